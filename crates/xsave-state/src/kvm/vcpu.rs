//! The ioctls of a vCPU that capture and restore consist of.

use std::vec::Vec;

use kvm_bindings::kvm_cpuid_entry2;

use super::buffer::XsaveBuffer;
use super::errno::Errno;

/// The ioctls of one vCPU.
///
/// Implemented for kvm-ioctls' `VcpuFd` (feature `kvm-ioctls`) and for [`RawVcpu`](super::RawVcpu),
/// which takes the file descriptor of any other KVM crate. Implement it for a wrapper that has its own
/// way to these ioctls, best by delegating to one of the two.
///
/// # Safety
///
/// An implementation guarantees that
/// - all methods act on the same KVM vCPU, of a VM of this process, and do what the ioctl that each
///   names does, and nothing else to the vCPU;
/// - whoever has the value by `&mut` is the only user of the vCPU: implement it for the owner of the
///   file descriptor, never for a shared reference to it. Between two calls nothing else may change
///   the vCPU, or the host may panic at its next KVM_RUN;
/// - [`get_xsave2`](Self::get_xsave2) writes to no other memory than
///   [`XsaveBuffer::as_mut_ptr`], and [`set_xsave`](Self::set_xsave) reads from no other. The buffer is
///   as long as KVM copies for any vCPU of this process.
#[allow(unsafe_code)]
pub unsafe trait Vcpu {
    /// KVM_GET_CPUID2: all entries; none where KVM_SET_CPUID2 was never called.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn get_cpuid2(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Errno>;

    /// KVM_GET_CPUID2 with room for no entry: returns true when there is one (KVM fails with E2BIG).
    ///
    /// # Errors
    ///
    /// The ioctl failed otherwise.
    fn has_cpuid(&mut self) -> Result<bool, Errno>;

    /// KVM_GET_XSAVE2, or KVM_GET_XSAVE where [`XsaveBuffer::has_xsave2`] says that KVM lacks it.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn get_xsave2(&mut self, buffer: &mut XsaveBuffer) -> Result<(), Errno>;

    /// KVM_SET_XSAVE.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn set_xsave(&mut self, buffer: &XsaveBuffer) -> Result<(), Errno>;

    /// KVM_GET_XCRS: XCR0, or `None` where the list lacks it.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn get_xcr0(&mut self) -> Result<Option<u64>, Errno>;

    /// KVM_SET_XCRS with XCR0 alone.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn set_xcr0(&mut self, value: u64) -> Result<(), Errno>;

    /// KVM_GET_MSRS of two registers: their values, or `None` where KVM lacks one.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn get_msrs(&mut self, indices: [u32; 2]) -> Result<Option<[u64; 2]>, Errno>;

    /// KVM_SET_MSRS of at most three registers, (index, value) each, in one call and in this order.
    /// Returns how many KVM has set: it stops at the first value that it refuses.
    ///
    /// # Errors
    ///
    /// The ioctl failed.
    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<usize, Errno>;
}
