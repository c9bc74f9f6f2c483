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
//! - **The VMM's say in it**: it can refuse, fail and be asked again, or answer later from another
//!   thread. The vCPU waits without running.
//! - **The VMM's own memory and accounts**: until first use it saves no tile state and keeps no room for
//!   it. The kernel's memory is not saved: that is there since KVM_SET_CPUID2.
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
//!
//! A VMM with a seccomp filter allows its vCPU threads KVM_GET_XCRS, KVM_GET_XSAVE2, KVM_SET_XSAVE and
//! KVM_SET_MSRS on the vCPU, and KVM_X86_SET_MSR_FILTER and KVM_ENABLE_CAP on the VM.
//!
//! While the trap is set, MSR accesses that the VMM's own filter denies leave to it as well
//! (KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR), because KVM has one switch for both. A VMM that relied on
//! #GP for them sets the exit's `error` to 1, which is that #GP.

mod driver;
mod filter;
mod ioctl;
mod policy;
mod rewind;
#[cfg(test)]
mod tests;
mod vm;

pub use driver::{ExitHandler, HandleError, Handled, ObserveError};
pub use filter::{FilterError, MsrFilter, MsrRange};
pub use policy::Policy;
pub use rewind::RewindError;
pub use vm::{InstallError, Mode, Options, StartError, TrapError, VmGate};
