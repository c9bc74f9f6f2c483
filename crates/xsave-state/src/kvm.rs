//! Capture and restore on KVM. All unsafe code of this crate is in here.
//!
//! | item | its one job |
//! |---|---|
//! | [`XsaveSize`] | proof of how many bytes KVM copies |
//! | [`XsaveBuffer`] | that many bytes, to be reused |
//! | [`capture`] | a vCPU's state, checked |
//! | [`restore`], [`RestorePlan`] | the steps in their order, as data, and their execution |
//! | [`write_xfd`] | IA32_XFD written so that the host survives it |
//!
//! ```no_run
//! use kvm_ioctls::Kvm;
//! use xsave_state::Layout;
//! use xsave_state::kvm::{self, XsaveBuffer, XsaveSize};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kvm = Kvm::new()?;
//! let vm = kvm.create_vm()?;
//! let vcpu = vm.create_vcpu(0)?;
//! let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
//! vcpu.set_cpuid2(&cpuid)?; // first, or KVM throws the state away
//!
//! let layout = Layout::from_cpuid(|leaf, subleaf| {
//!     let entries = cpuid.as_slice().iter();
//!     let mut same = entries.filter(|e| e.function == leaf && e.index == subleaf);
//!     same.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
//! })?;
//! let mut buffer = XsaveBuffer::new(XsaveSize::query(&vm, &vcpu)?);
//! let saved = kvm::capture(&vcpu, &layout, &mut buffer)?.state.into_owned();
//! // ... and later, or elsewhere:
//! kvm::restore(&vcpu, &saved, &mut buffer)?;
//! # Ok(())
//! # }
//! ```

mod buffer;
mod capture;
mod ioctl;
mod restore;
#[cfg(test)]
mod simulated;
mod size;
mod xfd;

pub use buffer::XsaveBuffer;
pub use capture::{Capture, CaptureError, capture};
pub use restore::{Cause, RestoreError, RestorePlan, Step, VcpuAfter, restore};
pub use size::{XsaveSize, XsaveSizeError};
pub use xfd::{WriteXfdError, write_xfd};

/// IA32_XFD: components whose use raises #NM (SDM Vol. 4).
pub const MSR_IA32_XFD: u32 = 0x1c4;
/// IA32_XFD_ERR: what the last such #NM was about (SDM Vol. 4).
pub const MSR_IA32_XFD_ERR: u32 = 0x1c5;
