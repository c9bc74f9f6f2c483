//! What a VMM may do wrong around an exit that waits, and what else may happen to the vCPU meanwhile.

use std::convert::Infallible;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_VCPUEVENT_VALID_SHADOW, kvm_guest_debug,
};
use kvm_ioctls::VcpuExit;
use vcpu_realloc::kvm::{
    CompleteError, HandleError, Handled, ObserveError, Options, Policy, RewindError, complete,
};
use vcpu_realloc::{Answer, Fault};

use crate::boot::{AMX, boot};
use crate::machine::{ARMED, Command, MSR_IA32_XFD, Machine, NONE, Stop, TILES, guest, host};
use crate::vmm::{Grants, never};

fn left(value: u64) -> Stop {
    Stop::Wrmsr {
        index: MSR_IA32_XFD,
        value,
    }
}

/// A vCPU of which a write waits, on any host, and the value. With AMX it is the first use, in the #NM
/// handler. Without, it is a write that KVM refuses, because it has no XFD.
fn waiting(then: &[Command]) -> Option<(Machine, u64)> {
    let has_amx = !host()?.2.xfd().is_empty();
    let mut machine = Machine::new(1, Options::default())?;
    let (first, value) = if has_amx {
        boot(&mut machine, 0, &mut never);
        (AMX[0], 0)
    } else {
        (Command::WriteXfd(ARMED), ARMED)
    };
    let commands: Vec<_> = [first].iter().chain(then).copied().collect();
    machine.tell(0, &commands);
    assert_eq!(machine.step(0), left(value));
    wait(&mut machine, value);
    Some((machine, value))
}

fn wait(machine: &mut Machine, value: u64) {
    let handled = machine.handle(0, value, &mut Answer::Later);
    match value {
        0 => assert!(matches!(handled, Ok(Handled::Waiting(_)))),
        _ => assert!(matches!(handled, Err(HandleError::Write(_)))),
    }
    assert!(machine.vcpus[0].handler.is_waiting());
}

/// A pause sets `immediate_exit` at any time: whoever rewinds or completes leaves it.
#[test]
fn immediate_exit_that_somebody_has_set_stays() {
    let Some((mut machine, value)) = waiting(&[]) else {
        return;
    };
    for set in [0, 1] {
        let vcpu = &mut machine.vcpus[0];
        vcpu.fd.set_kvm_immediate_exit(set);
        vcpu.handler.rewind(&mut vcpu.fd).unwrap();
        assert_eq!(vcpu.fd.get_kvm_run().immediate_exit, set);
        complete(&mut vcpu.fd, |_| Ok::<_, Infallible>(())).unwrap();
        assert_eq!(vcpu.fd.get_kvm_run().immediate_exit, set);
        if set == 0 {
            assert_eq!(machine.step(0), left(value));
            wait(&mut machine, value);
        } else {
            assert_eq!(vcpu.fd.run().unwrap_err().errno(), libc::EINTR);
        }
    }
}

