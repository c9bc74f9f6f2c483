//! The fidelity suite: the processor and the kernel that this runs on, held to the manual.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod bench;
mod cpuid;
mod host;
mod interrupts;
mod kernel_cases;
mod machine;
mod memory;
mod processors;
mod signal;
mod tilecfg;
mod tiles;
mod tmul;
mod xfd;
mod xrstor;
mod xsave;
mod xsave_legacy;
mod xsave_tiles;
