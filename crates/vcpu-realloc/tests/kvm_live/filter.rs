//! The trap beside a VMM's own MSR filter: on, and lifted, nothing of that one changes.

use kvm_ioctls::{MsrExitReason, MsrFilterDefaultAction, MsrFilterRangeFlags};
use vcpu_realloc::Answer;
use vcpu_realloc::kvm::{Handled, Mode, MsrFilter, MsrRange, Options};
use xsave_state::{ExtendedState, Image, Registers};

use crate::machine::{Command, MSR_IA32_XFD, Machine, Stop, guest};
use crate::vmm::never;

const TSC: u32 = 0x10;
const MTRR_CAP: u32 = 0xfe;

fn range(access: MsrFilterRangeFlags, base: u32, count: u32, bitmap: &[u8]) -> MsrRange {
    MsrRange::new(access, base, count, bitmap).unwrap()
}

/// Denies writes of TSC and reads of MTRRcap and of IA32_XFD.
fn few() -> MsrFilter {
    let ranges = vec![
        range(MsrFilterRangeFlags::WRITE, TSC, 1, &[0]),
        range(MsrFilterRangeFlags::READ, MTRR_CAP, 1, &[0]),
        range(MsrFilterRangeFlags::READ, MSR_IA32_XFD - 1, 2, &[0b01]),
    ];
    MsrFilter::new(MsrFilterDefaultAction::ALLOW, ranges).unwrap()
}

/// The same with all sixteen ranges in use, of which one allows writes of IA32_XFD.
fn sixteen() -> MsrFilter {
    let own = range(MsrFilterRangeFlags::WRITE, MSR_IA32_XFD - 4, 8, &[0xff]);
    let unused = (0..12).map(|i| range(MsrFilterRangeFlags::READ, 0x4000_0000 + 8 * i, 1, &[0]));
    let few = few();
    let ranges = few.ranges().iter().cloned().chain([own]).chain(unused);
    MsrFilter::new(MsrFilterDefaultAction::ALLOW, ranges.collect()).unwrap()
}

/// Whether an access leaves to the VMM, and whether the guest takes #GP.
fn outcome(machine: &mut Machine, command: Command) -> (bool, bool) {
    machine.tell(0, &[command]);
    let before = machine.word(0, guest::GP_COUNT);
    let mut stop = machine.step(0);
    let left = stop != Stop::Halted;
    if left {
        machine.refuse(0);
        stop = machine.step(0);
    }
    assert_eq!(stop, Stop::Halted);
    (left, machine.word(0, guest::GP_COUNT) > before)
}

/// A vCPU that had passed elsewhere lifts the trap, on any host.
fn lift(machine: &mut Machine) {
    let registers = Registers::RESET.with_xcr0(machine.layout.user());
    let image = Image::initial(&machine.layout);
    let state = ExtendedState::new(image, registers).unwrap();
    let handler = &mut machine.vcpus[0].handler;
    let _ = handler.restored(&state, None, &mut Answer::Grant).unwrap();
    assert_eq!(machine.gate.mode(), Mode::Lifted);
}

#[test]
fn a_vmm_s_own_filter_stays_in_force_and_remains() {
    for filter in [few(), sixteen()] {
        for exit_reasons in [MsrExitReason::Filter, MsrExitReason::empty()] {
            let options = Options {
                filter: filter.clone(),
                exit_reasons,
                ..Options::default()
            };
            let Some(mut machine) = Machine::new(1, options) else {
                return;
            };
            let own_leave = !exit_reasons.is_empty();
            for trapped in [true, false] {
                if !trapped {
                    lift(&mut machine);
                }
                // While the trap is on, what the VMM's own filter denies leaves to it, too.
                let leave = own_leave || trapped;
                let context = format!("{exit_reasons:?}, trapped: {trapped}");
                let outcome = &mut |command| outcome(&mut machine, command);
                let denied = (leave, true);
                assert_eq!(outcome(Command::WriteMsr(TSC, 0)), denied, "{context}");
                assert_eq!(outcome(Command::ReadMsr(MTRR_CAP)), denied, "{context}");
                assert_eq!(outcome(Command::ReadMsr(MSR_IA32_XFD)), denied, "{context}");
                let free = (false, false);
                assert_eq!(outcome(Command::ReadMsr(TSC)), free, "{context}");
                let (left, _) = outcome(Command::WriteXfd(0));
                assert_eq!(left, trapped, "{context}");
            }
        }
    }
}

/// The exit says that it is not a write of IA32_XFD, and the VMM goes on with its own.
#[test]
fn exits_of_a_vmm_s_own_filter_are_not_ours() {
    let options = Options {
        filter: few(),
        exit_reasons: MsrExitReason::Filter,
        ..Options::default()
    };
    let Some(mut machine) = Machine::new(1, options) else {
        return;
    };
    machine.tell(0, &[Command::WriteMsr(TSC, 5), Command::WriteXfd(0)]);
    let Stop::Wrmsr { index, value } = machine.step(0) else {
        panic!();
    };
    assert_eq!((index, value), (TSC, 5));
    let Machine { vcpus, buffer, .. } = &mut machine;
    let vcpu = &mut vcpus[0];
    let handled = vcpu
        .handler
        .handle(index, value, &mut vcpu.fd, buffer, &mut never);
    assert_eq!(handled, Ok(Handled::NotOurs));
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

/// The VMM's own filter changes while the trap is set: the trap stays in force.
#[test]
fn a_vmm_s_own_filter_changes_and_the_trap_stays() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    for filter in [few(), sixteen(), MsrFilter::none()] {
        let own = !filter.ranges().is_empty();
        machine
            .gate
            .set_filter(filter, MsrExitReason::empty())
            .unwrap();
        assert_eq!(machine.gate.mode(), Mode::Trapping);
        let outcome = &mut |command| outcome(&mut machine, command);
        assert!(outcome(Command::WriteXfd(0)).0);
        assert_eq!(outcome(Command::ReadMsr(MTRR_CAP)), (own, own));
    }
    machine
        .gate
        .set_filter(few(), MsrExitReason::empty())
        .unwrap();
    lift(&mut machine);
    let outcome = &mut |command| outcome(&mut machine, command);
    assert!(!outcome(Command::WriteXfd(0)).0);
    assert_eq!(outcome(Command::ReadMsr(MTRR_CAP)), (false, true));
}
