//! The extended state of a vCPU, read and checked.

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use crate::feature::XFeatures;
use crate::image::{Image, ImageError};
use crate::layout::Layout;
use crate::state::{ExtendedState, Registers, StateError};

/// What [`capture`] gives.
#[derive(Debug)]
#[non_exhaustive]
pub struct Capture<'a> {
    /// The state, over the bytes of the buffer: make it
    /// [owned](ExtendedState::into_owned) to keep it.
    pub state: ExtendedState<'a>,
    /// Components that KVM reported as in use and the guest cannot have: they are not in `state`.
    ///
    /// Kernels before 6.6 and 6.5.9 report what the host uses (fixed by 8647c52e9504, which does the
    /// same as is done here). On newer ones it is empty, unless `layout` is not the vCPU's.
    pub over_reported: XFeatures,
}

/// Reads the extended state of a vCPU that is not running: KVM_GET_XSAVE2, KVM_GET_XCRS, and
/// KVM_GET_MSRS where `layout` has components that IA32_XFD can disable. Allocates nothing.
///
/// `layout` is that of the vCPU's own CPUID. An exit that is still to be completed must be completed
/// before: call KVM_RUN with `immediate_exit` until it gives EINTR.
///
/// # Errors
///
/// An ioctl failed, or the vCPU is in a state that must not be restored anywhere.
/// [`StateError::InUseWhileDisabled`] says that somebody wrote IA32_XFD without
/// [`write_xfd`](super::write_xfd): do not run the vCPU again before it has been restored.
pub fn capture<'a>(
    vcpu: &VcpuFd,
    layout: &Layout,
    buffer: &'a mut XsaveBuffer,
) -> Result<Capture<'a>, CaptureError> {
    capture_from(vcpu, layout, buffer)
}

pub(super) fn capture_from<'a>(
    vcpu: &impl Vcpu,
    layout: &Layout,
    buffer: &'a mut XsaveBuffer,
) -> Result<Capture<'a>, CaptureError> {
    vcpu.read_area(buffer).map_err(CaptureError::Xsave)?;
    let xcr0 = vcpu
        .read_xcr0()
        .map_err(CaptureError::Xcrs)?
        .ok_or(CaptureError::NoXcr0)?;
    let (xfd, xfd_err) = if layout.xfd().is_empty() {
        (0, 0)
    } else {
        vcpu.read_xfd(buffer)
            .map_err(CaptureError::Msrs)?
            .ok_or(CaptureError::NoXfd {
                disableable: layout.xfd(),
            })?
    };

    let in_use = buffer.xstate_bv();
    let over_reported = in_use - layout.user();
    if !over_reported.is_empty() {
        buffer.set_xstate_bv(in_use & layout.user());
    }
    let image = Image::parse(buffer.area(), layout)?;
    let registers = Registers {
        xcr0: XFeatures::from_bits_retain(xcr0),
        xfd: XFeatures::from_bits_retain(xfd),
        xfd_err: XFeatures::from_bits_retain(xfd_err),
    };
    Ok(Capture {
        state: ExtendedState::new(image, registers)?,
        over_reported,
    })
}

/// A vCPU's extended state could not be captured. The vCPU is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// KVM_GET_XSAVE2 (or KVM_GET_XSAVE) failed.
    #[error("KVM_GET_XSAVE2: {0}")]
    Xsave(#[source] Errno),
    /// KVM_GET_XCRS failed.
    #[error("KVM_GET_XCRS: {0}")]
    Xcrs(#[source] Errno),
    /// KVM_GET_XCRS gave no XCR0.
    #[error("KVM_GET_XCRS has no XCR0")]
    NoXcr0,
    /// KVM_GET_MSRS failed.
    #[error("KVM_GET_MSRS of IA32_XFD and IA32_XFD_ERR: {0}")]
    Msrs(#[source] Errno),
    /// CPUID has components that IA32_XFD can disable, but KVM does not have both registers.
    #[error("CPUID says that IA32_XFD can disable {disableable}, but KVM has no such register")]
    NoXfd {
        /// What CPUID says can be disabled.
        disableable: XFeatures,
    },
    /// The area is not valid for the layout.
    #[error("the captured area: {0}")]
    Image(#[from] ImageError),
    /// The registers are not valid for the layout, or not with the area.
    #[error("the captured state: {0}")]
    State(#[from] StateError),
}
