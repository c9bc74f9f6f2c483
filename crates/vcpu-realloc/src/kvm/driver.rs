//! The exits of one vCPU.

use alloc::sync::Arc;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::{MSR_IA32_XFD, WriteXfdError, XsaveBuffer, write_xfd};
use xsave_state::{ExtendedState, XFeatures};

use super::exit::{self, Completion};
use super::rewind::{self, RewindError};
use super::shared::{Occasion, Shared};
use super::trap::TrapError;
use crate::gate::{Action, Event, Fault, Gate, Growth};
use crate::grant::SavedGrant;
use crate::growth::{Answer, Grow};

/// What became of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether the vCPU may run"]
pub enum Handled {
    /// It is not a write of IA32_XFD. Nothing was done.
    NotOurs,
    /// The write is performed. Run the vCPU.
    Written {
        /// The features for which the guest got state just now.
        first_use: Option<Growth>,
        /// Components that were in use and that the write disabled: they are initial now.
        released: XFeatures,
        /// Whether the VM's filter has just become the VMM's own again. An error is none of the write:
        /// after [`TrapError::Filter`] the next write tries again; after [`TrapError::ExitReasons`] there
        /// is none, and the VMM calls [`VmGate::lift`](super::VmGate::lift).
        lifted: Result<bool, TrapError>,
    },
    /// The guest gets #GP. Run the vCPU.
    Faulted(Fault),
    /// The VMM answers later. Do not run the vCPU before [`ExitHandler::resume`].
    Waiting(Growth),
    /// The VMM wants the VM stopped: the vCPU stands in front of its instruction again. Its state can be
    /// saved. When it runs, it asks again.
    Stopped(Growth),
}

/// What a vCPU that was restored, or looked at, has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether the trap could be lifted"]
pub struct Seen {
    /// The features that the VMM has granted just now, because the guest has them already.
    pub first_use: Option<Growth>,
    /// As in [`Handled::Written`].
    pub lifted: Result<bool, TrapError>,
}

/// The gate of one vCPU, driven by its exits. From [`VmGate::vcpu`](super::VmGate::vcpu).
#[derive(Debug)]
pub struct ExitHandler {
    gate: Gate,
    vcpu: u64,
    /// The vCPU's place in memory, from the first exit on.
    place: Option<usize>,
    vm: Arc<Shared>,
    /// The value of a write that has left and is not completed.
    pending: Option<XFeatures>,
}

impl ExitHandler {
    pub(super) fn new(gate: Gate, vcpu: u64, vm: Arc<Shared>) -> Self {
        Self {
            gate,
            vcpu,
            place: None,
            vm,
            pending: None,
        }
    }

