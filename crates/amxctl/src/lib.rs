#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]
#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! | module | its one job |
//! |---|---|
//! | [`mod@open`] | files of several VMMs, and core dumps, as vCPUs with their bytes |
//! | [`vcpu`] | one such vCPU, and what is known of it from where |
//! | [`guess`] | where the components lie when nobody says so |
//! | [`registers`] | its registers, as a restore from the file sets them |
//! | [`rules`] | what keeps it from being restored as it is |
//! | [`parts`] | registers, tile rows and fields within a component |
//! | [`mod@diff`] | in which of them two states differ |

mod bytes;
mod cpuid;
pub mod diff;
mod finding;
pub mod guess;
mod known;
pub mod open;
pub mod parts;
pub mod registers;
pub mod rules;
mod supervisor;
pub mod vcpu;

pub use open::{Content, Format, OpenError, Snapshot, open};
pub use vcpu::{Cpuid, Given, Known, Source, Subject, Vcpu};
