//! The cases of the kernel's own test (tools/testing/selftests/kvm/x86/amx_test.c), in its order.
//!
//! The guest program is `selftest.asm`. After each of its steps the vCPU is saved and restored into a new
//! VM, which goes on.

use amx_fidelity::arena::{Arena, Piece};
use amx_fidelity::component::{AMX, TILECFG, TILEDATA_BIT};
use amx_fidelity::guest::{self, Exit, Saved, Vm, World};
use amx_fidelity::pattern::noise;
use amx_fidelity::process::{self, GET_GUEST_PERMISSION, REQUEST_GUEST_PERMISSION};
use amx_fidelity::sdm::tilecfg::config;
use amx_fidelity::trial::AREA;
use kvm_ioctls::Kvm;

/// Offset and size of tile data, from the processor.
fn tile_data() -> (usize, usize) {
    let place = amx_fidelity::cpuid::Layout::here().place(18).unwrap();
    (place.offset, place.size)
}

#[expect(unsafe_code, reason = "a VM on memory of this process")]
pub(crate) fn new_vm(kvm: &Kvm, arena: &Arena) -> Vm {
    // SAFETY: All callers drop the VM before the arena, which they made before it.
    unsafe { Vm::new(kvm, arena) }
}

/// What is known after a step.
struct Step {
    saved: Saved,
    notes: Vec<u64>,
    area: Vec<u8>,
}

impl Step {
    fn xstate_bv(&self) -> u64 {
        u64::from_le_bytes(self.saved.area[512..520].try_into().unwrap())
    }

    /// XSTATE_BV and XCOMP_BV of the area that the guest saved.
    fn guest_header(&self) -> (u64, u64) {
        let word = |at: usize| u64::from_le_bytes(self.area[at..][..8].try_into().unwrap());
        (word(512), word(520))
    }
}

struct Run {
    arena: Arena,
    tile: Piece,
    notes: Piece,
    area: Piece,
    steps: Vec<Step>,
}

/// Runs the program to its end; `None` where the test is skipped.
fn run() -> Option<Run> {
    let kvm = guest::kvm()?;
    let mut arena = Arena::new(1);
    let world = World::new(&mut arena, false);
    let [configuration, tile, notes, area] = [(); 4].map(|()| arena.take(AREA));
    arena.bytes_mut(configuration)[..64].copy_from_slice(&config(&[(16, 64); 8]));
    arena.bytes_mut(tile)[..1024].copy_from_slice(&noise(6, 0, 1024));
    arena.bytes_mut(area).fill(0);
    let mut run = Run {
        arena,
        tile,
        notes,
        area,
        steps: Vec::new(),
    };
    let mut vm = new_vm(&kvm, &run.arena);
    let addresses = [configuration, tile, area, notes].map(Piece::address);
    world.enter_selftest(&vm, addresses);
    for port in 0x21..=0x29 {
        assert_eq!(vm.run(), Exit::Port(port), "{:x?}", vm.vcpu.get_regs());
        let saved = vm.save();
        if port == 0x24 {
            // Tile data in use, from before IA32_XFD was set, into the live vCPU.
            vm.set_area(&run.steps[2].saved.area)
                .expect("KVM_SET_XSAVE with disabled tile data in use");
        }
        vm = new_vm(&kvm, &run.arena);
        vm.restore(&saved);
        let again = vm.save();
        assert_eq!(
            again.regs, saved.regs,
            "general registers after step {port:#x}"
        );
        assert_eq!(
            (again.xfd, again.xfd_err),
            (saved.xfd, saved.xfd_err),
            "step {port:#x}"
        );
        run.note(saved);
    }
    assert_eq!(vm.run(), Exit::Halt);
    drop(vm);
    Some(run)
}

impl Run {
    fn note(&mut self, saved: Saved) {
        let words = self.arena.bytes(self.notes).chunks_exact(8);
        self.steps.push(Step {
            saved,
            notes: words
                .take(32)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect(),
            area: self.arena.bytes(self.area).to_vec(),
        });
    }

    fn tile(&self) -> &[u8] {
        &self.arena.bytes(self.tile)[..1024]
    }

    /// EAX, EBX, ECX and EDX that the guest saw.
    fn cpuid(&self, note: usize) -> [u32; 4] {
        let halves = |word: u64| [word as u32, (word >> 32) as u32];
        let [a, b] = [note, note + 1].map(|i| halves(self.steps[0].notes[i]));
        [a[0], a[1], b[0], b[1]]
    }
}

#[test]
fn case_01_permission_comes_before_cpuid_is_asked_for() {
    if !process::has_amx()
        || !process::alone("kernel_cases::case_01_permission_comes_before_cpuid_is_asked_for")
    {
        return;
    }
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: there is no /dev/kvm");
        return;
    };
    let user = |kvm: &Kvm| {
        let cpuid = guest::supported_cpuid(kvm);
        let entry = cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (0xd, 0))
            .unwrap();
        u64::from(entry.eax)
    };
    assert_eq!(
        process::query(GET_GUEST_PERMISSION).unwrap() & TILEDATA_BIT,
        0
    );
    assert_eq!(user(&kvm) & TILEDATA_BIT, 0, "not without permission");
    assert_eq!(process::request(REQUEST_GUEST_PERMISSION, 18), Ok(()));
    assert_ne!(
        process::query(GET_GUEST_PERMISSION).unwrap() & TILEDATA_BIT,
        0
    );
    assert_eq!(user(&kvm) & AMX, AMX, "with permission");
}

