//! The extended state of a vCPU, read and checked.

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use super::xfd::disableable;
use crate::feature::XFeatures;
use crate::image::{Image, ImageError};
use crate::initial::MXCSR_HOLDERS;
use crate::layout::Layout;
use crate::legacy::INITIAL_MXCSR;
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
/// KVM_GET_MSRS where `layout` has components that IA32_XFD can disable (XTILEDATA, also where its
/// CPUID hides XFD). Allocates nothing.
///
/// `layout` is that of the vCPU's own CPUID, [with the host's MXCSR
/// mask](Layout::with_mxcsr_mask_of): where that CPUID hides what the host's processor has, a guest
/// could otherwise keep itself from being captured. An exit that is still to be completed must be
/// completed before: call KVM_RUN with `immediate_exit` until it gives EINTR.
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
    let disableable = disableable(layout);
    let (xfd, xfd_err) = if disableable.is_empty() {
        (0, 0)
    } else {
        vcpu.read_xfd(buffer)
            .map_err(CaptureError::Msrs)?
            .ok_or(CaptureError::NoXfd { disableable })?
    };

    let in_use = buffer.xstate_bv();
    let over_reported = in_use - layout.user();
    if !over_reported.is_empty() {
        buffer.set_xstate_bv(in_use & layout.user());
    }
    // XSAVES and XSAVEC write MXCSR with SSE alone, and always where it is not initial. With AVX alone
    // the kernel's area has an older one, or one that it was given and does not load.
    let in_use = buffer.xstate_bv() & MXCSR_HOLDERS;
    if in_use == XFeatures::AVX && vcpu.keeps_compacted() {
        buffer.set_mxcsr(INITIAL_MXCSR);
    }
    let image = Image::parse(buffer.area(), layout).map_err(CaptureError::Image)?;
    let registers = Registers {
        xcr0: XFeatures::from_bits_retain(xcr0),
        xfd: XFeatures::from_bits_retain(xfd),
        xfd_err: XFeatures::from_bits_retain(xfd_err),
    };
    Ok(Capture {
        state: ExtendedState::new(image, registers).map_err(CaptureError::State)?,
        over_reported,
    })
}

