//! Linux guests, where this host's KVM has AMX and there is a kernel for them: in the AMX lab.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use amx_guest::report::Wish;
use amx_vmm::linux::devices::{Devices, Switched};
use amx_vmm::{Linux, Vm};
use support::{end, let_work, linux_guest};

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
    assert_eq!(log.up, Some((1, kernel)), "the lab's own kernel");
    assert!(devices.console().contains("reboot: Power down"));
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
    let processors = log.up.as_ref().map(|(processors, _)| *processors);
    assert_eq!(processors, Some(8), "{}", devices.console());
}

#[test]
fn a_guest_without_room_is_refused() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    linux.memory_bytes = 48 << 20;
    println!("{}", Vm::boot_linux(&host, &linux).err().expect("no room"));
    linux.memory_bytes = 64 << 20;
    println!("{}", Vm::boot_linux(&host, &linux).err().expect("no room"));
    linux.vcpus = Linux::MAX_VCPUS + 1;
    println!("{}", Vm::boot_linux(&host, &linux).err().expect("vCPUs"));
    linux.vcpus = 1;
    linux.command_line = "x".repeat(5000);
    println!("{}", Vm::boot_linux(&host, &linux).err().expect("long"));
}
