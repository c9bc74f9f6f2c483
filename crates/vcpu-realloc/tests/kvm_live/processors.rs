//! vCPUs whose threads go from processor to processor, each of which has an IA32_XFD of its own.
//!
//! What is held: live tiles, their configuration and IA32_XFD belong to the vCPU, wherever it runs next. While
//! IA32_XFD disables tile data, that component is the exception: KVM saves none of it when the vCPU leaves
//! its processor. The guest then finds its own tiles or zeros, and never those of another.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use kvm_ioctls::VcpuExit;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use vcpu_realloc::Answer;
use vcpu_realloc::kvm::{Handled, Mode, Options};
use xsave_state::kvm::{HostArea, XsaveBuffer};

use crate::boot::{AMX, boot};
use crate::machine::{ARMED, Command, Machine, Stop, Vcpu, guest};
use crate::vmm::never;

/// The thread that asks.
const THIS: Pid = Pid::from_raw(0);

/// The processors that this process may use.
fn processors() -> Vec<usize> {
    let allowed = sched_getaffinity(THIS).unwrap();
    (0..CpuSet::count())
        .filter(|&cpu| allowed.is_set(cpu).unwrap())
        .collect()
}

/// Two of them, or `None` and why.
fn two_processors() -> Option<[usize; 2]> {
    let all = processors();
    let two = all.first_chunk().copied();
    if two.is_none() {
        println!("skipped: there is one processor");
    }
    two
}

/// Moves a thread. It is there when this is done, also if it was running a guest.
fn go(thread: Pid, processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).unwrap();
    sched_setaffinity(thread, &set).unwrap();
}

/// A VM of two vCPUs, of which vCPU 0 has used tiles, so that nothing is trapped, and both are armed; and two
/// processors.
fn machine() -> Option<(Machine, [usize; 2])> {
    let processors = two_processors()?;
    let mut machine = Machine::with_amx(2, Options::default())?;
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
    }
    machine.tell(0, &[AMX[0], AMX[1], Command::WriteXfd(ARMED)]);
    assert_eq!(machine.run(0, &mut Answer::Grant), Stop::Halted);
    assert_eq!(machine.gate.mode(), Mode::Lifted);
    Some((machine, processors))
}

