//! The cases of the kernel's own test of AMX in KVM (tools/testing/selftests/kvm/x86/amx_test.c), end to end:
//! one walk with numbered stages, as that test has them, and each time the VM is captured, written as a
//! snapshot, read, and restored into a new VM.
//!
//! docs/migration.md has the table of what each stage shows. It needs AMX: it runs in the lab.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::sync::atomic::{AtomicU32, Ordering};

use amx_guest::area::{self, DOORBELL_PORT};
use amx_vmm::{Bus, BusError, Ended, Host, Snapshot, Vm};
use cpuid_amx::{CpuidTable, GuestPermission, permission};
use kvm_ioctls::Kvm;
use support::{LONG, amx_host, elsewhere, job};
use xsave_state::sanitize::{Change, sanitize};
use xsave_state::{
    ComponentId, ExtendedState, Losses, Misfit, StateError, UntrustedArea, XFeatures,
};

/// IA32_XFD and IA32_XFD_ERR with tile data.
const TILE_DATA: u64 = 1 << 18;
/// CR0.TS (SDM Vol. 3 §2.5).
const TASK_SWITCHED: u64 = 1 << 3;

/// Stops the VM at each stage.
#[derive(Default)]
struct Stage(AtomicU32);

impl Bus for Stage {
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        match data.try_into() {
            Ok(stage) if port == DOORBELL_PORT => {
                self.0.store(u32::from_le_bytes(stage), Ordering::SeqCst);
                Ok(())
            }
            _ => Err(BusError::NoDevice { vcpu, port }),
        }
    }

    fn stops(&self, _vcpu: u8) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }
}

/// What is known at a stage.
struct At {
    snapshot: Snapshot,
    area: Vec<u8>,
}

impl At {
    fn extended(&self) -> &ExtendedState<'static> {
        self.snapshot.vcpus()[0].extended()
    }

    fn in_use(&self) -> XFeatures {
        self.extended().image().xstate_bv()
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.area[at..][..8].try_into().expect("eight bytes"))
    }

    /// What the guest has noted.
    fn note(&self, at: usize) -> u64 {
        self.word(area::NOTES + at)
    }

    /// EAX, EBX, ECX and EDX that the guest has seen.
    fn cpuid(&self, at: usize) -> [u32; 4] {
        let halves = |word: u64| [word & 0xffff_ffff, word >> 32];
        let words = [at, at + 8].map(|at| halves(self.note(at)));
        let [[eax, ebx], [ecx, edx]] = words
            .map(|[low, high]| [low, high].map(|half| u32::try_from(half).expect("it is a half")));
        [eax, ebx, ecx, edx]
    }

    /// XSTATE_BV and XCOMP_BV of the area that the guest has saved.
    fn saved_header(&self) -> (u64, u64) {
        (
            self.word(area::OUT_VECTORS + 512),
            self.word(area::OUT_VECTORS + 520),
        )
    }

    fn tile(&self) -> &[u8] {
        &self.area[area::IN_VECTORS..][..1024]
    }

    fn tile_config(&self) -> &[u8] {
        &self.area[area::IN_TILECFG..][..64]
    }
}

/// Lets the guest run to stage `number`, saves it, and goes on in a new VM.
fn stage(host: &Host, vm: &mut Vm, number: u32) -> At {
    let stage = Stage::default();
    let ended = vm.run(&stage, LONG).expect("it runs");
    assert_eq!(ended, Ended::Stopped, "on the way to stage {number}");
    assert_eq!(stage.0.into_inner(), number);
    let bytes = vm.capture(host).expect("it is captured").to_bytes();
    let area = vm.read_area(0).expect("it is in memory");
    let snapshot = Snapshot::from_bytes(&bytes).expect("it is read");
    *vm = Vm::restore(host, &snapshot).expect("it is restored");
    let again = vm.capture(host).expect("it is captured again");
    let (before, after) = (&snapshot.vcpus()[0], &again.vcpus()[0]);
    assert_eq!(after.general(), before.general(), "stage {number}");
    assert_eq!(
        after.extended().registers(),
        before.extended().registers(),
        "stage {number}"
    );
    At { snapshot, area }
}

fn passed(number: u32, what: &str) {
    println!("stage {number}: {what}");
}

#[test]
fn stage_0_the_permission_comes_before_cpuid_is_asked_for() {
    const NAME: &str = "stage_0_the_permission_comes_before_cpuid_is_asked_for";
    if job().is_none() {
        if amx_host().is_some() {
            // In a process that has not asked yet.
            elsewhere(NAME, "ask");
        }
        return;
    }
    let kvm = Kvm::new().expect("it was opened before");
    let entries = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    let user = || {
        let cpuid = kvm.get_supported_cpuid(entries).expect("it is supported");
        let [eax, ..] = CpuidTable::leaf(&cpuid, 0xd, 0);
        XFeatures::from_bits_retain(eax.into())
    };
    let supported = host_compat::xcomp_guest_supp(&kvm).expect("Linux 5.17");
    assert!(supported.contains(XFeatures::XTILEDATA));
    assert!(!user().contains(XFeatures::XTILEDATA), "no permission yet");
    let permission = GuestPermission::request().expect("it is granted");
    assert!(permission.granted().contains(XFeatures::XTILEDATA));
    let granted = permission::granted().expect("the kernel knows it");
    assert!(granted.contains(XFeatures::XTILEDATA));
    assert!(user().contains(XFeatures::AMX));
}

