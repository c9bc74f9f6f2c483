//! Capture and restore on KVM. All unsafe code of this crate is in here.
//!
//! | item | its one job |
//! |---|---|
//! | [`HostArea`] | the area that KVM copies on this host: its size, with proof, and its layout |
//! | [`VcpuLayout`] | the layout of one vCPU: its CPUID, compared with the host |
//! | [`XsaveBuffer`] | the bytes that KVM copies from and to, to be reused |
//! | [`capture`], [`capture_untrusted`] | a vCPU's state, checked; the same bytes without a check |
//! | [`restore`] | a state in a vCPU, in the only safe order |
//! | [`load`] | an untrusted area in a vCPU, for VMMs with a snapshot format of their own |
//! | [`write_xfd`] | IA32_XFD written so that the host survives it |
//! | [`Vcpu`], [`RawVcpu`] | the ioctls of a vCPU: from kvm-ioctls, or of any other KVM crate |
//!
//! Everything takes the vCPU by `&mut`: the ioctls of one vCPU are serialised one by one, but not as a
//! group, and a KVM_SET_XSAVE of another thread in the midst of a sequence can panic the host.
//!
//! Supervisor components (CET) are not part of KVM's area. They are MSRs, and the live shadow-stack
//! pointer is `KVM_REG_GUEST_SSP`: saving them is the VMM's part.
//!
#![cfg_attr(feature = "kvm-ioctls", doc = "```no_run")]
#![cfg_attr(not(feature = "kvm-ioctls"), doc = "```ignore")]
//! use kvm_ioctls::Kvm;
//! use xsave_state::kvm::{self, HostArea, VcpuLayout, XsaveBuffer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kvm = Kvm::new()?;
//! let vm = kvm.create_vm()?;
//! let mut vcpu = vm.create_vcpu(0)?;
//! let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
//! vcpu.set_cpuid2(&cpuid)?; // first, or KVM throws the state away
//!
//! let host = HostArea::query(&vm, &vcpu)?; // once per process
//! let layout = VcpuLayout::query(&mut vcpu, &host)?; // once per vCPU
//! let mut buffer = XsaveBuffer::new(&host); // once per thread
//! let saved = kvm::capture(&mut vcpu, &layout, &mut buffer)?.state.into_owned();
//! // ... and later, or on another host:
//! kvm::restore(&mut vcpu, &saved, &layout, &mut buffer)?;
//! # Ok(())
//! # }
//! ```

mod buffer;
mod capture;
mod compaction;
mod errno;
mod host;
#[cfg(feature = "kvm-ioctls")]
mod kvm_ioctls;
mod load;
mod raw;
mod restore;
#[cfg(test)]
mod simulated;
mod vcpu;
mod vcpu_layout;
mod xfd;

pub use buffer::XsaveBuffer;
pub use capture::{Capture, CaptureError, capture, capture_untrusted};
pub use errno::Errno;
pub use host::{HostArea, HostAreaError};
#[cfg(feature = "kvm-ioctls")]
pub use kvm_ioctls::to_xsave;
pub use load::{LoadError, load};
pub use raw::RawVcpu;
pub use restore::{RestoreError, VcpuAfter, restore};
pub use vcpu::Vcpu;
pub use vcpu_layout::{VcpuLayout, VcpuLayoutError};
pub use xfd::{WriteXfdError, write_xfd};

pub use crate::registers::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
