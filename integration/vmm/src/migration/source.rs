//! The side that has the guest: rounds of changed pages, then the rest with the guest stopped, then the
//! hand-over.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::errno;

use super::destination::is_closed;
use super::frame::{FrameError, Hello, Link, Message, PAGES, VERSION};
use super::limit::{Cancel, Limited, Stream};
use super::offer::Candidate;
use crate::bus::Bus;
use crate::capture::CaptureError;
use crate::fit::Unfit;
use crate::host::Host;
use crate::linux::devices::{self, Devices};
use crate::memory::{MemoryError, PAGE_BYTES, Pages};
use crate::platform::{Platform, PlatformError};
use crate::run::{self, RunError};
use crate::snapshot::{AtStop, Snapshot};
use crate::vm::{Vcpu, Vm};

/// How long the vCPUs run before they are asked whether the round is over.
const SLICE: Duration = Duration::from_millis(10);

/// How a guest is to be moved.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest is stopped when what is left takes no longer at the rate seen so far.
    pub downtime: Duration,
    /// After so many rounds it is stopped in any case, unless what is left would take longer than
    /// [`max_downtime`](Self::max_downtime).
    pub max_rounds: u32,
    /// A guest that stands still for so long, and is not handed over, runs on here.
    pub max_downtime: Duration,
    /// A guest that is not handed over within this time from the first message on stays here.
    pub deadline: Duration,
    /// A destination that has not answered within this time, after the guest was handed over, leaves the
    /// move undecided.
    pub answer: Duration,
    /// Cancels the move as long as the guest is not handed over.
    pub cancel: Cancel,
    /// Percent of the time that the vCPUs stand still while pages are sent, up to
    /// [`MAX_THROTTLE_PERCENT`]: for a guest that changes more than the connection carries.
    pub throttle_percent: u8,
}

/// A guest that is moved while it runs does run.
pub const MAX_THROTTLE_PERCENT: u8 = 99;

impl Default for Options {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            max_rounds: 16,
            max_downtime: Duration::from_secs(3),
            deadline: Duration::from_secs(300),
            answer: Duration::from_secs(30),
            cancel: Cancel::default(),
            throttle_percent: 0,
        }
    }
}

impl Options {
    /// Returns the defaults, but that everything may take `time`: where nobody waits for the guest.
    #[must_use]
    pub fn within(time: Duration) -> Self {
        Self {
            max_downtime: time,
            deadline: time,
            answer: time,
            ..Self::default()
        }
    }
}

/// One round of pages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 0: all pages that are not zero.
    pub round: u32,
    /// The guest was stopped.
    pub stopped: bool,
    /// Pages sent.
    pub pages: usize,
    /// Bytes of pages per second in this round.
    pub bytes_per_second: f64,
    /// Pages that have changed meanwhile.
    pub changed: usize,
    /// How long those would take, in seconds: what the guest would stand still for.
    pub expected_downtime: f64,
}

/// What a caller is told while the guest is moved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// In the middle of a round, after each message of pages.
    Pages {
        /// The round's number.
        round: u32,
        /// The guest is stopped.
        stopped: bool,
        /// Pages sent in this round.
        sent: usize,
        /// Pages of this round.
        of: usize,
    },
    /// A round is over.
    Round(Round),
}

/// A guest that was moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// All rounds; the last one with the guest stopped.
    pub rounds: Vec<Round>,
    /// Bytes of registers, devices and controllers.
    pub state_bytes: usize,
    /// The vCPUs, by their numbers, as they were stopped.
    pub vcpus: Vec<AtStop>,
    /// From the stop to the destination's word that it has the guest, in seconds.
    pub downtime: f64,
    /// From the first message on, in seconds.
    pub total: f64,
}

