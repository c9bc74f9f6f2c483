//! Reads the extended state of a vCPU and checks it.

use thiserror::Error;

use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::vcpu::Vcpu;
use super::vcpu_layout::VcpuLayout;
use super::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use crate::area::initial::MXCSR_HOLDERS;
use crate::area::{Image, ImageError};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::INITIAL_MXCSR;
use crate::registers::Registers;
use crate::sanitize::UntrustedArea;
use crate::state::{ExtendedState, StateError};

/// The captured state of a vCPU.
#[derive(Debug)]
#[non_exhaustive]
pub struct Capture<'a> {
    /// The state, over the bytes of the buffer: make it
    /// [owned](ExtendedState::into_owned) to keep it.
    pub state: ExtendedState<'a>,
    /// Components that KVM reported as in use and the guest cannot have: they are not in `state`.
    ///
    /// Kernels before 6.6 and 6.5.9 report what the host uses (fixed by 8647c52e9504, which does the
    /// same as is done here). On newer ones it is empty.
    pub over_reported: XFeatures,
    /// Components that KVM reported as in use although IA32_XFD disables them: they are not in
    /// `state`, as the architecture and KVM's ABI have it (XSTATE_BV\[i\] = 0 where XFD\[i\] = 1).
    ///
    /// It is empty unless somebody wrote IA32_XFD without [`write_xfd`](super::write_xfd), or the
    /// kernel lacks the fix for CVE-2026-23005. **If it is not, the next KVM_RUN of this vCPU can
    /// panic the host:** [`restore`](super::restore) a state into it first, or discard it.
    pub disabled: XFeatures,
    /// True when the guest has enabled PKRU and KVM does not tell its value: `state` has 0, which may
    /// be wrong.
    ///
    /// It happens only where the vCPU's thread had its own PKRU at 0 when the vCPU last exited; Linux
    /// gives threads 0x55555554. KVM saves XSTATE_BV with the host's PKRU in place and, since Linux
    /// 6.3, writes no component that XSTATE_BV lacks
    /// (arch/x86/kernel/fpu/xstate.c, `__copy_xstate_to_uabi_buf`). The guest's value is not lost: call
    /// KVM_RUN with `immediate_exit` from a thread with another PKRU, and capture again.
    pub pkru_unknown: bool,
}

/// Reads and checks the extended state of a vCPU that is not running: KVM_GET_XSAVE2, KVM_GET_XCRS,
/// and KVM_GET_MSRS where the layout has components that IA32_XFD can disable. Allocates nothing.
///
/// An exit that is still to be completed must be completed before: call KVM_RUN with
/// `immediate_exit` until it fails with EINTR.
///
/// # Errors
///
/// An ioctl failed, the vCPU has no CPUID yet, or its state must not be restored anywhere. The bytes
/// of the last kind can still be had: [`capture_untrusted`].
pub fn capture<'a>(
    vcpu: &mut impl Vcpu,
    layout: &VcpuLayout,
    buffer: &'a mut XsaveBuffer,
) -> Result<Capture<'a>, CaptureError> {
    let registers = read(vcpu, layout, buffer)?;
    let layout = layout.layout();
    let in_use = buffer.xstate_bv();
    let over_reported = in_use - layout.user();
    let mut kept = in_use - over_reported;
    let disabled = kept & registers.xfd;
    kept -= disabled;
    let mut pkru_unknown = false;
    if !kept.contains(XFeatures::PKRU)
        && let Some(offset) = layout.component(ComponentId::PKRU).and_then(|c| c.offset())
    {
        // Kernels before 6.3 write the guest's PKRU to its place whatever XSTATE_BV says.
        if bytes::u32_at(buffer.as_bytes(), offset) != 0 {
            kept |= XFeatures::PKRU;
        } else {
            pkru_unknown = registers.xcr0.contains(XFeatures::PKRU);
        }
    }
    if kept != in_use {
        buffer.set_xstate_bv(kept);
    }
    // XSAVES and XSAVEC write MXCSR with SSE alone, and always where it is not initial. With AVX alone
    // the kernel's area has an older one, or one that it was given and does not load.
    if kept & MXCSR_HOLDERS == XFeatures::AVX && buffer.is_compacted() {
        buffer.set_mxcsr(INITIAL_MXCSR);
    }
    let image = Image::parse(buffer.as_bytes(), layout).map_err(CaptureError::Image)?;
    Ok(Capture {
        state: ExtendedState::new(image, registers).map_err(CaptureError::State)?,
        over_reported,
        disabled,
        pkru_unknown,
    })
}

