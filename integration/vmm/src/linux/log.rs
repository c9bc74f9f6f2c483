//! What the guest's init has reported, added up.

use amx_guest::report::{Event, LINE_BYTES, LOADS, Load, Report, UnknownReport, Wrong};

/// One process of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// What it does, once it has said so.
    pub load: Option<Load>,
    /// Its last round. Where the guest came from another host, that is where it goes on.
    pub round: u64,
    /// How many rounds this host has seen.
    pub rounds: u64,
    /// Wrong bytes: the round, the first of them, how many.
    pub wrong: Vec<(u64, Wrong, u32)>,
    /// What else went wrong, with the round.
    pub failed: Vec<(u64, String)>,
    /// What it lacks, so that it does nothing.
    pub lacks: Option<String>,
    /// It has ended as asked.
    pub ended: bool,
    /// It was ended, by this status.
    pub died: Option<i32>,
}

impl Process {
    /// Nothing was wrong.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.wrong.is_empty() && self.failed.is_empty() && self.died.is_none()
    }
}

/// A guest after its boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Up {
    /// Processors online.
    pub processors: u32,
    /// The kernel's release.
    pub kernel: String,
    /// The words of /proc/cpuinfo's flags that begin with `amx_`.
    pub amx: Vec<String>,
}

/// All that the guest has reported to this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// The guest as its init found it, where this host has seen the boot.
    pub up: Option<Up>,
    /// By their place in [`LOADS`].
    pub processes: [Process; LOADS.len()],
    /// All processes have ended.
    pub finished: bool,
    /// Lines that say nothing known: only the first few.
    pub unknown: Vec<UnknownReport>,
    /// The beginning of a line.
    pub(crate) partial: Vec<u8>,
}

impl Log {
    /// Lists of errors are no longer: a guest may report for ever.
    const LIMIT: usize = 64;

    /// Nothing was wrong, and every line was understood.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.unknown.is_empty() && self.processes.iter().all(Process::is_right)
    }

    /// Whether each process that works has had `rounds` more rounds than in `before`. One that lacks
    /// something says so again and again, so that this is known after a while.
    #[must_use]
    pub fn went_on(&self, before: &Self, rounds: u64) -> bool {
        self.processes
            .iter()
            .zip(&before.processes)
            .filter(|(now, _)| now.lacks.is_none() && now.died.is_none())
            .all(|(now, before)| now.rounds.saturating_sub(before.rounds) >= rounds)
    }

    /// All rounds that this host has seen.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.processes.iter().map(|process| process.rounds).sum()
    }

    /// The guest has written `bytes`.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                // What is too long is cut off, and is then no report.
                if self.partial.len() < LINE_BYTES {
                    self.partial.push(byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            match line.parse() {
                Ok(report) => self.add(report),
                Err(unknown) if self.unknown.len() < Self::LIMIT => self.unknown.push(unknown),
                Err(_) => {}
            }
        }
    }

    fn add(&mut self, report: Report) {
        match report {
            Report::Up {
                processors,
                kernel,
                amx,
            } => {
                self.up = Some(Up {
                    processors,
                    kernel,
                    amx,
                });
            }
            Report::Finished => self.finished = true,
            Report::Process { process, event } => {
                if let Some(process) = self.processes.get_mut(usize::from(process)) {
                    process.add(event);
                }
            }
        }
    }
}

impl Process {
    fn add(&mut self, event: Event) {
        match event {
            Event::Start(load) => self.load = Some(load),
            Event::Lacks(what) => self.lacks = Some(what),
            Event::Round(round) => self.count(round),
            Event::Wrong {
                round,
                first,
                bytes,
            } => {
                self.count(round);
                if self.wrong.len() < Log::LIMIT {
                    self.wrong.push((round, first, bytes));
                }
            }
            Event::Failed { round, what } => {
                self.count(round);
                if self.failed.len() < Log::LIMIT {
                    self.failed.push((round, what));
                }
            }
            Event::End(_) => self.ended = true,
            Event::Died(status) => self.died = Some(status),
        }
    }

    fn count(&mut self, round: u64) {
        self.round = round;
        self.rounds = self.rounds.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_any_pieces() {
        let text = "up 2 amx_tile 6.12\n0 start int8\n0 round 1\n4 failed 1 no SIGILL\n0 round 2\n";
        for size in 1..text.len() {
            let mut log = Log::default();
            for piece in text.as_bytes().chunks(size) {
                log.write(piece);
            }
            let up = log
                .up
                .as_ref()
                .map(|up| (up.processors, up.kernel.as_str()));
            assert_eq!(up, Some((2, "6.12")));
            assert_eq!((log.processes[0].round, log.processes[0].rounds), (2, 2));
            assert_eq!(log.rounds(), 3);
            assert!(log.processes[0].is_right() && !log.processes[4].is_right());
            assert!(!log.is_right());
        }
    }

    #[test]
    fn a_guest_that_reports_for_ever_takes_no_memory() {
        let mut log = Log::default();
        for round in 0..1000 {
            log.write(format!("1 failed {round} x\n").as_bytes());
            log.write(&[0xff; 1000]);
            log.write(b"\n");
        }
        log.write(&vec![b'x'; 1 << 20]);
        assert_eq!(log.processes[1].failed.len(), Log::LIMIT);
        assert_eq!(log.unknown.len(), Log::LIMIT);
        assert_eq!(log.partial.len(), LINE_BYTES);
        assert_eq!(log.processes[1].rounds, 1000);
    }

    #[test]
    fn who_lacks_something_is_not_waited_for() {
        let before = Log::default();
        let mut log = Log::default();
        log.write(b"5 lacks /dev/cpu/0/msr\n");
        for process in [0, 1, 2, 3, 4, 6] {
            assert!(!log.went_on(&before, 1));
            log.write(format!("{process} round 7\n").as_bytes());
        }
        assert!(log.went_on(&before, 1) && !log.went_on(&before, 2));
    }
}
