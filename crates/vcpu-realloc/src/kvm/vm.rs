//! The gate of a VM: the MSR filter, and what its vCPUs share.

use alloc::sync::Arc;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{Cap, MsrExitReason, VmFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::MSR_IA32_XFD;
use xsave_state::{Layout, XFeatures};

use super::driver::ExitHandler;
use super::filter::{FilterError, MsrFilter};
use super::ioctl::VmHandle;
use super::policy::{Policy, Progress};
use crate::gate::{Event, Gate, Growth};
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
pub struct VmGate(Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    vm: VmHandle,
    layout: Layout,
    options: Options,
    /// `options.filter` with IA32_XFD in it. `None`: nothing is trapped in this VM.
    merged: Option<MsrFilter>,
    mode: Mode,
    progress: Mutex<Progress>,
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
        let merged = match mode {
            Mode::Trapping => {
                let merged = options.filter.with_write_denied(MSR_IA32_XFD);
                Some(merged.map_err(InstallError::Merge)?)
            }
            _ => None,
        };
        let shared = Shared {
            vm,
            layout: layout.clone(),
            options,
            merged,
            mode,
            progress: Mutex::default(),
        };
        shared.trap()?;
        Ok(Self(Arc::new(shared)))
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
        let shared = &self.0;
        let mut gate = Gate::new(&shared.layout);
        let mut progress = shared.progress();
        let due = match shared.mode {
            Mode::AtCpuidTime => gate.everything(),
            _ => gate.growth_for(progress.granted),
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
                }
                Answer::Deny if shared.mode == Mode::AtCpuidTime => {
                    return Err(StartError::Denied { growth });
                }
                Answer::Deny => return Err(StartError::DeniedAfterFirstUse { vcpu, growth }),
                Answer::Later => return Err(StartError::Undecided { growth }),
            }
        }
        if progress.lifted && !gate.has_passed() {
            shared.trap().map_err(StartError::Trap)?;
            progress.lifted = false;
            progress.reasons_are_due = false;
        }
        progress.enter(gate.has_passed());
        drop(progress);
        Ok(ExitHandler::new(gate, vcpu, self.clone()))
    }

    /// How it works just now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        match self.0.mode {
            Mode::Trapping if self.0.progress().lifted => Mode::Lifted,
            mode => mode,
        }
    }

    /// The vCPU that was the first to use a feature, where one has.
    #[must_use]
    pub fn first_use(&self) -> Option<u64> {
        self.0.progress().first_use
    }

    /// The features for which all vCPUs have state, under [`Policy::WholeVm`]. A vCPU that is added
    /// has them from the start, so its memory is due then.
    #[must_use]
    pub fn granted(&self) -> XFeatures {
        self.0.progress().granted
    }

    /// Gives the VM the VMM's own filter and exit reasons again where nobody has to be asked any more,
    /// and gives whether it did. Handlers do that themselves; this is for a VMM whose handler got
    /// [`HandleError::Lift`](super::HandleError::Lift) or
    /// [`ObserveError::Lift`](super::ObserveError::Lift).
    ///
    /// # Errors
    ///
    /// KVM refuses. Call it again, as often as it takes; [`TrapError`] says what is as before until then.
    pub fn lift(&self) -> Result<bool, TrapError> {
        let shared = &self.0;
        let mut progress = shared.progress();
        let complete = progress.is_complete(shared.options.policy, shared.layout.xfd());
        if shared.merged.is_none() || !complete {
            return Ok(false);
        }
        // The filter comes first: without the capability a filtered write is #GP for the guest. When
        // the call is over no vCPU is deciding by the old one (`synchronize_srcu` in
        // `kvm_vm_ioctl_set_msr_filter`), so it is safe to go on.
        let options = &shared.options;
        let vm = &shared.vm;
        if !progress.lifted {
            vm.set_filter(&options.filter).map_err(TrapError::Filter)?;
            progress.lifted = true;
            progress.reasons_are_due = true;
        }
        if !progress.reasons_are_due {
            return Ok(false);
        }
        vm.set_exit_reasons(options.exit_reasons)
            .map_err(TrapError::ExitReasons)?;
        progress.reasons_are_due = false;
        Ok(true)
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.0
    }
}

impl Shared {
    pub(super) fn policy(&self) -> Policy {
        self.options.policy
    }

    pub(super) fn scope(&self) -> Scope {
        match self.options.policy {
            Policy::WholeVm => Scope::Vm,
            Policy::EachVcpu => Scope::Vcpu,
        }
    }

    /// Held while the VMM is asked, so that two vCPUs at once are one first use.
    pub(super) fn progress(&self) -> MutexGuard<'_, Progress> {
        // It is changed in one piece, after everything that can panic.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trap(&self) -> Result<(), TrapError> {
        let Some(merged) = &self.merged else {
            return Ok(());
        };
        // The capability comes first: without it a filtered write is #GP for the guest.
        let reasons = self.options.exit_reasons | MsrExitReason::Filter;
        self.vm
            .set_exit_reasons(reasons)
            .map_err(TrapError::ExitReasons)?;
        self.vm.set_filter(merged).map_err(|errno| {
            // As it was before; where that fails as well, more accesses leave than the VMM asked for.
            let _ = self.vm.set_exit_reasons(self.options.exit_reasons);
            TrapError::Filter(errno)
        })
    }
}

/// The trap could not be set or lifted. To set it takes both ioctls or none. To lift it, the filter goes
/// first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TrapError {
    /// KVM_ENABLE_CAP failed. If the trap was being lifted, the filter is the VMM's own again and no
    /// write of IA32_XFD leaves, so that no handler tries again; but until [`VmGate::lift`] succeeds
    /// accesses that the filter denies leave to the VMM, even if it wants #GP for them.
    #[error("KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR: {0}")]
    ExitReasons(Errno),
    /// KVM_X86_SET_MSR_FILTER failed. If the trap was being lifted, it is still set, and the next write
    /// of IA32_XFD tries again.
    #[error("KVM_X86_SET_MSR_FILTER: {0}")]
    Filter(Errno),
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
