//! A Linux guest from process to process: what one process does with it, and how the next is started.
//!
//! The soak test is also made of this file.

use std::io::{BufRead, BufReader, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use amx_guest::report::Wish;
use amx_vmm::linux::Guest;
use amx_vmm::linux::guest::Verdict;
use amx_vmm::migration::{Cancel, Options};
use amx_vmm::snapshot::AtStop;
use amx_vmm::{Host, Linux, Snapshot, file};
use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use xsave_state::{ExtendedState, XFeatures};

/// Has the leg that a process is to do.
pub(crate) const LEG: &str = "AMX_VMM_LEG";
/// No step takes longer, also under emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest runs between looks at what it has said.
const SLICE: Duration = Duration::from_millis(2);
/// So many of them without what is waited for, and it hangs.
const SLICES: u32 = 5000;

/// What one process does: it has the guest from one place, lets it work, and passes it on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Leg {
    pub(crate) from: Origin,
    /// How long the guest runs at least.
    pub(crate) micros: u64,
    pub(crate) to: Target,
}

/// Where the guest comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Origin {
    /// A new one.
    Boot,
    /// The stream is standard input.
    Stream,
    /// A snapshot.
    File(PathBuf),
    /// A snapshot without the tiles: the guest has to notice.
    FileWithoutTiles(PathBuf),
}

/// Where it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Target {
    /// To whoever listens there, while it runs.
    Socket {
        path: PathBuf,
        downtime_micros: u64,
        max_rounds: u32,
        throttle_percent: u8,
    },
    /// Into a snapshot.
    File(PathBuf),
    /// The same, stopped in a program with live tiles.
    FileWithTiles(PathBuf),
    /// It switches itself off.
    End,
}

/// What one process has done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) verdict: Verdict,
    /// As they were when the guest left.
    pub(crate) vcpus: Vec<AtStop>,
    /// Pages of each round, the last one with the guest stopped; none for a file.
    pub(crate) rounds: Vec<usize>,
    /// In seconds; none for a file.
    pub(crate) downtime: Option<f64>,
}

impl Done {
    pub(crate) fn has_live_tiles(&self) -> bool {
        self.vcpus.iter().any(AtStop::has_live_tiles)
    }
}

const CONNECTED: &str = "leg connected";
const DONE: &str = "leg done ";

/// A leg in a process of its own, which has to call [`go`].
pub(crate) struct Running {
    leg: Leg,
    process: Child,
    lines: mpsc::Receiver<String>,
    listener: Option<UnixListener>,
}

