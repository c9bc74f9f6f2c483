//! The driver for KVM: a guest's writes of IA32_XFD leave to the VMM and are performed safely.
//!
//! Linux grows a vCPU's area when KVM_SET_CPUID2 exposes AMX, and passes IA32_XFD through by itself
//! after the first write that is not zero. What is here adds the moment of first use, with the
//! VMM's say in it.

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{
    Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::{MSR_IA32_XFD, WriteXfdError, XsaveBuffer, write_xfd};
use xsave_state::{Layout, XFeatures};

use crate::gate::{Action, Event, Fault, Gate, Growth};

/// Makes the writes of IA32_XFD by all vCPUs of a VM leave with KVM_EXIT_X86_WRMSR. Reads do not.
///
/// It sets the VM's only MSR filter: a VMM with a filter of its own adds the register to that one.
///
/// # Errors
///
/// The kernel lacks the capabilities (before 5.10), or refuses them.
pub fn trap_xfd_writes(vm: &VmFd) -> Result<(), TrapError> {
    if !vm.check_extension(Cap::X86UserSpaceMsr) || !vm.check_extension(Cap::X86MsrFilter) {
        return Err(TrapError::Unsupported);
    }
    // The capability comes first: without it a filtered write is #GP for the guest.
    let capability = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(MsrExitReason::Filter.bits()), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability).map_err(TrapError::Capability)?;
    // A clear bit denies.
    let denied = [0];
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base: MSR_IA32_XFD,
        msr_count: 1,
        bitmap: &denied,
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
        .map_err(TrapError::Filter)
}

/// Lets the writes of IA32_XFD by all vCPUs pass again, by removing the VM's MSR filter.
///
/// # Errors
///
/// The kernel's, as it is.
pub fn release_xfd_writes(vm: &VmFd) -> Result<(), TrapError> {
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[])
        .map_err(TrapError::Filter)
}

/// The VMM's answer when a guest first uses a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest may have the state.
    Grant,
    /// It may not: its write raises #GP.
    Deny,
}

/// What became of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Handled {
    /// It is not a write of IA32_XFD. Nothing was done.
    NotOurs,
    /// The write is performed. `released` had state, which the write disabled.
    Written {
        /// These are in their initial state now.
        released: XFeatures,
    },
    /// The guest gets #GP when the vCPU runs next.
    Faulted(Fault),
}

/// The gate of one vCPU, driven by its exits.
///
/// ```no_run
/// use kvm_ioctls::{VcpuExit, VcpuFd};
/// use vcpu_realloc::kvm::{Answer, XfdDriver};
/// use xsave_state::kvm::XsaveBuffer;
///
/// # fn demo(mut vcpu: VcpuFd, layout: xsave_state::Layout, mut buffer: XsaveBuffer) -> Result<(), Box<dyn std::error::Error>> {
/// let mut driver = XfdDriver::new(&layout);
/// loop {
///     match vcpu.run()? {
///         // The exit borrows the vCPU: take out what is needed.
///         VcpuExit::X86Wrmsr(exit) => {
///             let (index, value) = (exit.index, exit.data);
///             let _ = driver.handle(&mut vcpu, index, value, &mut buffer, |growth| {
///                 println!("first use of {growth}");
///                 Answer::Grant
///             })?;
///         }
///         VcpuExit::Hlt => return Ok(()),
///         _ => {}
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct XfdDriver {
    gate: Gate,
}

impl XfdDriver {
    /// For a vCPU after reset; `layout` is that of its own CPUID.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self {
            gate: Gate::new(layout),
        }
    }

    /// The gate: what the guest has and may have.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Handles KVM_EXIT_X86_WRMSR of `value` to MSR `index`. `first_use` is asked when the guest is
    /// about to use features for the first time. `buffer` is scratch space.
    ///
    /// Call KVM_RUN afterwards: it completes the guest's instruction, with #GP where
    /// [`Handled::Faulted`] says so.
    ///
    /// # Errors
    ///
    /// An ioctl failed. The guest's instruction is not completed and nothing is granted: handle the
    /// exit again with the same `index` and `value` before KVM_RUN, or discard the vCPU.
    pub fn handle(
        &mut self,
        vcpu: &mut VcpuFd,
        index: u32,
        value: u64,
        buffer: &mut XsaveBuffer,
        first_use: impl FnOnce(Growth) -> Answer,
    ) -> Result<Handled, HandleError> {
        if index != MSR_IA32_XFD {
            return Ok(Handled::NotOurs);
        }
        // The gate is changed on a copy, so that an error leaves it as it was.
        let mut gate = self.gate.clone();
        // XSETBV never leaves KVM, so this is where the gate learns of XCR0.
        let _ = gate.on(Event::ObserveXcr0(read_xcr0(vcpu)?));
        let xfd = XFeatures::from_bits_retain(value);
        let action = match gate.on(Event::WriteXfd(xfd)) {
            Action::Grow(growth) => gate.on(match first_use(growth) {
                Answer::Grant => Event::Grant(growth.features()),
                Answer::Deny => Event::Deny,
            }),
            action => action,
        };
        let handled = match action {
            Action::InjectGp(fault) => {
                set_error(vcpu, 1);
                Handled::Faulted(fault)
            }
            _ => {
                let released = write_xfd(vcpu, xfd, buffer)?;
                set_error(vcpu, 0);
                Handled::Written { released }
            }
        };
        self.gate = gate;
        Ok(handled)
    }
}

fn read_xcr0(vcpu: &VcpuFd) -> Result<XFeatures, HandleError> {
    let xcrs = vcpu.get_xcrs().map_err(HandleError::Xcrs)?;
    let len = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
    let mut entries = xcrs.xcrs.iter().take(len);
    let xcr0 = entries.find(|entry| entry.xcr == 0);
    let xcr0 = xcr0.ok_or(HandleError::NoXcr0)?;
    Ok(XFeatures::from_bits_retain(xcr0.value))
}

/// What KVM_RUN does with the guest's WRMSR: 0 skips it, 1 raises #GP.
fn set_error(vcpu: &mut VcpuFd, error: u8) {
    vcpu.get_kvm_run().__bindgen_anon_1.msr.error = error;
}

/// The writes of IA32_XFD could not be trapped, or not be let through again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TrapError {
    /// The kernel has no KVM_CAP_X86_USER_SPACE_MSR or no KVM_CAP_X86_MSR_FILTER.
    #[error("KVM cannot let MSR writes leave to the VMM; that needs Linux 5.10")]
    Unsupported,
    /// KVM_ENABLE_CAP failed.
    #[error("KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR: {0}")]
    Capability(#[source] Errno),
    /// KVM_X86_SET_MSR_FILTER failed.
    #[error("KVM_X86_SET_MSR_FILTER: {0}")]
    Filter(#[source] Errno),
}

/// An exit could not be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandleError {
    /// KVM_GET_XCRS failed.
    #[error("KVM_GET_XCRS: {0}")]
    Xcrs(#[source] Errno),
    /// KVM_GET_XCRS gave no XCR0.
    #[error("KVM_GET_XCRS has no XCR0")]
    NoXcr0,
    /// IA32_XFD could not be written.
    #[error(transparent)]
    Write(#[from] WriteXfdError),
}
