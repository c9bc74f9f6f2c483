//! A look at guests that run: how far they have come, and the word to end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::guest::{AREA_BYTES, COMMANDS, TURNS};
use super::{AREAS, Command, Machine, Vcpu};

/// Longer than any turn takes, under emulation on a busy machine as well.
const HANGS: Duration = Duration::from_secs(600);

/// One guest that goes through its commands again and again.
pub(crate) struct Watch<'a> {
    turns: &'a AtomicU64,
    last: &'a AtomicU64,
}

impl Watch<'_> {
    /// Waits until the guest has counted another turn.
    pub(crate) fn wait_for_a_turn(&self) {
        let (before, start) = (self.turns(), Instant::now());
        while self.turns() == before {
            assert!(start.elapsed() < HANGS, "no turn after {before}");
            std::thread::yield_now();
        }
    }

    /// Turns that the guest has counted.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Halts the guest at the end of its commands.
    pub(crate) fn end(&self) {
        self.last.store(Command::Halt.words()[0], Ordering::Relaxed);
    }
}

impl Machine {
    /// Has the vCPUs do these commands until they are told to end: the vCPUs, to be run, and what is seen of
    /// each meanwhile.
    pub(crate) fn watched(
        &mut self,
        commands: &[Vec<Command>],
    ) -> impl Iterator<Item = (&mut Vcpu, Watch<'_>)> {
        for (n, commands) in commands.iter().enumerate() {
            let last = [Command::Turn, Command::Again];
            self.tell(n, &[commands, &last[..]].concat());
            self.area_mut(n)[TURNS..][..8].fill(0);
        }
        let memory = self.memory.0.as_mut_ptr();
        let cell = move |n: usize, offset: usize| {
            let at = AREAS + n * AREA_BYTES + offset;
            assert!(offset < AREA_BYTES && at.is_multiple_of(8));
            // SAFETY: The place is within the memory of `n`, which lives as long as the borrow of `self`
            // that the caller keeps, and is aligned. Meanwhile only the guest writes there, and this
            // program only through the atomic.
            unsafe { AtomicU64::from_ptr(memory.wrapping_add(at).cast()) }
        };
        self.vcpus
            .iter_mut()
            .zip(commands)
            .enumerate()
            .map(move |(n, (vcpu, commands))| {
                let watch = Watch {
                    turns: cell(n, TURNS),
                    last: cell(n, COMMANDS + 16 * (commands.len() + 1)),
                };
                (vcpu, watch)
            })
    }
}
