//! What is written of the vCPUs, and how.

use serde::{Deserialize, Serialize};
use xsave_state::wire;

use super::header::Header;
use super::{Snapshot, VcpuState};
use crate::linux::devices;
use crate::platform::Platform as Captured;
use crate::registers::{CpuidEntry, Debug, Events, General, MpState, Msr, Special, Timer};

/// All but memory, as it is written.
#[derive(Serialize, Deserialize)]
pub(super) struct State<'a> {
    #[serde(borrow)]
    pub(super) vcpus: Vec<Vcpu<'a>>,
    /// The extended states of all vCPUs, one behind the other, as xsave-state encodes them.
    pub(super) extended: &'a [u8],
    pub(super) tsc_khz: Option<u32>,
    pub(super) platform: Option<Platform<'a>>,
}

/// One vCPU, as it is written.
#[derive(Serialize, Deserialize)]
pub(super) struct Vcpu<'a> {
    pub(super) cpuid: Vec<CpuidEntry>,
    pub(super) general: General,
    pub(super) special: Special,
    pub(super) debug: Debug,
    pub(super) events: Events,
    pub(super) mp_state: MpState,
    pub(super) msrs: Vec<Msr>,
    pub(super) lapic: Option<&'a [u8]>,
}

/// Interrupt controllers, timer, clock and devices, as they are written.
#[derive(Serialize, Deserialize)]
pub(super) struct Platform<'a> {
    #[serde(borrow)]
    pub(super) chips: [&'a [u8]; 3],
    pub(super) timer: Timer,
    pub(super) clock: u64,
    pub(super) devices: devices::State,
}

impl Snapshot {
    /// The bytes of a snapshot file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let state = self.state_bytes();
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

    /// All but memory.
    pub(crate) fn state_bytes(&self) -> Vec<u8> {
        let extended = extended(&self.vcpus);
        let state = State {
            vcpus: self.vcpus.iter().map(Vcpu::from).collect(),
            extended: &extended,
            tsc_khz: self.tsc_khz,
            platform: self.platform.as_ref().map(Platform::from),
        };
        // It fails where a sequence does not know its length or the buffer is full: these do, and a
        // vector grows.
        postcard::to_allocvec(&state).unwrap_or_default()
    }
}

/// The extended states, each with the number of its vCPU and its own layout.
pub(super) fn extended(vcpus: &[VcpuState]) -> Vec<u8> {
    let states = (0..).zip(vcpus);
    states
        .flat_map(|(vcpu, state)| wire::encode(vcpu, &state.extended))
        .collect()
}

impl<'a> From<&'a VcpuState> for Vcpu<'a> {
    fn from(vcpu: &'a VcpuState) -> Self {
        Self {
            cpuid: vcpu.cpuid.clone(),
            general: vcpu.general,
            special: vcpu.special,
            debug: vcpu.debug,
            events: vcpu.events,
            mp_state: vcpu.mp_state,
            msrs: vcpu.msrs.clone(),
            lapic: vcpu.lapic.as_ref().map(|lapic| lapic.as_slice()),
        }
    }
}

impl<'a> From<&'a Captured> for Platform<'a> {
    fn from(platform: &'a Captured) -> Self {
        Self {
            chips: platform.chips.each_ref().map(|chip| chip.as_slice()),
            timer: platform.timer,
            clock: platform.clock,
            devices: platform.devices.clone(),
        }
    }
}
