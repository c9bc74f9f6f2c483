//! A bare guest with interrupt controllers, a timer and a clock: what Linux guests have, without Linux.
//!
//! Its messages are made from the snapshot of a guest without them.

use amx_vmm::Host;
use amx_vmm::linux::devices;
use amx_vmm::migration::frame::{self, Hello};
use amx_vmm::registers::{CpuidEntry, Debug, Events, General, MpState, Msr, Special, Timer};
use serde::{Deserialize, Serialize};

use crate::frame::{COMMIT, Frame, HELLO, PAGES, STATE};
use crate::trial;

/// The content of State, as docs/migration.md names its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) vcpus: Vec<Vcpu>,
    /// The states of all vCPUs, one behind the other, as xsave-state encodes them.
    pub(crate) extended: Vec<u8>,
    pub(crate) tsc_khz: Option<u32>,
    pub(crate) platform: Option<Platform>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vcpu {
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) general: General,
    pub(crate) special: Special,
    pub(crate) debug: Debug,
    pub(crate) events: Events,
    pub(crate) mp_state: MpState,
    pub(crate) msrs: Vec<Msr>,
    pub(crate) lapic: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Platform {
    pub(crate) chips: [Vec<u8>; 3],
    pub(crate) timer: Timer,
    pub(crate) clock: u64,
    pub(crate) devices: devices::State,
}

impl State {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        postcard::from_bytes(bytes).expect("it was sent by this VMM")
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("its lengths are known")
    }
}

/// Bytes of a snapshot's header (docs of `snapshot::header`).
const HEADER_BYTES: usize = 64;

/// What a source sends of a guest in the middle of its work: Hello, Pages, State, Commit.
pub(crate) fn messages(host: &Host, with_platform: bool) -> [Frame; 4] {
    // A file has the same content.
    let file = trial::guest(host)
        .capture(host)
        .expect("it is captured")
        .to_bytes();
    let state_bytes = u64::from_le_bytes(file[16..24].try_into().expect("eight bytes"));
    let memory_bytes = u64::from_le_bytes(file[24..32].try_into().expect("eight bytes"));
    let body = &file[HEADER_BYTES..];
    let (state, pages) = body.split_at(usize::try_from(state_bytes).expect("it is short"));
    let mut state = State::parse(state);
    if with_platform {
        add_platform(&mut state);
    }
    let hello = Hello {
        version: frame::VERSION,
        memory_bytes,
        has_platform: with_platform,
    };
    let mut number = 0..;
    [
        (HELLO, postcard::to_stdvec(&hello).expect("plain data")),
        (PAGES, pages.to_vec()),
        (STATE, state.to_bytes()),
        (COMMIT, vec![]),
    ]
    .map(|(kind, content)| Frame {
        kind,
        number: number.next().expect("without end"),
        content,
    })
}

fn add_platform(state: &mut State) {
    for (index, vcpu) in (0..).zip(&mut state.vcpus) {
        // Enabled; the first one is the bootstrap processor (SDM Vol. 3 §12.4.4).
        vcpu.special.apic_base = 0xfee0_0800 | if index == 0 { 0x100 } else { 0 };
        let mut lapic = vec![0; 1024];
        let mut set = |offset: usize, value: u32| {
            lapic[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        set(0x20, index << 24);
        set(0x30, 0x0005_0014);
        // Flat destinations, software-disabled, every local interrupt masked.
        set(0xe0, u32::MAX);
        set(0xf0, 0xff);
        for local in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
            set(local, 0x1_0000);
        }
        vcpu.lapic = Some(lapic);
    }
    state.platform = Some(Platform {
        chips: [(); 3].map(|()| vec![0; 512]),
        timer: Timer::default(),
        clock: 1_000_000_000,
        devices: devices::State::default(),
    });
}
