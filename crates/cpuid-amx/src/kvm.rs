//! The kernel side: KVM's own table type, the permission's system call, and KVM_SET_CPUID2.
//!
//! All unsafe code of the crate is in `arch_prctl` below this module.

#[expect(unsafe_code, reason = "a system call that no safe library wraps")]
pub(crate) mod arch_prctl;
mod rewrite;
mod set;
mod table;

pub use rewrite::Rewrite;
pub use set::{CpuidSet, SetCpuidError, set_cpuid};
