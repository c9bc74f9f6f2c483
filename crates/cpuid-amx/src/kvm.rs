//! KVM's own table type, and KVM_SET_CPUID2.

mod rewrite;
mod set;
mod table;

pub use rewrite::Rewrite;
pub use set::{CpuidSet, SetCpuidError, set_cpuid};
