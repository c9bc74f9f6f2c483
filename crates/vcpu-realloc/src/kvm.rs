//! The driver for KVM: a guest's writes of IA32_XFD leave to the VMM and are performed safely.
//!
//! | item | its one job |
//! |---|---|
//! | [`VmGate`] | the gate of a VM: sets the trap, and lifts it |
//! | [`ExitHandler`] | the exits of one vCPU |
//! | [`Policy`] | who is grown at a first use, and when the trap is lifted |
//! | [`MsrFilter`] | a VMM's own MSR filter, with which the trap is merged |
//! | [`pass_through_early`] | hardening for kernels before the fix for CVE-2026-23005 |

mod driver;
mod early;
mod filter;
mod ioctl;
mod policy;
mod rewind;
#[cfg(test)]
mod tests;
mod vm;

pub use driver::{ExitHandler, HandleError, Handled, ObserveError};
pub use early::pass_through_early;
pub use filter::{FilterError, MsrFilter, MsrRange};
pub use policy::Policy;
pub use rewind::RewindError;
pub use vm::{InstallError, Mode, Options, StartError, TrapError, VmGate};
