//! The trap on IA32_XFD in a VM: set, lifted, and changed with the VMM's own filter.

use kvm_ioctls::MsrExitReason;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::MSR_IA32_XFD;

use super::filter::{FilterError, MsrFilter};
use super::ioctl::VmHandle;

/// A VM's MSR filter: the VMM's own, and the same with IA32_XFD in it.
#[derive(Debug)]
pub(super) struct Trap {
    vm: VmHandle,
    own: MsrFilter,
    own_reasons: MsrExitReason,
    /// `None`: nothing is trapped in this VM.
    merged: Option<MsrFilter>,
    /// The filter is the VMM's own.
    lifted: bool,
    /// But the exit reasons are not yet.
    reasons_are_due: bool,
}

impl Trap {
    /// Nothing is set yet.
    pub(super) fn new(
        vm: VmHandle,
        own: MsrFilter,
        own_reasons: MsrExitReason,
        traps: bool,
    ) -> Result<Self, FilterError> {
        Ok(Self {
            vm,
            merged: traps.then(|| merge(&own)).transpose()?,
            own,
            own_reasons,
            lifted: false,
            reasons_are_due: false,
        })
    }

    pub(super) fn is_lifted(&self) -> bool {
        self.lifted
    }

    /// Sets it, for the first time or again.
    pub(super) fn set(&mut self) -> Result<(), TrapError> {
        let Some(merged) = &self.merged else {
            return Ok(());
        };
        // The capability comes first: without it a filtered write is #GP for the guest.
        let reasons = self.own_reasons | MsrExitReason::Filter;
        self.vm
            .set_exit_reasons(reasons)
            .map_err(TrapError::ExitReasons)?;
        self.vm.set_filter(merged).map_err(|errno| {
            // As it was before; where that fails as well, more accesses leave than the VMM asked for.
            let _ = self.vm.set_exit_reasons(self.own_reasons);
            TrapError::Filter(errno)
        })?;
        self.lifted = false;
        self.reasons_are_due = false;
        Ok(())
    }

    /// Gives the VM the VMM's own filter and exit reasons, and says whether that was to be done.
    pub(super) fn lift(&mut self) -> Result<bool, TrapError> {
        if self.merged.is_none() {
            return Ok(false);
        }
        // The filter comes first: without the capability a filtered write is #GP for the guest. When
        // the call is over no vCPU is deciding by the old one (`synchronize_srcu` in
        // `kvm_vm_ioctl_set_msr_filter`), so it is safe to go on.
        if !self.lifted {
            self.vm.set_filter(&self.own).map_err(TrapError::Filter)?;
            self.lifted = true;
            self.reasons_are_due = true;
        }
        if !self.reasons_are_due {
            return Ok(false);
        }
        self.vm
            .set_exit_reasons(self.own_reasons)
            .map_err(TrapError::ExitReasons)?;
        self.reasons_are_due = false;
        Ok(true)
    }

    /// Takes another filter of the VMM's own. What is in force is changed without a gap in the trap.
    pub(super) fn change(
        &mut self,
        own: MsrFilter,
        own_reasons: MsrExitReason,
    ) -> Result<(), SetFilterError> {
        let merged = match &self.merged {
            Some(_) => Some(merge(&own).map_err(SetFilterError::Merge)?),
            None => None,
        };
        let (force, trapped) = match &merged {
            Some(merged) if !self.lifted => (merged, MsrExitReason::Filter),
            _ => (&own, MsrExitReason::empty()),
        };
        // Until the filter is replaced, in one piece, what either of the two wants to leave does.
        let before = self.own_reasons | trapped;
        self.vm
            .set_exit_reasons(before | own_reasons)
            .map_err(TrapError::ExitReasons)?;
        self.vm.set_filter(force).map_err(|errno| {
            let _ = self.vm.set_exit_reasons(before);
            TrapError::Filter(errno)
        })?;
        self.own = own;
        self.own_reasons = own_reasons;
        self.merged = merged;
        self.reasons_are_due = self.lifted;
        self.vm
            .set_exit_reasons(own_reasons | trapped)
            .map_err(TrapError::ExitReasons)?;
        self.reasons_are_due = false;
        Ok(())
    }
}

fn merge(own: &MsrFilter) -> Result<MsrFilter, FilterError> {
    own.with_write_denied(MSR_IA32_XFD)
}

/// The trap could not be set or lifted. To set it takes both ioctls or none. To lift it, the filter goes
/// first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TrapError {
    /// KVM_ENABLE_CAP failed. If the trap was being lifted, the filter is the VMM's own again and no
    /// write of IA32_XFD leaves, so that no handler tries again; but until
    /// [`VmGate::lift`](super::VmGate::lift) succeeds accesses that the filter denies leave to the VMM,
    /// even if it wants #GP for them.
    #[error("KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR: {0}")]
    ExitReasons(Errno),
    /// KVM_X86_SET_MSR_FILTER failed. If the trap was being lifted, it is still set, and the next write
    /// of IA32_XFD tries again.
    #[error("KVM_X86_SET_MSR_FILTER: {0}")]
    Filter(Errno),
}

/// The VMM's own filter could not be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SetFilterError {
    /// It cannot take IA32_XFD on. Nothing was done.
    #[error("the VMM's own MSR filter: {0}")]
    Merge(FilterError),
    /// KVM refused. The filter before is in force, unless it is [`TrapError::ExitReasons`] after the filter
    /// was replaced: then more accesses leave to the VMM than it asked for, and it calls again.
    #[error(transparent)]
    Trap(#[from] TrapError),
}
