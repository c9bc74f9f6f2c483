//! Guests on every core, from process to process.

use amx_vmm::words::in_words;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use amx_guest::Kind;
use amx_vmm::file;
use anyhow::Context;
use nix::libc;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use vmm_sys_util::signal::register_signal_handler;

use crate::child;
use crate::job::{Job, Outcome, Sizes, Stop, Times};
use crate::screen::Progress;
use crate::stats::Steps;

/// The most moves of one guest.
const MOVES_PER_GUEST: u64 = 9;
/// A process lets its guest run this long before it stops it, in microseconds.
const RUN_MICROS: std::ops::Range<u64> = 300..7000;

/// What is to be done.
pub(crate) struct Plan {
    pub(crate) kvm: String,
    pub(crate) kind: Kind,
    pub(crate) moves: u64,
    pub(crate) vcpus: u8,
    pub(crate) seed: u64,
    /// How many times as long as usual the payload waits in each round.
    pub(crate) slower: u64,
    /// Where the snapshot files go.
    pub(crate) directory: PathBuf,
}

/// What was done.
pub(crate) struct Fleet {
    pub(crate) workers: usize,
    pub(crate) moves: u64,
    pub(crate) guests: u64,
    /// Moves of guests whose result was wrong, or that did not come to their end.
    pub(crate) lost: u64,
    /// What went wrong, one line per guest.
    pub(crate) troubles: Vec<String>,
    pub(crate) steps: Steps,
    pub(crate) sizes: Sizes,
    pub(crate) interrupted: bool,
}

/// What one guest's chain came to.
struct Chain {
    moves: Vec<(Times, Times)>,
    sizes: Sizes,
    trouble: Option<String>,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Whether Ctrl-C was pressed.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Moves guests until all moves are done.
pub(crate) fn run(plan: &Plan, progress: &Progress) -> anyhow::Result<Fleet> {
    // So that the snapshot files are removed also then.
    for signal in [libc::SIGINT, libc::SIGTERM] {
        register_signal_handler(signal, on_interrupt).context("the handler of Ctrl-C")?;
    }
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let left = AtomicU64::new(plan.moves);
    let next_guest = AtomicU64::new(0);
    let fleet = Mutex::new(Fleet {
        workers,
        moves: 0,
        guests: 0,
        lost: 0,
        troubles: Vec::new(),
        steps: Steps::new()?,
        sizes: Sizes::default(),
        interrupted: false,
    });
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while !interrupted() {
                    let guest = next_guest.fetch_add(1, Ordering::Relaxed);
                    let mut rng = StdRng::seed_from_u64(plan.seed.wrapping_add(guest));
                    let Some(moves) = claim(&left, rng.random_range(3..=MOVES_PER_GUEST)) else {
                        break;
                    };
                    let chain = chain(plan, guest, moves, &mut rng, progress);
                    // A guest that came to its end early leaves moves for others.
                    let done = chain.moves.len() as u64;
                    if chain.trouble.is_none() {
                        left.fetch_add(moves.saturating_sub(done), Ordering::Relaxed);
                    }
                    let mut fleet = fleet.lock().unwrap_or_else(PoisonError::into_inner);
                    fleet.take(guest, moves, chain);
                    progress.guests(fleet.guests, fleet.lost);
                }
            });
        }
    });
    let mut fleet = fleet.into_inner().unwrap_or_else(PoisonError::into_inner);
    fleet.interrupted = interrupted();
    Ok(fleet)
}

impl Fleet {
    fn take(&mut self, guest: u64, planned: u64, chain: Chain) {
        let moves = chain.moves.len() as u64;
        self.guests = self.guests.saturating_add(1);
        self.moves = self.moves.saturating_add(moves);
        for (saved, restored) in &chain.moves {
            self.steps.add(saved, restored);
        }
        if chain.sizes != Sizes::default() {
            self.sizes = chain.sizes;
        }
        if let Some(trouble) = chain.trouble {
            self.lost = self.lost.saturating_add(planned);
            self.troubles.push(format!("guest {guest}: {trouble}"));
        }
    }
}

/// Up to `wanted` of the moves that are left, or `None`.
fn claim(left: &AtomicU64, wanted: u64) -> Option<u64> {
    let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        (left > 0).then(|| left.saturating_sub(wanted))
    });
    before.ok().map(|before| before.min(wanted))
}

/// One guest: starts in a process, and goes on in `moves` further ones unless it ends before.
fn chain(plan: &Plan, guest: u64, moves: u64, rng: &mut StdRng, progress: &Progress) -> Chain {
    let mut chain = Chain {
        moves: Vec::new(),
        sizes: Sizes::default(),
        trouble: None,
    };
    let mut job = Job {
        kind: plan.kind.name().to_owned(),
        seed: plan
            .seed
            .wrapping_add(guest.wrapping_mul(u64::from(plan.vcpus))),
        rounds: plan.kind.default_rounds(),
        slower: plan.slower,
        vcpus: plan.vcpus,
        from: None,
        lose: None,
        stop: None,
    };
    let mut saved = Times::default();
    for leg in 0..=moves {
        let to = plan.directory.join(format!("guest-{guest}-{leg}.snapshot"));
        job.stop = (leg < moves).then(|| Stop {
            after_micros: rng.random_range(RUN_MICROS),
            midway: false,
            to: to.clone(),
        });
        let answer = child::run(&plan.kvm, &job);
        if let Some(used) = job.from.take()
            && let Err(error) = file::remove(&used)
        {
            chain.trouble = Some(format!("{}: {error}", used.display()));
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                chain.trouble = Some(in_words(error.as_ref()));
                break;
            }
        };
        if answer.times.restore.is_some() {
            chain.moves.push((saved, answer.times));
            progress.moved();
        }
        saved = answer.times;
        match answer.outcome {
            Outcome::Saved(sizes) => {
                chain.sizes = sizes;
                job.from = Some(to);
            }
            Outcome::Finished { wrong } => {
                chain.trouble = chain.trouble.or_else(|| trouble(&wrong));
                break;
            }
            Outcome::Faulted { error } | Outcome::Failed { error } => {
                chain.trouble = Some(error);
                break;
            }
        }
        if interrupted() {
            break;
        }
    }
    chain
}

/// What is wrong with the results, if anything.
fn trouble(wrong: &[Vec<String>]) -> Option<String> {
    let parts: Vec<String> = (0..)
        .zip(wrong)
        .filter(|(_, registers)| !registers.is_empty())
        .map(|(vcpu, registers): (u8, _)| {
            let first: Vec<&str> = registers.iter().map(String::as_str).take(4).collect();
            format!(
                "vCPU {vcpu} has {} wrong registers ({}, ...)",
                registers.len(),
                first.join(", ")
            )
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}
