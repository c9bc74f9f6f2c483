//! When KVM stops intercepting IA32_XFD by itself: xsave-state's restore sees to it for a guest that can
//! use tiles, and the gate's trap is in force all the same.

use vcpu_realloc::kvm::{MsrFilter, Options};
use xsave_state::{ExtendedState, Image, Registers, XFeatures};

use crate::boot::{AMX, XCR0_AMX};
use crate::machine::stats::exits;
use crate::machine::{Command, Machine, Stop, Vcpu};
use crate::vmm::never;

const WRITES: u64 = 1_000;

/// Restores a state with IA32_XFD = 0 and this XCR0 into vCPU 0.
fn restore(machine: &mut Machine, xcr0: u64) {
    let Vcpu { fd, layout, .. } = &mut machine.vcpus[0];
    let image = Image::initial(layout.layout());
    let registers = Registers::RESET.with_xcr0(XFeatures::from_bits_retain(xcr0));
    let state = ExtendedState::new(image, registers).unwrap();
    xsave_state::kvm::restore(fd, &state, layout, &mut machine.buffer).unwrap();
}

/// VM exits of so many writes of 0 to IA32_XFD by a guest that has not run. A filter of its own keeps
/// the gate out: what is counted is KVM's doing.
fn exits_of_first_writes(prepare: impl FnOnce(&mut Machine)) -> Option<u64> {
    let mut machine = Machine::with_amx(1, Options::default())?;
    // KVM as it is without this crate.
    machine
        .vm
        .set_msr_filter(MsrFilter::none().default_action(), &[])
        .unwrap();
    prepare(&mut machine);
    let mut commands = vec![Command::WriteXfd(0); 100];
    commands.push(Command::Bell(1));
    let mut count = 0;
    for _ in 0..WRITES / 100 {
        machine.tell(0, &commands);
        let before = exits(&machine.vcpus[0].fd);
        assert_eq!(machine.run(0, &mut never), Stop::Bell(1));
        count += exits(&machine.vcpus[0].fd) - before;
        assert_eq!(machine.run(0, &mut never), Stop::Halted);
    }
    // And the guest works: AMX is there with IA32_XFD = 0.
    machine.tell(0, &[Command::WriteXcr0(XCR0_AMX), AMX[0], AMX[1]]);
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    Some(count)
}

#[test]
fn after_a_restore_with_tiles_enabled_the_guest_s_writes_do_not_exit() {
    let Some(new) = exits_of_first_writes(|_| {}) else {
        return;
    };
    let with_tiles = exits_of_first_writes(|machine| restore(machine, XCR0_AMX)).unwrap();
    let without = exits_of_first_writes(|machine| restore(machine, 3)).unwrap();
    println!(
        "VM exits of {WRITES} writes of 0 by a new guest: {new}; restored with tiles enabled: \
         {with_tiles}; without: {without}"
    );
    assert!(new >= WRITES, "KVM intercepts: {new}");
    assert!(with_tiles < WRITES / 10, "KVM passes through: {with_tiles}");
    assert!(without >= WRITES, "KVM intercepts: {without}");
}

/// KVM intercepts what the filter denies.
#[test]
fn the_trap_is_in_force_after_a_restore() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    restore(&mut machine, XCR0_AMX);
    machine.tell(0, &[Command::WriteXfd(0)]);
    assert!(matches!(machine.step(0), Stop::Wrmsr { value: 0, .. }));
}
