//! The exits of one vCPU.

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::{MSR_IA32_XFD, WriteXfdError, XsaveBuffer, write_xfd};
use xsave_state::{ExtendedState, XFeatures};

use super::policy::Policy;
use super::rewind::{self, RewindError};
use super::vm::{TrapError, VmGate};
use crate::gate::{Action, Event, Fault, Gate, Growth};
use crate::growth::{Answer, Grow, Request};

/// What became of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Handled {
    /// It is not a write of IA32_XFD. Nothing was done.
    NotOurs,
    /// The write is performed. Run the vCPU.
    Written {
        /// The features for which the guest got state just now.
        first_use: Option<Growth>,
        /// Components that were in use and that the write disabled: they are initial now.
        released: XFeatures,
        /// The VM's filter is the VMM's own again.
        lifted: bool,
    },
    /// The guest gets #GP. Run the vCPU.
    Faulted(Fault),
    /// The VMM answers later. Do not run the vCPU before [`ExitHandler::resume`].
    Waiting(Growth),
}

/// The gate of one vCPU, driven by its exits. From [`VmGate::vcpu`].
#[derive(Debug)]
pub struct ExitHandler {
    gate: Gate,
    vcpu: u64,
    vm: VmGate,
    /// The value of a write that has left and is not completed.
    pending: Option<XFeatures>,
}

impl ExitHandler {
    pub(super) fn new(gate: Gate, vcpu: u64, vm: VmGate) -> Self {
        Self {
            gate,
            vcpu,
            vm,
            pending: None,
        }
    }

    /// The gate: what the guest has and may have.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The gate of the VM.
    #[must_use]
    pub fn vm(&self) -> &VmGate {
        &self.vm
    }

    /// Handles KVM_EXIT_X86_WRMSR of `value` to MSR `index`. `vmm` is asked when the guest is about
    /// to use features for the first time; `buffer` is scratch space.
    ///
    /// The order of the arguments lets a VMM write it in one expression, although the exit borrows
    /// the vCPU:
    ///
    /// ```no_run
    /// # use kvm_ioctls::{VcpuExit, VcpuFd};
    /// # use vcpu_realloc::kvm::ExitHandler;
    /// # use vcpu_realloc::{Answer, Request};
    /// # use xsave_state::kvm::XsaveBuffer;
    /// # fn demo(mut vcpu: VcpuFd, mut gate: ExitHandler, mut buffer: XsaveBuffer) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut vmm = |request: &Request| {
    ///     println!("vCPU {} uses {} for the first time", request.vcpu, request.growth);
    ///     Ok::<_, std::io::Error>(Answer::Grant)
    /// };
    /// loop {
    ///     match vcpu.run()? {
    ///         VcpuExit::X86Wrmsr(exit) => {
    ///             let _ = gate.handle(exit.index, exit.data, &mut vcpu, &mut buffer, &mut vmm)?;
    ///         }
    ///         VcpuExit::Hlt => return Ok(()),
    ///         _ => { /* your exits */ }
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The VMM could not answer, or an ioctl failed. Unless it is [`HandleError::Lift`], the guest's
    /// instruction is not completed: [`resume`](Self::resume) it, as often as it takes. KVM_RUN
    /// before that raises #GP in the guest, because a write must not be lost.
    #[inline]
    pub fn handle<V: Grow>(
        &mut self,
        index: u32,
        value: u64,
        vcpu: &mut VcpuFd,
        buffer: &mut XsaveBuffer,
        vmm: &mut V,
    ) -> Result<Handled, HandleError<V::Error>> {
        if index != MSR_IA32_XFD {
            return Ok(Handled::NotOurs);
        }
        let xfd = XFeatures::from_bits_retain(value);
        self.write(xfd, vcpu, buffer, vmm)
    }

    /// Goes on with a write that waits, after an error or after [`Handled::Waiting`]: asks the VMM
    /// again. An [`Answer`] is a VMM that says that. Gives [`Handled::NotOurs`] where nothing waits.
    ///
    /// # Errors
    ///
    /// As [`handle`](Self::handle).
    pub fn resume<V: Grow>(
        &mut self,
        vcpu: &mut VcpuFd,
        buffer: &mut XsaveBuffer,
        vmm: &mut V,
    ) -> Result<Handled, HandleError<V::Error>> {
        match self.pending {
            Some(xfd) => self.write(xfd, vcpu, buffer, vmm),
            None => Ok(Handled::NotOurs),
        }
    }

