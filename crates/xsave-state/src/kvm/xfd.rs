//! Writes IA32_XFD so that the host survives it.

use thiserror::Error;

use super::MSR_IA32_XFD;
use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::vcpu::Vcpu;
use crate::feature::XFeatures;

/// Writes `xfd` to IA32_XFD of a vCPU that is not running, and returns the components that were in use
/// and are now in their initial state.
///
/// KVM_SET_MSRS alone is not safe: with a disabled component in use, the next KVM_RUN loads an area
/// that the processor refuses, in the host. So the component is released first. The architecture says
/// the same: state under XFD is not preserved (SDM Vol. 1 §13.14).
///
/// `buffer` is scratch space.
///
/// # Errors
///
/// See [`WriteXfdError`]. After [`WriteXfdError::Read`] the vCPU is unchanged; after any other
/// IA32_XFD is, but the components may have been released.
pub fn write_xfd(
    vcpu: &mut impl Vcpu,
    xfd: XFeatures,
    buffer: &mut XsaveBuffer,
) -> Result<XFeatures, WriteXfdError> {
    let released = release(vcpu, xfd, buffer)?;
    match vcpu.set_msrs(&[(MSR_IA32_XFD, xfd.bits())]) {
        Ok(1) => Ok(released),
        Ok(_) => Err(WriteXfdError::Refused { xfd }),
        Err(errno) => Err(WriteXfdError::Msr { xfd, errno }),
    }
}

/// Puts the components of `xfd` into their initial state and returns those that were in use.
fn release(
    vcpu: &mut impl Vcpu,
    xfd: XFeatures,
    buffer: &mut XsaveBuffer,
) -> Result<XFeatures, WriteXfdError> {
    if xfd.is_empty() {
        return Ok(XFeatures::empty());
    }
    vcpu.get_xsave2(buffer).map_err(WriteXfdError::Read)?;
    let in_use = buffer.xstate_bv();
    let released = in_use & xfd;
    if !released.is_empty() {
        buffer.set_xstate_bv(in_use - xfd);
        vcpu.set_xsave(buffer)
            .map_err(|errno| WriteXfdError::Release { released, errno })?;
    }
    Ok(released)
}

/// Errors from writing IA32_XFD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteXfdError {
    /// KVM_GET_XSAVE2 failed.
    #[error("KVM_GET_XSAVE2, to see what IA32_XFD would disable: {0}")]
    Read(Errno),
    /// KVM_SET_XSAVE failed.
    #[error("KVM_SET_XSAVE, to release {released} before IA32_XFD disables it: {errno}")]
    Release {
        /// The components to be released.
        released: XFeatures,
        /// The error number.
        errno: Errno,
    },
    /// KVM refuses the value: the vCPU's CPUID lacks a component, or KVM lacks IA32_XFD.
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
        /// The error number.
        errno: Errno,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::simulated::{SimulatedVcpu, amx_area, amx_buffer};

    #[test]
    fn nothing_is_read_where_nothing_is_disabled() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        let released = write_xfd(&mut vcpu, XFeatures::empty(), &mut amx_buffer()).unwrap();
        assert!(released.is_empty());
        assert_eq!(vcpu.log, ["SET_MSRS 1c4=0"]);
    }

    #[test]
    fn an_unused_component_needs_no_write() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x202e7));
        let released = write_xfd(&mut vcpu, XFeatures::XTILEDATA, &mut amx_buffer()).unwrap();
        assert!(released.is_empty());
        assert_eq!(vcpu.log, ["GET_XSAVE2", "SET_MSRS 1c4=40000"]);
    }

    #[test]
    fn a_component_in_use_is_released_and_the_others_are_kept() {
        let area = amx_area(0x602e7);
        let mut vcpu = SimulatedVcpu::new(&area);
        let released = write_xfd(&mut vcpu, XFeatures::XTILEDATA, &mut amx_buffer()).unwrap();
        assert_eq!(released, XFeatures::XTILEDATA);
        assert_eq!((vcpu.xstate_bv(), vcpu.xfd), (0x202e7, 1 << 18));
        assert_eq!(vcpu.area[520..2816], area[520..2816]);
        assert_eq!(vcpu.dangers, 0);
    }

    #[test]
    fn each_failing_ioctl_is_named_and_none_endangers_the_host() {
        for (fail_at, name) in [
            (1, "KVM_GET_XSAVE2"),
            (2, "KVM_SET_XSAVE"),
            (3, "KVM_SET_MSRS"),
        ] {
            let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
            vcpu.fail_at = fail_at;
            let error = write_xfd(&mut vcpu, XFeatures::XTILEDATA, &mut amx_buffer()).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
            assert_eq!((vcpu.xfd, vcpu.dangers), (0, 0));
        }
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        vcpu.msrs_accepted = 0;
        let xfd = XFeatures::XTILEDATA;
        let error = write_xfd(&mut vcpu, xfd, &mut amx_buffer()).unwrap_err();
        assert_eq!(error, WriteXfdError::Refused { xfd });
    }
}