/// Moves the guest of `vm` to whoever is at the other end of `stream`, and tells `progress` after each
/// round and after each message of pages: of half a MiB, so that a look at the clock costs nothing beside it.
/// Until it is stopped the guest runs on, with `bus` (and `devices`, where it has any). A guest whose first use
/// of AMX is watched ([`Vm::run_watched`]) has to have made it, or to have its filter lifted, before: here nobody
/// answers.
///
/// `Ok` means that the destination has the guest: `vm` must not run again, and is best dropped.
///
/// # Errors
///
/// Why the guest was not moved. It is stopped, and can run on here; except after
/// [`SendError::Undecided`] and errors of the guest itself.
pub fn send<S: Stream, B: Bus>(
    vm: &mut Vm,
    host: &Host,
    guest: (&B, Option<&Devices>),
    stream: S,
    options: &Options,
    mut progress: impl FnMut(&Progress),
) -> Result<Report, SendError> {
    let start = Instant::now();
    let mut link = Link::new(Limited::new(stream, options.deadline, &options.cancel));
    agree(&mut link, vm, host, guest, options)?;
    vm.log_dirty_pages(true).map_err(SendError::DirtyLog)?;
    let moved = rounds(&mut link, vm, host, guest, options, &mut progress)
        .or_else(|error| refuse(&mut link, error));
    // The guest that stays is not to pay for it. Of one that has gone, nobody cares.
    let log_off = vm.log_dirty_pages(false).map_err(SendError::DirtyLog);
    let Sent {
        rounds,
        stopped_at,
        state_bytes,
        vcpus,
    } = moved?;
    if let Err(error) = log_off {
        return refuse(&mut link, error);
    }
    hand_over(&mut link, options.answer)?;
    Ok(Report {
        rounds,
        state_bytes,
        vcpus,
        downtime: stopped_at.elapsed().as_secs_f64(),
        total: start.elapsed().as_secs_f64(),
    })
}

/// The destination describes itself while the guest runs, which is then compared with that.
fn agree<S: Stream, B: Bus>(
    link: &mut Link<Limited<S>>,
    vm: &mut Vm,
    host: &Host,
    guest: (&B, Option<&Devices>),
    options: &Options,
) -> Result<(), SendError> {
    let hello = Hello {
        version: VERSION,
        memory_bytes: vm.memory_bytes,
        has_platform: guest.1.is_some(),
    };
    let offered = while_running(&mut vm.vcpus, guest.0, options, || {
        link.send(&Message::Hello(hello))?;
        match link.receive()? {
            Message::Offer(offer) => Ok(offer),
            other => Err(SendError::unexpected(&other)),
        }
    });
    let (offer, _) = offered.or_else(|error| refuse(link, error))?;
    if guest.0.stops(0) {
        return refuse(link, SendError::GuestEnded);
    }
    if offer.version != VERSION {
        let error = SendError::Version {
            found: offer.version,
            known: VERSION,
        };
        return refuse(link, error);
    }
    let fits = vm.capture_vcpus(host, false).map_err(SendError::from);
    let fits = fits.and_then(|vcpus| {
        Ok(offer.check(&Candidate {
            vcpus: &vcpus,
            memory_bytes: vm.memory_bytes,
            tsc_khz: vm.tsc_khz(),
        })?)
    });
    fits.or_else(|error| refuse(link, error))
}

/// Tells the other side, if it does not know and still listens.
fn refuse<S: Stream, T>(link: &mut Link<Limited<S>>, error: SendError) -> Result<T, SendError> {
    if !matches!(error, SendError::Refused { .. }) {
        link.refuse(&error);
    }
    Err(error)
}

/// All but the hand-over.
struct Sent {
    rounds: Vec<Round>,
    stopped_at: Instant,
    state_bytes: usize,
    vcpus: Vec<AtStop>,
}