/// A VMM that ignores that its vCPU waits, and runs it, gives its guest #GP. What comes after that is not
/// the write any more: neither is it performed, nor is another exit rewound.
#[test]
fn a_vcpu_that_ran_on_does_not_wait_any_more() {
    let Some((mut machine, _)) = waiting(&[Command::Bell(3), Command::Bell(4)]) else {
        return;
    };
    assert_eq!(machine.step(0), Stop::Bell(3));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
    let at = machine.rip(0);
    let vcpu = &mut machine.vcpus[0];
    vcpu.handler.rewind(&mut vcpu.fd).unwrap();
    assert!(!vcpu.handler.is_waiting());
    assert_eq!(machine.rip(0), at, "the OUT is as it was");
    let before = machine.vcpus[0].handler.gate().xfd();
    assert_eq!(machine.resume(0, &mut Answer::Grant), Ok(Handled::NotOurs));
    assert_eq!(machine.vcpus[0].handler.gate().xfd(), before);
    assert!(!machine.gate.saved_grant().has_been());
    assert_eq!(machine.step(0), Stop::Bell(4));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

/// Even where it did not get as far as the guest: the #GP is on its way.
#[test]
fn a_vcpu_that_was_run_without_entering_does_not_wait_any_more() {
    let Some((mut machine, _)) = waiting(&[Command::Bell(3)]) else {
        return;
    };
    let vcpu = &mut machine.vcpus[0];
    vcpu.fd.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.fd.run().unwrap_err().errno(), libc::EINTR);
    vcpu.fd.set_kvm_immediate_exit(0);
    assert_eq!(machine.resume(0, &mut Answer::Grant), Ok(Handled::NotOurs));
    assert!(!machine.vcpus[0].handler.is_waiting());
    assert_eq!(machine.vcpus[0].handler.gate().waiting_for(), None);
    assert_eq!(machine.step(0), Stop::Bell(3));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

/// An exit is the one that the vCPU has left with: not an older one, not another vCPU's.
#[test]
fn an_exit_that_is_none_is_refused() {
    let Some(mut machine) = Machine::new(2, Options::default()) else {
        return;
    };
    for n in [0, 1] {
        machine.tell(n, &[Command::WriteXfd(0), Command::Bell(3)]);
        assert_eq!(machine.step(n), left(0));
    }
    let none = HandleError::NoSuchExit { value: ARMED };
    assert_eq!(machine.handle(0, ARMED, &mut never), Err(none));
    assert!(matches!(
        machine.handle(0, 0, &mut never),
        Ok(Handled::Written { .. })
    ));
    let Machine { vcpus, buffer, .. } = &mut machine;
    let [first, second] = &mut vcpus[..] else {
        unreachable!("there are two");
    };
    let handled = first
        .handler
        .handle(MSR_IA32_XFD, 0, &mut second.fd, buffer, &mut never);
    assert_eq!(handled, Err(HandleError::AnotherVcpu { vcpu: 0 }));
    let resumed = first.handler.resume(&mut second.fd, buffer, &mut never);
    assert_eq!(resumed, Err(HandleError::AnotherVcpu { vcpu: 0 }));
    let rewound = first.handler.rewind(&mut second.fd);
    assert_eq!(rewound, Err(RewindError::AnotherVcpu { vcpu: 0 }));
    // Both go on, each with its own.
    assert!(matches!(
        machine.handle(1, 0, &mut never),
        Ok(Handled::Written { .. })
    ));
    for n in [0, 1] {
        assert_eq!(machine.step(n), Stop::Bell(3));
        // The write is over.
        let none = HandleError::NoSuchExit { value: 0 };
        assert_eq!(machine.handle(n, 0, &mut never), Err(none));
        assert_eq!(machine.word(n, guest::GP_COUNT), 0);
    }
}

/// STI covers the instruction behind it: no interrupt may come between the two, also not where that
/// instruction is repeated.
#[test]
fn rewinding_keeps_the_interrupt_shadow() {
    let Some((mut machine, value)) = waiting(&[Command::Bell(3)]) else {
        return;
    };
    for shadow in [1, 0] {
        let vcpu = &mut machine.vcpus[0];
        let mut events = vcpu.fd.get_vcpu_events().unwrap();
        events.interrupt.shadow = shadow;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        vcpu.fd.set_vcpu_events(&events).unwrap();
        let set = vcpu.fd.get_vcpu_events().unwrap().interrupt.shadow;
        if shadow == 1 && set == 0 {
            println!("skipped: this KVM keeps no interrupt shadow");
            return;
        }
        vcpu.handler.rewind(&mut vcpu.fd).unwrap();
        let after = vcpu.fd.get_vcpu_events().unwrap().interrupt.shadow;
        assert_eq!(after != 0, shadow != 0);
        assert_eq!(machine.step(0), left(value));
        wait(&mut machine, value);
    }
}

/// Behind an instruction of a guest that is debugged KVM_RUN gives KVM_EXIT_DEBUG: the exit is complete,
/// and the vCPU goes back in front of it.
#[test]
fn a_vcpu_that_steps_can_be_rewound() {
    let Some((mut machine, value)) = waiting(&[Command::Bell(3)]) else {
        return;
    };
    let fd = &machine.vcpus[0].fd;
    let steps = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    if let Err(error) = fd.set_guest_debug(&steps) {
        println!("skipped: this KVM debugs no guest: {error}");
        return;
    }
    let at = machine.rip(0);
    let vcpu = &mut machine.vcpus[0];
    vcpu.handler.rewind(&mut vcpu.fd).unwrap();
    assert!(!vcpu.handler.is_waiting());
    assert_eq!(machine.rip(0), at);
    // One step: the same write again. Some processors stop in front of it once.
    let vcpu = &mut machine.vcpus[0];
    let mut steps = 0;
    while matches!(vcpu.fd.run(), Ok(VcpuExit::Debug(_))) {
        steps += 1;
        assert!(steps < 3, "the write comes again");
    }
    assert_eq!(machine.rip(0), at);
    wait(&mut machine, value);
    let fd = &machine.vcpus[0].fd;
    fd.set_guest_debug(&kvm_guest_debug::default()).unwrap();
    assert_eq!(machine.step(0), Stop::Bell(3));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
}

/// A reset or an INIT takes the write back before anything else: or KVM would go behind an instruction of
/// the vCPU after the reset.
#[test]
fn reset_and_init_take_back_what_waits() {
    for init in [false, true] {
        let Some((mut machine, value)) = waiting(&[Command::Bell(3)]) else {
            return;
        };
        let at = machine.rip(0);
        let vcpu = &mut machine.vcpus[0];
        if init {
            let seen = vcpu.handler.init(&mut vcpu.fd, &mut never).unwrap();
            assert_eq!(seen.first_use, None);
        } else {
            vcpu.handler.reset(&mut vcpu.fd).unwrap();
            assert_eq!(vcpu.handler.gate().xcr0().bits(), 1);
            assert_eq!(vcpu.handler.gate().xfd(), NONE);
        }
        assert!(!vcpu.handler.is_waiting());
        assert_eq!(vcpu.handler.gate().waiting_for(), None);
        assert_eq!(machine.rip(0), at);
        // Nothing is pending that would change the registers that the VMM sets now.
        complete(&mut machine.vcpus[0].fd, |_| Err(())).unwrap();
        assert_eq!(machine.rip(0), at);
        assert_eq!(machine.step(0), left(value));
        assert_eq!(machine.word(0, guest::GP_COUNT), 0);
    }
}

/// Completing is for other exits.
#[test]
fn what_waits_is_not_completed() {
    let Some((mut machine, _)) = waiting(&[Command::Bell(3), Command::Bell(4)]) else {
        return;
    };
    let vcpu = &mut machine.vcpus[0];
    let refused = complete(&mut vcpu.fd, |_| Ok::<_, Infallible>(()));
    assert_eq!(refused, Err(CompleteError::Waiting));
    assert!(vcpu.handler.is_waiting());
    assert_eq!(machine.step(0), Stop::Bell(3));
    complete(&mut machine.vcpus[0].fd, |_| Ok::<_, Infallible>(())).unwrap();
    assert_eq!(machine.step(0), Stop::Bell(4));
}

/// A VMM that wants no growth now has the VM to save, and the guest notices nothing.
#[test]
fn stopped_at_its_first_use_it_can_be_saved_and_asks_again() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    boot(&mut machine, 0, &mut never);
    machine.tell(0, &AMX);
    for _ in 0..3 {
        assert_eq!(machine.step(0), left(0));
        let stopped = machine.handle(0, 0, &mut Answer::Stop).unwrap();
        assert!(matches!(stopped, Handled::Stopped(growth) if growth.features() == TILES));
        assert!(!machine.vcpus[0].handler.is_waiting());
        assert!(machine.is_in_nm_handler(0));
    }
    let saved = machine.save(0, &mut never);
    assert_eq!(saved.grant.map(|grant| grant.has_been()), Some(false));
    let mut target = Machine::with_amx(1, Options::default()).unwrap();
    target.copy_memory(&machine);
    target.restore(0, &saved, &mut never);
    for vm in [&mut machine, &mut target] {
        assert_eq!(vm.run(0, &mut Answer::Grant), Stop::Halted);
        assert!(vm.tiles_are_right(0));
        assert_eq!(vm.word(0, guest::GP_COUNT), 0);
    }
}