    /// The gate: what the guest has and may have.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Handles KVM_EXIT_X86_WRMSR of `value` to MSR `index`. `vmm` is asked when the guest is about
    /// to use features for the first time; `buffer` is scratch space.
    ///
    /// The order of the arguments lets a VMM write it in one expression, although the exit borrows
    /// the vCPU:
    ///
    /// ```no_run
    /// # use kvm_ioctls::{VcpuExit, VcpuFd};
    /// # use vcpu_realloc::kvm::{ExitHandler, Handled};
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
    ///             match gate.handle(exit.index, exit.data, &mut vcpu, &mut buffer, &mut vmm)? {
    ///                 Handled::Written { .. } | Handled::Faulted(_) => {} // run on
    ///                 handled => return Err(format!("{handled:?}").into()),
    ///             }
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
    /// The VMM could not answer, or an ioctl failed, or it denied too late: the guest's instruction is
    /// not completed. [`resume`](Self::resume) it, as often as it takes. KVM_RUN before that raises #GP in
    /// the guest, because a write must not be lost. Or it is not the exit of this vCPU, and nothing was
    /// done.
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
        if !self.is_ours(vcpu) {
            return Err(HandleError::AnotherVcpu { vcpu: self.vcpu });
        }
        if !exit::is_write_of_xfd(vcpu, value) {
            return Err(HandleError::NoSuchExit { value });
        }
        let xfd = XFeatures::from_bits_retain(value);
        self.write(xfd, vcpu, buffer, vmm)
    }

    /// Goes on with a write that waits, after an error or after [`Handled::Waiting`]: asks the VMM
    /// again. An [`Answer`] is a VMM that says that. Gives [`Handled::NotOurs`] where nothing waits: also
    /// where the vCPU was run meanwhile, which was #GP for its write.
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
        if !self.is_ours(vcpu) {
            return Err(HandleError::AnotherVcpu { vcpu: self.vcpu });
        }
        match self.still_pending(vcpu) {
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
    /// `immediate_exit` is afterwards as somebody else has set it.
    ///
    /// A VMM [completes](super::complete) pending exits before it reads a vCPU's state. Call this before
    /// that.
    ///
    /// # Errors
    ///
    /// An ioctl failed. [`RewindError`] says whether the write still waits, as it did before, or the
    /// vCPU is to be discarded.
    pub fn rewind(&mut self, vcpu: &mut VcpuFd) -> Result<(), RewindError> {
        if !self.is_ours(vcpu) {
            return Err(RewindError::AnotherVcpu { vcpu: self.vcpu });
        }
        if self.still_pending(vcpu).is_some() {
            rewind::rewind(vcpu)?;
            self.withdraw();
        }
        Ok(())
    }

    /// Tells the gate that its vCPU is about to be reset. A write that waits is taken back first, or KVM
    /// would complete it in the vCPU after the reset. What was granted stays granted.
    ///
    /// # Errors
    ///
    /// As [`rewind`](Self::rewind).
    pub fn reset(&mut self, vcpu: &mut VcpuFd) -> Result<(), RewindError> {
        self.rewind(vcpu)?;
        let _ = self.gate.on(Event::Reset);
        Ok(())
    }

    /// Tells the gate that the VMM is about to send its vCPU an INIT, which leaves XCR0 and IA32_XFD as
    /// they are. A write that waits is taken back first. INITs that KVM's own interrupt controller delivers
    /// come only to a vCPU that runs, and need no call.
    ///
    /// # Errors
    ///
    /// A write could not be taken back, or the VMM did not grant what the vCPU can use: it must not run
    /// before it has.
    pub fn init<V: Grow>(
        &mut self,
        vcpu: &mut VcpuFd,
        vmm: &mut V,
    ) -> Result<Seen, ObserveError<V::Error>> {
        self.rewind(vcpu)?;
        let _ = self.gate.on(Event::ObserveXcr0(read_xcr0(vcpu)?));
        self.look(Event::Init, Occasion::Observed, vmm)
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
    ) -> Result<Seen, ObserveError<V::Error>> {
        let registers = state.registers();
        let event = Event::Observe {
            xcr0: registers.xcr0,
            xfd: registers.xfd,
            in_use: state.image().xstate_bv(),
        };
        self.look(event, Occasion::Observed, vmm)
    }

    /// Tells the gate that its vCPU has been restored, with
    /// [`xsave_state::kvm::restore`]. `grant` is what was saved with the VM; `None`: nothing was, so
    /// nobody knows. The VMM is asked about what the vCPU has, and about what its VM was or may have been
    /// granted: a task of the guest may have tiles in memory, which no register shows. Where it had
    /// passed, it passes here, and the filter is lifted before it runs.
    ///
    /// A refusal loses nothing yet: the VM can be restored elsewhere, or run on where it was.
    ///
    /// # Errors
    ///
    /// The VMM did not grant it. The vCPU must not run before it has.
    pub fn restored<V: Grow>(
        &mut self,
        state: &ExtendedState<'_>,
        grant: Option<SavedGrant>,
        vmm: &mut V,
    ) -> Result<Seen, ObserveError<V::Error>> {
        let disableable = self.vm.layout.xfd();
        let granted = grant.map_or(disableable, |grant| grant.features() & disableable);
        self.vm.state().progress.promised |= granted;
        let registers = state.registers();
        let event = Event::Restore {
            xcr0: registers.xcr0,
            xfd: registers.xfd,
            in_use: state.image().xstate_bv(),
            granted,
        };
        self.look(event, Occasion::Restored, vmm)
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
        exit::hold(vcpu);
        let mut first_use = None;
        self.take_what_the_vm_has();
        if !self.gate.has_passed() {
            // XSETBV never leaves KVM, so this is where the gate learns of XCR0.
            let _ = self.gate.on(Event::ObserveXcr0(read_xcr0(vcpu)?));
        }
        let before = self.gate.clone();
        let mut action = self.gate.on(Event::WriteXfd(xfd));
        if let Action::Grow(growth) = action {
            match self
                .ask(growth, Occasion::Write, vmm)
                .map_err(HandleError::Vmm)?
            {
                Answer::Grant => {
                    first_use = Some(growth);
                    action = self.pass(Event::Grant(growth.features()));
                }
                Answer::Deny => {
                    action = self.gate.on(Event::Deny);
                    if action == Action::Hold {
                        return Err(HandleError::DeniedAfterFirstUse { growth });
                    }
                }
                Answer::Later => return Ok(Handled::Waiting(growth)),
                Answer::Stop => {
                    rewind::rewind(vcpu).map_err(HandleError::Rewind)?;
                    self.withdraw();
                    return Ok(Handled::Stopped(growth));
                }
            }
        }
        if let Action::InjectGp(fault) = action {
            self.pending = None;
            exit::release(vcpu, Completion::Fault);
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
        exit::release(vcpu, Completion::Skip);
        self.pending = None;
        Ok(Handled::Written {
            first_use,
            released,
            lifted: self.vm.lift(),
        })
    }

    /// Asks about what the vCPU has.
    fn look<V: Grow>(
        &mut self,
        event: Event,
        occasion: Occasion,
        vmm: &mut V,
    ) -> Result<Seen, ObserveError<V::Error>> {
        if self.pending.is_some() {
            return Err(ObserveError::Waiting);
        }
        self.take_what_the_vm_has();
        let Action::Grow(growth) = self.gate.on(event) else {
            return Ok(Seen {
                first_use: None,
                lifted: Ok(false),
            });
        };
        match self.ask(growth, occasion, vmm).map_err(ObserveError::Vmm)? {
            Answer::Grant => {}
            Answer::Deny => return Err(ObserveError::Denied { growth }),
            Answer::Later | Answer::Stop => return Err(ObserveError::Undecided { growth }),
        }
        let _ = self.pass(Event::Grant(growth.features()));
        Ok(Seen {
            first_use: Some(growth),
            lifted: self.vm.lift(),
        })
    }

    /// Asks the VMM. A failure is told to the gate; an answer is for the caller to tell.
    fn ask<V: Grow>(
        &mut self,
        growth: Growth,
        occasion: Occasion,
        vmm: &mut V,
    ) -> Result<Answer, V::Error> {
        let answer = self.vm.ask(self.vcpu, growth, occasion, vmm);
        if answer.is_err() {
            let _ = self.gate.on(Event::Fail);
        }
        answer
    }

    /// What another vCPU's first use has given to all, and what it keeps from being denied.
    fn take_what_the_vm_has(&mut self) {
        let (granted, promised) = self.vm.granted_and_promised();
        let _ = self.gate.on(Event::GrantedElsewhere(promised));
        if !self.gate.granted().contains(granted) {
            let _ = self.pass(Event::Grant(granted));
        }
    }

    /// Takes an event that can make the gate pass, and counts it for the VM if it does.
    fn pass(&mut self, event: Event) -> Action {
        let before = self.gate.has_passed();
        let action = self.gate.on(event);
        if !before && self.gate.has_passed() {
            let progress = &mut self.vm.state().progress;
            progress.passed = progress.passed.saturating_add(1);
        }
        action
    }

    /// Whether this is the vCPU that the handler had the first exit of.
    fn is_ours(&mut self, vcpu: &mut VcpuFd) -> bool {
        let place = exit::place(vcpu);
        *self.place.get_or_insert(place) == place
    }

    /// The write that waits. A vCPU that was run although one did has taken #GP for it.
    fn still_pending(&mut self, vcpu: &mut VcpuFd) -> Option<XFeatures> {
        if self.pending.is_some() && !exit::is_held(vcpu) {
            self.withdraw();
        }
        self.pending
    }

    fn withdraw(&mut self) {
        let _ = self.gate.on(Event::Withdraw);
        self.pending = None;
    }
}

impl Drop for ExitHandler {
    fn drop(&mut self) {
        self.vm.state().progress.leave(self.gate.has_passed());
    }
}

fn read_xcr0(vcpu: &VcpuFd) -> Result<XFeatures, Xcr0Error> {
    let xcrs = vcpu.get_xcrs().map_err(Xcr0Error::Ioctl)?;
    let len = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
    let mut entries = xcrs.xcrs.iter().take(len);
    let xcr0 = entries.find(|entry| entry.xcr == 0);
    let xcr0 = xcr0.ok_or(Xcr0Error::Absent)?;
    Ok(XFeatures::from_bits_retain(xcr0.value))
}

/// XCR0 could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Xcr0Error {
    /// KVM_GET_XCRS failed.
    #[error("KVM_GET_XCRS: {0}")]
    Ioctl(Errno),
    /// KVM_GET_XCRS gave no XCR0.
    #[error("KVM_GET_XCRS has no XCR0")]
    Absent,
}

