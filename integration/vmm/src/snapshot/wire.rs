//! What is written of the vCPUs, and how.

use serde::{Deserialize, Serialize};
use xsave_state::{ExtendedState, Layout};

use super::header::Header;
use super::{Snapshot, VcpuState};
use crate::registers::{CpuidEntry, Debug, Events, General, MpState, Msr, Special};

/// All vCPUs, as they are written.
#[derive(Serialize, Deserialize)]
pub(super) struct State<'a> {
    #[serde(borrow)]
    pub(super) vcpus: Vec<Vcpu<'a>>,
}

/// One vCPU, as it is written.
#[derive(Serialize, Deserialize)]
pub(super) struct Vcpu<'a> {
    pub(super) cpuid: Vec<CpuidEntry>,
    #[serde(borrow)]
    pub(super) extended: Extended<'a>,
    pub(super) general: General,
    pub(super) special: Special,
    pub(super) debug: Debug,
    pub(super) events: Events,
    pub(super) mp_state: MpState,
    pub(super) msrs: Vec<Msr>,
}

/// The extended state, as it is written: up to the end of the last component in use.
#[derive(Serialize, Deserialize)]
pub(super) struct Extended<'a> {
    pub(super) xcr0: u64,
    pub(super) xfd: u64,
    pub(super) xfd_err: u64,
    pub(super) area: &'a [u8],
}

impl Snapshot {
    /// The bytes of a snapshot file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let state = State {
            vcpus: self.vcpus.iter().map(Vcpu::from).collect(),
        };
        // It fails where a sequence does not know its length or the buffer is full: these do, and a
        // vector grows.
        let state = postcard::to_allocvec(&state).unwrap_or_default();
        let mut header = Header {
            state_bytes: state.len(),
            memory_bytes: self.memory.memory_bytes,
            pages: self.memory.len(),
            body_checksum: 0,
        };
        let numbers: Vec<u8> = self
            .memory
            .numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        let mut checksum = crc32fast::Hasher::new();
        for part in [&state, &numbers, &self.memory.content] {
            checksum.update(part);
        }
        header.body_checksum = checksum.finalize();
        let mut bytes = Vec::with_capacity(header.file_bytes());
        for part in [&header.to_bytes(), &state, &numbers, &self.memory.content] {
            bytes.extend_from_slice(part);
        }
        bytes
    }
}

impl<'a> From<&'a VcpuState> for Vcpu<'a> {
    fn from(vcpu: &'a VcpuState) -> Self {
        Self {
            cpuid: vcpu.cpuid.clone(),
            extended: Extended::from(&vcpu.extended),
            general: vcpu.general,
            special: vcpu.special,
            debug: vcpu.debug,
            events: vcpu.events,
            mp_state: vcpu.mp_state,
            msrs: vcpu.msrs.clone(),
        }
    }
}

impl<'a> From<&'a ExtendedState<'static>> for Extended<'a> {
    fn from(extended: &'a ExtendedState<'static>) -> Self {
        let registers = extended.registers();
        let area = extended.image().as_bytes();
        let used = used_bytes(extended.layout(), extended);
        Self {
            xcr0: registers.xcr0.bits(),
            xfd: registers.xfd.bits(),
            xfd_err: registers.xfd_err.bits(),
            area: area.get(..used).unwrap_or(area),
        }
    }
}

fn used_bytes(layout: &Layout, extended: &ExtendedState<'_>) -> usize {
    layout.standard_size_of(extended.image().xstate_bv())
}
