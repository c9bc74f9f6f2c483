//! The steps that put a state into a vCPU: in their order, as data, and executed.

use core::fmt;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use super::xfd::{self, WriteXfdError};
use super::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use crate::feature::XFeatures;
use crate::state::{ExtendedState, Registers};

/// One step of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// See that the vCPU has its CPUID.
    RequireCpuid,
    /// Release the components that the next step disables.
    Release(XFeatures),
    /// KVM_SET_MSRS of IA32_XFD.
    SetXfd(XFeatures),
    /// KVM_SET_MSRS of IA32_XFD_ERR.
    SetXfdErr(XFeatures),
    /// KVM_SET_XCRS.
    SetXcr0(XFeatures),
    /// KVM_SET_XSAVE, with this XSTATE_BV.
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
            Self::SetXfd(_) => {
                "before KVM_SET_XSAVE, so that no area is ever in place with a component in use \
                 that IA32_XFD then disables"
            }
            Self::SetXfdErr(_) => {
                "a guest in the middle of handling #NM reads from it which component it was"
            }
            Self::SetXcr0(_) => {
                "KVM checks it against the vCPU's CPUID, so a guest that lacks AMX is told here"
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
            Self::SetXfd(value) => write!(f, "set IA32_XFD to {value} (KVM_SET_MSRS)"),
            Self::SetXfdErr(value) => write!(f, "set IA32_XFD_ERR to {value} (KVM_SET_MSRS)"),
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
    steps: [Option<Step>; 6],
}

impl<'s> RestorePlan<'s> {
    /// The plan for a state. The steps for IA32_XFD are left out where the layout has nothing that
    /// it could disable.
    #[must_use]
    pub fn new(state: &'s ExtendedState<'s>) -> Self {
        let Registers { xcr0, xfd, xfd_err } = state.registers();
        let has_xfd = !state.layout().xfd().is_empty();
        Self {
            state,
            steps: [
                Some(Step::RequireCpuid),
                (!xfd.is_empty()).then_some(Step::Release(xfd)),
                has_xfd.then_some(Step::SetXfd(xfd)),
                has_xfd.then_some(Step::SetXfdErr(xfd_err)),
                Some(Step::SetXcr0(xcr0)),
                Some(Step::SetXsave(state.image().xstate_bv())),
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
                self.fits(buffer)?;
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
            Step::SetXfd(value) => {
                write_msr(vcpu, buffer, MSR_IA32_XFD, value)?;
                *after = VcpuAfter::Discard;
            }
            Step::SetXfdErr(value) => {
                write_msr(vcpu, buffer, MSR_IA32_XFD_ERR, value)?;
                *after = VcpuAfter::Discard;
            }
            Step::SetXcr0(value) => {
                vcpu.write_xcr0(value.bits())?;
                *after = VcpuAfter::Discard;
            }
            Step::SetXsave(_) => {
                // KVM may have taken over part of it.
                *after = VcpuAfter::Discard;
                buffer.fill_with(self.state.image().as_bytes());
                vcpu.write_area(buffer)?;
            }
        }
        Ok(())
    }

    /// Everything in use must have its place in what KVM copies.
    fn fits(&self, buffer: &XsaveBuffer) -> Result<(), Cause> {
        let in_use = self.state.image().xstate_bv();
        let state_bytes = self.state.layout().standard_size_of(in_use);
        let kvm_bytes = buffer.size().bytes();
        if state_bytes > kvm_bytes {
            return Err(Cause::TooLarge {
                in_use,
                state_bytes,
                kvm_bytes,
            });
        }
        Ok(())
    }
}

fn write_msr(
    vcpu: &impl Vcpu,
    buffer: &mut XsaveBuffer,
    index: u32,
    value: XFeatures,
) -> Result<(), Cause> {
    if vcpu.write_msr(buffer, index, value.bits())? {
        Ok(())
    } else {
        Err(Cause::MsrRefused { index, value })
    }
}

/// Puts a state into a vCPU that has its CPUID and is not running: makes the plan and executes it.
/// Allocates nothing. `buffer` is scratch space.
///
/// The state must fit the host: compare the layouts first, with
/// [`Layout::misfits`](crate::Layout::misfits).
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
    #[source]
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
        "{in_use} needs {state_bytes} bytes, but KVM copies {kvm_bytes}: ask for the guest \
         permission (ARCH_REQ_XCOMP_GUEST_PERM) before the first vCPU"
    )]
    TooLarge {
        /// XSTATE_BV of the state.
        in_use: XFeatures,
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
    #[error("{0}")]
    Errno(#[from] Errno),
}
