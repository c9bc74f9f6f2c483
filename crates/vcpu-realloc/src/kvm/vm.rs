//! The gate of a VM: set up, and its vCPUs added.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::io;

use kvm_ioctls::{Cap, MsrExitReason, VmFd};
use thiserror::Error;
use xsave_state::{Layout, XFeatures};

use super::driver::ExitHandler;
use super::filter::{FilterError, MsrFilter};
use super::ioctl::VmHandle;
use super::policy::Policy;
use super::shared::{FirstUse, Occasion, Shared};
use super::trap::{SetFilterError, Trap, TrapError};
use crate::gate::{Event, Gate, Growth};
use crate::grant::SavedGrant;
use crate::growth::{Answer, Grow, Request, Scope};

/// What a VMM chooses.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who is grown at a first use, and when the filter is lifted.
    pub policy: Policy,
    /// The MSR filter that the VMM has without this crate. It stays in force, and is what remains
    /// when the trap is lifted.
    pub filter: MsrFilter,
    /// The reasons for which the VMM has MSR accesses leave to it without this crate, with
    /// KVM_CAP_X86_USER_SPACE_MSR.
    pub exit_reasons: MsrExitReason,
}

impl Default for Options {
    /// [`Policy::WholeVm`], and a VMM that has nothing to do with MSRs otherwise.
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            filter: MsrFilter::none(),
            exit_reasons: MsrExitReason::empty(),
        }
    }
}

/// How a VM's gate works just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// The guest's CPUID has nothing that IA32_XFD can disable. Nothing was set up.
    Absent,
    /// Writes of IA32_XFD leave, and the first use is asked for.
    Trapping,
    /// All have state. The VM's filter is the VMM's own again, and KVM passes IA32_XFD through.
    Lifted,
    /// KVM cannot let writes leave: no KVM_CAP_X86_USER_SPACE_MSR or no KVM_CAP_X86_MSR_FILTER,
    /// before Linux 5.10. Everything is asked for when a vCPU gets its handler, before its CPUID is
    /// set, which is when Linux itself grows it. A VMM that wants to deny then hides AMX.
    AtCpuidTime,
}

/// The gate of a VM. Its clones are the same gate.
#[derive(Clone, Debug)]
pub struct VmGate {
    shared: Arc<Shared>,
    /// As it was set up.
    mode: Mode,
}

impl VmGate {
    /// Makes writes of IA32_XFD by all vCPUs of the VM leave with KVM_EXIT_X86_WRMSR. Reads do not.
    /// `layout` is that of the CPUID which the vCPUs are to get.
    ///
    /// Where the guest has no such feature, or KVM cannot do it, nothing is set up and
    /// [`mode`](Self::mode) says so: the VMM's code is the same.
    ///
    /// # Errors
    ///
    /// The VMM's own filter cannot take IA32_XFD on, or KVM refuses. Then the VM has the VMM's own
    /// filter, or none.
    pub fn install(vm: &VmFd, layout: &Layout, options: Options) -> Result<Self, InstallError> {
        let can_trap =
            vm.check_extension(Cap::X86UserSpaceMsr) && vm.check_extension(Cap::X86MsrFilter);
        let vm = VmHandle::new(vm).map_err(InstallError::Descriptor)?;
        Self::on(vm, can_trap, layout, options)
    }

    pub(super) fn on(
        vm: VmHandle,
        can_trap: bool,
        layout: &Layout,
        options: Options,
    ) -> Result<Self, InstallError> {
        let mode = match (layout.xfd().is_empty(), can_trap) {
            (true, _) => Mode::Absent,
            (false, true) => Mode::Trapping,
            (false, false) => Mode::AtCpuidTime,
        };
        let Options {
            policy,
            filter,
            exit_reasons,
        } = options;
        let trap = Trap::new(vm, filter, exit_reasons, mode == Mode::Trapping)
            .map_err(InstallError::Merge)?;
        let shared = Arc::new(Shared::new(layout.clone(), policy, trap));
        shared.state().trap.set()?;
        Ok(Self { shared, mode })
    }

