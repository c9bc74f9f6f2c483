//! What the init of a Linux guest tells the host, line by line.
//!
//! This file is also compiled into that init, so it uses nothing but the standard library.

use std::fmt;
use std::str::FromStr;

/// The port that the init writes its lines to, and reads the host's [`Wish`] from.
pub const REPORT_PORT: u16 = 0x510;
/// No line is longer, its end included. A pipe takes so much at once from several processes.
pub const LINE_BYTES: usize = 256;

/// One process of the guest, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Load {
    /// Products of bytes, with and without sign (TDPBSSD, TDPBUUD); tiles live across system calls.
    Int8,
    /// Products of bfloat16 numbers (TDPBF16PS).
    Bf16,
    /// The products of [`Int8`](Self::Int8), interrupted by signal handlers that use tiles.
    Signals,
    /// Tile instructions without the permission: each must raise SIGILL.
    Denied,
    /// Reads IA32_XFD of its processor, which must be armed while this process has no permission.
    Xfd,
    /// Keeps values in its vector registers and PKRU across system calls; needs no AMX.
    Vectors,
}

/// The processes of a guest. The first two compete for the tiles of the same processor.
pub const LOADS: [Load; 7] = [
    Load::Int8,
    Load::Int8,
    Load::Bf16,
    Load::Signals,
    Load::Denied,
    Load::Xfd,
    Load::Vectors,
];

impl Load {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Int8, "int8"),
        (Self::Bf16, "bf16"),
        (Self::Signals, "signals"),
        (Self::Denied, "denied"),
        (Self::Xfd, "xfd"),
        (Self::Vectors, "vectors"),
    ];

    /// Its name in a report.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL
            .into_iter()
            .find(|(load, _)| *load == self)
            .map_or("", |(_, name)| name)
    }
}

/// One byte that is not what plain code computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// 0 to 7: the tile. 8: the tile configuration, of one row.
    pub tile: u8,
    /// The row.
    pub row: u8,
    /// The byte in the row.
    pub byte: u8,
    /// As computed.
    pub expected: u8,
    /// As found.
    pub found: u8,
}

/// What one process says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It begins.
    Start(Load),
    /// It cannot do its work here, and why.
    Lacks(String),
    /// A round has ended, and all was right.
    Round(u64),
    /// A round has ended with a wrong byte, the first one; and how many there are.
    Wrong {
        /// The round.
        round: u64,
        /// The first wrong byte.
        first: Wrong,
        /// All wrong bytes of the round.
        bytes: u32,
    },
    /// Something else went wrong in a round.
    Failed {
        /// The round.
        round: u64,
        /// What.
        what: String,
    },
    /// It has ended as asked, after so many rounds.
    End(u64),
    /// It was ended by a signal, or by an error of its own.
    Died(i32),
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The init runs, on so many processors.
    Up {
        /// Processors online.
        processors: u32,
        /// The guest's kernel.
        kernel: String,
        /// What /proc/cpuinfo says of AMX: the words of its flags that begin with `amx_`.
        amx: Vec<String>,
    },
    /// A process by its place in [`LOADS`].
    Process {
        /// Its place.
        process: u8,
        /// What it says.
        event: Event,
    },
    /// All processes have ended; the machine is about to.
    Finished,
}

/// What the host wants; it answers each read of the port with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wish {
    /// Go on.
    GoOn = 0,
    /// End all processes and switch the machine off.
    PowerOff = 1,
    /// End all processes and reset the machine.
    Reset = 2,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up {
                processors,
                kernel,
                amx,
            } => write!(f, "up {processors} {} {kernel}", Words(amx)),
            Self::Process { process, event } => write!(f, "{process} {event}"),
            Self::Finished => f.write_str("finished"),
        }
    }
}

/// Stands where there is no word.
const NO_WORD: &str = "-";

/// One word of several, joined by commas.
struct Words<'a>(&'a [String]);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(NO_WORD);
        }
        f.write_str(&self.0.join(","))
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(load) => write!(f, "start {}", load.name()),
            Self::Lacks(what) => write!(f, "lacks {what}"),
            Self::Round(round) => write!(f, "round {round}"),
            Self::Wrong {
                round,
                first,
                bytes,
            } => write!(
                f,
                "wrong {round} tile {} row {} byte {} expected {} found {} bytes {bytes}",
                first.tile, first.row, first.byte, first.expected, first.found
            ),
            Self::Failed { round, what } => write!(f, "failed {round} {what}"),
            Self::End(rounds) => write!(f, "end {rounds}"),
            Self::Died(status) => write!(f, "died {status}"),
        }
    }
}

/// A line that says nothing known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownReport {
    /// The line.
    pub line: String,
}

impl fmt::Display for UnknownReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest's report {:?} is none that it has", self.line)
    }
}

impl std::error::Error for UnknownReport {}