#[test]
fn stages_1_to_9_each_in_a_new_vm() {
    let Some(host) = amx_host() else { return };
    let mut vm = Vm::boot_kernel_cases(&host).expect("it boots");

    let at = stage(&host, &mut vm, 1);
    assert_eq!(at.note(0) & XFeatures::AMX.bits(), XFeatures::AMX.bits());
    let [_, enabled_bytes, ..] = at.cpuid(16);
    assert!((2816 + 8192..=4096 + 8192).contains(&enabled_bytes));
    passed(1, "XCR0 has both components, and 0DH.0:EBX their bytes");
    assert_eq!(at.cpuid(32)[..2], [64, 2752]);
    assert_eq!(at.cpuid(48)[..2], [8192, 2816]);
    assert!(at.cpuid(64)[0] >= 1, "palettes");
    let [bytes, names, rows, _] = at.cpuid(80);
    let shape = (names >> 16, bytes >> 16, names & 0xffff, rows & 0xffff);
    assert_eq!(shape, (8, 1024, 64, 16));
    passed(1, "the places of both, and palette 1");
    assert_eq!(at.note(96), 0);
    assert!(at.extended().registers().xfd.is_empty());

    let at = stage(&host, &mut vm, 2);
    assert_eq!(at.note(104), 0, "IA32_XFD in the second VM");
    passed(2, "IA32_XFD of 0 survives");
    let config = at.extended().image().component(ComponentId::XTILECFG);
    assert_eq!(config, Some(at.tile_config()));
    passed(2, "the tile configuration is captured");

    let live = stage(&host, &mut vm, 3);
    assert!(live.in_use().contains(XFeatures::AMX));
    passed(
        3,
        "a tile is loaded under the configuration that was restored",
    );
    let image = live.extended().image();
    let tiles = image.component(ComponentId::XTILEDATA).expect("in use");
    assert_eq!(&tiles[..1024], live.tile());
    assert!(tiles[1024..].iter().all(|byte| *byte == 0));
    passed(3, "TMM0 as captured equals memory");

    let at = stage(&host, &mut vm, 4);
    let armed = at.extended().registers();
    assert_eq!(armed.xfd.bits(), TILE_DATA);
    assert!(!at.in_use().contains(XFeatures::XTILEDATA));
    // The kernel's test gives the area of stage 3 to the vCPU that has tile data disabled. Such a state
    // cannot be made here; made safe it is restored, and the VM runs on.
    let image = live.extended().image().clone();
    assert_eq!(
        ExtendedState::new(image.clone(), armed),
        Err(StateError::InUseWhileDisabled {
            xstate_bv: live.in_use(),
            xfd: armed.xfd,
            both: XFeatures::XTILEDATA
        })
    );
    let untrusted = UntrustedArea::new(image.as_bytes(), armed);
    assert!(sanitize(&untrusted, host.layout(), Losses::empty()).is_err());
    let safe = sanitize(&untrusted, host.layout(), Losses::DISABLED).expect("it is allowed");
    // Beside it, components that are in use with their initial values are released.
    let mut changes = safe.report.changes().iter();
    assert!(changes.any(|change| matches!(change, Change::Lost(Misfit::Disabled { .. }))));
    let snapshot = at.snapshot.map_extended(|_| safe.state.clone());
    vm = Vm::restore(&host, &snapshot).expect("it is restored");
    passed(
        4,
        "tile data in use and disabled: refused, or dropped by name, and the VM runs on",
    );

    for number in [5, 6] {
        let at = stage(&host, &mut vm, number);
        let (xstate_bv, xcomp_bv) = at.saved_header();
        assert_eq!(xstate_bv & TILE_DATA, 0, "stage {number}");
        assert_eq!(xcomp_bv & TILE_DATA, TILE_DATA, "stage {number}");
        let xfd = if number == 5 { 0 } else { TILE_DATA };
        assert_eq!(at.extended().registers().xfd.bits(), xfd);
        assert!(!at.in_use().contains(XFeatures::XTILEDATA));
    }
    passed(
        5,
        "released tiles have their place in XSAVEC, and are not in use",
    );
    passed(6, "the same with tile data disabled");

    let at = stage(&host, &mut vm, 7);
    let config = at.extended().image().component(ComponentId::XTILECFG);
    assert_eq!(config, Some(at.tile_config()));
    assert_eq!(at.note(8), 1, "one #NM");
    assert_eq!(at.note(112) & TASK_SWITCHED, 0);
    passed(
        7,
        "disabled in the new VM too: LDTILECFG works, TILELOADD raises #NM",
    );
    assert_eq!((at.note(120), at.note(128)), (TILE_DATA, TILE_DATA));
    let registers = at.extended().registers();
    assert_eq!(registers.xfd, XFeatures::XTILEDATA);
    assert_eq!(registers.xfd_err, XFeatures::XTILEDATA);
    passed(7, "CR0.TS is 0; IA32_XFD_ERR and IA32_XFD have tile data");

    let at = stage(&host, &mut vm, 8);
    assert_eq!((at.note(136), at.note(144)), (TILE_DATA, TILE_DATA));
    let registers = at.extended().registers();
    assert!(registers.xfd.is_empty() && registers.xfd_err.is_empty());
    passed(8, "both survive in the handler, and are cleared");

    let at = stage(&host, &mut vm, 9);
    assert_eq!(at.note(8), 1, "still one #NM");
    assert_eq!(&at.area[area::OUT_VECTORS..][..1024], at.tile());
    passed(9, "the same TILELOADD loads the tile");
    let ended = vm.run(&Stage::default(), LONG).expect("it runs");
    assert_eq!(ended, Ended::Halted);
}
