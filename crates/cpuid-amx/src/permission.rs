//! The permission to give tile data to guests, as a proof.
//!
//! Linux lets KVM expose component 18 only when the process has asked for it with
//! ARCH_REQ_XCOMP_GUEST_PERM (Documentation/arch/x86/xstate.rst; arch/x86/kernel/fpu/xstate.c,
//! `xstate_request_perm`). It belongs to the process, any thread may ask, and **the first vCPU
//! locks it**: ask before KVM_CREATE_VCPU, and before KVM_GET_SUPPORTED_CPUID, which filters 0DH by
//! it. fork passes it on together with the lock, exec resets both.

#[cfg(all(feature = "permission", target_os = "linux", target_arch = "x86_64"))]
#[expect(unsafe_code, reason = "a system call that no safe library wraps")]
mod arch_prctl;
mod error;
#[cfg(all(feature = "permission", target_os = "linux", target_arch = "x86_64"))]
mod grant;

pub use error::PermissionError;
#[cfg(all(feature = "permission", target_os = "linux", target_arch = "x86_64"))]
pub use grant::{GuestPermission, granted, supported};