impl Running {
    pub(crate) fn start(
        mut command: Command,
        leg: Leg,
        stream: Option<UnixStream>,
    ) -> anyhow::Result<Self> {
        let listener = match &leg.to {
            Target::Socket { path, .. } => Some(UnixListener::bind(path)?),
            Target::File(_) | Target::FileWithTiles(_) | Target::End => None,
        };
        let mut process = command
            .env(LEG, serde_json::to_string(&leg)?)
            .stdin(stream.map_or_else(Stdio::null, |stream| OwnedFd::from(stream).into()))
            .stdout(Stdio::piped())
            .spawn()
            .context("a new process")?;
        let stdout = process.stdout.take().context("it has an output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Nobody may be waiting any more.
                let _ = sender.send(line);
            }
        });
        Ok(Self {
            leg,
            process,
            lines,
            listener,
        })
    }

    /// The stream on which the guest will leave it, if it is one: then the next process can be started.
    pub(crate) fn stream(&mut self) -> anyhow::Result<Option<UnixStream>> {
        let Some(listener) = self.listener.take() else {
            return Ok(None);
        };
        self.line(CONNECTED)?;
        Ok(Some(listener.accept().context("it has connected")?.0))
    }

    /// What it has done, and its leg.
    pub(crate) fn done(mut self) -> anyhow::Result<(Done, Leg)> {
        let done = self.line(DONE)?;
        let status = self.process.wait().context("the process")?;
        ensure!(status.success(), "{:?}: {status}", self.leg);
        Ok((serde_json::from_str(&done)?, self.leg.clone()))
    }

    /// The rest of the next line that has `mark`.
    fn line(&mut self, mark: &str) -> anyhow::Result<String> {
        // The lines end with the process's output.
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            if let Some((_, rest)) = line.split_once(mark) {
                return Ok(rest.to_owned());
            }
        }
        match self.process.try_wait()? {
            Some(status) => bail!("{:?} has ended: {status}", self.leg),
            None => bail!("{:?}: no more of it in {} s", self.leg, PATIENCE.as_secs()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, unless something is wrong.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Does the leg that this process was started for.
pub(crate) fn go(host: &Host, kernel: &Path, leg: &str) -> anyhow::Result<()> {
    let leg: Leg = serde_json::from_str(leg).context("the leg")?;
    let out = match &leg.to {
        Target::Socket { path, .. } => {
            let stream = UnixStream::connect(path).context("the first process listens")?;
            println!("{CONNECTED}");
            Some(stream)
        }
        Target::File(_) | Target::FileWithTiles(_) | Target::End => None,
    };
    let mut guest = arrive(host, kernel, &leg.from)?;
    let notices = matches!(leg.from, Origin::FileWithoutTiles(_));
    work(&mut guest, leg.micros, notices)?;
    let mut done = Done {
        verdict: guest.verdict(),
        vcpus: Vec::new(),
        rounds: Vec::new(),
        downtime: None,
    };
    match &leg.to {
        Target::Socket {
            downtime_micros,
            max_rounds,
            throttle_percent,
            ..
        } => {
            let options = Options {
                downtime: Duration::from_micros(*downtime_micros),
                max_rounds: *max_rounds,
                throttle_percent: *throttle_percent,
                ..Options::within(PATIENCE)
            };
            let stream = out.context("it has connected")?;
            let report = guest.send(host, stream, &options, |_| {})?;
            done.vcpus = report.vcpus;
            done.rounds = report.rounds.iter().map(|round| round.pages).collect();
            done.downtime = Some(report.downtime);
            // What it has said meanwhile.
            done.verdict = guest.verdict();
        }
        Target::File(path) => done.vcpus = save(host, &mut guest, path)?,
        Target::FileWithTiles(path) => {
            stop_with_tiles(host, &mut guest)?;
            done.vcpus = save(host, &mut guest, path)?;
        }
        Target::End if notices => {}
        Target::End => {
            guest.devices.wish(Wish::PowerOff);
            until(&mut guest, |guest| guest.devices.switched().is_some())?;
            done.verdict = guest.verdict();
        }
    }
    println!("{DONE}{}", serde_json::to_string(&done)?);
    Ok(())
}

fn arrive(host: &Host, kernel: &Path, from: &Origin) -> anyhow::Result<Guest> {
    let snapshot =
        |path| -> anyhow::Result<Snapshot> { Ok(Snapshot::from_bytes(&file::read(path)?)?) };
    Ok(match from {
        Origin::Boot => Guest::boot(host, &Linux::new(kernel))?,
        Origin::Stream => {
            let stream = UnixStream::from(stdin().as_fd().try_clone_to_owned()?);
            Guest::receive(host, stream, PATIENCE, &Cancel::default(), |_| {})?.0
        }
        Origin::File(path) => {
            let snapshot = snapshot(path)?;
            // Files are memory, too, where they are in the lab: no two of them at a time.
            file::remove(path)?;
            Guest::restore(host, &snapshot)?
        }
        Origin::FileWithoutTiles(path) => {
            let mut error = None;
            let snapshot = snapshot(path)?.map_extended(|extended| {
                let image = extended.image().clone().without(XFeatures::XTILEDATA);
                ExtendedState::new(image, extended.registers()).unwrap_or_else(|cause| {
                    error = Some(cause);
                    extended.clone()
                })
            });
            if let Some(error) = error {
                return Err(error.into());
            }
            Guest::restore(host, &snapshot)?
        }
    })
}

/// Lets it work at least so long, and until each of its processes has had a round; or, where something
/// is missing, until it notices.
fn work(guest: &mut Guest, micros: u64, notices: bool) -> anyhow::Result<()> {
    /// A loss is noticed within the round, so more is no use.
    const ROUNDS: u64 = 20;
    let before = guest.devices.log();
    guest.run(Duration::from_micros(micros))?;
    if notices {
        return until(guest, |guest| {
            let log = guest.devices.log();
            !log.is_right() || log.went_on(&before, ROUNDS)
        });
    }
    until(guest, |guest| {
        let log = guest.devices.log();
        !log.is_right() || log.went_on(&before, 1)
    })?;
    let verdict = guest.verdict();
    match verdict.wrong {
        Some(wrong) => bail!("the guest has found wrong: {wrong}"),
        None => Ok(()),
    }
}

fn until(guest: &mut Guest, done: impl Fn(&Guest) -> bool) -> anyhow::Result<()> {
    for _ in 0..SLICES {
        if done(guest) {
            return Ok(());
        }
        guest.run(SLICE)?;
    }
    bail!(
        "the guest hangs: {:?}\n{}",
        guest.verdict(),
        guest.devices.console()
    )
}

fn stop_with_tiles(host: &Host, guest: &mut Guest) -> anyhow::Result<()> {
    for slice in 0..1000_u64 {
        // Not always at the same distance from the last stop.
        let micros = slice.wrapping_mul(1237).checked_rem(7000).unwrap_or(0);
        guest.run(Duration::from_micros(micros.saturating_add(500)))?;
        if guest.vm.at_stop(host)?.iter().any(AtStop::has_live_tiles) {
            return Ok(());
        }
    }
    bail!("never a program's tiles in a register")
}

fn save(host: &Host, guest: &mut Guest, path: &Path) -> anyhow::Result<Vec<AtStop>> {
    let snapshot = guest.capture(host)?;
    let vcpus = snapshot.at_stop();
    let bytes = snapshot.to_bytes();
    drop(snapshot);
    file::write(path, &bytes)?;
    Ok(vcpus)
}
