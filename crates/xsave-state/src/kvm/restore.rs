//! The steps that put a state into a vCPU: in their order, as data, and executed.

use core::fmt;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use super::xfd::{self, WriteXfdError, disableable};
use super::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use crate::feature::XFeatures;
use crate::state::{ExtendedState, Registers};

/// One step of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// See that the vCPU has its CPUID. In the plan only where XCR0 is x87 alone, which KVM takes
    /// without a CPUID: with any other XCR0, [`SetXcr0`](Self::SetXcr0) notices, or
    /// [`SetXfd`](Self::SetXfd) before it where IA32_XFD is not 0.
    RequireCpuid,
    /// Release the components that the next step disables.
    Release(XFeatures),
    /// KVM_SET_MSRS of IA32_XFD and, in the same call, IA32_XFD_ERR.
    SetXfd {
        /// IA32_XFD.
        xfd: XFeatures,
        /// IA32_XFD_ERR, which a guest in the middle of handling #NM reads.
        xfd_err: XFeatures,
    },
    /// KVM_SET_XCRS.
    SetXcr0(XFeatures),
    /// KVM_SET_XSAVE, with this XSTATE_BV: the state's, and SSE with it where AVX alone holds an MXCSR
    /// that is not initial. Kernels that keep the area in the compacted format would lose that.
    SetXsave(XFeatures),
}

impl Step {
    /// Why this step is done, and done here.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::RequireCpuid => {
                "the first KVM_SET_CPUID2 with AMX throws the area away, and before it \
                 KVM_SET_XSAVE keeps x87 and SSE only, without an error"
            }
            Self::Release(_) => {
                "what the vCPU has in use may not be disabled: the host could not load its area"
            }
            Self::SetXfd { .. } => {
                "before KVM_SET_XSAVE, so that no area is ever in place with a component in use \
                 that IA32_XFD then disables"
            }
            Self::SetXcr0(_) => {
                "before KVM_SET_XSAVE, because KVM checks it against the vCPU's CPUID: one that \
                 lacks a component, or is not set, is noticed here"
            }
            Self::SetXsave(_) => "last, when XFD and CPUID are in place",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RequireCpuid => f.write_str("see that CPUID is set (KVM_GET_CPUID2)"),
            Self::Release(features) => {
                write!(f, "release {features} (KVM_GET_XSAVE2, KVM_SET_XSAVE)")
            }
            Self::SetXfd { xfd, xfd_err } => write!(
                f,
                "set IA32_XFD to {xfd} and IA32_XFD_ERR to {xfd_err} (KVM_SET_MSRS)"
            ),
            Self::SetXcr0(value) => write!(f, "set XCR0 to {value} (KVM_SET_XCRS)"),
            Self::SetXsave(in_use) => write!(f, "set the area with {in_use} (KVM_SET_XSAVE)"),
        }
    }
}

/// The steps that put a state into a vCPU, in the only order that is safe on every kernel.
///
/// ```
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0xd, 0, 0, 0],
/// #         (0xd, 0) => [0x7, 832, 832, 0],
/// #         (0xd, 1) => [0xf, 832, 0, 0],
/// #         (0xd, 2) => [256, 576, 0, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
/// # let layout = xsave_state::Layout::from_cpuid(cpuid).unwrap();
/// use xsave_state::ExtendedState;
/// use xsave_state::kvm::RestorePlan;
///
/// let state = ExtendedState::reset(&layout);
/// let plan = RestorePlan::new(&state);
/// let steps: Vec<String> = plan.steps().map(|step| step.to_string()).collect();
/// assert_eq!(steps, [
///     "see that CPUID is set (KVM_GET_CPUID2)",
///     "set XCR0 to x87 (0x1) (KVM_SET_XCRS)",
///     "set the area with none (KVM_SET_XSAVE)",
/// ]);
/// ```
#[derive(Clone, Debug)]
pub struct RestorePlan<'s> {
    state: &'s ExtendedState<'s>,
    steps: [Option<Step>; 5],
}