/// Reads the same as [`capture`] and checks nothing: for a state that `capture` refuses, as input of
/// [`sanitize`](crate::sanitize::sanitize).
///
/// # Errors
///
/// An ioctl failed, or the vCPU has no CPUID yet.
pub fn capture_untrusted<'a>(
    vcpu: &mut impl Vcpu,
    layout: &VcpuLayout,
    buffer: &'a mut XsaveBuffer,
) -> Result<UntrustedArea<'a>, CaptureError> {
    let registers = read(vcpu, layout, buffer)?;
    let area = UntrustedArea::new(buffer.as_bytes(), registers);
    Ok(area.of_guest_with(layout.layout().user()))
}

/// Reads the area into the buffer, and the registers.
///
/// Bytes of an earlier capture stay behind what KVM writes. They are never read: what this vCPU's
/// layout has, KVM writes.
fn read(
    vcpu: &mut impl Vcpu,
    layout: &VcpuLayout,
    buffer: &mut XsaveBuffer,
) -> Result<Registers, CaptureError> {
    vcpu.get_xsave2(buffer).map_err(CaptureError::Xsave)?;
    let xcr0 = vcpu.get_xcr0().map_err(CaptureError::Xcrs)?;
    let xcr0 = XFeatures::from_bits_retain(xcr0.ok_or(CaptureError::NoXcr0)?);
    // KVM answers for a vCPU without CPUID as well: with the reset state, which it throws away later.
    // Any other XCR0 shows that there is one.
    if xcr0 == XFeatures::X87 && !vcpu.has_cpuid().map_err(CaptureError::Cpuid)? {
        return Err(CaptureError::NoCpuid);
    }
    let registers = Registers::RESET.with_xcr0(xcr0);
    let disableable = layout.layout().xfd();
    if disableable.is_empty() {
        return Ok(registers);
    }
    let msrs = vcpu
        .get_msrs([MSR_IA32_XFD, MSR_IA32_XFD_ERR])
        .map_err(CaptureError::Msrs)?;
    let [xfd, xfd_err] = msrs
        .ok_or(CaptureError::NoXfd { disableable })?
        .map(XFeatures::from_bits_retain);
    Ok(registers.with_xfd(xfd).with_xfd_err(xfd_err))
}

