//! How many bytes KVM copies from and to a vCPU's area, with the proof that it will stay so.

use kvm_ioctls::{Cap, VcpuFd, VmFd};
use thiserror::Error;

use crate::layout::MAX_AREA_BYTES;

/// KVM_GET_XSAVE copies this many, and KVM_GET_XSAVE2 no fewer.
const MINIMUM_BYTES: usize = 4096;

/// How many bytes KVM copies at most from and to the area of any vCPU of this process.
///
/// KVM_GET_XSAVE2 and KVM_SET_XSAVE copy as many bytes as the vCPU's own area has, and know nothing
/// of the caller's buffer. That number grows with the guest permissions of the process
/// (ARCH_REQ_XCOMP_GUEST_PERM) and with the vCPU's CPUID, but never beyond KVM_CAP_XSAVE2 **once a
/// vCPU exists**, because creating the first one locks the permissions
/// (arch/x86/kernel/fpu/core.c, `fpu_alloc_guest_fpstate`). So this value can only be had by showing
/// a vCPU:
///
/// ```compile_fail,E0061
/// # fn demo(vm: &kvm_ioctls::VmFd) {
/// // Before the first vCPU the answer could still change.
/// let size = xsave_state::kvm::XsaveSize::query(vm);
/// # }
/// ```
///
/// ```compile_fail,E0451
/// // Nobody can claim a size.
/// let size = xsave_state::kvm::XsaveSize { bytes: 4096, has_xsave2: true };
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveSize {
    bytes: usize,
    has_xsave2: bool,
}

impl XsaveSize {
    /// Asks KVM. Both must belong to the calling process, as a [`VcpuFd`] can do anything only in
    /// the process (the memory, strictly) that created its VM.
    ///
    /// Kernels before 5.17 have no KVM_CAP_XSAVE2 and no dynamic components: 4,096 bytes, always.
    ///
    /// # Errors
    ///
    /// KVM has no KVM_CAP_XSAVE, or gives a size that cannot be.
    pub fn query(vm: &VmFd, _locks_permission: &VcpuFd) -> Result<Self, XsaveSizeError> {
        if !vm.check_extension(Cap::Xsave) {
            return Err(XsaveSizeError::NoXsave);
        }
        Self::from_capability(vm.check_extension_int(Cap::Xsave2))
    }

    pub(super) fn from_capability(reported: i32) -> Result<Self, XsaveSizeError> {
        let bytes = usize::try_from(reported)
            .ok()
            .filter(|&bytes| bytes <= MAX_AREA_BYTES)
            .ok_or(XsaveSizeError::Unbelievable {
                reported_bytes: reported,
                limit_bytes: MAX_AREA_BYTES,
            })?;
        Ok(Self {
            bytes: bytes.max(MINIMUM_BYTES),
            has_xsave2: bytes != 0,
        })
    }

    /// Bytes, at least 4,096.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    pub(super) const fn has_xsave2(self) -> bool {
        self.has_xsave2
    }
}

/// KVM does not say how large an area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum XsaveSizeError {
    /// There is no KVM_CAP_XSAVE: the processor has no XSAVE.
    #[error("KVM has no KVM_CAP_XSAVE: this processor has no XSAVE")]
    NoXsave,
    /// KVM_CAP_XSAVE2 is negative, or more than any area can have.
    #[error("KVM_CAP_XSAVE2 is {reported_bytes} bytes; more than {limit_bytes} are not believed")]
    Unbelievable {
        /// What KVM says.
        reported_bytes: i32,
        /// [`MAX_AREA_BYTES`].
        limit_bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_buffer_is_smaller_than_what_the_kernel_copies() {
        for reported in [0, 1, 832, 4095, 4096, 11_008, 65_536] {
            let size = XsaveSize::from_capability(reported).unwrap();
            assert!(size.bytes() >= 4096, "{reported}");
            assert!(size.bytes() >= usize::try_from(reported).unwrap());
            assert_eq!(size.has_xsave2(), reported != 0);
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for reported_bytes in [-1, i32::MIN, 65_537, i32::MAX] {
            assert_eq!(
                XsaveSize::from_capability(reported_bytes),
                Err(XsaveSizeError::Unbelievable {
                    reported_bytes,
                    limit_bytes: 65_536
                })
            );
        }
    }
}
