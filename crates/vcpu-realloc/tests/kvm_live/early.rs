//! IA32_XFD passed through from the start: what KVM does with a host's writes before the first run.

use vcpu_realloc::kvm::{MsrFilter, Options, pass_through_early};
use xsave_state::kvm::write_xfd;

use crate::boot::{AMX, XCR0_AMX};
use crate::machine::stats::exits;
use crate::machine::{Command, Machine, Stop};
use crate::vmm::never;

const WRITES: u64 = 1_000;

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
    // And the guest works: AMX is there with XFD at its reset value.
    machine.tell(0, &[Command::WriteXcr0(XCR0_AMX), AMX[0], AMX[1]]);
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    Some(count)
}

#[test]
fn a_host_write_before_the_first_run_passes_xfd_through() {
    let Some(late) = exits_of_first_writes(|_| {}) else {
        return;
    };
    let early = exits_of_first_writes(|machine| {
        let vcpu = &machine.vcpus[0].fd;
        pass_through_early(vcpu, &machine.layout, &mut machine.buffer).unwrap();
    });
    // A write of 0 alone does not.
    let zero = exits_of_first_writes(|machine| {
        let vcpu = &machine.vcpus[0].fd;
        let released = write_xfd(vcpu, crate::machine::NONE, &mut machine.buffer);
        assert!(released.unwrap().is_empty());
    });
    let (early, zero) = (early.unwrap(), zero.unwrap());
    println!(
        "VM exits of {WRITES} writes of 0 by a new guest: {late}; after a host write of 0: {zero}; \
         after 1 << 18 and 0: {early}"
    );
    assert!(late >= WRITES, "KVM intercepts: {late}");
    assert!(zero >= WRITES, "KVM intercepts: {zero}");
    assert!(early < WRITES / 10, "KVM passes through: {early}");
}

/// The gate's trap is in force all the same: KVM intercepts what the filter denies.
#[test]
fn what_is_passed_through_early_is_trapped_all_the_same() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    let vcpu = &machine.vcpus[0].fd;
    pass_through_early(vcpu, &machine.layout, &mut machine.buffer).unwrap();
    machine.tell(0, &[Command::WriteXfd(0)]);
    assert!(matches!(machine.step(0), Stop::Wrmsr { value: 0, .. }));
}
