//! vCPUs and areas of the kvm-ioctls crate.

use std::vec::Vec;

use ::kvm_ioctls::{Cap, VcpuFd, VmFd};
use kvm_bindings::{Xsave, kvm_cpuid_entry2};

use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::host::{HostArea, HostAreaError};
use super::raw::RawVcpu;
use super::vcpu::Vcpu;
use crate::area::Image;

impl HostArea {
    /// Asks KVM and the processor. Once a vCPU exists the answer is the same for the whole process.
    ///
    /// Both arguments belong to the calling process: a [`VcpuFd`] can do anything only in the process
    /// that created its VM.
    ///
    /// # Errors
    ///
    /// See [`HostAreaError`].
    #[allow(unsafe_code)]
    pub fn query(vm: &VmFd, _locks_permission: &VcpuFd) -> Result<Self, HostAreaError> {
        if !vm.check_extension(Cap::Xsave) {
            return Err(HostAreaError::NoXsave);
        }
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        // SAFETY: `vm` was asked, and there is a vCPU.
        unsafe { Self::from_capability(xsave2) }
    }
}

/// Copies an image into kvm-bindings' type, for a VMM that keeps it in its snapshots.
#[must_use]
pub fn to_xsave(image: &Image<'_>) -> Option<Xsave> {
    let (region, extra) = image.to_words();
    let mut xsave = Xsave::new(extra.len()).ok()?;
    xsave.as_mut_slice().copy_from_slice(&extra);
    // SAFETY: The length of the entries, which `Xsave` keeps beside them, is not changed.
    #[allow(unsafe_code)]
    let header = unsafe { xsave.as_mut_fam_struct() };
    header.xsave.region = region;
    Some(xsave)
}

fn raw(vcpu: &mut VcpuFd) -> RawVcpu<'_, VcpuFd> {
    // SAFETY: A `VcpuFd` is a KVM vCPU, and can be used only in the process that created its VM. It
    // is its only owner: it is not `Clone`, and making a second one of the same file descriptor is
    // unsafe.
    #[allow(unsafe_code)]
    unsafe {
        RawVcpu::new(vcpu)
    }
}

// SAFETY: Every method is that of `RawVcpu`.
#[allow(unsafe_code)]
unsafe impl Vcpu for VcpuFd {
    fn get_cpuid2(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
        Vcpu::get_cpuid2(&mut raw(self))
    }

    fn has_cpuid(&mut self) -> Result<bool, Errno> {
        raw(self).has_cpuid()
    }

    fn get_xsave2(&mut self, buffer: &mut XsaveBuffer) -> Result<(), Errno> {
        Vcpu::get_xsave2(&mut raw(self), buffer)
    }

    fn set_xsave(&mut self, buffer: &XsaveBuffer) -> Result<(), Errno> {
        Vcpu::set_xsave(&mut raw(self), buffer)
    }

    fn get_xcr0(&mut self) -> Result<Option<u64>, Errno> {
        raw(self).get_xcr0()
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Errno> {
        raw(self).set_xcr0(value)
    }

    fn get_msrs(&mut self, indices: [u32; 2]) -> Result<Option<[u64; 2]>, Errno> {
        Vcpu::get_msrs(&mut raw(self), indices)
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<usize, Errno> {
        Vcpu::set_msrs(&mut raw(self), msrs)
    }
}
