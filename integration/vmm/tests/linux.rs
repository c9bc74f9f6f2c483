//! Linux guests, where this host's KVM has AMX and there is a kernel for them: in the AMX lab.
//!
//! ```sh
//! cargo lab guest-kernel FOLDER
//! AMX_LAB_MEMORY=1024 AMX_LAB_FILES=FOLDER:/boot/guest cargo lab cargo test --package amx-vmm --test linux
//! ```
//!
//! Files are in the lab's memory: with 512 MiB a process that writes a snapshot may be killed for lack of it.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use amx_guest::report::{LOADS, Load, Wish};
use amx_vmm::fit::Reason;
use amx_vmm::linux::devices::{Devices, Switched};
use amx_vmm::linux::log::Log;
use amx_vmm::migration::{
    Cancel, Offer, Options, Progress, ReceiveError, SendError, receive, receive_with, send,
};
use amx_vmm::{Host, Linux, LinuxError, Snapshot, Vm, file};
use cpuid_amx::{AmxFeatures, Level, Policy};
use host_compat::compat;
use support::{
    GUEST_KERNEL, boot, elsewhere, end, job, let_work, linux_guest, start_elsewhere,
    with_live_tiles,
};
use xsave_state::{ComponentId, ExtendedState, Misfit, XFeatures};

#[test]
fn it_computes_on_tiles_and_switches_itself_off() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
    let devices = Devices::new(&vm);
    let_work(&mut vm, &devices, 3);
    let log = end(&mut vm, &devices, Wish::PowerOff);
    assert_eq!(devices.switched(), Some(Switched::Off));
    let kernel = amx_vmm::host::kernel().expect("/proc is there");
    let up = log.up.as_ref().expect("it was booted here");
    assert_eq!(up.kernel, kernel, "the lab's own kernel");
    assert_eq!(up.processors, 1);
    assert!(devices.console().contains("reboot: Power down"));
    // Each process has done its work: also the one that reads IA32_XFD, and finds it armed.
    for (load, process) in LOADS.iter().zip(&log.processes) {
        assert_eq!(process.load, Some(*load));
        assert_eq!(process.lacks, None);
        assert!(process.rounds > 0, "{log:#?}");
    }
}

/// The kernel as Debian has it, which unpacks itself.
#[test]
fn a_bzimage_boots() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    linux.kernel = Path::new(GUEST_KERNEL).join(amx_lab::VMLINUZ);
    let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
    let devices = Devices::new(&vm);
    let_work(&mut vm, &devices, 1);
    let log = end(&mut vm, &devices, Wish::PowerOff);
    let up = log.up.expect("it was booted here");
    assert_eq!(Some(up.kernel), amx_vmm::host::kernel());
}

/// What it computes with then: the vector registers and PKRU.
#[test]
fn without_amx_it_computes_on_vectors() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    linux.policy = Policy::hide_amx();
    let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
    let devices = Devices::new(&vm);
    let_work(&mut vm, &devices, 3);
    let log = end(&mut vm, &devices, Wish::PowerOff);
    for (load, process) in LOADS.iter().zip(&log.processes) {
        assert_eq!(process.rounds > 0, *load == Load::Vectors, "{log:#?}");
        assert_eq!(process.lacks.is_none(), *load == Load::Vectors, "{log:#?}");
    }
}

#[test]
fn all_its_processors_compute_and_it_resets_itself() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    linux.vcpus = Linux::MAX_VCPUS;
    let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
    let devices = Devices::new(&vm);
    let_work(&mut vm, &devices, 3);
    let log = end(&mut vm, &devices, Wish::Reset);
    assert_eq!(devices.switched(), Some(Switched::Reset));
    let processors = log.up.as_ref().map(|up| up.processors);
    assert_eq!(processors, Some(8), "{}", devices.console());
}

/// Each level that this processor can carry, a part of it, and none: what the guest's kernel finds is
/// what the policy says, as far as the kernel has names for it.
#[test]
fn its_kernel_sees_of_amx_what_the_policy_says() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let seen = |policy: Policy| {
        let linux = Linux {
            policy,
            ..linux.clone()
        };
        let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
        let devices = Devices::new(&vm);
        let up = boot(&mut vm, &devices);
        let features = up.amx.iter().map(|name| {
            AmxFeatures::by_name(name).unwrap_or_else(|| panic!("{name} is not known"))
        });
        features.collect::<AmxFeatures>()
    };
    // Later features have no words in the flags of these kernels.
    let named = AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16;
    assert_eq!(seen(Policy::hide_amx()), AmxFeatures::empty());
    let part = AmxFeatures::TILE | AmxFeatures::BF16;
    assert_eq!(seen(Policy::exactly(part)), part);
    let mut carried = 0;
    for level in Level::ALL {
        let policy = Policy::level(level);
        if policy.choose(host.cpuid()).is_err() {
            println!("{level}: this processor cannot carry it");
            continue;
        }
        assert_eq!(seen(policy), level.features() & named, "{level}");
        carried += 1;
    }
    assert!(carried > 0, "a processor with AMX has the first level");
}

