//! A Linux guest that computes on tiles goes from process to process, again and again, in the AMX lab.
//!
//! `AMX_TEST_SOAK_MOVES` says how often, `AMX_TEST_SEED` repeats the timing of a run as far as a machine does.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::io::{BufRead, BufReader, Lines, Write, stderr, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use amx_guest::report::Wish;
use amx_vmm::linux::Guest;
use amx_vmm::linux::guest::Verdict;
use amx_vmm::migration::Options;
use amx_vmm::snapshot::AtStop;
use amx_vmm::{Host, Linux, Snapshot, file};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use support::{JOB, end, job, linux_guest};

const NAME: &str = "it_goes_from_process_to_process_again_and_again";
/// Moves unless `AMX_TEST_SOAK_MOVES` says otherwise.
const MOVES: u64 = 100;
/// No step of a move takes longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// What one process does: it has the guest from one place, lets it work, and passes it on.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Leg {
    from: Origin,
    /// How long the guest runs at least.
    micros: u64,
    to: To,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Origin {
    Boot,
    /// The stream is standard input.
    Stream,
    File(PathBuf),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum To {
    /// To whoever listens there.
    Socket {
        path: PathBuf,
        downtime_micros: u64,
        max_rounds: u32,
        throttle_percent: u8,
    },
    File(PathBuf),
    End,
}

/// What one process has done.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Done {
    verdict: Verdict,
    vcpus: Vec<AtStop>,
    /// Pages of each round; none for a file.
    rounds: Vec<usize>,
    downtime: Option<f64>,
}

#[test]
fn it_goes_from_process_to_process_again_and_again() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    match job() {
        Some(leg) => go(&host, &linux, &serde_json::from_str(&leg).expect("a leg")),
        None => soak(),
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
        micros: rng.random_range(0..8000),
        to: if count == moves {
            To::End
        } else {
            to(&mut rng, folder.path(), count)
        },
    };
    let start = Instant::now();
    let mut sums = Sums::default();
    let mut running = Running::start(leg(0, Origin::Boot), None);
    for count in 0..moves {
        let mut stream = running.stream();
        let mut next = None;
        // Over a stream it has to be there before the guest can come; a file is there before it is.
        if stream.is_some() {
            next = Some(Running::start(
                leg(count + 1, Origin::Stream),
                stream.take(),
            ));
        }
        let (done, to) = running.done();
        sums.add(&done);
        running = match (next, to) {
            (Some(next), _) => next,
            (None, To::File(path)) => Running::start(leg(count + 1, Origin::File(path)), None),
            (None, to) => panic!("no way to {to:?}"),
        };
        if count % 10 == 9 {
            let seconds = start.elapsed().as_secs_f64();
            say(&format!(
                "{} of {moves} moves, {seconds:.1} s: {sums:?}",
                count + 1
            ));
        }
    }
    let (done, _) = running.done();
    assert!(done.verdict.finished, "{done:#?}");
    sums.guest_rounds += done.verdict.rounds();
    say(&format!("0 wrong results: {sums:?}"));
    assert_eq!(sums.moves, moves);
    assert!(
        sums.with_live_tiles > 0,
        "no move had a program's tiles in a register"
    );
    assert!(
        sums.with_more_rounds > 0,
        "no move had more than one round before the stop"
    );
}

/// A line for whoever watches, whether or not output is captured.
fn say(line: &str) {
    let _ = writeln!(stderr(), "soak: {line}");
}

/// Where the guest goes next.
fn to(rng: &mut StdRng, folder: &Path, count: u64) -> To {
    if rng.random_ratio(1, 10) {
        return To::File(folder.join(format!("{count}.snapshot")));
    }
    To::Socket {
        path: folder.join(format!("{count}.socket")),
        downtime_micros: rng.random_range(0..4000),
        max_rounds: rng.random_range(2..5),
        throttle_percent: rng.random_range(80..95),
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
        self.moves += 1;
        self.through_files += u64::from(done.rounds.is_empty());
        self.with_live_tiles += u64::from(done.vcpus.iter().any(AtStop::has_live_tiles));
        self.with_more_rounds += u64::from(done.rounds.len() > 2);
        self.pages += done.rounds.iter().sum::<usize>();
        self.guest_rounds += done.verdict.rounds();
    }
}

/// A leg in a process of its own.
struct Running {
    leg: Leg,
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    listener: Option<UnixListener>,
}

