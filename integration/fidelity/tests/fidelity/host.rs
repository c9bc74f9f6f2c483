//! Processes with and without the permission for tiles (Documentation/arch/x86/xstate.rst).

use std::sync::atomic::{AtomicBool, Ordering};

use amx_fidelity::component::{AMX, TILECFG, TILEDATA, TILEDATA_BIT};
use amx_fidelity::pattern::noise;
use amx_fidelity::process::{
    self, GET_GUEST_PERMISSION, GET_PERMISSION, REQUEST_GUEST_PERMISSION, REQUEST_PERMISSION,
};
use amx_fidelity::sdm::tilecfg::config;
use amx_fidelity::trial::{AREA, Fault, Here, Instruction, Trial};
use kvm_ioctls::Kvm;

use crate::machine::Machine;

/// What uses tile data, on this processor.
fn uses_tiles() -> impl Iterator<Item = Instruction> {
    [
        Instruction::Tilezero0,
        Instruction::Tileloadd0,
        Instruction::Tilestored0,
        Instruction::Xrstor,
    ]
    .into_iter()
    .chain(Instruction::products())
}

/// The tests' first state has tiles configured and no tile data in use.
fn configured(machine: &mut Machine<Here>, instruction: Instruction) -> Trial {
    let trial = machine.with_tiles(Trial::of(instruction), &config(&[(16, 64); 8]), &[]);
    let mut area = vec![0; 4096];
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    area[512..520].copy_from_slice(&TILEDATA_BIT.to_le_bytes());
    machine.set_operand(&area);
    trial
        .starting_from(machine.load, 1 << TILECFG)
        .on_address(machine.operand.address(), 64)
        .requesting(AMX)
}

#[test]
fn without_permission_tiles_are_sigill() {
    if !process::has_amx() || !process::alone("host::without_permission_tiles_are_sigill") {
        return;
    }
    assert_eq!(process::query(GET_PERMISSION).unwrap() & TILEDATA_BIT, 0);
    let mut machine = Machine::new(Here::new());
    for instruction in uses_tiles() {
        let trial = configured(&mut machine, instruction);
        assert_eq!(
            machine.run(trial).fault(),
            Some(Fault::SIGILL),
            "{instruction:?}"
        );
    }
}

#[test]
fn without_permission_what_uses_no_tile_data_works() {
    if !process::has_amx()
        || !process::alone("host::without_permission_what_uses_no_tile_data_works")
    {
        return;
    }
    let mut machine = Machine::new(Here::new());
    for instruction in [
        Instruction::Ldtilecfg,
        Instruction::Sttilecfg,
        Instruction::Tilerelease,
        Instruction::Xsave,
        Instruction::Xsaveopt,
        Instruction::Xsavec,
    ] {
        let trial = configured(&mut machine, instruction);
        machine.set_operand(&config(&[(3, 16); 2]));
        assert_eq!(machine.run(trial).fault(), None, "{instruction:?}");
    }
    let mut area = vec![0; AREA];
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    let trial = configured(&mut machine, Instruction::Xrstor);
    machine.set_operand(&area);
    assert_eq!(
        machine.run(trial).fault(),
        None,
        "XRSTOR of initial tile data"
    );
}

#[test]
fn with_permission_tiles_work() {
    if !process::has_amx() || !process::alone("host::with_permission_tiles_work") {
        return;
    }
    let mut machine = Machine::new(Here::new());
    let trial = configured(&mut machine, Instruction::Tilezero0);
    assert_eq!(machine.run(trial).fault(), Some(Fault::SIGILL));
    assert_eq!(process::request(REQUEST_PERMISSION, TILEDATA), Ok(()));
    assert_ne!(process::query(GET_PERMISSION).unwrap() & TILEDATA_BIT, 0);
    for instruction in uses_tiles() {
        let trial = configured(&mut machine, instruction);
        assert_eq!(machine.run(trial).fault(), None, "{instruction:?}");
    }
    assert_eq!(
        process::request(REQUEST_PERMISSION, TILEDATA),
        Ok(()),
        "once more"
    );
}

