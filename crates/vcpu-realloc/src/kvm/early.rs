//! IA32_XFD passed through from the start.

use kvm_ioctls::VcpuFd;
use xsave_state::kvm::{WriteXfdError, XsaveBuffer, write_xfd};
use xsave_state::{Layout, XFeatures};

/// Makes KVM pass IA32_XFD through for a vCPU that has not run yet, instead of at the guest's first
/// write that is not zero.
pub fn pass_through_early(
    vcpu: &VcpuFd,
    layout: &Layout,
    buffer: &mut XsaveBuffer,
) -> Result<(), WriteXfdError> {
    if layout.xfd().is_empty() {
        return Ok(());
    }
    write_xfd(vcpu, layout.xfd(), buffer)?;
    write_xfd(vcpu, XFeatures::empty(), buffer)?;
    Ok(())
}
