//! Saved before, in the middle of, and after growth, and gone on in another VM.

use vcpu_realloc::Answer;
use vcpu_realloc::kvm::{Handled, Mode, ObserveError, Options, RewindError};

use crate::boot::{AMX, boot};
use crate::machine::{ARMED, Command, MSR_IA32_XFD, Machine, Stop, TILES, guest};
use crate::vmm::{Grants, never};

const CLEARED: Stop = Stop::Wrmsr {
    index: MSR_IA32_XFD,
    value: 0,
};

/// A process uses tiles, with a bell in front of it, with its tiles loaded, and at its end.
const PROCESS: [Command; 5] = [
    Command::Bell(2),
    AMX[0],
    Command::Bell(3),
    AMX[1],
    Command::Bell(4),
];

fn booted() -> Option<Machine> {
    let mut machine = Machine::with_amx(1, Options::default())?;
    boot(&mut machine, 0, &mut never);
    machine.tell(0, &PROCESS);
    assert_eq!(machine.run(0, &mut never), Stop::Bell(2));
    Some(machine)
}

/// Moves vCPU 0 to a new VM.
fn moved(machine: &mut Machine, saving: &mut Grants, restoring: &mut Grants) -> Machine {
    let saved = machine.save(0, saving);
    let mut target = Machine::with_amx(1, Options::default()).unwrap();
    target.copy_memory(machine);
    target.restore(0, &saved, restoring);
    target
}

#[test]
fn saved_before_growth_the_first_use_is_seen_there() {
    let Some(mut machine) = booted() else { return };
    let (mut saving, mut restoring) = (Grants::default(), Grants::default());
    let mut target = moved(&mut machine, &mut saving, &mut restoring);
    assert!(saving.0.is_empty() && restoring.0.is_empty());
    assert!(!target.gate.saved_grant().has_been());
    assert_eq!(target.gate.mode(), Mode::Trapping);
    assert_eq!(target.step(0), CLEARED);
    assert!(target.is_in_nm_handler(0));
    let mut vmm = Grants::default();
    let _ = target.handle(0, 0, &mut vmm).unwrap();
    assert_eq!(vmm.0.len(), 1);
    assert_eq!(target.step(0), Stop::Bell(3));
    assert_eq!(target.step(0), Stop::Bell(4));
    assert!(target.tiles_are_right(0));
    assert_eq!(target.vcpus[0].exits, 1);
}

#[test]
fn saved_in_the_middle_of_growth_the_write_is_repeated_there() {
    let Some(mut machine) = booted() else { return };
    assert_eq!(machine.step(0), CLEARED);
    let waiting = machine.handle(0, 0, &mut Answer::Later).unwrap();
    assert!(matches!(waiting, Handled::Waiting(_)));
    // It is in the middle of an instruction, and the gate says so.
    let state = machine.capture(0);
    let handler = &mut machine.vcpus[0].handler;
    let error = handler.observe(&state, &mut never).unwrap_err();
    assert_eq!(error, ObserveError::Waiting);
    let vcpu = &mut machine.vcpus[0];
    vcpu.handler.rewind(&mut vcpu.fd).unwrap();
    assert!(machine.is_in_nm_handler(0));

    let (mut saving, mut restoring) = (Grants::default(), Grants::default());
    let mut target = moved(&mut machine, &mut saving, &mut restoring);
    assert!(saving.0.is_empty() && restoring.0.is_empty());
    // There, and here: whichever of both goes on.
    for vm in [&mut target, &mut machine] {
        assert_eq!(vm.step(0), CLEARED);
        assert!(vm.is_in_nm_handler(0));
        let mut vmm = Grants::default();
        let _ = vm.handle(0, 0, &mut vmm).unwrap();
        assert_eq!(vmm.0.len(), 1);
        assert_eq!(vm.step(0), Stop::Bell(3));
        assert_eq!(vm.step(0), Stop::Bell(4));
        assert!(vm.tiles_are_right(0));
        assert_eq!(vm.word(0, guest::GP_COUNT), 0);
    }
}