impl FromStr for Report {
    type Err = UnknownReport;

    fn from_str(line: &str) -> Result<Self, UnknownReport> {
        parse(line).ok_or_else(|| UnknownReport {
            line: line.chars().take(LINE_BYTES).collect(),
        })
    }
}

fn parse(line: &str) -> Option<Report> {
    if line.len() >= LINE_BYTES {
        return None;
    }
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    match first {
        "finished" if rest.is_empty() => Some(Report::Finished),
        "up" => {
            let (processors, rest) = rest.split_once(' ')?;
            let (amx, kernel) = rest.split_once(' ')?;
            let amx = if amx == NO_WORD { "" } else { amx };
            Some(Report::Up {
                processors: processors.parse().ok()?,
                kernel: kernel.to_owned(),
                amx: amx.split_terminator(',').map(str::to_owned).collect(),
            })
        }
        _ => {
            let process: u8 = first.parse().ok()?;
            (usize::from(process) < LOADS.len()).then_some(())?;
            let event = event(rest)?;
            Some(Report::Process { process, event })
        }
    }
}

fn event(text: &str) -> Option<Event> {
    let (verb, rest) = text.split_once(' ')?;
    Some(match verb {
        "start" => Event::Start(Load::ALL.into_iter().find(|(_, name)| *name == rest)?.0),
        "lacks" => Event::Lacks(rest.to_owned()),
        "round" => Event::Round(rest.parse().ok()?),
        "wrong" => wrong(rest)?,
        "failed" => {
            let (round, what) = rest.split_once(' ')?;
            Event::Failed {
                round: round.parse().ok()?,
                what: what.to_owned(),
            }
        }
        "end" => Event::End(rest.parse().ok()?),
        "died" => Event::Died(rest.parse().ok()?),
        _ => return None,
    })
}

fn wrong(text: &str) -> Option<Event> {
    let mut words = text.split(' ');
    let round = words.next()?.parse().ok()?;
    let mut named = |name: &str| (words.next()? == name).then(|| words.next()).flatten();
    let event = Event::Wrong {
        round,
        first: Wrong {
            tile: named("tile")?.parse().ok()?,
            row: named("row")?.parse().ok()?,
            byte: named("byte")?.parse().ok()?,
            expected: named("expected")?.parse().ok()?,
            found: named("found")?.parse().ok()?,
        },
        bytes: named("bytes")?.parse().ok()?,
    };
    words.next().is_none().then_some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Report> {
        let events = [
            Event::Start(Load::Signals),
            Event::Lacks("/dev/cpu/0/msr: No such file".into()),
            Event::Round(u64::MAX),
            Event::Wrong {
                round: 7,
                first: Wrong {
                    tile: 8,
                    row: 15,
                    byte: 63,
                    expected: 255,
                    found: 0,
                },
                bytes: 8192,
            },
            Event::Failed {
                round: 3,
                what: "no SIGILL".into(),
            },
            Event::End(12),
            Event::Died(-4),
        ];
        let mut reports: Vec<Report> = (0..)
            .zip(events)
            .map(|(process, event)| Report::Process {
                process: process % 6,
                event,
            })
            .collect();
        reports.push(Report::Finished);
        for amx in [
            &[][..],
            &["amx_tile"],
            &["amx_bf16", "amx_tile", "amx_int8"],
        ] {
            reports.push(Report::Up {
                processors: 8,
                kernel: "6.12.1-cloud-amd64 #1 SMP".into(),
                amx: amx.iter().map(|word| (*word).to_owned()).collect(),
            });
        }
        reports
    }

    #[test]
    fn what_is_written_is_read() {
        for report in all() {
            assert_eq!(report.to_string().parse(), Ok(report));
        }
    }

    #[test]
    fn a_changed_line_is_another_report_or_none() {
        for report in all() {
            let line = report.to_string();
            for at in 0..line.len() {
                for byte in 0..128 {
                    let mut bytes = line.clone().into_bytes();
                    bytes[at] = byte;
                    let changed = String::from_utf8(bytes).unwrap();
                    // No panic; and what is read is what was there.
                    if let Ok(read) = changed.parse::<Report>() {
                        assert!(changed == line || read != report || at > 0, "{changed:?}");
                    }
                }
                assert!(line[..at].parse::<Report>() != Ok(report.clone()));
            }
        }
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let long = format!("0 lacks {}", "x".repeat(LINE_BYTES));
        for line in [
            "",
            "0",
            "7 round 1",
            "0 round -1",
            "0 round 1 2",
            "0 start none",
            "finished 1",
            "0 wrong 1 tile 0 row 0 byte 0 expected 0 found 0 bytes 1 more",
            "0 wrong 1 tile 256 row 0 byte 0 expected 0 found 0 bytes 1",
            &long,
        ] {
            assert!(line.parse::<Report>().is_err(), "{line:?}");
        }
    }
}