impl<'s> RestorePlan<'s> {
    /// The plan for a state. Steps that could have no effect are left out: those for IA32_XFD where
    /// the layout has nothing that it could disable (XTILEDATA counts even where the layout's CPUID
    /// hides XFD: the vCPU has the register all the same), and [`Step::RequireCpuid`] where
    /// [`Step::SetXcr0`] shows the same, or the guest has no XSAVE.
    #[must_use]
    pub fn new(state: &'s ExtendedState<'s>) -> Self {
        let Registers { xcr0, xfd, xfd_err } = state.registers();
        let has_xfd = !disableable(state.layout()).is_empty();
        // A CPUID without XSAVE, or none at all, takes nothing away when it is set later.
        let needs_cpuid = xcr0 == XFeatures::X87 && state.layout().user() != XFeatures::LEGACY;
        Self {
            state,
            steps: [
                needs_cpuid.then_some(Step::RequireCpuid),
                (!xfd.is_empty()).then_some(Step::Release(xfd)),
                has_xfd.then_some(Step::SetXfd { xfd, xfd_err }),
                Some(Step::SetXcr0(xcr0)),
                Some(Step::SetXsave(state.image().xstate_bv_with_mxcsr())),
            ],
        }
    }

    /// The steps, in their order.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().flatten().copied()
    }

    /// Does them on a vCPU that is not running. Allocates nothing. `buffer` is scratch space.
    ///
    /// # Errors
    ///
    /// The step that failed, why, and whether the vCPU is as it was or must be discarded.
    pub fn execute(&self, vcpu: &VcpuFd, buffer: &mut XsaveBuffer) -> Result<(), RestoreError> {
        self.execute_on(vcpu, buffer)
    }

    pub(super) fn execute_on(
        &self,
        vcpu: &impl Vcpu,
        buffer: &mut XsaveBuffer,
    ) -> Result<(), RestoreError> {
        let mut after = VcpuAfter::Unchanged;
        self.fits(buffer)?;
        for step in self.steps() {
            self.step(step, vcpu, buffer, &mut after)
                .map_err(|cause| RestoreError {
                    step,
                    cause,
                    vcpu: after,
                })?;
        }
        Ok(())
    }

    /// Does one step. `after` becomes [`VcpuAfter::Discard`] as soon as something may have changed.
    fn step(
        &self,
        step: Step,
        vcpu: &impl Vcpu,
        buffer: &mut XsaveBuffer,
        after: &mut VcpuAfter,
    ) -> Result<(), Cause> {
        match step {
            Step::RequireCpuid => {
                if !vcpu.has_cpuid()? {
                    return Err(Cause::NoCpuid);
                }
            }
            Step::Release(features) => {
                let released = xfd::release(vcpu, features, buffer);
                *after = match released {
                    Ok(released) if released.is_empty() => VcpuAfter::Unchanged,
                    Err(WriteXfdError::Read(_)) => VcpuAfter::Unchanged,
                    _ => VcpuAfter::Discard,
                };
                released.map_err(Cause::Release)?;
            }
            Step::SetXfd { xfd, xfd_err } => {
                let taken = vcpu.write_xfd(buffer, xfd.bits(), Some(xfd_err.bits()))?;
                if taken > 0 {
                    *after = VcpuAfter::Discard;
                }
                let (index, value) = match taken {
                    // As for XCR0: another remedy.
                    0 if matches!(vcpu.has_cpuid(), Ok(false)) => return Err(Cause::NoCpuid),
                    0 => (MSR_IA32_XFD, xfd),
                    1 => (MSR_IA32_XFD_ERR, xfd_err),
                    _ => return Ok(()),
                };
                return Err(Cause::MsrRefused { index, value });
            }
            Step::SetXcr0(value) => {
                if let Err(errno) = vcpu.write_xcr0(value.bits()) {
                    // KVM says EINVAL for a vCPU without CPUID too, which needs another remedy.
                    return Err(match vcpu.has_cpuid() {
                        Ok(false) => Cause::NoCpuid,
                        _ => errno.into(),
                    });
                }
                *after = VcpuAfter::Discard;
            }
            Step::SetXsave(_) => {
                // KVM may have taken over part of it.
                *after = VcpuAfter::Discard;
                buffer.fill_with(self.state.image());
                vcpu.write_area(buffer)?;
            }
        }
        Ok(())
    }

    /// Everything in use must have its place in what KVM copies.
    fn fits(&self, buffer: &XsaveBuffer) -> Result<(), RestoreError> {
        let in_use = self.state.image().xstate_bv_with_mxcsr();
        let state_bytes = self.state.layout().standard_size_of(in_use);
        let kvm_bytes = buffer.size().bytes();
        if state_bytes > kvm_bytes {
            return Err(RestoreError {
                step: Step::SetXsave(in_use),
                cause: Cause::TooLarge {
                    state_bytes,
                    kvm_bytes,
                },
                vcpu: VcpuAfter::Unchanged,
            });
        }
        Ok(())
    }
}

