//! A Linux guest that computes on tiles goes from process to process, again and again, in the AMX lab.
//!
//! `AMX_TEST_SOAK_MOVES` says how often, `AMX_TEST_SEED` repeats the timing of a run as far as a machine does.
//! It needs a kernel for the guest, and memory for its snapshots: see tests/linux.rs.

#![allow(clippy::arithmetic_side_effects)]

#[path = "../src/bin/amx-demo/journey.rs"]
#[allow(dead_code, reason = "the demo uses the rest")]
mod journey;
mod support;

use std::io::{Write, stderr};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use journey::{Done, LEG, Leg, Origin, Running, Target, go};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::linux_guest;

const NAME: &str = "it_goes_from_process_to_process_again_and_again";
/// Moves unless `AMX_TEST_SOAK_MOVES` says otherwise.
const MOVES: u64 = 100;

#[test]
fn it_goes_from_process_to_process_again_and_again() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    match std::env::var(LEG) {
        Ok(leg) => go(&host, &linux.kernel, &leg).expect("it goes"),
        Err(_) => soak(),
    }
}

/// The whole of it: starts the processes, of which two live at a time, and adds up what they say.
fn soak() {
    let number = |name: &str| -> Option<u64> {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
    };
    let moves = number("AMX_TEST_SOAK_MOVES").unwrap_or(MOVES);
    let seed = number("AMX_TEST_SEED").unwrap_or_else(|| rand::random::<u32>().into());
    say(&format!("{moves} moves, AMX_TEST_SEED={seed}"));
    let mut rng = StdRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().expect("a folder");
    let mut leg = |count, from| Leg {
        from,
        micros: rng.random_range(0..5000),
        to: if count == moves {
            Target::End
        } else {
            target(&mut rng, folder.path(), count)
        },
    };
    let start = Instant::now();
    let mut sums = Sums::default();
    let mut running = Running::start(process(), leg(0, Origin::Boot), None).expect("it starts");
    for count in 0..moves {
        // Over a stream the next process has to be there before the guest comes, a file comes first.
        let stream = running.stream().expect("it connects");
        let next = stream.map(|stream| {
            let leg = leg(count + 1, Origin::Stream);
            Running::start(process(), leg, Some(stream)).expect("it starts")
        });
        let (done, gone) = running.done().expect("it is passed on");
        sums.add(&done);
        running = next.unwrap_or_else(|| match gone.to {
            Target::File(path) => {
                let leg = leg(count + 1, Origin::File(path));
                Running::start(process(), leg, None).expect("it starts")
            }
            to => panic!("no way to {to:?}"),
        });
        if count % 10 == 9 {
            let seconds = start.elapsed().as_secs_f64();
            say(&format!("{} moves, {seconds:.1} s: {sums:?}", count + 1));
        }
    }
    let (done, _) = running.done().expect("it comes to its end");
    assert!(done.verdict.right && done.verdict.finished, "{done:#?}");
    sums.guest_rounds += done.verdict.rounds();
    say(&format!("0 wrong results: {sums:?}"));
    assert_eq!(sums.moves, moves);
    assert!(
        sums.with_live_tiles > 0,
        "no move had a program's tiles in a register"
    );
    assert!(
        sums.with_more_rounds > 0,
        "no move had two rounds before the stop"
    );
}

/// A line for whoever watches, whether or not output is captured.
fn say(line: &str) {
    let _ = writeln!(stderr(), "soak: {line}");
}

/// This test in a process of its own.
fn process() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("it has a path"));
    command.args([NAME, "--exact", "--nocapture", "--test-threads=1"]);
    command
}

/// Where the guest goes next.
fn target(rng: &mut StdRng, folder: &Path, count: u64) -> Target {
    if rng.random_ratio(1, 10) {
        return Target::File(folder.join(format!("{count}.snapshot")));
    }
    Target::Socket {
        path: folder.join(format!("{count}.socket")),
        downtime_micros: rng.random_range(0..4000),
        max_rounds: rng.random_range(2..5),
        throttle_percent: rng.random_range(90..98),
    }
}

/// What all moves come to.
#[derive(Debug, Default)]
#[allow(dead_code, reason = "they are printed")]
struct Sums {
    moves: u64,
    through_files: u64,
    /// A program's tiles were in a vCPU's registers at the stop.
    with_live_tiles: u64,
    /// More than one round before the stop.
    with_more_rounds: u64,
    pages: usize,
    /// Checked by the guest itself.
    guest_rounds: u64,
}

impl Sums {
    fn add(&mut self, done: &Done) {
        assert!(done.verdict.right, "{done:#?}");
        self.moves += 1;
        self.through_files += u64::from(done.rounds.is_empty());
        self.with_live_tiles += u64::from(done.has_live_tiles());
        self.with_more_rounds += u64::from(done.rounds.len() > 2);
        self.pages += done.rounds.iter().sum::<usize>();
        self.guest_rounds += done.verdict.rounds();
    }
}