    /// Whether a write waits: the vCPU must not run before it is [resumed](Self::resume).
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.pending.is_some()
    }

    /// Puts a vCPU that waits back in front of its instruction, which it will repeat, here or on
    /// another host: for a snapshot in the middle of growth. Where nothing waits, nothing is done.
    ///
    /// A VMM completes pending exits before it reads a vCPU's state. Call this before that.
    ///
    /// # Errors
    ///
    /// An ioctl failed. [`RewindError`] says whether the write still waits, as it did before, or the
    /// vCPU is to be discarded.
    pub fn rewind(&mut self, vcpu: &mut VcpuFd) -> Result<(), RewindError> {
        if self.pending.is_some() {
            rewind::rewind(vcpu)?;
            let _ = self.gate.on(Event::Withdraw);
            self.pending = None;
        }
        Ok(())
    }

    /// Shows the gate a state that was just captured: XSETBV never leaves KVM, so this and an exit
    /// are the only times at which XCR0 is seen. The VMM is asked about what the guest can use, or has
    /// in use, and has no state for. It cannot deny it any more.
    ///
    /// # Errors
    ///
    /// The VMM did not grant it. The vCPU must not run before it has.
    pub fn observe<V: Grow>(
        &mut self,
        state: &ExtendedState<'_>,
        vmm: &mut V,
    ) -> Result<Option<Growth>, ObserveError<V::Error>> {
        let registers = state.registers();
        let event = Event::Observe {
            xcr0: registers.xcr0,
            xfd: registers.xfd,
            in_use: state.image().xstate_bv(),
        };
        self.look(event, vmm)
    }

    /// Tells the gate that its vCPU has been restored, with
    /// [`xsave_state::kvm::restore`] or by a reset. The VMM is asked about what the vCPU has: where it
    /// had passed, it passes here, and the filter is lifted before it runs.
    ///
    /// # Errors
    ///
    /// The VMM did not grant it. The vCPU must not run before it has.
    pub fn restored<V: Grow>(
        &mut self,
        state: &ExtendedState<'_>,
        vmm: &mut V,
    ) -> Result<Option<Growth>, ObserveError<V::Error>> {
        let registers = state.registers();
        let event = Event::Restore {
            xcr0: registers.xcr0,
            xfd: registers.xfd,
            in_use: state.image().xstate_bv(),
        };
        self.look(event, vmm)
    }

    #[cold]
    fn write<V: Grow>(
        &mut self,
        xfd: XFeatures,
        vcpu: &mut VcpuFd,
        buffer: &mut XsaveBuffer,
        vmm: &mut V,
    ) -> Result<Handled, HandleError<V::Error>> {
        self.pending = Some(xfd);
        // Until the write is done, running the vCPU must not skip it.
        set_error(vcpu, Completion::Fault);
        let mut first_use = None;
        self.take_what_the_vm_has();
        if !self.gate.has_passed() {
            // XSETBV never leaves KVM, so this is where the gate learns of XCR0.
            let _ = self.gate.on(Event::ObserveXcr0(read_xcr0(vcpu)?));
        }
        let before = self.gate.clone();
        let mut action = self.gate.on(Event::WriteXfd(xfd));
        if let Action::Grow(growth) = action {
            match self.ask(growth, vmm).map_err(HandleError::Vmm)? {
                Answer::Grant => {
                    first_use = Some(growth);
                    action = self.pass(Event::Grant(growth.features()));
                }
                Answer::Deny => action = self.gate.on(Event::Deny),
                Answer::Later => return Ok(Handled::Waiting(growth)),
            }
        }
        if let Action::InjectGp(fault) = action {
            self.pending = None;
            return Ok(Handled::Faulted(fault));
        }
        let released = match write_xfd(vcpu, xfd, buffer) {
            Ok(released) => released,
            Err(error) => {
                // Not written; but what was granted is granted.
                let granted = self.gate.granted();
                self.gate = before;
                let _ = self.gate.on(Event::Withdraw);
                let _ = self.gate.on(Event::Grant(granted));
                return Err(error.into());
            }
        };
        set_error(vcpu, Completion::Skip);
        self.pending = None;
        let lifted = self.vm.lift().map_err(HandleError::Lift)?;
        Ok(Handled::Written {
            first_use,
            released,
            lifted,
        })
    }

    /// Asks about what the vCPU has.
    fn look<V: Grow>(
        &mut self,
        event: Event,
        vmm: &mut V,
    ) -> Result<Option<Growth>, ObserveError<V::Error>> {
        if self.pending.is_some() {
            return Err(ObserveError::Waiting);
        }
        self.take_what_the_vm_has();
        let Action::Grow(growth) = self.gate.on(event) else {
            return Ok(None);
        };
        match self.ask(growth, vmm).map_err(ObserveError::Vmm)? {
            Answer::Grant => {}
            Answer::Deny => return Err(ObserveError::Denied { growth }),
            Answer::Later => return Err(ObserveError::Undecided { growth }),
        }
        let _ = self.pass(Event::Grant(growth.features()));
        self.vm.lift().map_err(ObserveError::Lift)?;
        Ok(Some(growth))
    }

    /// Asks the VMM, or knows that all vCPUs have been granted meanwhile. A failure is told to the
    /// gate; an answer is for the caller to tell.
    fn ask<V: Grow>(&mut self, growth: Growth, vmm: &mut V) -> Result<Answer, V::Error> {
        let shared = self.vm.shared();
        let mut progress = shared.progress();
        if progress.granted.contains(growth.features()) {
            return Ok(Answer::Grant);
        }
        let request = Request {
            vcpu: self.vcpu,
            growth,
            scope: shared.scope(),
        };
        let answer = vmm.grow(&request);
        match answer {
            Ok(Answer::Grant) => {
                if shared.policy() == Policy::WholeVm {
                    progress.granted |= growth.features();
                }
                progress.first_use.get_or_insert(self.vcpu);
            }
            Ok(Answer::Deny | Answer::Later) => {}
            Err(_) => {
                let _ = self.gate.on(Event::Fail);
            }
        }
        answer
    }

    /// What another vCPU's first use has given to all.
    fn take_what_the_vm_has(&mut self) {
        let granted = self.vm.granted();
        if !self.gate.granted().contains(granted) {
            let _ = self.pass(Event::Grant(granted));
        }
    }

    /// Takes an event that can make the gate pass, and counts it for the VM if it does.
    fn pass(&mut self, event: Event) -> Action {
        let before = self.gate.has_passed();
        let action = self.gate.on(event);
        if !before && self.gate.has_passed() {
            let mut progress = self.vm.shared().progress();
            progress.passed = progress.passed.saturating_add(1);
        }
        action
    }
}

