//! The first use of AMX: once, at the right vCPU and moment; granted, denied, failed, deferred.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use kvm_ioctls::VcpuExit;
use vcpu_realloc::kvm::{HandleError, Handled, Mode, Options, Policy};
use vcpu_realloc::{Answer, Fault, Request, Scope};
use xsave_state::kvm::XsaveBuffer;

use crate::boot::{AMX, XCR0_AMX, boot};
use crate::machine::stats::exits;
use crate::machine::{ARMED, Command, MSR_IA32_XFD, Machine, NONE, Stop, TILES, Vcpu, guest};
use crate::vmm::{Grants, fails, never};

const CLEARED: Stop = Stop::Wrmsr {
    index: MSR_IA32_XFD,
    value: 0,
};

/// The whole life of a VM of two vCPUs whose guest does as Linux does.
#[test]
fn the_first_use_is_seen_once_and_then_nothing_costs() {
    let Some(mut machine) = Machine::with_amx(2, Options::default()) else {
        return;
    };
    let mut vmm = Grants::default();
    boot(&mut machine, 0, &mut never);
    boot(&mut machine, 1, &mut never);
    assert_eq!(machine.gate.mode(), Mode::Trapping);
    assert_eq!(machine.first_use(), None);
    assert_eq!([0, 1].map(|n| machine.vcpus[n].exits), [1, 1]);

    // vCPU 1 is the first to use a tile: in its #NM handler.
    machine.tell(1, &[AMX[0], AMX[1], Command::Bell(5)]);
    assert_eq!(machine.step(1), CLEARED);
    assert!(machine.is_in_nm_handler(1));
    assert_eq!(machine.word(1, guest::NM_COUNT), 1);
    assert_eq!(machine.word(1, guest::XFD_ERR), ARMED);
    let handled = machine.handle(1, 0, &mut vmm).unwrap();
    let [
        Request {
            vcpu: 1,
            growth,
            scope: Scope::Vm,
        },
    ] = vmm.0[..]
    else {
        panic!("{vmm:?}");
    };
    assert_eq!((growth.features(), growth.bytes()), (TILES, 8192));
    assert_eq!(growth.area_bytes(), machine.layout.standard_size());
    assert_eq!(
        handled,
        Handled::Written {
            first_use: Some(growth),
            released: NONE,
            lifted: Ok(true)
        }
    );
    assert_eq!(
        (machine.gate.mode(), machine.first_use()),
        (Mode::Lifted, Some(1))
    );
    assert_eq!(machine.run(1, &mut never), Stop::Bell(5));
    assert!(machine.tiles_are_right(1));

    // From now on nobody is asked, and no write leaves.
    machine.tell(0, &[AMX[0], AMX[1], Command::Bell(6)]);
    assert_eq!(machine.step(0), Stop::Bell(6));
    assert!(machine.tiles_are_right(0));
    for n in [0, 1] {
        machine.tell(
            n,
            &[Command::Toggle(100_000), Command::Bell(7), AMX[0], AMX[1]],
        );
        let before = exits(&machine.vcpus[n].fd);
        assert_eq!(machine.step(n), Stop::Bell(7));
        // The bell; the host's interrupts, of which there are few and which are not ours.
        let left = exits(&machine.vcpus[n].fd) - before;
        println!("vCPU {n}: {left} VM exits in 200,000 writes");
        assert!(left < 200, "{left}");
        assert_eq!(machine.step(n), Stop::Halted);
        assert!(machine.tiles_are_right(n));
    }
    assert_eq!([0, 1].map(|n| machine.vcpus[n].exits), [1, 2]);
    assert_eq!(vmm.0.len(), 1);
}

#[test]
fn a_denied_first_use_is_gp_and_the_vm_runs_on() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    boot(&mut machine, 0, &mut never);
    for times in 1..=3 {
        // The "process" ends at its first tile instruction; the next one has no tiles.
        machine.tell(0, &[AMX[0], Command::ReadXfd, Command::Bell(5)]);
        assert_eq!(machine.step(0), CLEARED);
        let denied = Handled::Faulted(Fault::Denied { features: TILES });
        assert_eq!(machine.handle(0, 0, &mut Answer::Deny), Ok(denied));
        assert_eq!(machine.step(0), Stop::Bell(5));
        assert_eq!(machine.word(0, guest::GP_COUNT), times);
        assert_eq!(machine.word(0, guest::XFD_READ), ARMED);
        let state = machine.capture(0);
        assert_eq!(state.registers().xfd, TILES);
        assert!(!state.image().xstate_bv().contains(TILES));
    }
    // The VMM has thought better of it.
    machine.tell(0, &AMX);
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Halted);
    assert!(machine.tiles_are_right(0));
}

