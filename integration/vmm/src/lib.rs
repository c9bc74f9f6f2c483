//! A small VMM that uses the crates as a downstream would.
//!
//! It runs bare guests of a few pages, and Linux, on one or more vCPUs, stops them at any instruction, writes
//! all of their state to a file, and goes on from such a file in another process. The extended state
//! goes through `xsave-state` only.
//!
//! | module | its one job |
//! |---|---|
//! | [`host`] | what this host's KVM can do |
//! | [`vm`] | a VM with its memory and its vCPUs, while they do not run |
//! | [`mod@linux`] | boots a Linux kernel as a guest, with its devices |
//! | [`memory`] | guest memory, and which of its pages are worth saving |
//! | [`run`] | lets the vCPUs run until they halt, a device stops them, or a time is up |
//! | [`kick`] | the signal that takes a vCPU out of the guest |
//! | [`bus`] | what answers the guest's port and memory accesses |
//! | [`capture`] | reads all state of a stopped VM |
//! | [`migration`] | moves a running guest to another process over a stream |
//! | [`platform`] | interrupt controllers, timer and clock of a VM |
//! | [`restore`] | puts it into a new VM |
//! | [`relayout`] | a snapshot for a host with other components of the extended state |
//! | [`registers`] | the registers that KVM has a structure for, as plain data |
//! | [`snapshot`] | a VM's state as checked data, and its bytes |
//! | [`first_use`] | the moment at which a guest first uses AMX |
//! | [`fit`] | whether a snapshot can go on here, or every reason why not |
//! | `features` | the features other than AMX that two hosts have in common, or one lacks |
//! | [`mod@file`] | a file that is there entirely or not at all |
//! | [`words`] | an error with its causes, each said once |

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

pub mod bus;
pub mod capture;
pub mod file;
pub mod first_use;
pub mod fit;
pub mod host;
pub mod kick;
pub mod linux;
pub mod memory;
pub mod migration;
pub mod platform;
pub mod registers;
pub mod relayout;
pub mod restore;
pub mod run;
pub mod snapshot;
pub mod vm;
pub mod words;

pub use bus::{Bus, BusError, Console, Doorbell};
pub use capture::CaptureError;
pub use first_use::{FirstUse, FirstUseError};
pub use fit::{Reason, Unfit};
pub use host::{Host, HostError};
pub use linux::{Linux, LinuxError};
pub use relayout::CannotRelayout;
pub use restore::RestoreError;
pub use run::{Ended, RunError};
pub use snapshot::{Snapshot, SnapshotError};
pub use vm::{Vm, VmError};

/// The README's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
mod readme {}