    /// The handler for the exits of a vCPU: `vcpu` is the number that KVM_CREATE_VCPU was given. Call
    /// it before KVM_SET_CPUID2.
    ///
    /// The VMM is asked here where there is no later moment: in [`Mode::AtCpuidTime`], and under
    /// [`Policy::WholeVm`] for a vCPU that comes after the VM's first use, which has lifted the trap.
    ///
    /// # Errors
    ///
    /// The VMM was asked and did not grant, or the trap had been lifted and could not be set again
    /// for a vCPU that is new.
    pub fn vcpu<V: Grow>(
        &self,
        vcpu: u64,
        vmm: &mut V,
    ) -> Result<ExitHandler, StartError<V::Error>> {
        let shared = &self.shared;
        let mut gate = Gate::new(&shared.layout);
        let mut state = shared.state();
        let due = match self.mode {
            Mode::AtCpuidTime => gate.everything(),
            _ => gate.growth_for(state.progress.granted),
        };
        if let Some(growth) = due {
            let request = Request {
                vcpu,
                growth,
                scope: Scope::Vcpu,
            };
            match vmm.grow(&request).map_err(StartError::Vmm)? {
                Answer::Grant => {
                    let _ = gate.on(Event::Grant(growth.features()));
                    state.granted(vcpu, growth, Occasion::Created);
                }
                Answer::Deny if self.mode == Mode::AtCpuidTime => {
                    return Err(StartError::Denied { growth });
                }
                Answer::Deny => return Err(StartError::DeniedAfterFirstUse { vcpu, growth }),
                Answer::Later | Answer::Stop => return Err(StartError::Undecided { growth }),
            }
        }
        if state.trap.is_lifted() && !gate.has_passed() {
            state.trap.set().map_err(StartError::Trap)?;
        }
        state.progress.enter(gate.has_passed());
        drop(state);
        Ok(ExitHandler::new(gate, vcpu, shared.clone()))
    }

    /// Replaces the VMM's own MSR filter and exit reasons, as given in [`Options`]. What a VMM does by
    /// itself with KVM_X86_SET_MSR_FILTER or KVM_CAP_X86_USER_SPACE_MSR after
    /// [`install`](Self::install) would remove the trap, and nobody would notice.
    ///
    /// # Errors
    ///
    /// The filter cannot take IA32_XFD on, or KVM refuses.
    pub fn set_filter(
        &self,
        filter: MsrFilter,
        exit_reasons: MsrExitReason,
    ) -> Result<(), SetFilterError> {
        self.shared.state().trap.change(filter, exit_reasons)
    }

    /// How it works just now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        match self.mode {
            Mode::Trapping if self.shared.state().trap.is_lifted() => Mode::Lifted,
            mode => mode,
        }
    }

    /// What has been granted, in its order: which vCPU, when, and how much. Empty before the VM's first
    /// use. It is of this process: it does not travel.
    #[must_use]
    pub fn first_uses(&self) -> Vec<FirstUse> {
        self.shared.state().first_uses.clone()
    }

    /// What is saved with the VM: whether its first use has been, here or before. Read it after all vCPUs
    /// have been [observed](ExitHandler::observe), and hand it to
    /// [`restored`](ExitHandler::restored) where the VM goes on.
    #[must_use]
    pub fn saved_grant(&self) -> SavedGrant {
        SavedGrant::of(self.shared.state().progress.promised)
    }

    /// The features for which all vCPUs have state, under [`Policy::WholeVm`]. A vCPU that is added
    /// has them from the start.
    #[must_use]
    pub fn granted(&self) -> XFeatures {
        self.shared.state().progress.granted
    }

    /// Gives the VM the VMM's own filter and exit reasons again where nobody has to be asked any more,
    /// and gives whether it did. Handlers do that themselves; this is for a VMM whose handler told it in
    /// `lifted` that KVM refused.
    ///
    /// # Errors
    ///
    /// KVM refuses. Call it again, as often as it takes; [`TrapError`] says what is as before until then.
    pub fn lift(&self) -> Result<bool, TrapError> {
        self.shared.lift()
    }
}

/// The writes of IA32_XFD could not be trapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InstallError {
    /// The VM's descriptor could not be duplicated.
    #[error("another descriptor of the VM: {0}")]
    Descriptor(io::Error),
    /// The VMM's own filter cannot take IA32_XFD on.
    #[error("the VMM's own MSR filter: {0}")]
    Merge(FilterError),
    /// KVM refused.
    #[error(transparent)]
    Trap(#[from] TrapError),
}

/// A vCPU could not get its handler.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StartError<E> {
    /// The VMM could not answer: its own error.
    #[error(transparent)]
    Vmm(E),
    /// The VMM denied it in [`Mode::AtCpuidTime`], where there is no other time to ask: hide the features
    /// from the guest's CPUID.
    #[error(
        "denied, and KVM gives no later moment to ask ({growth}): hide AMX from the guest's CPUID"
    )]
    Denied {
        /// What the vCPU was to get.
        growth: Growth,
    },
    /// The VMM denied it for a vCPU that comes after the first use, which under [`Policy::WholeVm`] was
    /// that of all vCPUs: do not add the vCPU, or choose [`Policy::EachVcpu`].
    #[error(
        "denied for vCPU {vcpu}, but the VM's first use was that of all its vCPUs ({growth}): do not \
         add it, or use Policy::EachVcpu"
    )]
    DeniedAfterFirstUse {
        /// The vCPU that was to be added.
        vcpu: u64,
        /// What it was to get.
        growth: Growth,
    },
    /// The VMM answers later, but the handler needs the answer: ask again when it is there.
    #[error("the VMM answers later ({growth}): ask again when it can, before CPUID is set")]
    Undecided {
        /// What the vCPU is to get.
        growth: Growth,
    },
    /// The trap could not be set again.
    #[error(transparent)]
    Trap(TrapError),
}