/// All pages while the guest runs, again and again what has changed, then the rest.
fn rounds<S: Stream, B: Bus>(
    link: &mut Link<Limited<S>>,
    vm: &mut Vm,
    host: &Host,
    guest: (&B, Option<&Devices>),
    options: &Options,
    progress: &mut impl FnMut(&Progress),
) -> Result<Sent, SendError> {
    let mut rounds: Vec<Round> = Vec::new();
    // Which pages are not zero is looked for while the guest runs: what changes meanwhile is in the log.
    let mut numbers: Option<Vec<u32>> = None;
    let (mut numbers, stopped_at) = loop {
        let round = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
        let (memory, memory_bytes) = (&vm.memory, vm.memory_bytes);
        let ((pages, start), stood_still) = while_running(&mut vm.vcpus, guest.0, options, || {
            let numbers = match numbers.take() {
                Some(numbers) => numbers,
                None => Pages::nonzero(memory, memory_bytes)?,
            };
            let start = Instant::now();
            send_pages(link, memory, &numbers, |sent, of| {
                progress(&Progress::Pages {
                    round,
                    stopped: false,
                    sent,
                    of,
                });
            })?;
            Ok((numbers.len(), start))
        })?;
        if guest.0.stops(0) {
            return Err(SendError::GuestEnded);
        }
        let changed = vm.dirty_pages().map_err(SendError::DirtyLog)?;
        let this = measured(round, false, pages, changed.len(), start.elapsed());
        progress(&Progress::Round(this));
        rounds.push(this);
        if this.expected_downtime <= options.downtime.as_secs_f64() {
            break (changed, stood_still);
        }
        if round.saturating_add(1) >= options.max_rounds {
            if this.expected_downtime > options.max_downtime.as_secs_f64() {
                return Err(SendError::Busy {
                    expected: Duration::try_from_secs_f64(this.expected_downtime)
                        .unwrap_or(Duration::MAX),
                    allowed: options.max_downtime,
                });
            }
            break (changed, stood_still);
        }
        numbers = Some(changed);
    };
    // Since then the guest stands still.
    link.stream().limit(stopped_at, options.max_downtime);
    let start = Instant::now();
    let (state, vcpus) = captured(vm, host, guest.1)?;
    // After the capture, which may make KVM write to guest memory.
    numbers.extend(vm.dirty_pages().map_err(SendError::DirtyLog)?);
    numbers.sort_unstable();
    numbers.dedup();
    let round = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
    send_pages(link, &vm.memory, &numbers, |sent, of| {
        progress(&Progress::Pages {
            round,
            stopped: true,
            sent,
            of,
        });
    })?;
    let last = measured(round, true, numbers.len(), 0, start.elapsed());
    rounds.push(last);
    let state_bytes = state.len();
    link.send(&Message::State(state))?;
    // Not before: whoever is told may take his time, and the destination has something to do now.
    progress(&Progress::Round(last));
    match link.receive()? {
        Message::Ready => Ok(Sent {
            rounds,
            stopped_at,
            state_bytes,
            vcpus,
        }),
        other => Err(SendError::unexpected(&other)),
    }
}

/// Once the commitment is sent, the guest is not run here, unless it is certain that the destination has
/// not taken it.
fn hand_over<S: Stream>(link: &mut Link<Limited<S>>, answer: Duration) -> Result<(), SendError> {
    link.stream().commit(answer);
    // Where this fails, the rest of the message is never sent, and a part of it commits nobody.
    link.send(&Message::Commit)?;
    match link.receive() {
        Ok(Message::Running) => Ok(()),
        // The other end is closed, and did not say that it has the guest: it never will run it.
        Err(FrameError::Stream(error)) if is_closed(&error) => Err(SendError::Frame(error.into())),
        Ok(_) | Err(_) => Err(SendError::Undecided),
    }
}

fn measured(round: u32, stopped: bool, pages: usize, changed: usize, time: Duration) -> Round {
    #[allow(
        clippy::cast_precision_loss,
        reason = "numbers of pages of at most 256 MiB are exact"
    )]
    let bytes = |pages: usize| pages.saturating_mul(PAGE_BYTES) as f64;
    // A round of nothing says nothing about the rate; then nothing is left, either.
    let rate = bytes(pages.max(1)) / time.as_secs_f64().max(1e-9);
    Round {
        round,
        stopped,
        pages,
        bytes_per_second: rate,
        changed,
        expected_downtime: bytes(changed) / rate,
    }
}

/// Does `work` while the guest runs, and returns with it when the vCPUs were stopped.
fn while_running<B: Bus, T>(
    vcpus: &mut [Vcpu],
    bus: &B,
    options: &Options,
    work: impl FnOnce() -> Result<T, SendError>,
) -> Result<(T, Instant), SendError> {
    // What is never sent: that the sender is gone is the sign.
    let (over, work_over) = mpsc::channel();
    thread::scope(|scope| {
        let runs = scope.spawn(|| run_until(work_over, vcpus, bus, options));
        let done = work();
        drop::<mpsc::Sender<()>>(over);
        let ran = runs.join().unwrap_or(Err(RunError::ThreadDied));
        let stopped_at = ran.map_err(SendError::Guest)?;
        Ok((done?, stopped_at))
    })
}

/// Lets the vCPUs run, for their share of the time, until the work is over or the guest has ended. Returns when
/// they were stopped.
fn run_until<B: Bus>(
    work_over: mpsc::Receiver<()>,
    vcpus: &mut [Vcpu],
    bus: &B,
    options: &Options,
) -> Result<Instant, RunError> {
    let pause = pause(options.throttle_percent);
    let mut stopped_at = Instant::now();
    while !bus.stops(0) {
        run::run(vcpus, None, bus, SLICE)?;
        stopped_at = Instant::now();
        if work_over.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
            break;
        }
    }
    Ok(stopped_at)
}

