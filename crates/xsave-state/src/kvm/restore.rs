//! Puts a state into a vCPU, in the only order that is safe on every kernel.

use core::fmt;

use thiserror::Error;

use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::vcpu::Vcpu;
use super::vcpu_layout::VcpuLayout;
use super::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use crate::feature::XFeatures;
use crate::fit::Misfit;
use crate::registers::Registers;
use crate::state::ExtendedState;

/// Puts a state into a vCPU that has its CPUID and is not running. Allocates nothing. `buffer` is
/// scratch space.
///
/// Call it after the VMM's own KVM_SET_MSRS, whose list contains neither IA32_XFD nor IA32_XFD_ERR.
///
/// The order makes sure that no component is ever in use while IA32_XFD disables it, whatever the vCPU
/// had before and whichever step fails: the host would panic at the next KVM_RUN.
///
/// | IA32_XFD of the state | order | why it is safe |
/// |---|---|---|
/// | not 0 | XCR0, area, IA32_XFD | the area has nothing in use that IA32_XFD can disable |
/// | 0 | IA32_XFD, XCR0, area | nothing is disabled when the area comes |
///
/// PKRU is always written, and MXCSR on kernels that would keep it. A guest that has enabled tiles and
/// has IA32_XFD = 0 gets the register passed through at once, as it was where it came from: IA32_XFD
/// is written twice. On kernels without the fix for CVE-2026-23005 its first write would exit, and
/// could lose the race with an interrupt of the host.
///
/// # Errors
///
/// The state does not fit the vCPU, before anything was changed; or a step failed.
/// [`RestoreError::vcpu`] says whether the vCPU is unchanged or must be discarded.
pub fn restore(
    vcpu: &mut impl Vcpu,
    state: &ExtendedState<'_>,
    layout: &VcpuLayout,
    buffer: &mut XsaveBuffer,
) -> Result<(), RestoreError> {
    fits(state, layout, buffer)?;
    let registers = state.registers();
    // KVM accepts this value without a CPUID: the first KVM_SET_CPUID2 would throw the area away.
    if registers.xcr0 == XFeatures::X87 && !vcpu.has_cpuid().map_err(RestoreError::Cpuid)? {
        return Err(RestoreError::NoCpuid {
            vcpu: VcpuAfter::Unchanged,
        });
    }
    buffer.fill_with(state.image(), layout.layout());
    let has_xfd = !layout.layout().xfd().is_empty();
    let mut after = VcpuAfter::Unchanged;
    if registers.xfd.is_empty() {
        if has_xfd {
            set_xfd(vcpu, registers, &mut after)?;
        }
        set_xcr0(vcpu, registers, &mut after)?;
        set_area(vcpu, buffer)
    } else {
        set_xcr0(vcpu, registers, &mut after)?;
        set_area(vcpu, buffer)?;
        set_xfd(vcpu, registers, &mut after)
    }
}

/// Everything in use must be where KVM and the vCPU's CPUID have it, and within what KVM copies.
fn fits(
    state: &ExtendedState<'_>,
    layout: &VcpuLayout,
    buffer: &XsaveBuffer,
) -> Result<(), RestoreError> {
    let mut misfits = state.misfits(layout.layout());
    if let Some(first) = misfits.next() {
        return Err(RestoreError::Misfit {
            first,
            others: misfits.count(),
        });
    }
    let state_bytes = layout.layout().standard_size_of(state.image().xstate_bv());
    let kvm_bytes = buffer.as_bytes().len();
    if state_bytes > kvm_bytes {
        return Err(RestoreError::TooLarge {
            state_bytes,
            kvm_bytes,
        });
    }
    Ok(())
}

fn set_xcr0(
    vcpu: &mut impl Vcpu,
    registers: Registers,
    after: &mut VcpuAfter,
) -> Result<(), RestoreError> {
    let xcr0 = registers.xcr0;
    if let Err(errno) = vcpu.set_xcr0(xcr0.bits()) {
        // KVM fails with EINVAL for a vCPU without CPUID too, which requires another remedy.
        return Err(match vcpu.has_cpuid() {
            Ok(false) => RestoreError::NoCpuid { vcpu: *after },
            _ => RestoreError::Xcrs {
                xcr0,
                errno,
                vcpu: *after,
            },
        });
    }
    *after = VcpuAfter::Discard;
    Ok(())
}