impl Running {
    fn start(leg: Leg, stream: Option<UnixStream>) -> Self {
        let listener = match &leg.to {
            To::Socket { path, .. } => Some(UnixListener::bind(path).expect("the path is free")),
            To::File(_) | To::End => None,
        };
        let program = std::env::current_exe().expect("it has a path");
        let mut process = Command::new(program)
            .args([NAME, "--exact", "--nocapture", "--test-threads=1"])
            .env(JOB, serde_json::to_string(&leg).expect("it is data"))
            .stdin(stream.map_or_else(Stdio::null, |stream| OwnedFd::from(stream).into()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started");
        let stdout = process.stdout.take().expect("it is piped");
        Self {
            leg,
            process,
            lines: BufReader::new(stdout).lines(),
            listener,
        }
    }

    /// The stream on which the guest will leave it, if it is one.
    fn stream(&mut self) -> Option<UnixStream> {
        let listener = self.listener.take()?;
        self.line(CONNECTED);
        Some(listener.accept().expect("it has connected").0)
    }

    /// What it has done, and where the guest is; it has to have passed.
    fn done(mut self) -> (Done, To) {
        let done = self.line(DONE);
        for _ in self.lines {}
        let status = self.process.wait().expect("it ends");
        assert!(status.success(), "{:?}: {status}", self.leg);
        let done: Done = serde_json::from_str(&done).expect("it is what it has done");
        assert!(done.verdict.right, "{:?}: {done:#?}", self.leg);
        match &self.leg.from {
            Origin::File(path) => file::remove(path).expect("it was read"),
            Origin::Boot | Origin::Stream => {}
        }
        (done, self.leg.to)
    }

    /// The rest of the next line that has `mark`.
    fn line(&mut self, mark: &str) -> String {
        for line in &mut self.lines {
            let line = line.expect("it is text");
            if let Some((_, rest)) = line.split_once(mark) {
                return rest.to_owned();
            }
        }
        let status = self.process.wait();
        panic!("{:?} has ended with {status:?}", self.leg);
    }
}

const CONNECTED: &str = "soak connected";
const DONE: &str = "soak done ";

/// One leg.
fn go(host: &Host, linux: &Linux, leg: &Leg) {
    let out = match &leg.to {
        To::Socket { path, .. } => {
            let stream = UnixStream::connect(path).expect("the first process listens");
            println!("{CONNECTED}");
            Some(stream)
        }
        To::File(_) | To::End => None,
    };
    let mut guest = match &leg.from {
        Origin::Boot => Guest::boot(host, linux).expect("it is loaded"),
        Origin::Stream => {
            let stream = stdin().as_fd().try_clone_to_owned().expect("it is open");
            let stream = UnixStream::from(stream);
            Guest::receive(host, stream, PATIENCE, |_| {})
                .expect("it comes")
                .0
        }
        Origin::File(path) => {
            let bytes = file::read(path).expect("it is read");
            let snapshot = Snapshot::from_bytes(&bytes).expect("it is a snapshot");
            Guest::restore(host, &snapshot).expect("it is restored")
        }
    };
    work(&mut guest, leg.micros);
    let mut done = Done {
        verdict: guest.verdict(),
        vcpus: Vec::new(),
        rounds: Vec::new(),
        downtime: None,
    };
    match &leg.to {
        To::Socket {
            downtime_micros,
            max_rounds,
            throttle_percent,
            ..
        } => {
            let options = Options {
                downtime: Duration::from_micros(*downtime_micros),
                max_rounds: *max_rounds,
                patience: PATIENCE,
                throttle_percent: *throttle_percent,
            };
            let stream = out.expect("it has connected");
            let report = guest
                .send(host, stream, &options, |_| {})
                .expect("it is moved");
            done.vcpus = report.vcpus;
            done.rounds = report.rounds.iter().map(|round| round.pages).collect();
            done.downtime = Some(report.downtime);
            // What it has said meanwhile.
            done.verdict = guest.verdict();
        }
        To::File(path) => {
            let snapshot = guest.capture(host).expect("it is captured");
            done.vcpus = snapshot.at_stop();
            file::write(path, &snapshot.to_bytes()).expect("it is written");
        }
        To::End => {
            end(&mut guest.vm, &guest.devices, Wish::PowerOff);
            done.verdict = guest.verdict();
        }
    }
    println!(
        "{DONE}{}",
        serde_json::to_string(&done).expect("it is data")
    );
}

/// Lets it work at least so long, and until each of its processes has had a round, all right.
fn work(guest: &mut Guest, micros: u64) {
    let before = guest.devices.log();
    guest.run(Duration::from_micros(micros)).expect("it runs");
    for _ in 0..5000 {
        let log = guest.devices.log();
        assert!(log.is_right(), "{log:#?}\n{}", guest.devices.console());
        if log.went_on(&before, 1) {
            return;
        }
        guest.run(Duration::from_millis(2)).expect("it runs");
    }
    panic!("it hangs: {:#?}", guest.devices.log());
}
