//! A Linux guest that computes on tiles, moved while it runs; and the control, that it notices lost tiles.

use amx_vmm::words::in_words;
use std::path::{Path, PathBuf};
use std::process::Command;

use amx_guest::Kind;
use amx_vmm::linux::guest::Verdict;
use amx_vmm::snapshot::AtStop;
use amx_vmm::{Host, file};
use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use xsave_state::XFeatures;

use crate::fleet::{self, Plan};
use crate::journey::{self, Done, Leg, Origin, Running, Target};
use crate::screen::Progress;

/// How the guest is stopped while it is moved: a budget that asks for a further round now and then.
const DOWNTIME_MICROS: std::ops::Range<u64> = 500..4000;
const MAX_ROUNDS: u32 = 4;
/// An emulated host with one processor has to share it between the guest and its two VMMs.
const THROTTLE_PERCENT: u8 = 85;
/// A process lets its guest run this long at least before it passes it on.
const RUN_MICROS: std::ops::Range<u64> = 0..6000;

/// So many times as often it is moved at most, where no program's tiles were live so far.
const PATIENCE: u64 = 4;

/// A program that has stored its tiles does not miss them: at so many moments they are left out at most.
const MOMENTS: u32 = 8;

/// One move of the guest.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Move {
    /// Pages sent, again and again.
    pub(crate) pages: usize,
    /// Rounds while it ran.
    pub(crate) rounds: usize,
    /// In seconds, as far as it stood still for the move.
    pub(crate) downtime: f64,
    /// As the vCPUs were stopped.
    pub(crate) vcpus: Vec<AtStop>,
    /// A program's tiles were in the registers of one.
    pub(crate) live_tiles: bool,
    /// What the guest has said to the process that it was moved to.
    pub(crate) verdict: Option<Verdict>,
}

/// The guest restored from the same file whole, and without its tiles.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Control {
    /// At how many moments the tiles were left out until the guest noticed.
    pub(crate) moments: u32,
    /// The guest's words without its tiles.
    pub(crate) without_tiles: Verdict,
    /// And with them.
    pub(crate) whole: Verdict,
    pub(crate) good: bool,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Journey {
    pub(crate) moves_wanted: u64,
    pub(crate) moves: Vec<Move>,
    /// Moves with a program's tiles in a register.
    pub(crate) with_live_tiles: usize,
    pub(crate) control: Option<Control>,
    /// What went wrong.
    pub(crate) trouble: Option<String>,
    pub(crate) good: bool,
}

/// Why there is no Linux guest, where there is none.
pub(crate) fn lacks(kind: Kind, kernel: Option<&Path>) -> Option<&'static str> {
    if kind != Kind::Tiles {
        return Some(
            "The Linux guest needs a host whose guests have AMX: cargo demo without --here goes to one.",
        );
    }
    if kernel.is_none() {
        return Some(
            "The Linux guest needs a kernel: --guest-kernel PATH (`cargo lab guest-kernel FOLDER` writes one).",
        );
    }
    None
}

/// A process that does one leg.
pub(crate) fn leg(kvm: &str, kernel: &Path) -> anyhow::Result<u8> {
    let leg = std::env::var(journey::LEG).context("the leg")?;
    journey::go(&Host::probe_at(kvm)?, kernel, &leg)?;
    Ok(crate::GOOD)
}

/// Moves the guest, then the control.
pub(crate) fn run(
    plan: &Plan,
    kernel: &Path,
    moves: u64,
    progress: &Progress,
) -> anyhow::Result<Journey> {
    let mut journey = Journey {
        moves_wanted: moves,
        moves: Vec::new(),
        with_live_tiles: 0,
        control: None,
        trouble: None,
        good: false,
    };
    let all = travel(plan, kernel, moves, progress, &mut journey);
    if fleet::interrupted() {
        return Ok(journey);
    }
    if let Err(error) = all {
        journey.trouble = Some(in_words(error.as_ref()));
    }
    let live = journey.moves.iter().filter(|moved| moved.live_tiles);
    journey.with_live_tiles = live.count();
    let all = journey.moves.len() as u64 >= moves;
    let right = |moved: &Move| moved.verdict.as_ref().is_some_and(|verdict| verdict.right);
    journey.good = journey.trouble.is_none()
        && all
        && journey.moves.iter().all(right)
        && journey.with_live_tiles > 0
        && journey.control.as_ref().is_some_and(|control| control.good);
    Ok(journey)
}

