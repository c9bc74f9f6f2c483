//! The permission, KVM_SET_CPUID2, what a host is and what a policy makes of it, on the kernel that is
//! here.
//!
//! Each errno comes from the kernel where this machine can provoke it. Those that it cannot provoke
//! come from a seccomp filter, on a thread of its own: the calls are real, the answer is not. What
//! the machine lacks is said as `skipped: why`.
#![allow(
    unsafe_code,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod cpuid;
mod permission;
mod policy;
mod process;
mod seccomp;
mod vm;
