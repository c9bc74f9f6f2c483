//! What a process of the chain is told, and what it says when it is done. JSON, one object each.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The payload's name.
    pub(crate) kind: String,
    /// vCPU *n*'s input comes from this plus *n*.
    pub(crate) seed: u64,
    pub(crate) rounds: u64,
    /// How many times as long as usual the payload waits in each round.
    pub(crate) slower: u64,
    pub(crate) vcpus: u8,
    /// The snapshot to go on from; a new guest without one.
    pub(crate) from: Option<PathBuf>,
    /// What is left out of it.
    pub(crate) lose: Option<Loss>,
    /// When to stop, and where to write the snapshot; runs to the end without.
    pub(crate) stop: Option<Stop>,
}

/// When to stop, and where to write the snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stop {
    pub(crate) after_micros: u64,
    /// Goes on until all vCPUs are between their first and their last round.
    pub(crate) midway: bool,
    pub(crate) to: PathBuf,
}

/// What a restore leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Loss {
    /// The whole area.
    Everything,
    /// One component, by its number.
    Component(u8),
    /// MXCSR, which is in the area of two components.
    Mxcsr,
    /// IA32_XFD and IA32_XFD_ERR.
    Xfd,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) times: Times,
    pub(crate) outcome: Outcome,
}

/// What came of it in the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The guest was stopped, and the snapshot was written.
    Saved(Sizes),
    /// The guest came to its end: per vCPU the registers that are wrong.
    Finished { wrong: Vec<Vec<String>> },
    /// The guest took an exception that its payload does not raise on purpose.
    Faulted { error: String },
    /// An error of this program or of the host, in words.
    Failed { error: String },
}

/// What a snapshot consists of, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sizes {
    /// The file.
    pub(crate) file: usize,
    /// One vCPU's area up to the last component in use.
    pub(crate) area: usize,
    /// XSTATE_BV of vCPU 0.
    pub(crate) in_use: u64,
    /// IA32_XFD of vCPU 0.
    pub(crate) xfd: u64,
    /// IA32_XFD_ERR of vCPU 0.
    pub(crate) xfd_err: u64,
    /// Pages of guest memory that are not zero.
    pub(crate) pages: usize,
}

/// How long the steps of this process took. A step that it did not take is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) read: Option<Duration>,
    pub(crate) check: Option<Duration>,
    pub(crate) restore: Option<Duration>,
    pub(crate) run: Option<Duration>,
    pub(crate) capture: Option<Duration>,
    pub(crate) write: Option<Duration>,
}