fn travel(
    plan: &Plan,
    kernel: &Path,
    moves: u64,
    progress: &Progress,
    journey: &mut Journey,
) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let snapshot = plan.directory.join("linux.snapshot");
    let mut leg = |count: u64, from, last| Leg {
        from,
        micros: rng.random_range(RUN_MICROS),
        // It ends in a file, from which the control begins.
        to: if last {
            Target::FileWithTiles(snapshot.clone())
        } else {
            Target::Socket {
                path: plan.directory.join(format!("{count}.socket")),
                downtime_micros: rng.random_range(DOWNTIME_MICROS),
                max_rounds: MAX_ROUNDS,
                throttle_percent: THROTTLE_PERCENT,
            }
        },
    };
    let start = |leg, stream| Running::start(process(plan, kernel)?, leg, stream);
    let mut running = start(leg(0, Origin::Boot, false), None)?;
    let mut count: u64 = 0;
    let mut last = false;
    while !last {
        if fleet::interrupted() {
            return Ok(());
        }
        let stream = running.stream()?;
        count = count.saturating_add(1);
        // When it is stopped is left to chance: until a program's tiles were live, it goes on.
        last = count >= moves
            && (journey.moves.iter().any(|moved| moved.live_tiles)
                || count >= moves.saturating_mul(PATIENCE));
        let next = start(leg(count, Origin::Stream, last), stream)?;
        let (done, _) = running.done().with_context(|| format!("move {count}"))?;
        journey.heard(&done);
        journey.moves.push(Move::of(done));
        progress.moved();
        running = next;
    }
    let (done, _) = running.done().context("the last process")?;
    journey.heard(&done);
    progress.control();
    journey.control = Some(control(plan, kernel, &snapshot)?);
    Ok(())
}

impl Journey {
    /// The process to which the last move went has done its part.
    fn heard(&mut self, done: &Done) {
        if let Some(last) = self.moves.last_mut() {
            last.verdict = Some(done.verdict.clone());
        }
    }
}

impl Move {
    fn of(done: Done) -> Self {
        Self {
            pages: done.rounds.iter().sum(),
            rounds: done.rounds.len().saturating_sub(1),
            downtime: done.downtime.unwrap_or_default(),
            live_tiles: done.has_live_tiles(),
            vcpus: done.vcpus,
            verdict: None,
        }
    }

    /// What of AMX was live, in words.
    pub(crate) fn live(&self) -> &'static str {
        let holds =
            |vcpu: &AtStop| XFeatures::from_bits_retain(vcpu.in_use).contains(XFeatures::XTILEDATA);
        if self.live_tiles {
            "tiles of a program"
        } else if self.vcpus.iter().any(holds) {
            "tiles, in the kernel"
        } else {
            "no tiles"
        }
    }
}

fn control(plan: &Plan, kernel: &Path, snapshot: &Path) -> anyhow::Result<Control> {
    let verdict = |from| -> anyhow::Result<Verdict> {
        let leg = Leg {
            from,
            micros: 0,
            to: Target::End,
        };
        let (done, _) = Running::start(process(plan, kernel)?, leg, None)?.done()?;
        Ok(done.verdict)
    };
    let path = || PathBuf::from(snapshot);
    let mut moments: u32 = 1;
    let without_tiles = loop {
        let verdict = verdict(Origin::FileWithoutTiles(path())).context("without its tiles")?;
        if !verdict.right || moments >= MOMENTS {
            break verdict;
        }
        moments = moments.saturating_add(1);
        let another = Leg {
            from: Origin::File(path()),
            micros: u64::from(moments).saturating_mul(700),
            to: Target::FileWithTiles(path()),
        };
        Running::start(process(plan, kernel)?, another, None)?
            .done()
            .context("another moment")?;
    };
    let whole = verdict(Origin::File(path())).context("the control, with its tiles")?;
    file::remove(snapshot)?;
    if !whole.finished {
        bail!("the guest has not ended in order");
    }
    Ok(Control {
        good: !without_tiles.right && whole.right,
        moments,
        without_tiles,
        whole,
    })
}

fn process(plan: &Plan, kernel: &Path) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(program);
    command.args(["linux-leg", "--kvm", &plan.kvm, "--guest-kernel"]);
    command.arg(kernel);
    Ok(command)
}
