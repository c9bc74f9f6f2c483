//! The moment at which a guest first uses AMX: which vCPU, when, and room for its state.
//!
//! What a VMM adds to have it: [`FirstUse::watch`] before its vCPUs run, and one arm in the loop of
//! `run`.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vcpu_realloc::growth::{Ledger, LedgerError};
use vcpu_realloc::kvm::{
    ExitHandler, HandleError, Handled, InstallError, ObserveError, Options, StartError, VmGate,
};
use vcpu_realloc::{Answer, Request};
use xsave_state::kvm::{CaptureError, XsaveBuffer, capture};

use crate::host::Host;
use crate::vm::{Vcpu, Vm};

/// The gate of a VM, with memory for the state of its vCPUs.
pub struct FirstUse {
    pub(crate) gates: Vec<Gate>,
    pub(crate) ledger: Mutex<Ledger<Instant>>,
    vm: VmGate,
}

/// The gate of one vCPU.
pub(crate) struct Gate {
    handler: ExitHandler,
    buffer: XsaveBuffer,
}

impl FirstUse {
    /// Watches a VM that has not run yet: booted, or restored.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn watch(host: &Host, vm: &mut Vm) -> Result<Self, FirstUseError> {
        let first = vm.vcpus.first().ok_or(FirstUseError::NoVcpu)?;
        let gate = VmGate::install(&vm.fd, first.layout.layout(), Options::default())?;
        let ledger = Mutex::new(Ledger::new());
        let mut gates = Vec::with_capacity(vm.vcpus.len());
        for (number, Vcpu { fd, layout }) in (0..).zip(&mut vm.vcpus) {
            lock(&ledger).add(number, layout.layout())?;
            let mut vmm = allocate(&ledger);
            let mut handler = gate.vcpu(number, &mut vmm)?;
            let mut buffer = XsaveBuffer::new(host.area());
            // A restored vCPU may have passed elsewhere.
            let state = capture(fd, layout, &mut buffer)?.state;
            handler.restored(&state, &mut vmm)?;
            drop(state);
            gates.push(Gate { handler, buffer });
        }
        Ok(Self {
            gates,
            ledger,
            vm: gate,
        })
    }

    /// Which vCPU was the first to use AMX, and when.
    #[must_use]
    pub fn first_use(&self) -> Option<(u64, Instant)> {
        lock(&self.ledger).first_use()
    }

    /// Bytes that the VMM keeps for the state of all vCPUs.
    #[must_use]
    pub fn bytes(&self) -> usize {
        lock(&self.ledger).bytes()
    }

    /// The gate of the VM.
    #[must_use]
    pub fn gate(&self) -> &VmGate {
        &self.vm
    }
}

impl Gate {
    /// Whether the write was one of IA32_XFD, and is done.
    pub(crate) fn write(
        &mut self,
        msr: u32,
        value: u64,
        vcpu: &mut VcpuFd,
        ledger: &Mutex<Ledger<Instant>>,
    ) -> Result<bool, HandleError<LedgerError>> {
        let handled =
            self.handler
                .handle(msr, value, vcpu, &mut self.buffer, &mut allocate(ledger))?;
        Ok(handled != Handled::NotOurs)
    }
}

/// This VMM grants whatever it has memory for.
fn allocate(
    ledger: &Mutex<Ledger<Instant>>,
) -> impl FnMut(&Request) -> Result<Answer, LedgerError> {
    |request| {
        lock(ledger).grow(request, Instant::now())?;
        Ok(Answer::Grant)
    }
}

fn lock<T>(ledger: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// There is no memory for a vCPU's state.
    #[error(transparent)]
    Memory(#[from] LedgerError),
    /// A vCPU could not be watched.
    #[error(transparent)]
    Start(#[from] StartError<LedgerError>),
    /// A vCPU's state could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A vCPU has state already, and the VMM has no room for it.
    #[error(transparent)]
    Observe(#[from] ObserveError<LedgerError>),
}