/// How long the vCPUs stand still after each slice.
fn pause(throttle_percent: u8) -> Duration {
    let still = u32::from(throttle_percent.min(MAX_THROTTLE_PERCENT));
    let slices = f64::from(still) / f64::from(100_u32.saturating_sub(still));
    SLICE.mul_f64(slices)
}

fn send_pages<S: Stream>(
    link: &mut Link<Limited<S>>,
    memory: &vm_memory::GuestMemoryMmap,
    numbers: &[u32],
    mut progress: impl FnMut(usize, usize),
) -> Result<(), SendError> {
    let mut sent: usize = 0;
    for chunk in numbers.chunks(PAGES) {
        link.stream().check().map_err(FrameError::from)?;
        link.send_pages(chunk, |number, page| {
            let address = u64::from(number).saturating_mul(PAGE_BYTES as u64);
            memory
                .read_slice(page, GuestAddress(address))
                .map_err(|error| SendError::from(MemoryError::from(error)))
        })?;
        sent = sent.saturating_add(chunk.len());
        progress(sent, numbers.len());
    }
    Ok(())
}

/// All but memory.
fn captured(
    vm: &mut Vm,
    host: &Host,
    devices: Option<&Devices>,
) -> Result<(Vec<u8>, Vec<AtStop>), SendError> {
    let platform = devices
        .map(|devices: &devices::Devices| Platform::capture(&vm.fd, devices.state()))
        .transpose()?;
    let snapshot = Snapshot {
        vcpus: vm.capture_vcpus(host, platform.is_some())?,
        memory: Pages::default(),
        tsc_khz: vm.tsc_khz(),
        platform,
    };
    let vcpus = snapshot.at_stop();
    Ok((snapshot.state_bytes(), vcpus))
}

/// A guest was not moved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SendError {
    /// The connection, or what came over it.
    #[error("the destination: {0}")]
    Frame(FrameError),
    /// It was cancelled here.
    #[error("the move was cancelled")]
    Cancelled,
    /// The guest changes more than the connection carries: it was not stopped at all.
    #[error(
        "what the guest changes would keep it stopped for {} ms; the limit is {} ms: throttle it, or allow \
         more", expected.as_millis(), allowed.as_millis()
    )]
    Busy {
        /// For so long it would stand still, at the rate of the last round.
        expected: Duration,
        /// [`Options::max_downtime`].
        allowed: Duration,
    },
    /// The destination speaks another version.
    #[error("the destination speaks version {found} of the protocol; this program {known}")]
    Version {
        /// The destination's.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The guest cannot go on there.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// The destination does not want it.
    #[error("the destination refuses: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// The destination has said what it may not say now.
    #[error("the destination has sent a message out of turn")]
    OutOfTurn,
    /// KVM's log of changed pages.
    #[error("the log of changed pages: {0}")]
    DirtyLog(#[source] errno::Error),
    /// The vCPUs' state could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The VM's state could not be read.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest has failed while it was being moved.
    #[error("the guest: {0}")]
    Guest(#[source] RunError),
    /// The guest has ended while it was being moved.
    #[error("the guest has ended its machine")]
    GuestEnded,
    /// The destination was told to take over, and its answer cannot be understood.
    #[error(
        "it is not known whether the destination has taken over: the guest stands still here; look \
         there before it is run or dropped"
    )]
    Undecided,
}

impl From<FrameError> for SendError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Cancelled => Self::Cancelled,
            error => Self::Frame(error),
        }
    }
}

impl SendError {
    fn unexpected(message: &Message) -> Self {
        match message {
            Message::Refuse(reason) => Self::Refused {
                reason: reason.clone(),
            },
            _ => Self::OutOfTurn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttled_guest_has_its_share_of_the_time() {
        for (percent, pause_ms) in [(0, 0.0), (50, 10.0), (80, 40.0), (90, 90.0), (99, 990.0)] {
            let pause = pause(percent).as_secs_f64() * 1e3;
            assert!((pause - pause_ms).abs() < 1e-3, "{percent} %: {pause} ms");
        }
        assert_eq!(
            pause(u8::MAX),
            pause(MAX_THROTTLE_PERCENT),
            "it never stops"
        );
    }
}