/// A vCPU's extended state could not be captured. The vCPU is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// KVM_GET_XSAVE2 (or KVM_GET_XSAVE) failed.
    #[error("KVM_GET_XSAVE2: {0}")]
    Xsave(Errno),
    /// KVM_GET_XCRS failed.
    #[error("KVM_GET_XCRS: {0}")]
    Xcrs(Errno),
    /// KVM_GET_XCRS gave no XCR0.
    #[error("KVM_GET_XCRS has no XCR0")]
    NoXcr0,
    /// KVM_GET_MSRS failed.
    #[error("KVM_GET_MSRS of IA32_XFD and IA32_XFD_ERR: {0}")]
    Msrs(Errno),
    /// CPUID has components that IA32_XFD can disable, but KVM does not have both registers.
    #[error("IA32_XFD can disable {disableable} of this CPUID, but KVM has no such register")]
    NoXfd {
        /// What can be disabled.
        disableable: XFeatures,
    },
    /// The area is not valid for the layout.
    #[error("the captured area: {0}")]
    Image(ImageError),
    /// The registers are not valid for the layout, or not with the area.
    #[error("the captured state: {0}")]
    State(StateError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::simulated::{
        SimulatedVcpu, amx_area, amx_buffer, amx_layout, amx_layout_without_xfd,
    };

    fn capture_error(vcpu: &SimulatedVcpu) -> CaptureError {
        capture_from(vcpu, &amx_layout(), &mut amx_buffer()).unwrap_err()
    }

    #[test]
    fn registers_and_area_are_read() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x202e7));
        vcpu.xcr0.set(Some(0x602e7));
        vcpu.xfd.set(1 << 18);
        vcpu.xfd_err.set(1 << 18);
        let mut buffer = amx_buffer();
        let capture = capture_from(&vcpu, &amx_layout(), &mut buffer).unwrap();
        assert!(capture.over_reported.is_empty());
        let registers = capture.state.registers();
        assert_eq!(registers.xcr0.bits(), 0x602e7);
        assert_eq!(registers.xfd, XFeatures::XTILEDATA);
        assert_eq!(registers.xfd_err, XFeatures::XTILEDATA);
        assert_eq!(capture.state.image().xstate_bv().bits(), 0x202e7);
        assert_eq!(capture.state.image().as_bytes(), *vcpu.area.borrow());
    }

    #[test]
    fn what_the_guest_cannot_have_is_masked_and_told() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7 | 1 << 19 | 1 << 8));
        let mut buffer = amx_buffer();
        let capture = capture_from(&vcpu, &amx_layout(), &mut buffer).unwrap();
        assert_eq!(capture.over_reported, XFeatures::APX | XFeatures::PT);
        assert_eq!(capture.state.image().xstate_bv().bits(), 0x602e7);
        assert_eq!(
            capture.state.image().as_bytes()[512..520],
            0x602e7u64.to_le_bytes()
        );
    }

    #[test]
    fn an_mxcsr_that_the_kernel_would_not_load_is_not_the_guest_s() {
        let mxcsr = |in_use, keeps_compacted| {
            let mut area = amx_area(in_use);
            area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
            let vcpu = SimulatedVcpu::new(&area);
            vcpu.keeps_compacted.set(keeps_compacted);
            let mut buffer = amx_buffer();
            let capture = capture_from(&vcpu, &amx_layout(), &mut buffer).unwrap();
            capture.state.image().mxcsr()
        };
        assert_eq!(mxcsr(4, true), 0x1f80);
        assert_eq!(mxcsr(4, false), 0x1fa0);
        for in_use in [2, 6] {
            assert_eq!(mxcsr(in_use, true), 0x1fa0);
            assert_eq!(mxcsr(in_use, false), 0x1fa0);
        }
    }

    #[test]
    fn without_xfd_in_cpuid_the_registers_are_not_asked_for() {
        let layout = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0xd, 0, 0, 0],
            (0xd, 0) => [3, 576, 576, 0],
            _ => [0; 4],
        })
        .unwrap();
        let vcpu = SimulatedVcpu::new(&amx_area(3));
        vcpu.has_xfd.set(false);
        let mut buffer = amx_buffer();
        let capture = capture_from(&vcpu, &layout, &mut buffer).unwrap();
        assert_eq!(capture.state.registers().xfd, XFeatures::empty());
        assert_eq!(*vcpu.log.borrow(), ["GET_XSAVE2", "GET_XCRS"]);
    }

    /// A guest that cannot know of XFD, in a vCPU whose XFD somebody has armed.
    #[test]
    fn an_armed_xfd_that_cpuid_hides_is_refused() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x202e7));
        vcpu.xfd.set(1 << 18);
        let layout = amx_layout_without_xfd();
        assert_eq!(
            capture_from(&vcpu, &layout, &mut amx_buffer()).unwrap_err(),
            CaptureError::State(StateError::Xfd {
                xfd: XFeatures::XTILEDATA,
                supported: XFeatures::empty(),
            })
        );
    }

    #[test]
    fn a_state_that_would_crash_the_next_host_is_refused() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        vcpu.xfd.set(1 << 18);
        assert!(!vcpu.host_lives());
        assert!(matches!(
            capture_error(&vcpu),
            CaptureError::State(StateError::InUseWhileDisabled { .. })
        ));
    }

    #[test]
    fn a_buffer_without_room_for_the_layout_is_refused() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7)[..4096]);
        let size = crate::kvm::XsaveSize::from_capability(4096).unwrap();
        let mut buffer = XsaveBuffer::new(size);
        assert_eq!(
            capture_from(&vcpu, &amx_layout(), &mut buffer).unwrap_err(),
            CaptureError::Image(ImageError::TooShort {
                required_bytes: 11_008,
                actual_bytes: 4096
            })
        );
    }

    #[test]
    fn no_error_says_its_cause_twice() {
        let vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        vcpu.fail_at.set(1);
        let xsave = capture_error(&vcpu);
        assert!(xsave.to_string().contains("Cannot allocate"), "{xsave}");
        vcpu.xfd.set(1 << 18);
        let state = capture_error(&vcpu);
        assert!(state.to_string().contains("in use"), "{state}");
        for error in [xsave, state] {
            assert!(std::error::Error::source(&error).is_none(), "{error}");
        }
    }

    #[test]
    fn each_failing_ioctl_is_named() {
        let vcpu = SimulatedVcpu::new(&amx_area(3));
        let failing = |n| {
            vcpu.fail_at.set(n);
            capture_error(&vcpu)
        };
        assert!(matches!(failing(1), CaptureError::Xsave(_)));
        assert!(matches!(failing(2), CaptureError::Xcrs(_)));
        assert!(matches!(failing(3), CaptureError::Msrs(_)));
        vcpu.xcr0.set(None);
        assert_eq!(capture_error(&vcpu), CaptureError::NoXcr0);
        vcpu.xcr0.set(Some(1));
        vcpu.has_xfd.set(false);
        assert_eq!(
            capture_error(&vcpu),
            CaptureError::NoXfd {
                disableable: XFeatures::XTILEDATA
            }
        );
    }
}
