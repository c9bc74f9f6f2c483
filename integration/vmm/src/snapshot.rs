//! A VM's state as checked data, and its bytes.
//!
//! A file is a [`header`], the registers of vCPUs and VM (postcard, with the extended states as
//! xsave-state encodes them), the numbers of the pages that are not
//! zero, and those pages. What was read from bytes has been checked: every vCPU's extended state
//! holds the invariants of [`ExtendedState`] for the CPUID that comes with it.

mod at_stop;
pub mod header;
mod parse;
#[cfg(test)]
pub(crate) mod tests;
mod wire;

use amx_guest::Workload;
use xsave_state::ExtendedState;

use crate::memory::Pages;
use crate::platform::Platform;
use crate::registers::{CpuidEntry, Debug, Events, General, MpState, Msr, Special};

pub use at_stop::AtStop;
pub use header::HeaderError;
pub use parse::{PageError, SnapshotError, VcpuCause};

/// The state of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) memory: Pages,
    /// The frequency of the guest's TSC in kHz; `None` where KVM did not know it.
    pub(crate) tsc_khz: Option<u32>,
    /// A bare guest has none.
    pub(crate) platform: Option<Platform>,
}

/// The registers of a local APIC, as KVM_GET_LAPIC has them.
pub(crate) type LocalApic = [u8; 1024];

/// The state of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) extended: ExtendedState<'static>,
    pub(crate) general: General,
    pub(crate) special: Special,
    pub(crate) debug: Debug,
    pub(crate) events: Events,
    pub(crate) mp_state: MpState,
    pub(crate) msrs: Vec<Msr>,
    /// Where the VM has a platform.
    pub(crate) lapic: Option<Box<LocalApic>>,
}

impl Snapshot {
    /// The vCPUs in the order of their numbers.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Pages {
        &self.memory
    }

    /// What was live in each vCPU.
    #[must_use]
    pub fn at_stop(&self) -> Vec<AtStop> {
        self.vcpus.iter().map(AtStop::of).collect()
    }

    /// Interrupt controllers, timer, clock and devices, of a guest that has them.
    #[must_use]
    pub fn platform(&self) -> Option<&Platform> {
        self.platform.as_ref()
    }

    /// Whether all vCPUs are between the first and the last round of their `workloads`.
    #[must_use]
    pub fn is_midway(&self, workloads: &[Workload]) -> bool {
        self.vcpus
            .iter()
            .zip(workloads)
            .all(|(vcpu, workload)| workload.is_midway(vcpu.general.rip, vcpu.general.rcx))
    }

    /// The same with other extended state on every vCPU: `change` gets each one's. The control of
    /// the demo leaves out what must not be lost.
    #[must_use]
    pub fn map_extended(
        mut self,
        mut change: impl FnMut(&ExtendedState<'static>) -> ExtendedState<'static>,
    ) -> Self {
        for vcpu in &mut self.vcpus {
            vcpu.extended = change(&vcpu.extended);
        }
        self
    }
}

impl VcpuState {
    /// The extended state.
    #[must_use]
    pub fn extended(&self) -> &ExtendedState<'static> {
        &self.extended
    }

    /// The general-purpose registers.
    #[must_use]
    pub fn general(&self) -> &General {
        &self.general
    }

    /// The MSRs, without IA32_XFD and IA32_XFD_ERR: those are in the extended state.
    #[must_use]
    pub fn msrs(&self) -> &[Msr] {
        &self.msrs
    }

    /// The vCPU's CPUID.
    #[must_use]
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }
}