/// Errors from capturing a vCPU's extended state. The vCPU is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The vCPU has no CPUID.
    #[error("the vCPU has no CPUID yet: call KVM_SET_CPUID2 first")]
    NoCpuid,
    /// KVM_GET_CPUID2 failed.
    #[error("KVM_GET_CPUID2: {0}")]
    Cpuid(Errno),
    /// KVM_GET_XSAVE2 (or KVM_GET_XSAVE) failed.
    #[error("KVM_GET_XSAVE2: {0}")]
    Xsave(Errno),
    /// KVM_GET_XCRS failed.
    #[error("KVM_GET_XCRS: {0}")]
    Xcrs(Errno),
    /// KVM_GET_XCRS listed no XCR0.
    #[error("KVM_GET_XCRS lists no XCR0")]
    NoXcr0,
    /// KVM_GET_MSRS failed.
    #[error("KVM_GET_MSRS of IA32_XFD and IA32_XFD_ERR: {0}")]
    Msrs(Errno),
    /// CPUID has components that IA32_XFD can disable, but KVM lacks the registers.
    #[error("IA32_XFD can disable {disableable} of this CPUID, but KVM lacks the register")]
    NoXfd {
        /// The components that can be disabled.
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
    use crate::fit::Losses;
    use crate::kvm::simulated::{
        SimulatedVcpu, amx_area, amx_buffer, amx_host, amx_vcpu_layout, vcpu_layout_of,
    };
    use crate::layout::Layout;
    use crate::sanitize::sanitize;

    fn capture_error(vcpu: &mut SimulatedVcpu) -> CaptureError {
        capture(vcpu, &amx_vcpu_layout(), &mut amx_buffer()).unwrap_err()
    }

    #[test]
    fn registers_and_area_are_read() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x202e7));
        vcpu.xcr0 = Some(0x602e7);
        vcpu.xfd = 1 << 18;
        vcpu.xfd_err = 1 << 18;
        let mut buffer = amx_buffer();
        let capture = capture(&mut vcpu, &amx_vcpu_layout(), &mut buffer).unwrap();
        assert!(capture.over_reported.is_empty());
        assert!(capture.disabled.is_empty());
        let registers = capture.state.registers();
        assert_eq!(registers.xcr0.bits(), 0x602e7);
        assert_eq!(registers.xfd, XFeatures::XTILEDATA);
        assert_eq!(registers.xfd_err, XFeatures::XTILEDATA);
        assert_eq!(capture.state.image().xstate_bv().bits(), 0x202e7);
        assert_eq!(capture.state.image().as_bytes(), vcpu.area);
    }

    #[test]
    fn over_reported_components_are_masked_and_reported() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7 | 1 << 19 | 1 << 8));
        let mut buffer = amx_buffer();
        let capture = capture(&mut vcpu, &amx_vcpu_layout(), &mut buffer).unwrap();
        assert_eq!(capture.over_reported, XFeatures::APX | XFeatures::PT);
        assert_eq!(capture.state.image().xstate_bv().bits(), 0x602e7);
    }

    /// As on kernels without the fix for CVE-2026-23005: not lost to its owner, and not restorable
    /// as it was.
    #[test]
    fn tiles_in_use_under_xfd_are_masked_and_reported() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
        vcpu.xfd = 1 << 18;
        assert!(!vcpu.host_lives());
        let (layout, mut buffer) = (amx_vcpu_layout(), amx_buffer());
        let captured = capture(&mut vcpu, &layout, &mut buffer).unwrap();
        assert_eq!(captured.disabled, XFeatures::XTILEDATA);
        assert_eq!(captured.state.image().xstate_bv().bits(), 0x202e7);

        let untrusted = capture_untrusted(&mut vcpu, &layout, &mut buffer).unwrap();
        assert_eq!(untrusted.bytes(), vcpu.area);
        assert!(sanitize(&untrusted, layout.layout(), Losses::empty()).is_err());
        let rescued = sanitize(&untrusted, layout.layout(), Losses::DISABLED).unwrap();
        assert_eq!(rescued.state.image().xstate_bv().bits(), 0x202e7);
    }

    #[test]
    fn pkru_that_kvm_reports_as_not_in_use_is_captured_or_said_to_be_unknown() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x7));
        let unknown = |vcpu: &mut SimulatedVcpu| {
            let mut buffer = amx_buffer();
            let captured = capture(vcpu, &amx_vcpu_layout(), &mut buffer).unwrap();
            captured.pkru_unknown
        };
        assert!(!unknown(&mut vcpu)); // not enabled: it is 0
        vcpu.xcr0 = Some(0x602e7);
        assert!(unknown(&mut vcpu));
        vcpu.area[512..520].copy_from_slice(&0x207u64.to_le_bytes());
        assert!(!unknown(&mut vcpu));

        let mut area = amx_area(0x7);
        area[2688..2696].copy_from_slice(&0xb5b5_b3b3u64.to_le_bytes());
        let mut vcpu = SimulatedVcpu::new(&area);
        vcpu.xcr0 = Some(0x602e7);
        let mut buffer = amx_buffer();
        let captured = capture(&mut vcpu, &amx_vcpu_layout(), &mut buffer).unwrap();
        assert!(!captured.pkru_unknown);
        let pkru = captured.state.image().component(ComponentId::PKRU).unwrap();
        assert_eq!(pkru, 0xb5b5_b3b3u64.to_le_bytes());

        // A guest without PKRU has other bytes there, or none.
        vcpu.xcr0 = Some(0x7);
        let layout = vcpu_layout_of(XFeatures::from_bits_retain(0x7));
        let captured = capture(&mut vcpu, &layout, &mut buffer).unwrap();
        assert_eq!(captured.state.image().xstate_bv().bits(), 7);
    }

    #[test]
    fn an_mxcsr_that_the_kernel_would_not_load_is_not_the_guest_s() {
        let mxcsr = |in_use, is_compacted| {
            let mut area = amx_area(in_use);
            area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
            let mut vcpu = SimulatedVcpu::new(&area);
            let mut buffer = XsaveBuffer::new(&amx_host(is_compacted));
            let captured = capture(&mut vcpu, &amx_vcpu_layout(), &mut buffer).unwrap();
            captured.state.image().mxcsr()
        };
        assert_eq!(mxcsr(4, true), 0x1f80);
        assert_eq!(mxcsr(4, false), 0x1fa0);
        for in_use in [2, 6] {
            assert_eq!(mxcsr(in_use, true), 0x1fa0);
            assert_eq!(mxcsr(in_use, false), 0x1fa0);
        }
    }

    #[test]
    fn without_tiles_the_registers_of_xfd_are_not_asked_for() {
        let layout = VcpuLayout::new(&Layout::legacy(), &amx_host(true)).unwrap();
        let mut vcpu = SimulatedVcpu::new(&amx_area(3));
        vcpu.has_xfd = false;
        let mut buffer = amx_buffer();
        let captured = capture(&mut vcpu, &layout, &mut buffer).unwrap();
        assert_eq!(captured.state.registers().xfd, XFeatures::empty());
        assert_eq!(vcpu.log, ["GET_XSAVE2", "GET_XCRS", "GET_CPUID2"]);
    }

    #[test]
    fn a_vcpu_without_cpuid_is_refused() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0));
        vcpu.has_cpuid = false;
        assert_eq!(capture_error(&mut vcpu), CaptureError::NoCpuid);
        let (layout, mut buffer) = (amx_vcpu_layout(), amx_buffer());
        let error = capture_untrusted(&mut vcpu, &layout, &mut buffer).unwrap_err();
        assert_eq!(error, CaptureError::NoCpuid);
    }

    #[test]
    fn a_buffer_without_room_for_the_layout_is_refused() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7)[..4096]);
        let host = super::super::HostArea::new(4096, amx_vcpu_layout().layout().clone(), true);
        let mut buffer = XsaveBuffer::new(&host.unwrap());
        assert_eq!(
            capture(&mut vcpu, &amx_vcpu_layout(), &mut buffer).unwrap_err(),
            CaptureError::Image(ImageError::TooShort {
                required_bytes: 11_008,
                actual_bytes: 4096
            })
        );
    }

    #[test]
    fn each_failing_ioctl_is_named_and_says_its_cause_once() {
        for (fail_at, name) in [
            (1, "KVM_GET_XSAVE2"),
            (2, "KVM_GET_XCRS"),
            (3, "KVM_GET_CPUID2"),
            (4, "KVM_GET_MSRS"),
        ] {
            let mut vcpu = SimulatedVcpu::new(&amx_area(0x602e7));
            vcpu.fail_at = fail_at;
            let error = capture_error(&mut vcpu);
            let text = error.to_string();
            assert!(
                text.starts_with(name) && text.contains("Cannot allocate"),
                "{text}"
            );
            assert!(std::error::Error::source(&error).is_none(), "{error}");
        }
    }

    #[test]
    fn missing_registers_are_named() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0));
        vcpu.has_xfd = false;
        let disableable = XFeatures::XTILEDATA;
        assert_eq!(
            capture_error(&mut vcpu),
            CaptureError::NoXfd { disableable }
        );
        vcpu.xcr0 = None;
        assert_eq!(capture_error(&mut vcpu), CaptureError::NoXcr0);
    }
}