/// (On a host without AMX see `exits`.)
#[test]
fn a_rewinding_that_failed_in_the_middle_of_growth_can_be_resumed() {
    let Some(mut machine) = booted() else { return };
    assert_eq!(machine.step(0), CLEARED);
    let waiting = machine.handle(0, 0, &mut Answer::Later).unwrap();
    assert!(matches!(waiting, Handled::Waiting(_)));
    let vcpu = &mut machine.vcpus[0];
    // As in `exits`.
    vcpu.fd.get_kvm_run().kvm_valid_regs = 1 << 31;
    let error = vcpu.handler.rewind(&mut vcpu.fd).unwrap_err();
    assert!(matches!(error, RewindError::Run(errno) if errno.errno() == libc::EINVAL));
    vcpu.fd.get_kvm_run().kvm_valid_regs = 0;
    assert!(vcpu.handler.is_waiting());
    let _ = machine.resume(0, &mut Answer::Grant).unwrap();
    assert_eq!(machine.step(0), Stop::Bell(3));
    assert_eq!(machine.step(0), Stop::Bell(4));
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

/// The control: a VMM that completes pending exits and does not rewind gives its guest a fault.
#[test]
fn saved_in_the_middle_without_rewinding_is_gp() {
    let Some(mut machine) = booted() else { return };
    assert_eq!(machine.step(0), CLEARED);
    let waiting = machine.handle(0, 0, &mut Answer::Later).unwrap();
    assert!(matches!(waiting, Handled::Waiting(_)));
    let fd = &mut machine.vcpus[0].fd;
    fd.set_kvm_immediate_exit(1);
    assert_eq!(fd.run().unwrap_err().errno(), libc::EINTR);
    fd.set_kvm_immediate_exit(0);
    machine.step(0);
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

#[test]
fn saved_after_growth_the_tiles_go_along_and_nothing_is_trapped() {
    let Some(mut machine) = booted() else { return };
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Bell(3));
    let (mut saving, mut restoring) = (Grants::default(), Grants::default());
    let mut target = moved(&mut machine, &mut saving, &mut restoring);
    assert!(saving.0.is_empty());
    let [request] = restoring.0[..] else {
        panic!("{restoring:?}");
    };
    assert_eq!((request.vcpu, request.growth.features()), (0, TILES));
    assert_eq!(target.gate.mode(), Mode::Lifted);
    assert_eq!(target.step(0), Stop::Bell(4));
    assert!(target.tiles_are_right(0));
    target.tell(0, &[Command::Toggle(1_000), AMX[0], AMX[1]]);
    assert_eq!(target.step(0), Stop::Halted);
    assert!(target.tiles_are_right(0));
    assert_eq!(target.vcpus[0].exits, 0);
}

/// Runs a process to its end; then IA32_XFD is armed and no tile is in use. A kernel may have tiles of a
/// task in its memory then.
fn between_processes() -> Option<Machine> {
    let mut machine = booted()?;
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Bell(3));
    assert_eq!(machine.step(0), Stop::Bell(4));
    assert!(machine.tiles_are_right(0));
    machine.tell(
        0,
        &[Command::WriteXfd(ARMED), Command::Bell(5), AMX[0], AMX[1]],
    );
    assert_eq!(machine.step(0), Stop::Bell(5));
    Some(machine)
}

/// The first use travels with the VM: it has passed there, too, though no register shows it.
#[test]
fn saved_after_growth_and_armed_it_is_asked_for_at_the_restore() {
    let Some(mut machine) = between_processes() else {
        return;
    };
    let (mut saving, mut restoring) = (Grants::default(), Grants::default());
    let mut target = moved(&mut machine, &mut saving, &mut restoring);
    assert!(saving.0.is_empty());
    let [request] = restoring.0[..] else {
        panic!("{restoring:?}");
    };
    assert_eq!((request.vcpu, request.growth.features()), (0, TILES));
    assert_eq!(target.gate.mode(), Mode::Lifted);
    assert_eq!(target.run(0, &mut never), Stop::Halted);
    assert!(target.tiles_are_right(0));
    assert_eq!(target.vcpus[0].exits, 0);
}

/// A snapshot of another VMM, which says nothing of it: a refusal comes before anything runs.
#[test]
fn a_snapshot_without_the_grant_is_asked_for_at_the_restore() {
    let Some(mut machine) = between_processes() else {
        return;
    };
    let mut saved = machine.save(0, &mut never);
    saved.grant = None;
    let mut target = Machine::with_amx(1, Options::default()).unwrap();
    target.copy_memory(&machine);
    let refused = target.try_restore(0, &saved, &mut Answer::Deny);
    assert!(matches!(refused, Err(ObserveError::Denied { .. })));
    // Nothing has run there, and it goes on here.
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    // Or there, granted.
    let mut vmm = Grants::default();
    target.restore(0, &saved, &mut vmm);
    assert_eq!(vmm.0.len(), 1);
    assert_eq!(target.run(0, &mut never), Stop::Halted);
    assert!(target.tiles_are_right(0));
}
