//! A Linux guest with its devices: where it comes from, and what it has to say.

use std::time::Duration;

use amx_guest::report::LOADS;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::devices::{Devices, DevicesError};
use super::log::{Log, Process};
use super::{Linux, LinuxError};
use crate::capture::CaptureError;
use crate::host::Host;
use crate::migration::destination::take_linux;
use crate::migration::{
    self, Cancel, Offer, Options, Progress, ReceiveError, Report, SendError, Stream,
};
use crate::restore::RestoreError;
use crate::run::RunError;
use crate::snapshot::Snapshot;
use crate::vm::Vm;

/// A Linux guest that does not run at the moment.
pub struct Guest {
    /// Its memory and vCPUs.
    pub vm: Vm,
    /// Its devices.
    pub devices: Devices,
}

impl Guest {
    /// A new one.
    ///
    /// # Errors
    ///
    /// As [`Vm::boot_linux`].
    pub fn boot(host: &Host, linux: &Linux) -> Result<Self, LinuxError> {
        let vm = Vm::boot_linux(host, linux)?;
        let devices = Devices::new(&vm);
        Ok(Self { vm, devices })
    }

    /// The one of a snapshot.
    ///
    /// # Errors
    ///
    /// It is none, or cannot be restored here.
    pub fn restore(host: &Host, snapshot: &Snapshot) -> Result<Self, GuestError> {
        let platform = snapshot.platform().ok_or(GuestError::Bare)?;
        let vm = Vm::restore(host, snapshot)?;
        let devices = Devices::restore(&vm, platform.devices())?;
        Ok(Self { vm, devices })
    }

    /// The one that comes over `stream` within `deadline`, unless it is cancelled before, and how many pages came;
    /// `progress` is told of them.
    ///
    /// # Errors
    ///
    /// It has not come.
    pub fn receive<S: Stream>(
        host: &Host,
        stream: S,
        deadline: Duration,
        cancel: &Cancel,
        progress: impl FnMut(usize),
    ) -> Result<(Self, usize), ReceiveError> {
        let offer = Offer::of(host);
        let (vm, devices, pages) = take_linux(host, &offer, stream, deadline, cancel, progress)?;
        Ok((Self { vm, devices }, pages))
    }

    /// Lets it run for `time`, or until it has ended its machine.
    ///
    /// # Errors
    ///
    /// A vCPU cannot go on.
    pub fn run(&mut self, time: Duration) -> Result<(), RunError> {
        self.vm.run(&self.devices, time).map(|_| ())
    }

    /// Moves it, as [`migration::send`] does.
    ///
    /// # Errors
    ///
    /// As [`migration::send`].
    pub fn send<S: Stream>(
        &mut self,
        host: &Host,
        stream: S,
        options: &Options,
        progress: impl FnMut(&Progress),
    ) -> Result<Report, SendError> {
        let guest = (&self.devices, Some(&self.devices));
        migration::send(&mut self.vm, host, guest, stream, options, progress)
    }

    /// All of its state.
    ///
    /// # Errors
    ///
    /// As [`Vm::capture_linux`].
    pub fn capture(&mut self, host: &Host) -> Result<Snapshot, CaptureError> {
        self.vm.capture_linux(host, &self.devices)
    }

    /// What its init has reported to this process.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        Verdict::of(&self.devices.log())
    }
}

/// What our init says of the work of its processes, as far as this process has heard it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Nothing was wrong, and every line was understood.
    pub right: bool,
    /// One for each process of [`LOADS`].
    pub processes: Vec<Checked>,
    /// What was wrong first, by tile, row and byte.
    pub wrong: Option<String>,
    /// All processes have ended as they were asked to.
    pub finished: bool,
}

/// One process of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// What it does.
    pub load: String,
    /// Its last round.
    pub round: u64,
    /// Rounds that were reported to this process, each checked by the guest.
    pub rounds_here: u64,
    /// What it lacks, so that it does nothing.
    pub lacks: Option<String>,
}

impl Verdict {
    /// What the reports so far say.
    #[must_use]
    pub fn of(log: &Log) -> Self {
        let named = || LOADS.iter().map(|load| load.name()).zip(&log.processes);
        let process = |(load, process): (&str, &Process)| Checked {
            load: load.to_owned(),
            round: process.round,
            rounds_here: process.rounds,
            lacks: process.lacks.clone(),
        };
        let wrong =
            named().find_map(|(load, process)| Some(format!("{load}: {}", wrong(process)?)));
        Self {
            right: log.is_right(),
            processes: named().map(process).collect(),
            wrong: wrong.or_else(|| log.unknown.first().map(ToString::to_string)),
            finished: log.finished && log.processes.iter().all(|process| process.ended),
        }
    }

    /// Rounds that were reported to this process.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.processes
            .iter()
            .map(|process| process.rounds_here)
            .fold(0, u64::saturating_add)
    }
}

/// The first thing that was wrong in a process.
fn wrong(process: &Process) -> Option<String> {
    if let Some((round, first, bytes)) = process.wrong.first() {
        return Some(format!(
            "round {round}: tile {} row {} byte {} is {:#04x}, not {:#04x}; {bytes} bytes in all",
            first.tile, first.row, first.byte, first.found, first.expected
        ));
    }
    if let Some((round, what)) = process.failed.first() {
        return Some(format!("round {round}: {what}"));
    }
    process.died.map(|status| format!("died with {status}"))
}

/// A Linux guest could not be restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// It could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Its devices could not be restored.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// It has no interrupt controllers.
    #[error("it is a bare guest, without the devices of a Linux guest")]
    Bare,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(lines: &str) -> Verdict {
        let mut log = Log::default();
        log.write(lines.as_bytes());
        Verdict::of(&log)
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        let right = verdict("0 round 7\n4 round 3\n5 lacks /dev/cpu/0/msr\n");
        assert!(right.right && right.wrong.is_none() && !right.finished);
        assert_eq!(right.rounds(), 2);
        assert_eq!(right.processes[5].load, "xfd");
        let line = "2 wrong 9 tile 3 row 4 byte 5 expected 255 found 0 bytes 64\n";
        let wrong = verdict(line);
        assert!(!wrong.right);
        assert_eq!(
            wrong.wrong.as_deref(),
            Some("bf16: round 9: tile 3 row 4 byte 5 is 0x00, not 0xff; 64 bytes in all")
        );
        let failed = verdict("4 failed 2 no SIGILL\n").wrong;
        assert_eq!(failed.as_deref(), Some("denied: round 2: no SIGILL"));
        assert!(verdict("nonsense\n").wrong.is_some());
    }

    #[test]
    fn it_is_finished_when_all_have_ended() {
        let ends: String = (0..LOADS.len()).map(|n| format!("{n} end 5\n")).collect();
        assert!(!verdict(&ends).finished);
        assert!(verdict(&format!("{ends}finished\n")).finished);
        assert!(!verdict("0 end 5\nfinished\n").finished);
    }
}