/// KVM may have taken part of the area when this fails.
fn set_area(vcpu: &mut impl Vcpu, buffer: &XsaveBuffer) -> Result<(), RestoreError> {
    vcpu.set_xsave(buffer).map_err(RestoreError::Xsave)
}

fn set_xfd(
    vcpu: &mut impl Vcpu,
    registers: Registers,
    after: &mut VcpuAfter,
) -> Result<(), RestoreError> {
    let Registers { xcr0, xfd, xfd_err } = registers;
    // KVM stops intercepting the register at the first value that is not 0, whoever writes it
    // (arch/x86/kvm/vmx/vmx.c, `vmx_set_msr`). Nothing runs between two writes of one ioctl.
    let passes_through = xfd.is_empty() && xcr0.contains(XFeatures::XTILEDATA);
    let writes = [
        (MSR_IA32_XFD, XFeatures::XTILEDATA),
        (MSR_IA32_XFD, xfd),
        (MSR_IA32_XFD_ERR, xfd_err),
    ];
    let writes = if passes_through {
        &writes[..]
    } else {
        writes.get(1..).unwrap_or_default()
    };
    let mut list = [(0, 0); 3];
    for (entry, (index, value)) in list.iter_mut().zip(writes) {
        *entry = (*index, value.bits());
    }
    let list = list.get(..writes.len()).unwrap_or_default();
    let written = match vcpu.set_msrs(list) {
        Ok(written) => written,
        Err(errno) => {
            return Err(RestoreError::Msrs {
                xfd,
                errno,
                vcpu: *after,
            });
        }
    };
    if written > 0 {
        *after = VcpuAfter::Discard;
    }
    let Some(&(index, value)) = writes.get(written) else {
        return Ok(());
    };
    // As for XCR0: another remedy.
    if written == 0 && matches!(vcpu.has_cpuid(), Ok(false)) {
        return Err(RestoreError::NoCpuid { vcpu: *after });
    }
    Err(RestoreError::MsrRefused {
        index,
        value,
        vcpu: *after,
    })
}

/// The fate of a vCPU whose restore failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuAfter {
    /// The vCPU is unchanged.
    Unchanged,
    /// The vCPU has part of the state: it must not run.
    Discard,
}

impl fmt::Display for VcpuAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unchanged => "the vCPU is unchanged",
            Self::Discard => "the vCPU has part of the state and must be discarded",
        })
    }
}

/// Errors from restoring a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state does not fit the vCPU. [`ExtendedState::misfits`] lists all reasons, and
    /// [`ExtendedState::relocate`] makes it fit where nothing is lost.
    #[error("the state does not fit the vCPU: {first}{}", More(*others))]
    Misfit {
        /// The first reason.
        first: Misfit,
        /// How many more reasons there are.
        others: usize,
    },
    /// The state has more bytes in use than KVM copies: the buffer is of a process that did not ask
    /// for the permission before its first vCPU.
    #[error(
        "the state requires {state_bytes} bytes, but KVM copies {kvm_bytes}: ask for the guest \
         permission (ARCH_REQ_XCOMP_GUEST_PERM) before the first vCPU"
    )]
    TooLarge {
        /// Where the last component in use ends.
        state_bytes: usize,
        /// The length of the buffer.
        kvm_bytes: usize,
    },
    /// KVM_GET_CPUID2 failed.
    #[error("KVM_GET_CPUID2: {0}")]
    Cpuid(Errno),
    /// The vCPU has no CPUID.
    #[error("the vCPU has no CPUID yet: call KVM_SET_CPUID2 first; {vcpu}")]
    NoCpuid {
        /// The fate of the vCPU.
        vcpu: VcpuAfter,
    },
    /// KVM_SET_XCRS failed.
    #[error("KVM_SET_XCRS of XCR0 to {xcr0}: {errno}; {vcpu}")]
    Xcrs {
        /// The value.
        xcr0: XFeatures,
        /// The error number.
        errno: Errno,
        /// The fate of the vCPU.
        vcpu: VcpuAfter,
    },
    /// KVM_SET_MSRS failed.
    #[error("KVM_SET_MSRS of IA32_XFD to {xfd}: {errno}; {vcpu}")]
    Msrs {
        /// IA32_XFD.
        xfd: XFeatures,
        /// The error number.
        errno: Errno,
        /// The fate of the vCPU.
        vcpu: VcpuAfter,
    },
    /// KVM refuses the value of a register.
    #[error(
        "KVM refuses {value} for MSR {index:#x}: the vCPU's CPUID lacks it, or the host has no XFD; \
         {vcpu}"
    )]
    MsrRefused {
        /// The register.
        index: u32,
        /// The value.
        value: XFeatures,
        /// The fate of the vCPU.
        vcpu: VcpuAfter,
    },
    /// KVM_SET_XSAVE failed. The vCPU must be discarded.
    #[error("KVM_SET_XSAVE: {0}; the vCPU has part of the state and must be discarded")]
    Xsave(Errno),
}