#[test]
fn a_guest_without_room_is_refused() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let refused = |linux: &Linux| {
        let error = Vm::boot_linux(&host, linux).err().expect("it is refused");
        println!("{error}");
        error
    };
    let small = Linux {
        memory_bytes: 48 << 20,
        ..linux.clone()
    };
    assert!(matches!(refused(&small), LinuxError::Loader(_)));
    let full = Linux {
        initramfs: vec![0; 80 << 20],
        ..linux.clone()
    };
    assert!(matches!(refused(&full), LinuxError::NoRoom { .. }));
    let many = Linux {
        vcpus: Linux::MAX_VCPUS + 1,
        ..linux.clone()
    };
    assert!(matches!(refused(&many), LinuxError::VcpuCount { .. }));
    let long = Linux {
        command_line: "x".repeat(5000),
        ..linux.clone()
    };
    assert!(matches!(refused(&long), LinuxError::CommandLine(_)));
    let none = Linux {
        kernel: "/proc/version".into(),
        ..linux
    };
    assert!(matches!(refused(&none), LinuxError::Loader(_)));
}

#[test]
fn it_goes_on_from_files_in_other_processes() {
    let name = "it_goes_on_from_files_in_other_processes";
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    let Some(job) = job() else {
        for job in ["boot", "go on", "go on", "end"] {
            elsewhere(name, job);
        }
        return;
    };
    let (mut vm, devices) = if job == "boot" {
        linux.vcpus = 2;
        let vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
        let devices = Devices::new(&vm);
        (vm, devices)
    } else {
        restored(&host, name, |snapshot| snapshot)
    };
    let_work(&mut vm, &devices, 2);
    if job == "end" {
        let log = end(&mut vm, &devices, Wish::PowerOff);
        assert!(log.processes[0].round > log.processes[0].rounds, "{log:#?}");
    } else {
        let snapshot = with_live_tiles(&mut vm, &host, &devices);
        file::write(&path(name), &snapshot.to_bytes()).expect("it is written");
    }
}

/// The control: the guest itself must notice. A program that has stored its tiles does not miss them, so this
/// is tried at several moments.
#[test]
fn tiles_that_are_lost_are_noticed_by_the_guest() {
    let name = "tiles_that_are_lost_are_noticed_by_the_guest";
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let Some(job) = job() else {
        elsewhere(name, "boot");
        for _ in 0..8 {
            if elsewhere(name, "lose").contains(NOTICED) {
                return;
            }
            elsewhere(name, "go on");
        }
        panic!("the guest has noticed nothing at any moment");
    };
    let (mut vm, devices) = match job.as_str() {
        "boot" => {
            let vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
            let devices = Devices::new(&vm);
            (vm, devices)
        }
        "lose" => restored(&host, name, |snapshot| {
            snapshot.map_extended(|extended| {
                let image = extended.image().clone().without(XFeatures::XTILEDATA);
                ExtendedState::new(image, extended.registers()).expect("less in use is never worse")
            })
        }),
        _ => restored(&host, name, |snapshot| snapshot),
    };
    if job != "lose" {
        let_work(&mut vm, &devices, 1);
        let snapshot = with_live_tiles(&mut vm, &host, &devices);
        file::write(&path(name), &snapshot.to_bytes()).expect("it is written");
        return;
    }
    for _ in 0..250 {
        vm.run(&devices, Duration::from_millis(20))
            .expect("it runs");
        let log = devices.log();
        let mut wrong = log.processes.iter().flat_map(|process| &process.wrong);
        if let Some((round, first, bytes)) = wrong.next() {
            println!("{NOTICED} in round {round}: {first:?}, {bytes} bytes");
            assert!(first.tile < 8 && *bytes > 0);
            return;
        }
        if log.went_on(&Log::default(), 2) {
            return;
        }
    }
    panic!("the guest hangs: {:#?}", devices.log());
}

/// What a guest's process prints that has found its tiles wrong.
const NOTICED: &str = "noticed";