#[test]
fn permission_for_guests_is_none_for_the_process() {
    if !process::has_amx() || !process::alone("host::permission_for_guests_is_none_for_the_process")
    {
        return;
    }
    assert_eq!(process::request(REQUEST_GUEST_PERMISSION, TILEDATA), Ok(()));
    assert_eq!(process::query(GET_PERMISSION).unwrap() & TILEDATA_BIT, 0);
    let mut machine = Machine::new(Here::new());
    let trial = configured(&mut machine, Instruction::Tilezero0);
    assert_eq!(machine.run(trial).fault(), Some(Fault::SIGILL));
}

#[test]
fn permission_is_refused_for_what_is_not_dynamic() {
    if !process::has_amx() || !process::alone("host::permission_is_refused_for_what_is_not_dynamic")
    {
        return;
    }
    for operation in [REQUEST_PERMISSION, REQUEST_GUEST_PERMISSION] {
        assert_eq!(process::request(operation, 63), Err(libc::EINVAL));
        assert_eq!(
            process::request(operation, 8),
            Err(libc::EOPNOTSUPP),
            "not requestable"
        );
    }
}

#[test]
fn the_first_vcpu_locks_the_permission_for_guests() {
    if !process::has_amx()
        || !process::alone("host::the_first_vcpu_locks_the_permission_for_guests")
    {
        return;
    }
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: there is no /dev/kvm");
        return;
    };
    let vm = kvm.create_vm().unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(
        process::request(REQUEST_GUEST_PERMISSION, TILEDATA),
        Err(libc::EBUSY)
    );
    assert_eq!(
        process::query(GET_GUEST_PERMISSION).unwrap() & TILEDATA_BIT,
        0
    );
}

#[test]
fn tiles_survive_other_threads_and_guests() {
    let Some(mut machine) = crate::machine::here() else {
        return;
    };
    let done = AtomicBool::new(false);
    let done = &done;
    std::thread::scope(|scope| {
        let _stop = Stop(done);
        scope.spawn(move || {
            let mut other = crate::machine::here().unwrap();
            let tiles = noise(8, 0, 8192);
            while !done.load(Ordering::Relaxed) {
                let trial = Trial::of(Instruction::Yield);
                let trial = other.with_tiles(trial, &config(&[(2, 8); 8]), &tiles);
                other.run(trial);
                assert!(
                    other.component(TILEDATA) == tiles,
                    "the other thread's tiles"
                );
            }
        });
        scope.spawn(move || {
            let mut guest = crate::machine::guest();
            let tiles = noise(9, 0, 8192);
            while let (Some(guest), false) = (&mut guest, done.load(Ordering::Relaxed)) {
                let trial = guest.with_tiles(
                    Trial::of(Instruction::Nothing),
                    &config(&[(3, 12); 8]),
                    &tiles,
                );
                guest.run(trial);
                assert!(guest.component(TILEDATA) == tiles, "the guest's tiles");
                std::thread::yield_now();
            }
        });
        let (tiles, config) = (noise(7, 0, 8192), config(&[(16, 64); 8]));
        for _ in 0..200 {
            let trial = machine.with_tiles(Trial::of(Instruction::Yield), &config, &tiles);
            let trial = machine.run(trial);
            assert_eq!(trial.xinuse() & AMX, AMX);
            assert_eq!(machine.component(TILECFG), config);
            assert!(machine.component(TILEDATA) == tiles, "this thread's tiles");
        }
    });
}

/// Ends the other threads, also where this one has failed.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn tiles_are_zero_at_first_use() {
    if !process::has_amx() || !process::alone("host::tiles_are_zero_at_first_use") {
        return;
    }
    assert_eq!(process::request(REQUEST_PERMISSION, TILEDATA), Ok(()));
    let mut machine = Machine::new(Here::new());
    // No state is loaded: these are the registers that the kernel gave to this process.
    let trial = Trial::of(Instruction::Nothing).saving_to(machine.result);
    let trial = machine.run(trial);
    assert_eq!(trial.xinuse() & AMX, 0, "XINUSE");
    assert_eq!(machine.in_use() & AMX, 0, "XSTATE_BV");
    assert!(machine.component(TILEDATA).iter().all(|&byte| byte == 0));
    machine.set_operand(&config(&[(16, 64); 8]));
    let trial = Trial::of(Instruction::Ldtilecfg)
        .on(machine.operand)
        .saving_to(machine.result);
    let trial = machine.run(trial);
    assert_eq!((trial.fault(), trial.xinuse() & AMX), (None, 1 << TILECFG));
    assert!(machine.component(TILEDATA).iter().all(|&byte| byte == 0));
}
