//! What a host says of itself, on the kernel that is here.
#![allow(unsafe_code, clippy::unwrap_used)]

mod host;
#[allow(dead_code, reason = "the tests of the permission need more of it")]
#[path = "../../../cpuid-amx/tests/live/process.rs"]
mod process;
#[path = "../../../cpuid-amx/tests/live/seccomp.rs"]
mod seccomp;
