//! What the program says, as data: with `--json` one object per line, and on the control socket.

use std::path::PathBuf;
use std::process::ExitCode;

use amx_vmm::linux::guest::Verdict;
use amx_vmm::migration::{Report, Round};
use amx_vmm::snapshot::AtStop;
use serde::{Deserialize, Serialize};

/// Something that has happened. New kinds and new fields may come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// What this process does now.
    State { state: State },
    /// In the middle of a round, a few times a second.
    Pages {
        round: u32,
        stopped: bool,
        sent: usize,
        of: usize,
    },
    /// A round is over.
    Round {
        /// Bytes of its pages.
        bytes: u64,
        #[serde(flatten)]
        round: Round,
    },
    /// Pages that have come so far, a few times a second.
    Arrived { pages: usize },
    /// The destination has the guest; it does not run here any more.
    HandedOver(Report),
    /// The guest is here, and runs nowhere else.
    TakenOver { pages: usize },
    /// The guest was not moved; the source has it.
    NotMoved { reason: String },
    /// At the destination: the guest has not come, and is not here.
    NotTaken { reason: String },
    /// It is not known which side has the guest. It stands still here.
    Undecided { reason: String },
    /// The guest is in a file, and does not run here any more.
    Saved {
        file: PathBuf,
        bytes: usize,
        pages: usize,
        vcpus: Vec<AtStop>,
    },
    /// How the guest does.
    Status {
        /// Running, stopping or undecided.
        state: State,
        vcpus: u8,
        memory_bytes: u64,
        verdict: Verdict,
    },
    /// The guest says that something is wrong: for the first time.
    Wrong { what: String },
    /// The guest has ended its machine.
    Ended { how: Ending, verdict: Verdict },
    /// Something else was in the way.
    Failed { reason: String },
    /// So many events before this one were not told, because nobody has read what was told.
    Missed { events: u64 },
}

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// It waits for a guest.
    Waiting,
    /// A guest comes.
    Receiving,
    /// It reads a snapshot file.
    Restoring,
    /// The guest runs.
    Running,
    /// The guest runs while it is moved.
    Moving,
    /// The guest stands still while it is saved.
    Saving,
    /// The guest was asked to switch itself off.
    Stopping,
    /// The guest stands still: it is not known which side has it.
    Undecided,
}

/// How a guest has ended its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ending {
    Off,
    Reset,
}

/// Exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Good = 0,
    Failed = 1,
    NotMoved = 3,
    Undecided = 4,
    Interrupted = 130,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

impl Event {
    /// Whether an order is answered with it, and the exit status of whoever has given the order.
    pub(crate) fn code(&self) -> Option<Code> {
        Some(match self {
            Self::HandedOver(_) | Self::Saved { .. } | Self::Status { .. } => Code::Good,
            Self::Ended {
                how: Ending::Off,
                verdict,
            } if verdict.right => Code::Good,
            Self::Ended { .. } | Self::Failed { .. } => Code::Failed,
            Self::NotMoved { .. } | Self::NotTaken { .. } => Code::NotMoved,
            Self::Undecided { .. } => Code::Undecided,
            _ => return None,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use serde_json::Value;

    use super::*;

    pub(crate) fn round() -> Round {
        Round {
            round: 1,
            stopped: false,
            pages: 300,
            bytes_per_second: 1e8,
            changed: 20,
            expected_downtime: 0.0008,
        }
    }

    #[test]
    fn an_event_is_one_object_with_its_name() {
        let event = Event::Round {
            bytes: 1_228_800,
            round: round(),
        };
        let text = serde_json::to_string(&event).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["event"], "round");
        assert_eq!(value["pages"], 300);
        assert_eq!(value["changed"], 20);
        assert_eq!(value["bytes"], 1_228_800);
    }

    #[test]
    fn orders_are_answered_by_results_only() {
        let reason = String::new;
        let state = State::Moving;
        assert_eq!(Event::State { state }.code(), None);
        assert_eq!(Event::Arrived { pages: 1 }.code(), None);
        let refused = Event::NotMoved { reason: reason() };
        assert_eq!(refused.code(), Some(Code::NotMoved));
        let undecided = Event::Undecided { reason: reason() };
        assert_eq!(undecided.code(), Some(Code::Undecided));
    }
}
