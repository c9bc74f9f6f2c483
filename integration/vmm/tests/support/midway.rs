//! Guests in the middle of their work: all that their results need is in their registers.
//!
//! How long a guest computes is known, and how long it is let run is not: a busy machine may let it come to its
//! end before it is stopped, and an emulated one computes faster than its timers tick. So a guest that was not
//! caught is tried again, and waits twice as long in each round, up to a limit.

use std::thread;
use std::time::{Duration, Instant};

use amx_guest::Workload;
use amx_vmm::{Console, Ended, Host, Snapshot, Vm};

use super::LONG;
use super::lab::in_lab;

/// So often a guest is made twice as slow.
pub(crate) const DOUBLINGS: u32 = 12;
/// So often a guest of one speed is tried.
const TRIES: u32 = 3;
/// How long a guest runs before it is seen where it is.
const SLICE: Duration = Duration::from_millis(2);

/// A guest that is stopped, all of its vCPUs between their first and their last round.
pub(crate) struct Midway {
    pub(crate) vm: Vm,
    /// Its state.
    pub(crate) snapshot: Snapshot,
    /// Its tasks, maybe slower.
    pub(crate) workloads: Vec<Workload>,
}

/// A guest with these tasks, maybe slower.
pub(crate) fn midway(host: &Host, workloads: &[Workload]) -> Midway {
    doubled(|factor| caught(host, &slower(workloads, factor)))
}

/// A guest with these tasks and no others, if it can be caught.
pub(crate) fn caught(host: &Host, workloads: &[Workload]) -> Option<Midway> {
    (0..TRIES).find_map(|_| catch(host, workloads))
}

fn catch(host: &Host, workloads: &[Workload]) -> Option<Midway> {
    let kind = workloads.first().expect("there is a vCPU").kind();
    let mut vm = Vm::boot(host, kind, workloads).expect("the guest boots");
    let deadline = Instant::now() + LONG;
    while vm.run(&Console::default(), SLICE).expect("the guest runs") == Ended::Stopped {
        let snapshot = vm.capture(host).expect("it can be captured");
        if snapshot.is_midway(workloads) {
            let workloads = workloads.to_vec();
            return Some(Midway {
                vm,
                snapshot,
                workloads,
            });
        }
        assert!(Instant::now() < deadline, "the guest stands still");
    }
    None
}

/// How much slower these tasks have to be for a guest that `moves` while it runs to arrive in the middle of them;
/// and then some more. In the lab with one processor, where time passes with instructions, it is the same each
/// time. Elsewhere the machine may be busier the next time.
pub(crate) fn outlasting(
    host: &Host,
    workloads: &[Workload],
    mut moves: impl FnMut(Vm) -> Vm,
) -> u64 {
    let is_exact = in_lab() && thread::available_parallelism().is_ok_and(|count| count.get() == 1);
    let mut factor: u64 = 1;
    while factor <= 1 << DOUBLINGS {
        if let Some(guest) = caught(host, &slower(workloads, factor)) {
            let mut arrived = moves(guest.vm);
            if is_midway(host, &mut arrived, workloads) {
                return factor + factor.div_ceil(if is_exact { 8 } else { 1 });
            }
        }
        // What is emulated is to be no slower than it must.
        factor += factor.div_ceil(if in_lab() { 4 } else { 1 });
    }
    never()
}

/// Whether the guest of `vm`, which is stopped, is in the middle of these tasks.
pub(crate) fn is_midway(host: &Host, vm: &mut Vm, workloads: &[Workload]) -> bool {
    let snapshot = vm.capture(host).expect("it can be captured");
    snapshot.is_midway(workloads)
}

/// The first success with a factor that is doubled each time.
pub(crate) fn doubled<T>(attempt: impl FnMut(u64) -> Option<T>) -> T {
    let mut factors = (0..=DOUBLINGS).map(|doubling| 1 << doubling);
    factors.find_map(attempt).unwrap_or_else(|| never())
}

fn never() -> ! {
    panic!(
        "the guest is never in the middle of its work, not even where it waits {} times as long",
        1_u64 << DOUBLINGS
    )
}

/// The same tasks with `factor` times the waiting.
pub(crate) fn slower(workloads: &[Workload], factor: u64) -> Vec<Workload> {
    let workloads = workloads.iter().cloned();
    workloads.map(|workload| workload.slower(factor)).collect()
}