#[test]
fn case_02_the_guest_has_both_components_in_xcr0() {
    let Some(run) = run() else { return };
    let [low, enabled_size, ..] = run.cpuid(16);
    assert_eq!(u64::from(low) & AMX, AMX);
    assert!(
        (2816 + 8192..=4096 + 8192).contains(&enabled_size),
        "{enabled_size}"
    );
}

#[test]
fn case_03_the_guest_sees_the_palette_and_the_places() {
    let Some(run) = run() else { return };
    assert_eq!(run.cpuid(18)[..2], [64, 2752]);
    assert_eq!(run.cpuid(20)[..2], [8192, 2816]);
    assert!(run.cpuid(22)[0] >= 1, "palettes");
    let [bytes, names, rows, _] = run.cpuid(24);
    assert_eq!(
        (names >> 16, bytes >> 16, names & 0xffff, rows & 0xffff),
        (8, 1024, 64, 16)
    );
    assert_eq!(tile_data(), (2816, 8192));
}

#[test]
fn case_04_xfd_of_zero_survives() {
    let Some(run) = run() else { return };
    assert_eq!(run.steps[0].saved.xfd, 0);
    assert_eq!(
        run.steps[1].notes[..2],
        [0, 0],
        "what the guest read before and after"
    );
}

#[test]
fn case_05_a_configuration_survives_and_a_tile_is_loaded() {
    let Some(run) = run() else { return };
    assert_ne!(run.steps[1].xstate_bv() & 1 << TILECFG, 0);
    assert_eq!(run.steps[1].saved.area[2752..2816], config(&[(16, 64); 8]));
    // The tile was loaded in another VM than the configuration.
    assert_eq!(run.steps[2].xstate_bv() & AMX, AMX);
}

#[test]
fn case_06_the_saved_tile_equals_memory() {
    let Some(run) = run() else { return };
    let (offset, size) = tile_data();
    let tiles = &run.steps[2].saved.area[offset..][..size];
    assert_eq!(&tiles[..1024], run.tile());
    assert!(tiles[1024..].iter().all(|&byte| byte == 0));
}

#[test]
fn case_07_an_area_with_disabled_tile_data_is_taken_and_the_vm_runs() {
    let Some(kvm) = guest::kvm() else { return };
    let Some(run) = run() else { return };
    assert_eq!(run.steps[3].saved.xfd, TILEDATA_BIT);
    assert_eq!(
        run.steps[3].xstate_bv() & TILEDATA_BIT,
        0,
        "disabled tile data is not in use"
    );
    // IA32_XFD first, then the area with tile data in use, and then the VM still runs.
    let mut saved = run.steps[3].saved.clone();
    saved.area.clone_from(&run.steps[2].saved.area);
    let mut vm = new_vm(&kvm, &run.arena);
    vm.restore(&saved);
    assert_eq!(vm.run(), Exit::Port(0x25));
    drop(vm);
}

#[test]
fn case_08_released_tiles_are_not_saved_but_have_their_place() {
    let Some(run) = run() else { return };
    let (xstate_bv, xcomp_bv) = run.steps[4].guest_header();
    assert_eq!(xstate_bv & TILEDATA_BIT, 0);
    assert_ne!(xcomp_bv & TILEDATA_BIT, 0);
}

#[test]
fn case_09_the_same_with_tile_data_disabled() {
    let Some(run) = run() else { return };
    assert_eq!(run.steps[5].saved.xfd, TILEDATA_BIT);
    let (xstate_bv, xcomp_bv) = run.steps[5].guest_header();
    assert_eq!(xstate_bv & TILEDATA_BIT, 0);
    assert_ne!(xcomp_bv & TILEDATA_BIT, 0);
}

#[test]
fn case_10_a_disabled_tile_is_configured_but_not_loaded() {
    let Some(run) = run() else { return };
    assert_eq!(run.steps[6].notes[2], 7, "the vector that TILELOADD raised");
    assert_eq!(run.steps[6].saved.area[2752..2816], config(&[(16, 64); 8]));
}

#[test]
fn case_11_the_registers_of_a_stop_survive() {
    let Some(run) = run() else { return };
    let (before, after) = (&run.steps[6].notes, &run.steps[7].notes);
    assert_eq!(before[3] & 8, 0, "CR0.TS");
    assert_eq!(before[4..6], [TILEDATA_BIT; 2], "IA32_XFD_ERR, IA32_XFD");
    assert_eq!(after[6..8], [TILEDATA_BIT; 2], "in the next VM");
    assert_eq!(
        (run.steps[6].saved.xfd_err, run.steps[6].saved.xfd),
        (TILEDATA_BIT, TILEDATA_BIT)
    );
}

#[test]
fn case_12_enabled_again_the_tile_is_loaded() {
    let Some(run) = run() else { return };
    assert_eq!((run.steps[7].saved.xfd_err, run.steps[7].saved.xfd), (0, 0));
    assert_eq!(
        &run.steps[8].area[..1024],
        run.tile(),
        "what the guest stored"
    );
}

#[test]
fn case_13_general_registers_are_the_same_after_every_restore() {
    // `run` compares them after each of the nine steps.
    if let Some(run) = run() {
        assert_eq!(run.steps.len(), 9);
    }
}
