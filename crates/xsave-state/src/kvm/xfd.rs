//! A write of IA32_XFD that the host survives.

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use crate::feature::XFeatures;
use crate::layout::Layout;

/// What IA32_XFD of a vCPU of this layout can disable. KVM goes by component 18 alone: a CPUID that
/// hides XFD, or a layout that keeps quiet about it, does not keep the register from having been
/// written (arch/x86/kvm/x86.c, `kvm_guest_supported_xfd`).
pub(super) fn disableable(layout: &Layout) -> XFeatures {
    layout.xfd() | (layout.user() & XFeatures::XTILEDATA)
}

/// Writes `xfd` to IA32_XFD of a vCPU that is not running, and gives the components that this put
/// into their initial state.
///
/// KVM_SET_MSRS alone is not safe: with a disabled component in use, the next KVM_RUN loads an area
/// that the processor refuses, in the host. So the component is released first, which is also what
/// the architecture gives: state under XFD is not preserved (SDM Vol. 1 §13.14).
///
/// `buffer` is used as scratch space.
///
/// # Errors
///
/// See [`WriteXfdError`]. After [`WriteXfdError::Read`] the vCPU is as it was; after any other
/// IA32_XFD is, but the components may have been released.
pub fn write_xfd(
    vcpu: &VcpuFd,
    xfd: XFeatures,
    buffer: &mut XsaveBuffer,
) -> Result<XFeatures, WriteXfdError> {
    let released = release(vcpu, xfd, buffer)?;
    match vcpu.write_xfd(buffer, xfd.bits(), None) {
        Ok(1) => Ok(released),
        Ok(_) => Err(WriteXfdError::Refused { xfd }),
        Err(errno) => Err(WriteXfdError::Msr { xfd, errno }),
    }
}

/// Puts the components of `xfd` into their initial state and gives those that were in use.
pub(super) fn release(
    vcpu: &impl Vcpu,
    xfd: XFeatures,
    buffer: &mut XsaveBuffer,
) -> Result<XFeatures, WriteXfdError> {
    if xfd.is_empty() {
        return Ok(XFeatures::empty());
    }
    vcpu.read_area(buffer).map_err(WriteXfdError::Read)?;
    let in_use = buffer.xstate_bv();
    let released = in_use & xfd;
    if !released.is_empty() {
        buffer.set_xstate_bv(in_use - xfd);
        vcpu.write_area(buffer)
            .map_err(|errno| WriteXfdError::Release { released, errno })?;
    }
    Ok(released)
}

/// IA32_XFD could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteXfdError {
    /// KVM_GET_XSAVE2 failed.
    #[error("KVM_GET_XSAVE2, to see what IA32_XFD would disable: {0}")]
    Read(Errno),
    /// KVM_SET_XSAVE failed.
    #[error("KVM_SET_XSAVE, to release {released} before IA32_XFD disables it: {errno}")]
    Release {
        /// What was to be released.
        released: XFeatures,
        /// What the kernel said.
        errno: Errno,
    },
    /// KVM does not accept the value: a component is not in the vCPU's CPUID, or KVM has no
    /// IA32_XFD.
    #[error("KVM refuses {xfd} for IA32_XFD: the vCPU's CPUID lacks it, or the host has no XFD")]
    Refused {
        /// The value.
        xfd: XFeatures,
    },
    /// KVM_SET_MSRS failed.
    #[error("KVM_SET_MSRS of IA32_XFD to {xfd}: {errno}")]
    Msr {
        /// The value.
        xfd: XFeatures,
        /// What the kernel said.
        errno: Errno,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::simulated::{SimulatedVcpu, amx_area, amx_buffer};

    #[test]
    fn nothing_is_read_where_nothing_is_disabled() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        let released = release(&vcpu, XFeatures::empty(), &mut amx_buffer()).unwrap();
        assert!(released.is_empty());
        assert!(vcpu.log.borrow().is_empty());
    }

    #[test]
    fn an_unused_component_needs_no_write() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x202e7));
        let released = release(&vcpu, XFeatures::XTILEDATA, &mut amx_buffer()).unwrap();
        assert!(released.is_empty());
        assert_eq!(*vcpu.log.borrow(), ["GET_XSAVE2"]);
    }

    #[test]
    fn a_component_in_use_is_released_and_the_others_are_kept() {
        let area = amx_area(0x602e7);
        let vcpu = SimulatedVcpu::new(&area);
        let released = release(&vcpu, XFeatures::XTILEDATA, &mut amx_buffer()).unwrap();
        assert_eq!(released, XFeatures::XTILEDATA);
        assert_eq!(vcpu.xstate_bv(), 0x202e7);
        assert_eq!(vcpu.area.borrow()[520..2816], area[520..2816]);
        vcpu.xfd.set(1 << 18);
        assert!(vcpu.host_lives());
    }

    #[test]
    fn each_failing_ioctl_is_named() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        vcpu.fail_at.set(1);
        let mut buffer = amx_buffer();
        let error = release(&vcpu, XFeatures::XTILEDATA, &mut buffer).unwrap_err();
        assert!(matches!(error, WriteXfdError::Read(_)), "{error}");
        vcpu.fail_at.set(2);
        let error = release(&vcpu, XFeatures::XTILEDATA, &mut buffer).unwrap_err();
        assert!(matches!(error, WriteXfdError::Release { .. }), "{error}");
        assert_eq!(vcpu.xstate_bv(), 0x602e7);
    }
}
