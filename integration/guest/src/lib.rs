//! What runs inside guests: payloads in assembly with models in plain Rust that know their result, and
//! the init of Linux guests.
//!
//! A payload keeps its whole state in registers: all vector registers (or tiles), the opmasks,
//! MXCSR, the x87 control word and stack. Every round mixes each of them into the others by steps
//! that can be undone, so a difference in one bit never goes away. Whoever loses a register of a
//! stopped payload gets a wrong result.
//!
//! | module | its one job |
//! |---|---|
//! | [`area`] | what the host and a vCPU share, by offset |
//! | [`machine`] | the bare machine under a payload: page tables, segments, exceptions |
//! | [`code`] | the machine code as bytes |
//! | [`model`] | the same computation without SIMD |
//! | [`report`] | what the init of a Linux guest tells the host |
//! | [`workload`] | one vCPU's task: its input, its code, and whether its result is right |

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod area;
pub mod code;
pub mod machine;
pub mod model;
pub mod report;
pub mod workload;

pub use workload::{Difference, Kind, Workload};

/// The init of Linux guests: a static program whose processes compute on tiles, check each round and
/// report it ([`report`]).
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/amx-guest-init"));