/// Puts a state into a vCPU that has its CPUID and is not running: makes the plan and executes it.
/// Allocates nothing. `buffer` is scratch space.
///
/// The state must fit the vCPU: see that it has no [`misfits`](ExtendedState::misfits) first. KVM
/// refuses most of what does not fit, but not all, and some of it at the last step.
///
/// # Errors
///
/// See [`RestorePlan::execute`].
pub fn restore(
    vcpu: &VcpuFd,
    state: &ExtendedState<'_>,
    buffer: &mut XsaveBuffer,
) -> Result<(), RestoreError> {
    RestorePlan::new(state).execute(vcpu, buffer)
}

/// A restore that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("cannot {step}: {cause}. {vcpu}")]
#[non_exhaustive]
pub struct RestoreError {
    /// The step.
    pub step: Step,
    /// Why it failed.
    pub cause: Cause,
    /// What has become of the vCPU.
    pub vcpu: VcpuAfter,
}

/// What a failed restore leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuAfter {
    /// The vCPU is as it was.
    Unchanged,
    /// Part of the state is in it: it must not run.
    Discard,
}

impl fmt::Display for VcpuAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unchanged => "The vCPU is as it was",
            Self::Discard => "The vCPU has part of the state and must be discarded",
        })
    }
}

/// Why a step of a restore failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Cause {
    /// The vCPU has no CPUID.
    #[error("the vCPU has no CPUID yet; call KVM_SET_CPUID2 first")]
    NoCpuid,
    /// The state needs more bytes than KVM copies: this process has not asked for the permission
    /// before its first vCPU.
    #[error(
        "it needs {state_bytes} bytes, but KVM copies {kvm_bytes}: ask for the guest permission \
         (ARCH_REQ_XCOMP_GUEST_PERM) before the first vCPU"
    )]
    TooLarge {
        /// Where the last component in use ends.
        state_bytes: usize,
        /// [`XsaveSize`](super::XsaveSize).
        kvm_bytes: usize,
    },
    /// A component that is to be disabled could not be released.
    #[error(transparent)]
    Release(WriteXfdError),
    /// KVM does not accept the value.
    #[error(
        "KVM refuses {value} for MSR {index:#x}: the vCPU's CPUID lacks it, or the host has no XFD"
    )]
    MsrRefused {
        /// The register.
        index: u32,
        /// The value.
        value: XFeatures,
    },
    /// The ioctl failed.
    #[error(transparent)]
    Errno(#[from] Errno),
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::image::Image;
    use crate::kvm::simulated::{
        SimulatedVcpu, amx_area, amx_buffer, amx_layout, amx_layout_without_xfd,
    };
    use crate::layout::Layout;

    fn state(xstate_bv: u64, xfd: u64) -> ExtendedState<'static> {
        let registers = Registers {
            xcr0: XFeatures::from_bits_retain(0x602e7),
            xfd: XFeatures::from_bits_retain(xfd),
            xfd_err: XFeatures::from_bits_retain(xfd),
        };
        let area = amx_area(xstate_bv);
        let image = Image::parse(&area, &amx_layout()).unwrap().into_owned();
        ExtendedState::new(image, registers).unwrap()
    }

    /// The same from a guest whose CPUID hides XFD, or a snapshot that keeps quiet about it.
    fn state_without_xfd(xstate_bv: u64) -> ExtendedState<'static> {
        let registers = Registers {
            xcr0: XFeatures::from_bits_retain(0x602e7),
            ..Registers::RESET
        };
        let area = amx_area(xstate_bv);
        let image = Image::parse(&area, &amx_layout_without_xfd()).unwrap();
        ExtendedState::new(image.into_owned(), registers).unwrap()
    }

    /// A vCPU that was used before: tiles live, or XFD armed.
    fn used(xstate_bv: u64, xfd: u64) -> SimulatedVcpu {
        let vcpu = SimulatedVcpu::new(&amx_area(xstate_bv));
        vcpu.xfd.set(xfd);
        vcpu
    }

    #[test]
    fn everything_arrives() {
        let state = state(0x202e7, 1 << 18);
        let vcpu = used(0, 0);
        RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap();
        assert_eq!(vcpu.xfd.get(), 1 << 18);
        assert_eq!(vcpu.xfd_err.get(), 1 << 18);
        assert_eq!(vcpu.xcr0.get(), Some(0x602e7));
        assert_eq!(*vcpu.area.borrow(), state.image().as_bytes());
    }

    /// Every restore, from every state of the vCPU to every state, failing at every ioctl or not at
    /// all: at no moment is a component in use and disabled, so the host lives whenever the vCPU
    /// runs next.
    #[test]
    fn at_no_step_does_the_vcpu_endanger_its_host() {
        let vcpus = [(0, 0), (0x602e7, 0), (0x202e7, 1 << 18), (0, 1 << 18)];
        let states: Vec<_> = vcpus
            .iter()
            .map(|&(xstate_bv, xfd)| state(xstate_bv, xfd))
            .chain([0, 0x602e7].map(state_without_xfd))
            .collect();
        let mut moments = 0;
        for before in vcpus {
            for after in &states {
                for fail_at in 0..9 {
                    let vcpu = used(before.0, before.1);
                    vcpu.fail_at.set(fail_at);
                    let plan = RestorePlan::new(after);
                    let mut buffer = amx_buffer();
                    let mut fate = VcpuAfter::Unchanged;
                    for step in plan.steps() {
                        let result = plan.step(step, &vcpu, &mut buffer, &mut fate);
                        assert!(vcpu.host_lives(), "{before:?} -> {after:?} at {step}");
                        moments += 1;
                        if result.is_err() {
                            break;
                        }
                    }
                }
            }
        }
        assert!(moments > 600, "{moments}");
    }

    #[test]
    fn a_state_whose_layout_has_no_xfd_disarms_the_vcpu() {
        let state = state_without_xfd(0x602e7);
        let vcpu = used(0x202e7, 1 << 18);
        vcpu.xfd_err.set(1 << 18);
        RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap();
        assert_eq!((vcpu.xfd.get(), vcpu.xfd_err.get()), (0, 0));
        assert_eq!(vcpu.xstate_bv(), 0x602e7);
    }

    /// The control of the test above: it sees what the wrong orders do.
    #[test]
    fn the_wrong_orders_would_endanger_the_host() {
        // SET_XSAVE with live tiles, then XFD.
        let vcpu = used(0, 0);
        let live = state(0x602e7, 0);
        let mut buffer = amx_buffer();
        buffer.fill_with(live.image());
        vcpu.write_area(&buffer).unwrap();
        vcpu.write_xfd(&mut buffer, 1 << 18, None).unwrap();
        assert!(!vcpu.host_lives());

        // Live tiles, then XFD alone.
        let vcpu = used(0x602e7, 0);
        vcpu.write_xfd(&mut buffer, 1 << 18, None).unwrap();
        assert!(!vcpu.host_lives());
    }

    #[test]
    fn the_order_is_release_xfd_xcr0_area() {
        let state = state(0x202e7, 1 << 18);
        let plan = RestorePlan::new(&state);
        let armed = XFeatures::XTILEDATA;
        assert_eq!(
            plan.steps().collect::<Vec<_>>(),
            [
                Step::Release(armed),
                Step::SetXfd {
                    xfd: armed,
                    xfd_err: armed
                },
                Step::SetXcr0(XFeatures::from_bits_retain(0x602e7)),
                Step::SetXsave(XFeatures::from_bits_retain(0x202e7)),
            ]
        );
        let vcpu = used(0x602e7, 0);
        plan.execute_on(&vcpu, &mut amx_buffer()).unwrap();
        assert_eq!(
            *vcpu.log.borrow(),
            [
                "GET_XSAVE2",
                "SET_XSAVE",
                "SET_MSRS",
                "SET_XCRS",
                "SET_XSAVE"
            ]
        );
        for step in plan.steps() {
            assert!(!step.reason().is_empty());
        }
    }

    #[test]
    fn each_failing_ioctl_names_its_step_and_what_became_of_the_vcpu() {
        let state = state(0x202e7, 1 << 18);
        let plan = RestorePlan::new(&state);
        let armed = XFeatures::XTILEDATA;
        let expected = [
            (Step::Release(armed), VcpuAfter::Unchanged), // GET_XSAVE2
            (Step::Release(armed), VcpuAfter::Discard),   // SET_XSAVE
            (
                Step::SetXfd {
                    xfd: armed,
                    xfd_err: armed,
                },
                VcpuAfter::Discard,
            ),
            (Step::SetXcr0(state.registers().xcr0), VcpuAfter::Discard),
            (
                Step::SetXsave(state.image().xstate_bv()),
                VcpuAfter::Discard,
            ),
        ];
        for (ioctl, (step, after)) in expected.into_iter().enumerate() {
            let vcpu = used(0x602e7, 0);
            vcpu.fail_at.set(ioctl + 1);
            let before = vcpu.area.borrow().clone();
            let error = plan.execute_on(&vcpu, &mut amx_buffer()).unwrap_err();
            assert_eq!((error.step, error.vcpu), (step, after), "{error}");
            // The cause is in its text, once.
            assert!(error.to_string().contains("Cannot allocate"), "{error}");
            assert!(std::error::Error::source(&error).is_none());
            if after == VcpuAfter::Unchanged {
                assert_eq!(*vcpu.area.borrow(), before);
                assert_eq!(vcpu.xfd.get(), 0);
                assert_eq!(vcpu.xcr0.get(), Some(1));
            }
        }
    }

    #[test]
    fn a_vcpu_without_cpuid_is_refused_at_reset_by_a_step_of_its_own() {
        let vcpu = used(0, 0);
        vcpu.has_cpuid.set(false);
        let state = ExtendedState::reset(&amx_layout());
        let error = RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap_err();
        assert_eq!(error.step, Step::RequireCpuid);
        assert_eq!(error.cause, Cause::NoCpuid);
        assert_eq!(error.vcpu, VcpuAfter::Unchanged);
        assert_eq!(*vcpu.log.borrow(), ["GET_CPUID2"]);
    }

    #[test]
    fn a_guest_without_xsave_needs_no_cpuid() {
        let vcpu = used(0, 0);
        vcpu.has_cpuid.set(false);
        let state = ExtendedState::reset(&Layout::legacy());
        RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap();
    }

    #[test]
    fn a_vcpu_without_cpuid_is_refused_by_kvm_with_xcr0() {
        let vcpu = used(0, 0);
        vcpu.has_cpuid.set(false);
        let state = state(0x602e7, 0);
        let error = RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap_err();
        assert_eq!(error.step, Step::SetXcr0(state.registers().xcr0));
        assert_eq!(error.cause, Cause::NoCpuid);
        assert_eq!(vcpu.xstate_bv(), 0);
    }

    #[test]
    fn a_vcpu_without_cpuid_is_refused_by_kvm_with_xfd() {
        let vcpu = used(0, 0);
        vcpu.has_cpuid.set(false);
        let armed = XFeatures::XTILEDATA;
        let state = state(0x202e7, armed.bits());
        let error = RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap_err();
        let (xfd, xfd_err) = (armed, armed);
        assert_eq!(error.step, Step::SetXfd { xfd, xfd_err });
        assert_eq!(error.cause, Cause::NoCpuid);
        assert_eq!(error.vcpu, VcpuAfter::Unchanged);
    }

    #[test]
    fn a_refused_register_value_is_named() {
        let state = state(0x202e7, 1 << 18);
        let refused = |msrs_taken| {
            let vcpu = used(0, 0);
            vcpu.msrs_taken.set(msrs_taken);
            let plan = RestorePlan::new(&state);
            let error = plan.execute_on(&vcpu, &mut amx_buffer()).unwrap_err();
            (error.cause, error.vcpu)
        };
        let value = XFeatures::XTILEDATA;
        let cause = |index| Cause::MsrRefused { index, value };
        assert_eq!(refused(0), (cause(0x1c4), VcpuAfter::Unchanged));
        assert_eq!(refused(1), (cause(0x1c5), VcpuAfter::Discard));
    }

    /// XMM is initial then: what lay there must not come into use.
    #[test]
    fn mxcsr_that_avx_alone_holds_is_given_to_kvm_with_sse() {
        let mut area = amx_area(0x4);
        area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
        let image = Image::parse(&area, &amx_layout()).unwrap();
        let state = ExtendedState::new(image, Registers::RESET).unwrap();
        let plan = RestorePlan::new(&state);
        let in_use = XFeatures::SSE | XFeatures::AVX;
        assert_eq!(plan.steps().last(), Some(Step::SetXsave(in_use)));
        let vcpu = used(0, 0);
        plan.execute_on(&vcpu, &mut amx_buffer()).unwrap();
        assert_eq!(vcpu.xstate_bv(), in_use.bits());
        let given = vcpu.area.borrow();
        assert_eq!(given[..160], area[..160]);
        assert_eq!(given[160..416], [0; 256]);
        assert_eq!(given[576..], area[576..]);
    }

    #[test]
    fn mxcsr_that_nothing_loads_is_given_to_kvm_as_initial() {
        let mut area = amx_area(1);
        area[24..28].copy_from_slice(&0xffc0u32.to_le_bytes());
        let image = Image::parse(&area, &amx_layout()).unwrap();
        let state = ExtendedState::new(image, Registers::RESET).unwrap();
        let vcpu = used(0, 0);
        RestorePlan::new(&state)
            .execute_on(&vcpu, &mut amx_buffer())
            .unwrap();
        assert_eq!(vcpu.area.borrow()[24..28], 0x1f80u32.to_le_bytes());
    }

    /// The length proof: nothing in use is cut off, and what is not in use needs no room.
    #[test]
    fn a_state_larger_than_what_kvm_copies_is_refused() {
        let size = crate::kvm::XsaveSize::from_capability(4096).unwrap();
        let mut buffer = XsaveBuffer::new(size);
        let vcpu = SimulatedVcpu::new(&amx_area(0)[..4096]);
        let live = state(0x602e7, 0);
        let error = RestorePlan::new(&live)
            .execute_on(&vcpu, &mut buffer)
            .unwrap_err();
        assert_eq!(
            error.cause,
            Cause::TooLarge {
                state_bytes: 11_008,
                kvm_bytes: 4096
            }
        );
        assert!(vcpu.log.borrow().is_empty());

        let idle = state(0x2e7, 0);
        RestorePlan::new(&idle)
            .execute_on(&vcpu, &mut buffer)
            .unwrap();
        assert_eq!(*vcpu.area.borrow(), idle.image().as_bytes()[..4096]);
    }

    #[test]
    fn bytes_of_an_earlier_use_of_the_buffer_do_not_reach_the_vcpu() {
        let layout = crate::Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0xd, 0, 0, 0],
            (0xd, 0) => [3, 576, 576, 0],
            _ => [0; 4],
        })
        .unwrap();
        let state = ExtendedState::reset(&layout);
        let vcpu = used(0, 0);
        let mut buffer = amx_buffer();
        buffer.area_mut().fill(0xaa);
        RestorePlan::new(&state)
            .execute_on(&vcpu, &mut buffer)
            .unwrap();
        assert!(vcpu.area.borrow()[576..].iter().all(|&byte| byte == 0));
    }
}
