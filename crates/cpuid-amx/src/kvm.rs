//! The kernel side: KVM's own table type, the permission's system call, KVM_SET_CPUID2, and what
//! there is to know of a host.
//!
//! All unsafe code of the crate is in `arch_prctl` and `attribute` below this module.

#[expect(unsafe_code, reason = "a system call that no safe library wraps")]
pub(crate) mod arch_prctl;
#[expect(unsafe_code, reason = "an ioctl that no safe library wraps")]
mod attribute;
pub(crate) mod probe;
mod rewrite;
mod set;
mod table;

pub use attribute::xcomp_guest_supp;
pub use rewrite::Rewrite;
pub use set::{CpuidSet, SetCpuidError, set_cpuid};
