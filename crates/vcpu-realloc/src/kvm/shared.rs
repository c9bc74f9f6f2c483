//! What the vCPUs of a VM share: the trap, who has been granted what, and the record of it.

use alloc::vec::Vec;
use core::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use xsave_state::{Layout, XFeatures};

use super::policy::{Policy, Progress};
use super::trap::{Trap, TrapError};
use crate::gate::Growth;
use crate::growth::{Answer, Grow, Request, Scope};

#[derive(Debug)]
pub(super) struct Shared {
    pub layout: Layout,
    pub policy: Policy,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub trap: Trap,
    pub progress: Progress,
    pub first_uses: Vec<FirstUse>,
}

/// A grant, as an operator wants to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstUse {
    /// The vCPU for which the VMM was asked.
    pub vcpu: u64,
    /// What it got, and under [`Policy::WholeVm`] every vCPU.
    pub growth: Growth,
    /// When the VMM was asked.
    pub occasion: Occasion,
    /// When it granted.
    pub at: SystemTime,
}

impl fmt::Display for FirstUse {
    /// `vCPU 1, at its write: XTILEDATA (0x40000), 8192 bytes, in an area of 11008 bytes`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let occasion = match self.occasion {
            Occasion::Write => "at its write",
            Occasion::Observed => "at a capture",
            Occasion::Restored => "at its restore",
            Occasion::Created => "when it was added",
        };
        write!(f, "vCPU {}, {occasion}: {}", self.vcpu, self.growth)
    }
}

/// When the VMM was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Occasion {
    /// The guest cleared IA32_XFD.
    Write,
    /// A capture, or an INIT, showed what the guest can use already.
    Observed,
    /// The vCPU was restored.
    Restored,
    /// The vCPU got its handler, and there is no later moment.
    Created,
}

impl Shared {
    pub(super) fn new(layout: Layout, policy: Policy, trap: Trap) -> Self {
        Self {
            layout,
            policy,
            state: Mutex::new(State {
                trap,
                progress: Progress::default(),
                first_uses: Vec::new(),
            }),
        }
    }

    /// Held while the VMM is asked, so that two vCPUs at once are one first use.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // It is changed in one piece, after everything that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the VMM, or knows that all vCPUs have been granted meanwhile.
    pub(super) fn ask<V: Grow>(
        &self,
        vcpu: u64,
        growth: Growth,
        occasion: Occasion,
        vmm: &mut V,
    ) -> Result<Answer, V::Error> {
        let mut state = self.state();
        if state.progress.granted.contains(growth.features()) {
            return Ok(Answer::Grant);
        }
        let scope = match self.policy {
            Policy::WholeVm => Scope::Vm,
            Policy::EachVcpu => Scope::Vcpu,
        };
        let answer = vmm.grow(&Request {
            vcpu,
            growth,
            scope,
        })?;
        if answer == Answer::Grant {
            if self.policy == Policy::WholeVm {
                state.progress.granted |= growth.features();
            }
            state.granted(vcpu, growth, occasion);
        }
        Ok(answer)
    }

    /// Gives the VM the VMM's own filter again where nobody has to be asked any more.
    pub(super) fn lift(&self) -> Result<bool, TrapError> {
        let state = &mut *self.state();
        if state.progress.is_complete(self.policy, self.layout.xfd()) {
            state.trap.lift()
        } else {
            Ok(false)
        }
    }

    /// What every vCPU has state for, and what none can be denied any more.
    pub(super) fn granted_and_promised(&self) -> (XFeatures, XFeatures) {
        let progress = self.state().progress;
        (progress.granted, progress.promised)
    }
}

impl State {
    /// Notes a grant.
    pub(super) fn granted(&mut self, vcpu: u64, growth: Growth, occasion: Occasion) {
        self.progress.promised |= growth.features();
        self.first_uses.push(FirstUse {
            vcpu,
            growth,
            occasion,
            at: SystemTime::now(),
        });
    }
}