impl RestoreError {
    /// Returns the fate of the vCPU.
    #[must_use]
    pub const fn vcpu(&self) -> VcpuAfter {
        match self {
            Self::Misfit { .. } | Self::TooLarge { .. } | Self::Cpuid(_) => VcpuAfter::Unchanged,
            Self::NoCpuid { vcpu }
            | Self::Xcrs { vcpu, .. }
            | Self::Msrs { vcpu, .. }
            | Self::MsrRefused { vcpu, .. } => *vcpu,
            Self::Xsave(_) => VcpuAfter::Discard,
        }
    }
}

/// Displays how many more reasons there are.
struct More(usize);

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            1 => f.write_str(", and 1 more reason"),
            more => write!(f, ", and {more} more reasons"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::area::Image;
    use crate::feature::ComponentId;
    use crate::kvm::HostArea;
    use crate::kvm::simulated::{
        SimulatedVcpu, amx_area, amx_buffer, amx_host, amx_layout, amx_vcpu_layout, vcpu_layout_of,
    };
    use crate::layout::{Component, Layout, Palette};

    fn state(xstate_bv: u64, xfd: u64) -> ExtendedState<'static> {
        let xfd = XFeatures::from_bits_retain(xfd);
        let registers = Registers::RESET
            .with_xcr0(amx_layout().user())
            .with_xfd(xfd)
            .with_xfd_err(xfd);
        let area = amx_area(xstate_bv);
        let image = Image::parse(&area, &amx_layout()).unwrap().into_owned();
        ExtendedState::new(image, registers).unwrap()
    }

    /// A vCPU that was used before: tiles live, or XFD armed.
    fn used(xstate_bv: u64, xfd: u64) -> SimulatedVcpu {
        let mut vcpu = SimulatedVcpu::new(&amx_area(xstate_bv));
        vcpu.xfd = xfd;
        vcpu
    }

    fn restore_into(
        vcpu: &mut SimulatedVcpu,
        state: &ExtendedState<'_>,
    ) -> Result<(), RestoreError> {
        restore(vcpu, state, &amx_vcpu_layout(), &mut amx_buffer())
    }

    #[test]
    fn everything_arrives() {
        let state = state(0x202e7, 1 << 18);
        let mut vcpu = used(0, 0);
        restore_into(&mut vcpu, &state).unwrap();
        assert_eq!((vcpu.xfd, vcpu.xfd_err), (1 << 18, 1 << 18));
        assert_eq!(vcpu.xcr0, Some(0x602e7));
        for id in state.image().xstate_bv().components() {
            let range = state.layout().component(id).unwrap().range().unwrap();
            let given = &vcpu.area[range.clone()];
            assert_eq!(given, &state.image().as_bytes()[range], "{id}");
        }
    }

    /// Every restore, from every state of the vCPU to every state, failing at every ioctl or not at
    /// all: the host lives whenever the vCPU runs next.
    #[test]
    fn at_no_step_does_the_vcpu_endanger_its_host() {
        let vcpus = [(0, 0), (0x602e7, 0), (0x202e7, 1 << 18), (0, 1 << 18)];
        let reset = ExtendedState::reset(&amx_layout());
        let states = vcpus.map(|(xstate_bv, xfd)| state(xstate_bv, xfd));
        let mut failures = 0;
        for before in vcpus {
            for after in states.iter().chain([&reset]) {
                for fail_at in 0..6 {
                    let mut vcpu = used(before.0, before.1);
                    vcpu.fail_at = fail_at;
                    let result = restore_into(&mut vcpu, after);
                    // The vCPU counts every moment at which it would have killed the host.
                    assert_eq!(
                        vcpu.dangers, 0,
                        "{before:?} -> {after:?}, {fail_at}: {result:?}"
                    );
                    failures += usize::from(result.is_err());
                }
            }
        }
        assert!(failures > 50, "{failures}");
    }

    /// The control of the test above: it sees what the wrong orders do.
    #[test]
    fn the_wrong_orders_would_endanger_the_host() {
        // Live tiles in the area, then XFD.
        let mut vcpu = used(0, 0);
        let mut buffer = amx_buffer();
        buffer.fill_with(state(0x602e7, 0).image(), &amx_layout());
        vcpu.set_xsave(&buffer).unwrap();
        vcpu.set_msrs(&[(0x1c4, 1 << 18)]).unwrap();
        assert!(!vcpu.host_lives() && vcpu.dangers > 0);

        // XFD armed, then live tiles, on a kernel without the fix.
        let mut vcpu = used(0, 1 << 18);
        vcpu.set_xsave(&buffer).unwrap();
        assert!(!vcpu.host_lives() && vcpu.dangers > 0);
    }

    #[test]
    fn no_area_is_read_and_the_order_follows_xfd() {
        let log = |state: &ExtendedState<'_>| {
            let mut vcpu = used(0x602e7, 0);
            restore_into(&mut vcpu, state).unwrap();
            vcpu.log
        };
        assert_eq!(
            log(&state(0x202e7, 1 << 18)),
            ["SET_XCRS", "SET_XSAVE", "SET_MSRS 1c4=40000 1c5=40000"]
        );
        assert_eq!(
            log(&state(0x602e7, 0)),
            ["SET_MSRS 1c4=40000 1c4=0 1c5=0", "SET_XCRS", "SET_XSAVE"]
        );
        // A guest that has not enabled tiles pays nothing for them.
        assert_eq!(
            log(&ExtendedState::reset(&amx_layout())),
            [
                "GET_CPUID2",
                "SET_MSRS 1c4=0 1c5=0",
                "SET_XCRS",
                "SET_XSAVE"
            ]
        );
    }

    #[test]
    fn each_failing_ioctl_is_named_with_the_fate_of_the_vcpu() {
        use VcpuAfter::{Discard, Unchanged};
        let armed = state(0x202e7, 1 << 18);
        let live = state(0x602e7, 0);
        let reset = ExtendedState::reset(&amx_layout());
        for (state, expected) in [
            (
                &armed,
                &[
                    ("KVM_SET_XCRS", Unchanged),
                    ("KVM_SET_XSAVE", Discard),
                    ("KVM_SET_MSRS", Discard),
                ][..],
            ),
            (
                &live,
                &[
                    ("KVM_SET_MSRS", Unchanged),
                    ("KVM_SET_XCRS", Discard),
                    ("KVM_SET_XSAVE", Discard),
                ],
            ),
            (
                &reset,
                &[("KVM_GET_CPUID2", Unchanged), ("KVM_SET_MSRS", Unchanged)],
            ),
        ] {
            for (index, (name, fate)) in expected.iter().enumerate() {
                let mut vcpu = used(0x602e7, 0);
                vcpu.fail_at = index + 1;
                let before = vcpu.area.clone();
                let error = restore_into(&mut vcpu, state).unwrap_err();
                let text = error.to_string();
                assert!(
                    text.starts_with(name) && text.contains("Cannot allocate"),
                    "{text}"
                );
                assert_eq!(error.vcpu(), *fate, "{text}");
                assert!(std::error::Error::source(&error).is_none());
                if *fate == Unchanged {
                    assert_eq!((vcpu.area, vcpu.xfd, vcpu.xcr0), (before, 0, Some(1)));
                }
            }
        }
    }

    #[test]
    fn a_vcpu_without_cpuid_is_refused_whatever_comes_first() {
        let reset = ExtendedState::reset(&amx_layout());
        for state in [state(0x602e7, 0), state(0x202e7, 1 << 18), reset] {
            let mut vcpu = used(0, 0);
            vcpu.has_cpuid = false;
            let error = restore_into(&mut vcpu, &state).unwrap_err();
            let vcpu_after = VcpuAfter::Unchanged;
            assert_eq!(error, RestoreError::NoCpuid { vcpu: vcpu_after });
            assert_eq!(vcpu.xstate_bv(), 0);
        }
    }

    #[test]
    fn a_refused_register_value_is_named() {
        let refused = |state: &ExtendedState<'_>, msrs_accepted| {
            let mut vcpu = used(0, 0);
            vcpu.msrs_accepted = msrs_accepted;
            restore_into(&mut vcpu, state).unwrap_err()
        };
        let (live, armed) = (state(0x602e7, 0), state(0x202e7, 1 << 18));
        let error = |index, value, vcpu| RestoreError::MsrRefused { index, value, vcpu };
        let (none, tiles) = (XFeatures::empty(), XFeatures::XTILEDATA);
        assert_eq!(refused(&live, 0), error(0x1c4, tiles, VcpuAfter::Unchanged));
        assert_eq!(refused(&live, 2), error(0x1c5, none, VcpuAfter::Discard));
        assert_eq!(refused(&armed, 0), error(0x1c4, tiles, VcpuAfter::Discard));
        assert_eq!(refused(&armed, 1), error(0x1c5, tiles, VcpuAfter::Discard));
    }

    /// The simulated vCPU keeps PKRU as KVM does.
    #[test]
    fn pkru_of_an_earlier_use_does_not_survive() {
        for state in [
            ExtendedState::reset(&amx_layout()),
            state(0x602e7 & !0x200, 0),
        ] {
            let mut vcpu = used(0x202e7, 0);
            vcpu.pkru = 0xb5b5_b3b3;
            restore_into(&mut vcpu, &state).unwrap();
            assert_eq!(vcpu.pkru, 0);
        }
        let mut vcpu = used(0, 0);
        let state = state(0x602e7, 0);
        restore_into(&mut vcpu, &state).unwrap();
        let pkru = state.image().component(ComponentId::PKRU).unwrap();
        assert_eq!(vcpu.pkru.to_le_bytes(), pkru[..4]);
    }

    /// A kernel that keeps areas in the standard format loads MXCSR whatever XSTATE_BV says.
    #[test]
    fn mxcsr_of_an_earlier_use_does_not_survive() {
        let mut vcpu = used(0x2, 0);
        vcpu.area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
        let mut buffer = XsaveBuffer::new(&amx_host(false));
        let reset = ExtendedState::reset(&amx_layout());
        restore(&mut vcpu, &reset, &amx_vcpu_layout(), &mut buffer).unwrap();
        assert_eq!(vcpu.area[24..28], 0x1f80u32.to_le_bytes());
        assert_eq!(vcpu.area[160..416], [0; 256]);
        assert_eq!(vcpu.xstate_bv(), 0x202);
    }

    /// XMM is initial then: what lay there must not come into use.
    #[test]
    fn mxcsr_that_avx_alone_holds_is_given_to_kvm_with_sse() {
        let mut area = amx_area(0x4);
        area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
        let image = Image::parse(&area, &amx_layout()).unwrap();
        let state = ExtendedState::new(image, Registers::RESET).unwrap();
        let mut vcpu = used(0x2, 0);
        restore_into(&mut vcpu, &state).unwrap();
        assert_eq!(vcpu.xstate_bv(), 0x206);
        assert_eq!(vcpu.area[24..28], 0x1fa0u32.to_le_bytes());
        assert_eq!(vcpu.area[160..416], [0; 256]);
        assert_eq!(vcpu.area[576..832], area[576..832]);
    }

    #[test]
    fn mxcsr_that_nothing_loads_is_given_to_kvm_as_initial() {
        let mut area = amx_area(1);
        area[24..28].copy_from_slice(&0xffc0u32.to_le_bytes());
        let image = Image::parse(&area, &amx_layout()).unwrap();
        let state = ExtendedState::new(image, Registers::RESET).unwrap();
        let mut vcpu = used(0, 0);
        restore_into(&mut vcpu, &state).unwrap();
        assert_eq!(vcpu.area[24..28], 0x1f80u32.to_le_bytes());
    }

    /// KVM would accept it, and the guest would have other bytes in AVX.
    #[test]
    fn a_state_laid_out_otherwise_is_refused_before_any_ioctl() {
        let elsewhere = Layout::from_parts([Component::user(ComponentId::AVX, 640, 256)], []);
        let elsewhere = elsewhere.unwrap();
        let mut area = [0; 1024];
        area[512] = 4;
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let image = Image::parse(&area, &elsewhere).unwrap();
        let state = ExtendedState::new(image, Registers::RESET).unwrap();
        let mut vcpu = used(0, 0);
        let error = restore_into(&mut vcpu, &state).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the state does not fit the vCPU: AVX is at offset 640 in the state and at 576 on the target"
        );
        assert_eq!(error.vcpu(), VcpuAfter::Unchanged);
        assert!(vcpu.log.is_empty());
    }

    /// KVM accepts a component that the host has and the guest's CPUID lacks.
    #[test]
    fn a_component_that_the_vcpu_lacks_is_refused_before_any_ioctl() {
        let layout = vcpu_layout_of(XFeatures::from_bits_retain(0x7));
        let mut vcpu = used(0, 0);
        let error = restore(&mut vcpu, &state(0x602e7, 0), &layout, &mut amx_buffer());
        assert_eq!(
            error.unwrap_err().to_string(),
            "the state does not fit the vCPU: the target lacks opmask, and 6 more \
             reasons"
        );
        assert!(vcpu.log.is_empty());
    }

    /// The length proof: nothing in use is cut off, and what is not in use needs no room.
    #[test]
    fn a_state_larger_than_what_kvm_copies_is_refused() {
        let host = HostArea::new(4096, amx_layout(), true).unwrap();
        let mut buffer = XsaveBuffer::new(&host);
        let mut vcpu = SimulatedVcpu::new(&amx_area(0)[..4096]);
        let layout = amx_vcpu_layout();
        let error = restore(&mut vcpu, &state(0x602e7, 0), &layout, &mut buffer).unwrap_err();
        assert_eq!(
            error,
            RestoreError::TooLarge {
                state_bytes: 11_008,
                kvm_bytes: 4096
            }
        );
        assert!(vcpu.log.is_empty());
        restore(&mut vcpu, &state(0x2e7, 0), &layout, &mut buffer).unwrap();
    }

    #[test]
    fn bytes_of_an_earlier_use_of_the_buffer_do_not_come_into_use() {
        let layout = VcpuLayout::new(&Layout::legacy(), &amx_host(true)).unwrap();
        let state = ExtendedState::reset(layout.layout());
        let mut vcpu = used(0, 0);
        let mut buffer = amx_buffer();
        buffer.bytes_mut().fill(0xaa);
        restore(&mut vcpu, &state, &layout, &mut buffer).unwrap();
        assert_eq!(vcpu.xstate_bv(), 0);
        let parts: Vec<_> = amx_layout().components().skip(2).copied().collect();
        let wider = Layout::from_parts(parts, [Palette::ONE]).unwrap();
        let wider = VcpuLayout::new(&wider, &amx_host(true)).unwrap();
        buffer.bytes_mut().fill(0xaa);
        restore(&mut vcpu, &state, &wider, &mut buffer).unwrap();
        assert_eq!((vcpu.xstate_bv(), vcpu.pkru), (0x200, 0));
    }
}