/// Tries to move it to where it lacks AMX. True if tiles of vCPU 0 were among the reasons.
fn is_refused_for_its_tiles(vm: &mut Vm, host: &Host, devices: &Devices, offer: &Offer) -> bool {
    let deadline = Duration::from_secs(60);
    let (here, there) = UnixStream::pair().expect("a socket");
    let options = Options::within(deadline);
    let (sent, received) = thread::scope(|scope| {
        let received =
            scope.spawn(|| receive_with(host, offer, there, deadline, &Cancel::default(), |_| {}));
        let guest = (devices, Some(devices));
        let sent = send(vm, host, guest, here, &options, |_| {
            panic!("no page may be sent")
        });
        (sent, received.join().expect("it does not panic"))
    });
    let Err(SendError::Unfit(unfit)) = sent else {
        panic!("{sent:?}")
    };
    for reason in unfit.reasons() {
        println!("{reason}");
        assert!(matches!(reason, Reason::Host(_)), "{reason}");
    }
    match received {
        Err(ReceiveError::Refused { reason }) => assert!(unfit.to_string().starts_with(&reason)),
        other => panic!("{:?}", other.err()),
    }
    let component = ComponentId::XTILEDATA;
    let loss = Misfit::Missing { component };
    let tiles = Reason::Host(compat::Reason::Loss { vcpu: 0, loss });
    unfit.reasons().contains(&tiles)
}

/// A destination without AMX: named to both sides before a page is sent, with tiles in a register, and all
/// processes compute on.
#[test]
fn it_is_refused_where_there_is_no_amx_and_computes_on() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let mut vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
    let devices = Devices::new(&vm);
    let_work(&mut vm, &devices, 1);
    let mut offer = Offer::of(&host);
    let kvm = offer.host.kvm.as_mut().expect("it has KVM");
    let seen = kvm.rewritten.as_mut().unwrap_or(&mut kvm.cpuid);
    Policy::hide_amx().apply(seen).expect("it can be");

    // It runs until the destination has described itself: now and then its tiles are live then.
    let mut tries = 0;
    while !is_refused_for_its_tiles(&mut vm, &host, &devices, &offer) {
        tries += 1;
        assert!(tries < 200, "its tiles are never live");
    }
    let_work(&mut vm, &devices, 2);
    end(&mut vm, &devices, Wish::PowerOff);
}

/// While it computes on tiles, from one process to the next.
#[test]
fn it_is_moved_over_sockets_while_it_computes() {
    let name = "it_is_moved_over_sockets_while_it_computes";
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    let socket = |left: u32| std::env::temp_dir().join(format!("{name}.{left}"));
    let deadline = Duration::from_secs(600);
    let (mut vm, devices, left) = match job() {
        None => {
            linux.vcpus = 2;
            let vm = Vm::boot_linux(&host, &linux).expect("it is loaded");
            let devices = Devices::new(&vm);
            (vm, devices, 2)
        }
        Some(left) => {
            let left: u32 = left.parse().expect("a number");
            let stream = UnixStream::connect(socket(left)).expect("the source listens");
            let received = receive(&host, stream, deadline).expect("it comes");
            let devices = received.devices.expect("it is a Linux guest");
            (received.vm, devices, left)
        }
    };
    let_work(&mut vm, &devices, 2);
    let Some(next) = left.checked_sub(1) else {
        let log = end(&mut vm, &devices, Wish::PowerOff);
        assert!(log.processes[0].round > log.processes[0].rounds, "{log:#?}");
        return;
    };
    let listener = UnixListener::bind(socket(next)).expect("the path is free");
    let mut destination = start_elsewhere(name, &next.to_string());
    let stream = destination.comes_to(&listener);
    let options = Options::within(deadline);
    let guest = (&devices, Some(&devices));
    let report = send(&mut vm, &host, guest, stream, &options, |progress| {
        if let Progress::Round(round) = progress {
            println!("{round:?}");
        }
    });
    println!("{:?}", report.expect("it is moved"));
    assert!(devices.log().is_right(), "{:#?}", devices.log());
    drop(vm);
    destination.passes();
}

/// Where one process of a test leaves a snapshot for the next.
fn path(test: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{test}.snapshot"))
}

fn restored(host: &Host, test: &str, change: impl FnOnce(Snapshot) -> Snapshot) -> (Vm, Devices) {
    let bytes = file::read(&path(test)).expect("it is read");
    let snapshot = change(Snapshot::from_bytes(&bytes).expect("it is a snapshot"));
    let vm = Vm::restore(host, &snapshot).expect("it is restored");
    let platform = snapshot.platform().expect("it is of a Linux guest");
    let devices = Devices::restore(&vm, platform.devices()).expect("they are restored");
    (vm, devices)
}