/// An exit could not be handled.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandleError<E> {
    /// The VMM could not answer: its own error. The guest's instruction waits.
    #[error(transparent)]
    Vmm(E),
    /// XCR0 could not be read. The guest's instruction waits.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
    /// The VMM denied what another vCPU of the VM has been granted, here or where the VM ran before: a
    /// task of the guest may have tiles in memory, and would die with its kernel. The instruction waits:
    /// grant it, [wait](Answer::Later), or [stop](Answer::Stop) the VM.
    #[error(
        "denied too late: the VM has been granted {growth} before. Grant it, wait, or stop the VM"
    )]
    DeniedAfterFirstUse {
        /// What the vCPU is about to use.
        growth: Growth,
    },
    /// The VMM wanted the VM stopped, and the vCPU could not be put back in front of its instruction.
    #[error(transparent)]
    Rewind(RewindError),
    /// It is not the vCPU of this handler. Nothing was done.
    #[error("this is not the vCPU of this handler, which is vCPU {vcpu}")]
    AnotherVcpu {
        /// The one of the handler.
        vcpu: u64,
    },
    /// The vCPU has not left for this write, or has been run since. Nothing was done.
    #[error("the vCPU's last exit is not a write of {value:#x} to IA32_XFD")]
    NoSuchExit {
        /// The value that was to be written.
        value: u64,
    },
    /// IA32_XFD could not be written. The guest's instruction waits, and what the VMM has granted is
    /// granted.
    #[error(transparent)]
    Write(#[from] WriteXfdError),
}

/// A captured or restored vCPU has what the VMM did not grant.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ObserveError<E> {
    /// The VMM could not answer: its own error.
    #[error(transparent)]
    Vmm(E),
    /// The VMM denied it: discard the vCPU, or grant it. After a restore nothing has run yet, and what
    /// was saved can go on elsewhere.
    #[error("denied, but the VM has it already: {growth}. Grant it, or go on where it came from")]
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
    /// A write that waits could not be taken back.
    #[error(transparent)]
    Rewind(#[from] RewindError),
    /// XCR0 could not be read.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
}