/// A task with tiles in memory may be scheduled on the vCPU that asks: it is too late for a denial, here
/// and where the VM goes on.
#[test]
fn after_the_vm_s_first_use_no_vcpu_is_denied() {
    let options = || Options {
        policy: Policy::EachVcpu,
        ..Options::default()
    };
    let Some(mut machine) = Machine::with_amx(2, options()) else {
        return;
    };
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
        machine.tell(n, &AMX);
    }
    // Before it is legal.
    assert_eq!(machine.step(1), left(0));
    let denied = machine.handle(1, 0, &mut Answer::Deny);
    assert!(matches!(denied, Ok(Handled::Faulted(Fault::Denied { .. }))));
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Halted);
    machine.tell(1, &AMX);
    assert_eq!(machine.step(1), left(0));
    for _ in 0..3 {
        let denied = machine.handle(1, 0, &mut Answer::Deny);
        assert!(matches!(
            denied,
            Err(HandleError::DeniedAfterFirstUse { growth }) if growth.features() == TILES
        ));
        assert!(machine.vcpus[1].handler.is_waiting());
    }
    // It can be saved as it stands; there, too, it is not denied.
    let vcpu = &mut machine.vcpus[1];
    vcpu.handler.rewind(&mut vcpu.fd).unwrap();
    let saved = machine.save(1, &mut never);
    let mut target = Machine::with_amx(2, options()).unwrap();
    target.copy_memory(&machine);
    let refused = target.try_restore(1, &saved, &mut Answer::Deny);
    assert!(matches!(refused, Err(ObserveError::Denied { .. })));
    let mut vmm = Grants::default();
    target.restore(1, &saved, &mut vmm);
    assert_eq!(vmm.0.len(), 1);
    for vm in [&mut machine, &mut target] {
        assert_eq!(vm.run(1, &mut Answer::Grant), Stop::Halted);
        assert!(vm.tiles_are_right(1));
        assert_eq!(vm.word(1, guest::GP_COUNT), 1);
    }
}