#[test]
fn a_failed_growth_reaches_the_vmm_and_is_retried() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    boot(&mut machine, 0, &mut never);
    machine.tell(0, &AMX);
    assert_eq!(machine.step(0), CLEARED);
    let failed = HandleError::Vmm("no memory".to_owned());
    assert_eq!(machine.handle(0, 0, &mut fails), Err(failed));
    for _ in 0..3 {
        let failed = HandleError::Vmm("no memory".to_owned());
        assert_eq!(machine.resume(0, &mut fails), Err(failed));
        assert!(machine.vcpus[0].handler.is_waiting());
        assert_eq!(machine.vcpus[0].handler.gate().granted(), NONE);
    }
    assert!(matches!(
        machine.resume(0, &mut Answer::Grant),
        Ok(Handled::Written {
            lifted: Ok(true),
            ..
        })
    ));
    assert_eq!(machine.step(0), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

/// A vCPU that is run although its growth has failed does not believe that its write was done.
#[test]
fn running_on_after_a_failure_is_gp_and_not_a_lost_write() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    boot(&mut machine, 0, &mut never);
    machine.tell(0, &[AMX[0], Command::Bell(5)]);
    assert_eq!(machine.step(0), CLEARED);
    assert!(machine.handle(0, 0, &mut fails).is_err());
    assert_eq!(machine.step(0), Stop::Bell(5));
    assert_eq!(machine.word(0, guest::GP_COUNT), 1);
    // At its next try all is as if nothing had been.
    machine.tell(0, &AMX);
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Halted);
    assert!(machine.tiles_are_right(0));
}

/// The vCPU waits without running while another thread answers, and the other vCPU runs on.
#[test]
fn another_thread_answers() {
    let Some(mut machine) = Machine::with_amx(2, Options::default()) else {
        return;
    };
    let (questions, receiver) = mpsc::channel::<Request>();
    let (sender, answers) = mpsc::channel::<Answer>();
    let allocator = thread::spawn(move || {
        for question in receiver {
            assert_eq!(question.growth.bytes(), 8192);
            sender.send(Answer::Grant).unwrap();
        }
    });
    let mut later = |request: &Request| questions.send(*request).map(|()| Answer::Later);
    boot(&mut machine, 0, &mut never);
    boot(&mut machine, 1, &mut never);
    machine.tell(0, &AMX);
    machine.tell(1, &[Command::ReadXfd, Command::Bell(6)]);
    assert_eq!(machine.step(0), CLEARED);
    let handled = machine.handle(0, 0, &mut later).unwrap();
    assert!(matches!(handled, Handled::Waiting(growth) if growth.features() == TILES));
    assert_eq!(machine.step(1), Stop::Bell(6));
    assert_eq!(machine.word(1, guest::XFD_READ), ARMED);

    let mut answer = answers.recv().unwrap();
    let handled = machine.resume(0, &mut answer).unwrap();
    assert!(matches!(
        handled,
        Handled::Written {
            lifted: Ok(true),
            ..
        }
    ));
    assert_eq!(machine.step(0), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    drop(questions);
    allocator.join().unwrap();
}

/// A guest that knows nothing of XFD has AMX with its XSETBV, which never leaves KVM. A capture shows
/// it.
#[test]
fn a_guest_that_never_arms_is_found_at_a_capture() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    machine.tell(
        0,
        &[
            Command::WriteXcr0(XCR0_AMX),
            AMX[0],
            AMX[1],
            Command::Bell(5),
        ],
    );
    assert_eq!(machine.step(0), Stop::Bell(5));
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.gate.mode(), Mode::Trapping);
    let mut vmm = Grants::default();
    let saved = machine.save(0, &mut vmm);
    assert!(saved.state.image().xstate_bv().contains(TILES));
    let [
        Request {
            vcpu: 0, growth, ..
        },
    ] = vmm.0[..]
    else {
        panic!("{vmm:?}");
    };
    assert_eq!(growth.features(), TILES);
    assert_eq!(machine.gate.mode(), Mode::Lifted);
}

/// It may even switch AMX off again: its tiles stay, and a capture finds them.
#[test]
fn tiles_left_behind_with_amx_switched_off_are_found_at_a_capture() {
    let Some(mut machine) = Machine::with_amx(1, Options::default()) else {
        return;
    };
    machine.tell(
        0,
        &[
            Command::WriteXcr0(XCR0_AMX),
            AMX[0],
            Command::WriteXcr0(XCR0_AMX & 3),
            Command::Bell(5),
        ],
    );
    assert_eq!(machine.step(0), Stop::Bell(5));
    let mut vmm = Grants::default();
    let saved = machine.save(0, &mut vmm);
    assert_eq!(saved.state.registers().xcr0.bits(), 3);
    assert!(saved.state.image().xstate_bv().contains(TILES));
    let [request] = vmm.0[..] else {
        panic!("{vmm:?}");
    };
    assert_eq!((request.vcpu, request.growth.features()), (0, TILES));
    assert_eq!(machine.gate.mode(), Mode::Lifted);
}

