//! The moment at which a guest first uses AMX: which vCPU, when, and what the VMM says to it.
//!
//! What a VMM adds to have it: [`FirstUse::watch`] before its vCPUs run, and one arm in the loop of
//! `run`.

use std::convert::Infallible;
use std::time::SystemTime;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vcpu_realloc::kvm::{
    ExitHandler, HandleError, Handled, InstallError, ObserveError, Options, StartError, VmGate,
};
use vcpu_realloc::{Answer, SavedGrant};
use xsave_state::kvm::{CaptureError, XsaveBuffer, capture};

use crate::host::Host;
use crate::vm::{Vcpu, Vm};

/// The gate of a VM.
pub struct FirstUse {
    pub(crate) gates: Vec<Gate>,
    vm: VmGate,
}

/// The gate of one vCPU.
pub(crate) struct Gate {
    handler: ExitHandler,
    buffer: XsaveBuffer,
    answer: Answer,
}

/// What became of a write to an MSR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrote {
    /// It is not one of IA32_XFD.
    NotOurs,
    /// The vCPU may run.
    Done,
    /// The vCPU stands in front of its write, and the VM stops.
    Stopped,
}

impl FirstUse {
    /// Watches a VM that has not run yet: booted, or restored. `grant` is what was saved with it; `None`:
    /// nobody knows. `answer` is given to its first use.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn watch(
        host: &Host,
        vm: &mut Vm,
        grant: Option<SavedGrant>,
        answer: Answer,
    ) -> Result<Self, FirstUseError> {
        let first = vm.vcpus.first().ok_or(FirstUseError::NoVcpu)?;
        let gate = VmGate::install(&vm.fd, first.layout.layout(), Options::default())?;
        let mut gates = Vec::with_capacity(vm.vcpus.len());
        for (number, Vcpu { fd, layout }) in (0..).zip(&mut vm.vcpus) {
            let mut handler = gate.vcpu(number, &mut { answer })?;
            let mut buffer = XsaveBuffer::new(host.area());
            // A restored vCPU may have passed elsewhere.
            let state = capture(fd, layout, &mut buffer)?.state;
            let _ = handler.restored(&state, grant, &mut { answer })?;
            drop(state);
            gates.push(Gate {
                handler,
                buffer,
                answer,
            });
        }
        Ok(Self { gates, vm: gate })
    }

    /// What the next first use is answered with: after a stop.
    pub fn set_answer(&mut self, answer: Answer) {
        for gate in &mut self.gates {
            gate.answer = answer;
        }
    }

    /// Which vCPU was the first to use AMX, and when.
    #[must_use]
    pub fn first_use(&self) -> Option<(u64, SystemTime)> {
        let first = *self.vm.first_uses().first()?;
        Some((first.vcpu, first.at))
    }

    /// The gate of the VM.
    #[must_use]
    pub fn gate(&self) -> &VmGate {
        &self.vm
    }
}

impl Gate {
    /// Handles a write to an MSR.
    pub(crate) fn write(
        &mut self,
        msr: u32,
        value: u64,
        vcpu: &mut VcpuFd,
    ) -> Result<Wrote, HandleError<Infallible>> {
        let Self {
            handler,
            buffer,
            answer,
        } = self;
        Ok(match handler.handle(msr, value, vcpu, buffer, answer)? {
            Handled::NotOurs => Wrote::NotOurs,
            Handled::Written { .. } | Handled::Faulted(_) => Wrote::Done,
            Handled::Waiting(_) => {
                handler.rewind(vcpu).map_err(HandleError::Rewind)?;
                Wrote::Stopped
            }
            Handled::Stopped(_) => Wrote::Stopped,
        })
    }
}

/// The first use of AMX cannot be watched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FirstUseError {
    /// The VM has no vCPU.
    #[error("the VM has no vCPU")]
    NoVcpu,
    /// The trap could not be set.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// A vCPU could not be watched.
    #[error(transparent)]
    Start(#[from] StartError<Infallible>),
    /// A vCPU's state could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A vCPU has AMX in use already, and that was not granted.
    #[error(transparent)]
    Observe(#[from] ObserveError<Infallible>),
}