/// Runs a vCPU to a HLT, or a number that the guest says, and handles what is trapped.
fn run(vcpu: &mut Vcpu, host: &HostArea, trapped: &AtomicU64) -> Option<u32> {
    let mut buffer = XsaveBuffer::new(host);
    loop {
        let (index, value) = match vcpu.fd.run().unwrap() {
            VcpuExit::X86Wrmsr(exit) => (exit.index, exit.data),
            VcpuExit::IoOut(guest::BELL_PORT, number) => {
                return Some(u32::from_le_bytes(number.try_into().unwrap()));
            }
            VcpuExit::Hlt => return None,
            exit => panic!("{exit:?}"),
        };
        let Vcpu { fd, handler, .. } = &mut *vcpu;
        let handled = handler.handle(index, value, fd, &mut buffer, &mut Answer::Grant);
        assert!(matches!(handled, Ok(Handled::Written { .. })));
        trapped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Has both vCPUs say a number again and again, and change places each time.
fn changing_places(machine: &mut Machine, processors: [usize; 2]) {
    let (host, both) = (&machine.host, Barrier::new(2));
    thread::scope(|scope| {
        for (n, vcpu) in machine.vcpus.iter_mut().enumerate() {
            let both = &both;
            scope.spawn(move || {
                let trapped = AtomicU64::new(0);
                for turn in 0.. {
                    // Both have left their processors before either has another.
                    both.wait();
                    go(THIS, processors[(n + turn) % 2]);
                    if run(vcpu, host, &trapped).is_none() {
                        break;
                    }
                }
                assert_eq!(trapped.into_inner(), 0);
            });
        }
    });
}

#[test]
fn live_tiles_go_along_between_runs() {
    let Some((mut machine, processors)) = machine() else {
        return;
    };
    for n in [0, 1] {
        let mut commands = vec![Command::LoadTiles];
        commands.extend((0..20).map(Command::Bell));
        commands.extend([Command::ReadXfd, Command::StoreTiles]);
        machine.tell(n, &commands);
    }
    changing_places(&mut machine, processors);
    for n in [0, 1] {
        assert_eq!(machine.word(n, guest::XFD_READ), 0, "vCPU {n}");
        assert!(machine.tiles_are_right(n), "vCPU {n}");
    }
}

#[test]
fn armed_a_vcpu_finds_its_own_tiles_or_zeros_after_runs_elsewhere() {
    let Some((mut machine, processors)) = machine() else {
        return;
    };
    let mut kept = [0; 2];
    for moves in 1..=8 {
        let before = [0, 1].map(|n| {
            let mut commands = vec![Command::LoadTiles, Command::WriteXfd(ARMED)];
            commands.extend((0..moves).map(Command::Bell));
            // #NM, whose handler clears IA32_XFD; TILESTORED is #UD without the configuration.
            commands.extend([
                Command::ReadXfd,
                Command::StoreTiles,
                Command::WriteXfd(ARMED),
            ]);
            machine.tell(n, &commands);
            machine.forget_tiles(n);
            machine.word(n, guest::NM_COUNT)
        });
        changing_places(&mut machine, processors);
        for n in [0, 1] {
            assert_eq!(machine.word(n, guest::XFD_READ), ARMED, "vCPU {n}, {moves}");
            assert_eq!(machine.word(n, guest::XFD_ERR), ARMED, "vCPU {n}, {moves}");
            // To load, and to store.
            assert_eq!(
                machine.word(n, guest::NM_COUNT),
                before[n] + 2,
                "vCPU {n}, {moves}"
            );
            let zeros = machine.tiles_are_zero(n);
            assert!(zeros || machine.tiles_are_right(n), "vCPU {n}, {moves}");
            kept[n] += u32::from(!zeros);
        }
    }
    println!("of 8 times, tiles that IA32_XFD disabled were kept: {kept:?}");
}

/// The threads are moved while their guests run. One has live tiles; the other arms IA32_XFD and uses tiles
/// again and again, so that it takes one #NM in each turn if, and only if, the register goes along.
#[test]
fn tiles_and_xfd_go_along_with_guests_that_run() {
    let Some((mut machine, processors)) = machine() else {
        return;
    };
    for n in [0, 1] {
        machine.tell(n, &[Command::LoadTiles]);
        assert_eq!(machine.run(n, &mut never), Stop::Halted);
    }
    let before = machine.word(1, guest::NM_COUNT);
    let commands = [
        vec![Command::StoreTiles],
        vec![
            Command::WriteXfd(ARMED),
            Command::ReadXfd,
            Command::LoadTiles,
            Command::StoreTiles,
        ],
    ];
    let host = machine.host.clone();
    let watches = thread::scope(|scope| {
        let (tell, threads) = mpsc::channel();
        let watches: Vec<_> = machine
            .watched(&commands)
            .enumerate()
            .map(|(n, (vcpu, watch))| {
                let (tell, host) = (tell.clone(), &host);
                scope.spawn(move || {
                    tell.send((n, gettid())).unwrap();
                    let trapped = AtomicU64::new(0);
                    assert_eq!(run(vcpu, host, &trapped), None);
                    assert_eq!(trapped.into_inner(), 0);
                });
                watch
            })
            .collect();
        let threads = [(); 2].map(|()| threads.recv().unwrap());
        for turn in 0..50 {
            for (n, thread) in threads {
                watches[n].wait_for_a_turn();
                go(thread, processors[(n + turn) % 2]);
            }
        }
        for watch in &watches {
            watch.wait_for_a_turn();
            watch.end();
        }
        watches
    });
    let turns = watches[1].turns();
    assert!(machine.tiles_are_right(0), "live all the time");
    assert!(machine.tiles_are_right(1), "of the last turn");
    assert_eq!(machine.word(1, guest::XFD_READ), ARMED);
    assert_eq!(machine.word(1, guest::NM_COUNT) - before, turns);
}

/// The first use of one vCPU lifts the trap from another that runs, on another processor if there is one, and
/// loses none of its writes.
#[test]
fn the_trap_is_lifted_beside_a_vcpu_that_runs() {
    let Some(mut machine) = Machine::with_amx(2, Options::default()) else {
        return;
    };
    for n in [0, 1] {
        boot(&mut machine, n, &mut never);
    }
    let commands = [
        AMX.to_vec(),
        vec![Command::WriteXfd(ARMED), Command::ReadXfd],
    ];
    let (host, processors) = (machine.host.clone(), processors());
    let trapped = [0, 0].map(AtomicU64::new);
    thread::scope(|scope| {
        let start = |n: usize, vcpu| {
            let (host, trapped) = (&host, &trapped[n]);
            let processor = processors[n % processors.len()];
            scope.spawn(move || {
                go(THIS, processor);
                assert_eq!(run(vcpu, host, trapped), None);
            });
        };
        let mut vcpus = machine.watched(&commands);
        let [(first, using), (second, arming)] = [(); 2].map(|()| vcpus.next().unwrap());
        start(1, second);
        arming.wait_for_a_turn();
        start(0, first);
        using.wait_for_a_turn();
        // A write that had left before may still be handled in the turn that is seen next.
        arming.wait_for_a_turn();
        let then = trapped[1].load(Ordering::Relaxed);
        for _ in 0..3 {
            arming.wait_for_a_turn();
        }
        assert_eq!(
            trapped[1].load(Ordering::Relaxed),
            then,
            "writes still leave"
        );
        assert_ne!(then, 0, "nothing was trapped before");
        using.end();
        arming.end();
    });
    assert_eq!(machine.gate.mode(), Mode::Lifted);
    assert_eq!(machine.first_use(), Some(0));
    assert_eq!(trapped[0].load(Ordering::Relaxed), 1, "the first use");
    assert!(machine.tiles_are_right(0));
    assert_eq!(machine.word(1, guest::XFD_READ), ARMED);
    assert_eq!(machine.word(1, guest::NM_COUNT), 0);
    machine.tell(1, &AMX);
    assert_eq!(machine.run(1, &mut never), Stop::Halted);
    assert!(machine.tiles_are_right(1));
    assert_eq!(machine.word(1, guest::NM_COUNT), 1);
}
