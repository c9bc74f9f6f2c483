//! The driver on the /dev/kvm that is here, and where the host has AMX with live tiles: a guest writes
//! IA32_XFD, and the write leaves to us.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[expect(unsafe_code, reason = "a system call, a VM and its guest need it")]
#[path = "../machine/mod.rs"]
mod machine;

mod boot;
mod cost;
mod downstream;
mod driver;
mod exits;
mod filter;
mod first_use;
mod hidden;
mod passthrough;
mod processors;
mod snapshot;
mod vmm;
