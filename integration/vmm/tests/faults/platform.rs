//! A bare guest with interrupt controllers, a timer and a clock: what Linux guests have, without Linux.
//!
//! Its messages are made from those of a guest without them.

use amx_vmm::Host;
use amx_vmm::linux::devices;
use amx_vmm::registers::{CpuidEntry, Debug, Events, General, MpState, Msr, Special, Timer};
use serde::{Deserialize, Serialize};

use crate::connection;
use crate::frame::Frame;

/// The content of State, as docs/migration.md names its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) vcpus: Vec<Vcpu>,
    /// xsave-state's container.
    pub(crate) extended: Vec<u8>,
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

/// What a source sends: Hello, Pages, State, Commit.
pub(crate) fn messages(host: &Host, with_platform: bool) -> [Frame; 4] {
    let [mut hello, _, pages, mut state, _, commit, _] =
        connection::recorded(host).map(|message| Frame::parse(&message));
    if with_platform {
        // Its last field is a bool.
        *hello.content.last_mut().expect("it has fields") = 1;
        let mut all = State::parse(&state.content);
        add_platform(&mut all);
        state.content = all.to_bytes();
    }
    [hello, pages, state, commit]
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
