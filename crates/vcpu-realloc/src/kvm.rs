//! The driver for KVM: a guest's writes of IA32_XFD leave to the VMM and are performed safely.
//!
//! # What Linux does by itself
//!
//! It grows a vCPU's area to its full size when KVM_SET_CPUID2 exposes AMX, and that is the only time
//! at which it can fail for lack of permission (EPERM) or memory (EFAULT). It intercepts IA32_XFD until
//! the first write that is not zero, and passes it through from then on. XSETBV it handles itself.
//! State of a component that IA32_XFD disables it does not keep, as the architecture allows.
//!
//! # What this adds
//!
//! - **The moment of first use**, at the vCPU and the instruction where it is.
//! - **The VMM's say in it**: it can fail and be asked again, answer later from another thread, have the
//!   VM stopped, or refuse ([`growth`](crate::growth) says what a refusal does). The vCPU waits without
//!   running.
//! - **A record of first uses** for an operator, and what of it travels with the VM's state
//!   ([`VmGate::saved_grant`]).
//! - **A write that the host survives**: see [`xsave_state::kvm::write_xfd`].
//!
//! A guest that enables AMX with XSETBV while IA32_XFD is 0 makes no write that could leave. It is seen
//! when its state is captured, or when it writes IA32_XFD later. Linux guests arm IA32_XFD first
//! (arch/x86/kernel/fpu/xstate.c, `fpu__init_cpu_xstate`).
//!
//! # Use
//!
//! | item | its one job |
//! |---|---|
//! | [`VmGate`] | the gate of a VM: sets the trap, and lifts it |
//! | [`ExitHandler`] | the exits of one vCPU |
//! | [`Options`], [`Policy`] | who is grown at a first use, and when the trap is lifted |
//! | [`MsrFilter`] | a VMM's own MSR filter, with which the trap is merged |
//! | [`complete`] | ends what an exit left pending, before a vCPU's state is read |
//!
//! A VMM with a seccomp filter allows its vCPU threads KVM_GET_XCRS, KVM_GET_XSAVE2, KVM_SET_XSAVE and
//! KVM_SET_MSRS on the vCPU, for [`ExitHandler::rewind`] KVM_GET_REGS, KVM_SET_REGS,
//! KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS, and KVM_X86_SET_MSR_FILTER and KVM_ENABLE_CAP on the VM.
//!
//! While the trap is set, MSR accesses that the VMM's own filter denies leave to it as well
//! (KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR), because KVM has one switch for both. A VMM that relied on
//! #GP for them sets the exit's `error` to 1, which is that #GP.

mod driver;
mod exit;
mod filter;
mod ioctl;
mod policy;
mod rewind;
mod shared;
#[cfg(test)]
mod tests;
mod trap;
mod vm;

pub use driver::{ExitHandler, HandleError, Handled, ObserveError, Seen, Xcr0Error};
pub use exit::{CompleteError, complete};
pub use filter::{FilterError, MsrFilter, MsrRange};
pub use policy::Policy;
pub use rewind::RewindError;
pub use shared::{FirstUse, Occasion};
pub use trap::{SetFilterError, TrapError};
pub use vm::{InstallError, Mode, Options, StartError, VmGate};
