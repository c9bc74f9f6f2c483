//! Every ioctl of save and of restore fails once with each of four errors.
//!
//! A process moves guests from one of its threads to another. One of the two is watched, and with it
//! the side whose ioctls are to fail; guests run in threads of their own. A first process counts the
//! ioctls of a move. In a second one each move lacks one of them.

use std::collections::BTreeMap;
use std::thread;

use amx_vmm::linux::devices::Devices;
use amx_vmm::migration::{Received, receive, send};
use amx_vmm::{Bus, Console, Host, Vm};
use nix::errno::Errno;
use nix::libc::SYS_ioctl;

use crate::frame::Frame;
use crate::groups::Group;
use crate::inject::{self, Call, mark, watched};
use crate::process::say;
use crate::table::{self, Outcome, Row};
use crate::trial::{self, PATIENCE};
use crate::{hostile, platform};

const ERRORS: [Errno; 4] = [Errno::EINVAL, Errno::ENOMEM, Errno::EFAULT, Errno::EINTR];

pub(crate) fn run_save() -> Vec<Row> {
    run(Group::Save, "save")
}

pub(crate) fn run_restore() -> Vec<Row> {
    run(Group::Restore, "restore")
}

fn run(group: Group, what: &str) -> Vec<Row> {
    [false, true]
        .into_iter()
        .map(|with_platform| {
            let guest = if with_platform {
                "with a platform"
            } else {
                "without"
            };
            let mut row = Row::new(format!("ioctl of {what} fails, guest {guest}"));
            for outcome in each_fails(group, with_platform) {
                row.add(outcome);
            }
            row
        })
        .collect()
}

fn each_fails(group: Group, with_platform: bool) -> Vec<Outcome> {
    let mut calls = Vec::new();
    inject::run(group, &format!("{with_platform} 1"), 1, |call| {
        if call.number == SYS_ioctl {
            calls.push(call.request);
        }
        None
    });
    let faults: Vec<(usize, Errno)> = (0..calls.len())
        .flat_map(|at| ERRORS.map(|error| (at, error)))
        // Under emulation one error for each ioctl, in turn.
        .filter(|(at, error)| !table::in_lab() || ERRORS[at % ERRORS.len()] == *error)
        .collect();
    let (mut operation, mut seen, mut failed) = (usize::MAX, 0, 0);
    let said = inject::run(
        group,
        &format!("{with_platform} {}", faults.len()),
        faults.len(),
        |call: Call| {
            if call.operation != operation {
                (operation, seen) = (call.operation, 0);
            }
            if call.number != SYS_ioctl {
                return None;
            }
            let (at, error) = faults[operation];
            seen += 1;
            if seen != at + 1 {
                return None;
            }
            assert_eq!(call.request, calls[at], "the same ioctls in each move");
            failed += 1;
            Some(error)
        },
    );
    assert_eq!(failed, faults.len(), "each fault was there");
    assert_eq!(said.len(), faults.len());
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    let outcomes = said.iter().zip(&faults).map(|(said, (at, _))| {
        let (outcome, why) = said.split_once(' ').expect("two words");
        let name = name(calls[*at]);
        *names.entry(format!("{name}: {outcome}")).or_default() += 1;
        // An error says what has failed, where the ioctl is not one of many.
        match outcome {
            "stays" => {
                assert!(!why.is_empty());
                Outcome::Stays
            }
            "moved" => Outcome::Moved,
            "lost" => Outcome::Lost,
            "double" => Outcome::Double,
            other => panic!("{other}"),
        }
    });
    let outcomes = outcomes.collect();
    println!(
        "{group:?}, with platform {with_platform}: {} ioctls",
        calls.len()
    );
    for (name, times) in names {
        println!("  {times:3} {name}");
    }
    outcomes
}

/// The names of requests by type and number (include/uapi/linux/kvm.h).
fn name(request: u64) -> String {
    let bytes = request >> 16 & 0x3fff;
    let name = match (request >> 8 & 0xff, request & 0xff) {
        (0xae, 0x01) => "KVM_CREATE_VM",
        (0xae, 0x02) => "KVM_GET_MSR_INDEX_LIST",
        (0xae, 0x03) => "KVM_CHECK_EXTENSION",
        (0xae, 0x04) => "KVM_GET_VCPU_MMAP_SIZE",
        (0xae, 0x41) => "KVM_CREATE_VCPU",
        (0xae, 0x42) => "KVM_GET_DIRTY_LOG",
        (0xae, 0x46) => "KVM_SET_USER_MEMORY_REGION",
        (0xae, 0x47) => "KVM_SET_TSS_ADDR",
        (0xae, 0x48) => "KVM_SET_IDENTITY_MAP_ADDR",
        (0xae, 0x60) => "KVM_CREATE_IRQCHIP",
        (0xae, 0x62) => "KVM_GET_IRQCHIP",
        (0xae, 0x63) => "KVM_SET_IRQCHIP",
        (0xae, 0x77) => "KVM_CREATE_PIT2",
        (0xae, 0x7b) => "KVM_SET_CLOCK",
        (0xae, 0x7c) => "KVM_GET_CLOCK",
        (0xae, 0x81) => "KVM_GET_REGS",
        (0xae, 0x82) => "KVM_SET_REGS",
        (0xae, 0x83) => "KVM_GET_SREGS",
        (0xae, 0x84) => "KVM_SET_SREGS",
        (0xae, 0x88) => "KVM_GET_MSRS",
        (0xae, 0x89) => "KVM_SET_MSRS",
        (0xae, 0x8e) => "KVM_GET_LAPIC",
        (0xae, 0x8f) => "KVM_SET_LAPIC",
        (0xae, 0x90) => "KVM_SET_CPUID2",
        (0xae, 0x91) => "KVM_GET_CPUID2",
        (0xae, 0x98) => "KVM_GET_MP_STATE",
        (0xae, 0x99) => "KVM_SET_MP_STATE",
        (0xae, 0x9f) if bytes == 0x70 => "KVM_GET_PIT2",
        (0xae, 0x9f) => "KVM_GET_VCPU_EVENTS",
        (0xae, 0xa0) if bytes == 0x70 => "KVM_SET_PIT2",
        (0xae, 0xa0) => "KVM_SET_VCPU_EVENTS",
        (0xae, 0xa1) => "KVM_GET_DEBUGREGS",
        (0xae, 0xa2) => "KVM_SET_DEBUGREGS",
        (0xae, 0xa3) => "KVM_GET_TSC_KHZ",
        (0xae, 0xa4) => "KVM_GET_XSAVE",
        (0xae, 0xa5) => "KVM_SET_XSAVE",
        (0xae, 0xa6) => "KVM_GET_XCRS",
        (0xae, 0xa7) => "KVM_SET_XCRS",
        (0xae, 0xad) => "KVM_KVMCLOCK_CTRL",
        (0xae, 0xcf) => "KVM_GET_XSAVE2",
        _ => return format!("ioctl {request:#x}"),
    };
    name.to_owned()
}