impl Drop for ExitHandler {
    fn drop(&mut self) {
        let mut progress = self.vm.shared().progress();
        progress.leave(self.gate.has_passed());
    }
}

fn read_xcr0<E>(vcpu: &VcpuFd) -> Result<XFeatures, HandleError<E>> {
    let xcrs = vcpu.get_xcrs().map_err(HandleError::Xcrs)?;
    let len = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
    let mut entries = xcrs.xcrs.iter().take(len);
    let xcr0 = entries.find(|entry| entry.xcr == 0);
    let xcr0 = xcr0.ok_or(HandleError::NoXcr0)?;
    Ok(XFeatures::from_bits_retain(xcr0.value))
}

/// What the next KVM_RUN does with the guest's WRMSR.
#[derive(Clone, Copy)]
pub(super) enum Completion {
    /// It is done: go behind it.
    Skip = 0,
    /// Raise #GP at it.
    Fault = 1,
}

pub(super) fn set_error(vcpu: &mut VcpuFd, completion: Completion) {
    vcpu.get_kvm_run().__bindgen_anon_1.msr.error = completion as u8;
}

/// An exit could not be handled.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandleError<E> {
    /// The VMM could not answer: its own error. The guest's instruction waits.
    #[error(transparent)]
    Vmm(E),
    /// KVM_GET_XCRS failed. The guest's instruction waits.
    #[error("KVM_GET_XCRS: {0}")]
    Xcrs(Errno),
    /// KVM_GET_XCRS gave no XCR0. The guest's instruction waits.
    #[error("KVM_GET_XCRS has no XCR0")]
    NoXcr0,
    /// IA32_XFD could not be written. The guest's instruction waits, and what the VMM has granted is
    /// granted.
    #[error(transparent)]
    Write(#[from] WriteXfdError),
    /// The write is done, and the vCPU may run; but the trap could not be lifted. After
    /// [`TrapError::Filter`] the next write tries again; after [`TrapError::ExitReasons`] there is none,
    /// and the VMM calls [`VmGate::lift`].
    #[error("the write is done, but its trap could not be lifted: {0}")]
    Lift(TrapError),
}

/// A captured or restored vCPU has what the VMM did not grant.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ObserveError<E> {
    /// The VMM could not answer: its own error.
    #[error(transparent)]
    Vmm(E),
    /// The VMM denied it: discard the vCPU, or grant it.
    #[error("denied, but the vCPU has it already: {growth}")]
    Denied {
        /// What it has.
        growth: Growth,
    },
    /// The VMM answers later: show the state again then.
    #[error("the VMM answers later, and the vCPU cannot run before: {growth}")]
    Undecided {
        /// What it has.
        growth: Growth,
    },
    /// A write of the vCPU waits, so its state is not between two instructions.
    #[error("a write of IA32_XFD waits: rewind the vCPU first")]
    Waiting,
    /// All is granted; but the trap could not be lifted. After [`TrapError::Filter`] the next write tries
    /// again; after [`TrapError::ExitReasons`] there is none, and the VMM calls [`VmGate::lift`].
    #[error("granted, but the trap could not be lifted: {0}")]
    Lift(TrapError),
}