/// Live tiles, and the guest arms XFD: performed naively, the host could not load the vCPU again.
/// (`integration/lab/tests/host_crash.rs` shows that it then dies.)
#[test]
fn arming_with_live_tiles_releases_them_and_the_host_lives() {
    let options = Options {
        policy: Policy::EachVcpu,
        ..Options::default()
    };
    let Some(mut machine) = Machine::with_amx(2, options) else {
        return;
    };
    boot(&mut machine, 0, &mut never);
    machine.tell(
        0,
        &[
            AMX[0],
            Command::WriteXfd(ARMED),
            Command::ReadXfd,
            Command::Bell(5),
            AMX[0],
            AMX[1],
        ],
    );
    assert_eq!(machine.step(0), CLEARED);
    let _ = machine.handle(0, 0, &mut Answer::Grant).unwrap();
    // vCPU 1 has not passed, so this leaves as well.
    let armed = Stop::Wrmsr {
        index: MSR_IA32_XFD,
        value: ARMED,
    };
    assert_eq!(machine.step(0), armed);
    assert!(matches!(
        machine.handle(0, ARMED, &mut never),
        Ok(Handled::Written {
            released: TILES,
            ..
        })
    ));
    assert_eq!(machine.step(0), Stop::Bell(5));
    assert_eq!(machine.word(0, guest::XFD_READ), ARMED);
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
}

/// The other policy: each vCPU is asked for, and pays until the last has passed.
#[test]
fn with_a_vcpu_each_the_filter_stays_until_the_last() {
    let options = Options {
        policy: Policy::EachVcpu,
        ..Options::default()
    };
    let Some(mut machine) = Machine::with_amx(2, options) else {
        return;
    };
    let mut vmm = Grants::default();
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
    }
    machine.tell(0, &[AMX[0], AMX[1], Command::Toggle(100)]);
    assert_eq!(machine.run(0, &mut vmm), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.gate.mode(), Mode::Trapping);
    // To arm, to use, and 200 times because vCPU 1 has not passed.
    assert_eq!(machine.vcpus[0].exits, 202);
    machine.tell(1, &AMX);
    assert_eq!(machine.run(1, &mut vmm), Stop::Halted);
    assert!(machine.tiles_are_right(1));
    assert_eq!(machine.vcpus[1].exits, 2);
    assert_eq!(machine.gate.mode(), Mode::Lifted);
    machine.tell(0, &[Command::Toggle(1_000), AMX[0], AMX[1]]);
    assert_eq!(machine.run(0, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.vcpus[0].exits, 202);
    let asked: Vec<_> = vmm.0.iter().map(|r| (r.vcpu, r.scope)).collect();
    assert_eq!(asked, [(0, Scope::Vcpu), (1, Scope::Vcpu)]);
    assert_eq!(machine.first_use(), Some(0));
}

/// Both vCPUs have left for their first use before either is handled, each on its thread.
#[test]
fn two_vcpus_at_once_are_one_first_use() {
    let Some(mut machine) = Machine::with_amx(2, Options::default()) else {
        return;
    };
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
        machine.tell(n, &AMX);
    }
    let asked = AtomicUsize::new(0);
    let both = Barrier::new(2);
    let host = &machine.host;
    thread::scope(|scope| {
        for vcpu in &mut machine.vcpus {
            let (asked, both) = (&asked, &both);
            scope.spawn(move || {
                let mut buffer = XsaveBuffer::new(host);
                let mut vmm = |_: &Request| {
                    asked.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, String>(Answer::Grant)
                };
                loop {
                    let (index, value) = match vcpu.fd.run().unwrap() {
                        VcpuExit::X86Wrmsr(exit) => (exit.index, exit.data),
                        VcpuExit::Hlt => break,
                        exit => panic!("{exit:?}"),
                    };
                    vcpu.exits += 1;
                    both.wait();
                    let Vcpu { fd, handler, .. } = &mut *vcpu;
                    let handled = handler.handle(index, value, fd, &mut buffer, &mut vmm);
                    assert!(matches!(handled, Ok(Handled::Written { .. })));
                }
            });
        }
    });
    assert_eq!(asked.into_inner(), 1);
    assert_eq!(machine.gate.mode(), Mode::Lifted);
    for n in [0, 1] {
        assert!(machine.tiles_are_right(n));
        // To arm, and to use.
        assert_eq!(machine.vcpus[n].exits, 2);
    }
}