/// Moves guests; the watched thread is the source's.
pub(crate) fn work_save(host: &Host, job: &str) {
    let (with_platform, moves) = parse(job);
    let messages = with_platform.then(|| platform::messages(host, true));
    prepare(host);
    watched();
    for _ in 0..moves {
        match &messages {
            None => {
                let mut vm = trial::guest(host);
                let (sent, received) = moved(host, &mut vm, &Console::default(), None);
                conclude(host, vm, &Console::default(), sent, received);
            }
            Some(messages) => {
                let (mut vm, devices) = guest_with_platform(host, messages);
                let (sent, received) = moved(host, &mut vm, &devices, Some(&devices));
                conclude(host, vm, &devices, sent, received);
            }
        }
    }
}

type Ends = (Result<(), String>, Result<Received, String>);

/// The source is this thread, and what it does to save is marked.
fn moved<B: Bus>(host: &Host, vm: &mut Vm, bus: &B, devices: Option<&Devices>) -> Ends {
    let (here, there) = trial::pair();
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, there, PATIENCE));
        mark();
        let sent = send(vm, host, (bus, devices), here, &trial::options(), |_| {});
        mark();
        let received = received.join().expect("it does not panic");
        (
            sent.map(|_| ()).map_err(|e| e.to_string()),
            received.map_err(|e| e.to_string()),
        )
    })
}

/// Moves guests; the watched thread is the destination's.
pub(crate) fn work_restore(host: &Host, job: &str) {
    let (with_platform, moves) = parse(job);
    let messages = with_platform.then(|| platform::messages(host, true));
    prepare(host);
    watched();
    for _ in 0..moves {
        match &messages {
            None => {
                let mut vm = trial::guest(host);
                let console = Console::default();
                let (sent, received) = arrives(host, &mut vm, &console, None);
                conclude(host, vm, &console, sent, received);
            }
            Some(messages) => {
                let (mut vm, devices) = guest_with_platform(host, messages);
                let (sent, received) = arrives(host, &mut vm, &devices, Some(&devices));
                conclude(host, vm, &devices, sent, received);
            }
        }
    }
}

/// The destination is this thread, and what it does to restore is marked.
fn arrives<B: Bus>(host: &Host, vm: &mut Vm, bus: &B, devices: Option<&Devices>) -> Ends {
    let (here, there) = trial::pair();
    thread::scope(|scope| {
        let sent = scope.spawn(|| send(vm, host, (bus, devices), here, &trial::options(), |_| {}));
        mark();
        let received = receive(host, there, PATIENCE);
        mark();
        let sent = sent.join().expect("it does not panic");
        (
            sent.map(|_| ()).map_err(|e| e.to_string()),
            received.map_err(|e| e.to_string()),
        )
    })
}

fn parse(job: &str) -> (bool, usize) {
    let (with_platform, moves) = job.split_once(' ').expect("two words");
    (with_platform == "true", moves.parse().expect("a number"))
}

/// What is asked or computed once in a process is asked or computed before.
fn prepare(host: &Host) {
    let (here, there) = trial::pair();
    let mut vm = trial::guest(host);
    let (sent, received) = trial::moved(host, &mut vm, here, there);
    assert_eq!(trial::outcome(host, vm, &sent, received), Outcome::Moved);
}

fn guest_with_platform(host: &Host, messages: &[Frame; 4]) -> (Vm, Devices) {
    let received = hostile::play(host, messages).expect("it is taken");
    let devices = received.devices.expect("it has them");
    (received.vm, devices)
}

fn conclude(
    host: &Host,
    vm: Vm,
    bus: &impl Bus,
    sent: Result<(), String>,
    received: Result<Received, String>,
) {
    match (sent, received) {
        (Err(why), Err(_)) => {
            trial::assert_computes_on_with(host, vm, bus);
            say(format!("stays {why}"));
        }
        (Ok(()), Ok(received)) => {
            drop(vm);
            trial::assert_computes_on_with(host, received.vm, bus);
            say("moved nothing was wrong");
        }
        (Ok(()), Err(why)) => say(format!("lost {why}")),
        (Err(why), Ok(_)) => say(format!("double {why}")),
    }
}
