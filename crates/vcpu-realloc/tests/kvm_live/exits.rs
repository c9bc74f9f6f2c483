//! Exits, #GP and errors, on any host: without AMX the gate believes in it and KVM does not.

use vcpu_realloc::Fault;
use vcpu_realloc::kvm::{HandleError, Handled, Options, RewindError};
use xsave_state::kvm::WriteXfdError;

use crate::machine::{ARMED, Command, MSR_IA32_XFD, Machine, NONE, Stop, TILES, guest, host};
use crate::vmm::never;

fn left(value: u64) -> Stop {
    Stop::Wrmsr {
        index: MSR_IA32_XFD,
        value,
    }
}

fn written() -> Handled {
    Handled::Written {
        first_use: None,
        released: NONE,
        lifted: Ok(false),
    }
}

#[test]
fn a_write_of_zero_leaves_and_is_performed() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    machine.tell(0, &[Command::WriteXfd(0), Command::Bell(7)]);
    assert_eq!(machine.step(0), left(0));
    assert_eq!(machine.handle(0, 0, &mut never), Ok(written()));
    assert_eq!(machine.step(0), Stop::Bell(7));
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

#[test]
fn a_reserved_bit_is_gp_in_the_guest_which_runs_on() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    for (times, bit) in [(1, 0), (2, 17), (3, 63)] {
        let value = 1 << bit;
        machine.tell(0, &[Command::WriteXfd(value), Command::Bell(8)]);
        assert_eq!(machine.step(0), left(value));
        let handled = machine.handle(0, value, &mut never).unwrap();
        assert!(matches!(
            handled,
            Handled::Faulted(Fault::ReservedXfd { .. })
        ));
        assert_eq!(machine.step(0), Stop::Bell(8));
        assert_eq!(machine.word(0, guest::GP_COUNT), times);
        assert_eq!(machine.step(0), Stop::Halted);
    }
}

#[test]
fn ten_thousand_writes_leave_ten_thousand_times() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    machine.tell(0, &[Command::WriteXfd(0), Command::Again]);
    for _ in 0..10_000 {
        assert_eq!(machine.step(0), left(0));
        assert_eq!(machine.handle(0, 0, &mut never), Ok(written()));
    }
    assert_eq!(machine.vcpus[0].exits, 10_000);
}

#[test]
fn other_registers_are_not_ours() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    machine.tell(0, &[Command::WriteXfd(0)]);
    assert_eq!(machine.step(0), left(0));
    let Machine { vcpus, buffer, .. } = &mut machine;
    let vcpu = &mut vcpus[0];
    let handled = vcpu
        .handler
        .handle(0x1c5, 0, &mut vcpu.fd, buffer, &mut never);
    assert_eq!(handled, Ok(Handled::NotOurs));
    // Nothing waits that could be resumed or rewound.
    assert_eq!(machine.resume(0, &mut never), Ok(Handled::NotOurs));
    assert!(!machine.vcpus[0].handler.is_waiting());
}

/// A failure reaches the VMM, changes nothing, and can be repeated.
#[test]
fn a_failed_write_reaches_the_vmm_and_can_be_repeated() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    if host_has_xfd() {
        return;
    }
    machine.tell(0, &[Command::WriteXfd(ARMED), Command::Bell(9)]);
    assert_eq!(machine.step(0), left(ARMED));
    let refused = HandleError::Write(WriteXfdError::Refused { xfd: TILES });
    assert_eq!(machine.handle(0, ARMED, &mut never), Err(refused));
    for _ in 0..3 {
        assert!(machine.vcpus[0].handler.is_waiting());
        assert_eq!(machine.vcpus[0].handler.gate().xfd(), NONE);
        let refused = HandleError::Write(WriteXfdError::Refused { xfd: TILES });
        assert_eq!(machine.resume(0, &mut never), Err(refused));
    }
    // Run all the same, the guest does not believe that it was done.
    assert_eq!(machine.step(0), Stop::Bell(9));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

/// The vCPU stands in front of its instruction again, and repeats it. (On a host with AMX see
/// `snapshot`.)
#[test]
fn a_rewound_vcpu_repeats_its_instruction() {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    if host_has_xfd() {
        return;
    }
    machine.tell(
        0,
        &[Command::Bell(1), Command::WriteXfd(ARMED), Command::Bell(2)],
    );
    assert_eq!(machine.step(0), Stop::Bell(1));
    assert_eq!(machine.step(0), left(ARMED));
    let at = machine.rip(0);
    for _ in 0..3 {
        assert!(machine.handle(0, ARMED, &mut never).is_err());
        let vcpu = &mut machine.vcpus[0];
        vcpu.handler.rewind(&mut vcpu.fd).unwrap();
        assert!(!vcpu.handler.is_waiting());
        assert_eq!(machine.rip(0), at);
        assert_eq!(machine.step(0), left(ARMED));
    }
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

/// KVM_RUN fails before it completes the exit: the write is not lost, and can be resumed or rewound.
#[test]
fn a_rewinding_that_failed_leaves_the_write_waiting() {
    // KVM has no registers of that number to share, and looks at 32 numbers (6.12).
    const NO_SUCH_REGISTERS: u64 = 1 << 31;
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    if host_has_xfd() {
        return;
    }
    machine.tell(0, &[Command::WriteXfd(ARMED), Command::Bell(2)]);
    assert_eq!(machine.step(0), left(ARMED));
    assert!(machine.handle(0, ARMED, &mut never).is_err());
    let vcpu = &mut machine.vcpus[0];
    vcpu.fd.get_kvm_run().kvm_valid_regs = NO_SUCH_REGISTERS;
    let error = vcpu.handler.rewind(&mut vcpu.fd).unwrap_err();
    assert!(matches!(error, RewindError::Run(errno) if errno.errno() == libc::EINVAL));
    vcpu.fd.get_kvm_run().kvm_valid_regs = 0;
    assert!(vcpu.handler.is_waiting());
    let refused = HandleError::Write(WriteXfdError::Refused { xfd: TILES });
    assert_eq!(machine.resume(0, &mut never), Err(refused));

    let vcpu = &mut machine.vcpus[0];
    vcpu.fd.get_kvm_run().kvm_valid_regs = NO_SUCH_REGISTERS;
    assert!(vcpu.handler.rewind(&mut vcpu.fd).is_err());
    vcpu.fd.get_kvm_run().kvm_valid_regs = 0;
    // Run all the same, the guest does not believe that it was done.
    assert_eq!(machine.step(0), Stop::Bell(2));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

/// What KVM refuses cannot be provoked where it has XFD.
fn host_has_xfd() -> bool {
    let has = host().is_some_and(|(_, _, layout)| !layout.xfd().is_empty());
    if has {
        println!("skipped: this host has XFD, so KVM takes the write");
    }
    has
}
