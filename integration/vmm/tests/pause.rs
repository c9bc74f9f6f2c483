//! A guest that is stopped neither repeats nor loses what it has told its devices or what they have
//! answered.
//!
//! Both count: the guest its OUTs and INs, the devices theirs. Each answer is the number of answers
//! before it, so that one that is lost or given twice is wrong for the guest from then on.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use amx_guest::area::{COUNT_PORT, OUT_INS, OUT_OUTS, OUT_WRONG, STRING_PORT};
use amx_guest::machine::MMIO_PHYSICAL;
use amx_guest::workload::counter_string;
use amx_vmm::{Bus, BusError, Ended, Snapshot, Vm};
use support::host;

const COUNTS: u64 = 400;
const VCPUS: u8 = 2;

/// What a vCPU has told its devices, in order, and how many answers it has had.
#[derive(Default)]
struct Told {
    counts: Vec<u32>,
    ins: u32,
    string_ins: u8,
    /// Answers to loads, a byte each.
    loads: u64,
    text: Vec<u8>,
    /// The bytes of each store, put together again by address.
    stores: Vec<u8>,
}

#[derive(Default)]
struct Recorder {
    told: [Mutex<Told>; VCPUS as usize],
    /// Exits of all vCPUs so far.
    exits: AtomicU64,
    /// The exit at which it stops the VM; 0 for none.
    stop_at: AtomicU64,
    /// It stops the VM at each exit.
    at_each: bool,
}

impl Bus for Recorder {
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        let mut told = self.told[usize::from(vcpu)]
            .lock()
            .expect("no panic before");
        match port {
            COUNT_PORT => {
                let bytes = data.try_into().expect("OUT of four bytes");
                told.counts.push(u32::from_le_bytes(bytes));
            }
            STRING_PORT => told.text.extend_from_slice(data),
            _ => return Err(BusError::NoDevice { vcpu, port }),
        }
        Ok(())
    }

    fn port_read(&self, vcpu: u8, port: u16, data: &mut [u8]) {
        let mut told = self.told[usize::from(vcpu)]
            .lock()
            .expect("no panic before");
        match port {
            COUNT_PORT => {
                data.copy_from_slice(&told.ins.to_le_bytes());
                told.ins += 1;
            }
            STRING_PORT => {
                assert_eq!(data.len(), 16, "REP INSB at once");
                data.fill(told.string_ins);
                told.string_ins = told.string_ins.wrapping_add(1);
            }
            _ => panic!("vCPU {vcpu} reads port {port:#x}"),
        }
    }

    fn stops(&self, _vcpu: u8) -> bool {
        let exit = self.exits.fetch_add(1, Ordering::SeqCst) + 1;
        self.at_each || exit == self.stop_at.load(Ordering::SeqCst)
    }

    fn memory_read(&self, vcpu: u8, address: u64, data: &mut [u8]) {
        let first = MMIO_PHYSICAL + 0x1000 - 4;
        assert!((first..first + 8).contains(&address), "{address:#x}");
        let mut told = self.told[usize::from(vcpu)]
            .lock()
            .expect("no panic before");
        // Eight bytes for each load, in one piece or in several.
        for byte in data {
            let bytes = (told.loads / 8).to_le_bytes();
            *byte = bytes[usize::try_from(told.loads % 8).expect("small")];
            told.loads += 1;
        }
    }

    fn memory_write(&self, vcpu: u8, address: u64, data: &[u8]) {
        let first = MMIO_PHYSICAL + 0x1000 - 4;
        assert!((first..first + 8).contains(&address), "{address:#x}");
        let mut told = self.told[usize::from(vcpu)]
            .lock()
            .expect("no panic before");
        told.stores.extend_from_slice(data);
    }
}

fn check(recorder: Recorder, vm: &Vm, counts: u64) {
    for (vcpu, told) in (0..VCPUS).zip(recorder.told) {
        let told = told.into_inner().expect("no panic before");
        let expected: Vec<u32> = (0..)
            .take(usize::try_from(counts).expect("small"))
            .collect();
        assert_eq!(told.counts, expected, "vCPU {vcpu}");
        let text = counter_string(vcpu).repeat(expected.len());
        assert_eq!(String::from_utf8_lossy(&told.text), text, "vCPU {vcpu}");
        let stores: Vec<u8> = (0..counts).flat_map(u64::to_le_bytes).collect();
        assert_eq!(told.stores, stores, "vCPU {vcpu}");
        assert_eq!(u64::from(told.ins), counts, "vCPU {vcpu}");
        assert_eq!(told.loads, counts * 8, "vCPU {vcpu}");
        // And what the guest says.
        let area = vm.read_area(vcpu).expect("it is in memory");
        let [outs, ins, wrong] = [OUT_OUTS, OUT_INS, OUT_WRONG]
            .map(|at| u64::from_le_bytes(area[at..at + 8].try_into().expect("eight bytes")));
        assert_eq!([outs, ins, wrong], [counts, counts, 0], "vCPU {vcpu}");
    }
}

#[test]
fn stopped_again_and_again_every_output_comes_once() {
    let Some(host) = host() else { return };
    let recorder = Recorder::default();
    let mut vm = Vm::boot_counter(&host, VCPUS, COUNTS).expect("the guest boots");
    let mut stops = 0u64;
    // A different time each, so that stops fall into every kind of exit.
    while vm
        .run(&recorder, Duration::from_micros(50 + 37 * (stops % 40)))
        .expect("it runs")
        == Ended::Stopped
    {
        stops += 1;
        assert!(stops < 10_000, "the guest makes no progress");
    }
    println!("{stops} stops");
    assert!(stops >= 10, "{stops} stops");
    check(recorder, &vm, COUNTS);
}

#[test]
fn moved_again_and_again_every_output_comes_once() {
    let Some(host) = host() else { return };
    let recorder = Recorder::default();
    let mut vm = Vm::boot_counter(&host, VCPUS, COUNTS).expect("the guest boots");
    let mut moves = 0u64;
    while vm
        .run(&recorder, Duration::from_micros(300 + 61 * (moves % 17)))
        .expect("it runs")
        == Ended::Stopped
    {
        let bytes = vm.capture(&host).expect("it is captured").to_bytes();
        let snapshot = Snapshot::from_bytes(&bytes).expect("it is read");
        vm = Vm::restore(&host, &snapshot).expect("it is restored");
        moves += 1;
        assert!(moves < 10_000, "the guest makes no progress");
    }
    println!("{moves} moves");
    assert!(moves >= 5, "{moves} moves");
    check(recorder, &vm, COUNTS);
}

#[test]
fn a_guest_that_is_stopped_at_once_has_done_nothing_wrong() {
    let Some(host) = host() else { return };
    let recorder = Recorder::default();
    let mut vm = Vm::boot_counter(&host, VCPUS, 3).expect("the guest boots");
    for _ in 0..200 {
        vm.run(&recorder, Duration::ZERO).expect("it runs");
    }
    let ended = vm.run(&recorder, support::LONG).expect("it runs");
    assert_eq!(ended, Ended::Halted);
    check(recorder, &vm, 3);
}

/// Between the two halves of a store, in the middle of a string, everywhere.
#[test]
fn moved_at_each_single_exit_every_output_comes_once() {
    const FEW: u64 = 3;
    let Some(host) = host() else { return };
    let mut stops = 0;
    for exit in 1.. {
        let recorder = Recorder {
            stop_at: AtomicU64::new(exit),
            ..Recorder::default()
        };
        let mut vm = Vm::boot_counter(&host, VCPUS, FEW).expect("the guest boots");
        if vm.run(&recorder, support::LONG).expect("it runs") == Ended::Halted {
            check(recorder, &vm, FEW);
            break;
        }
        let snapshot = vm.capture(&host).expect("it is captured");
        vm = Vm::restore(&host, &snapshot).expect("it is restored");
        let ended = vm.run(&recorder, support::LONG).expect("it runs on");
        assert_eq!(ended, Ended::Halted);
        check(recorder, &vm, FEW);
        stops += 1;
    }
    println!("{stops} places to stop");
    assert!(stops >= 4 * FEW, "{stops} places to stop");
}

/// At each exit there is, of each kind, a thousand times and more; and moved at every tenth.
#[test]
fn paused_a_thousand_times_it_counts_what_its_devices_count() {
    const PAUSES: u64 = 1000;
    let Some(host) = host() else { return };
    let recorder = Recorder {
        at_each: true,
        ..Recorder::default()
    };
    let counts = 60;
    let mut vm = Vm::boot_counter(&host, VCPUS, counts).expect("the guest boots");
    let (mut pauses, mut moves) = (0_u64, 0);
    while vm.run(&recorder, support::LONG).expect("it runs") == Ended::Stopped {
        pauses += 1;
        if pauses.is_multiple_of(10) {
            let snapshot = vm.capture(&host).expect("it is captured");
            vm = Vm::restore(&host, &snapshot).expect("it is restored");
            moves += 1;
        }
    }
    println!("{pauses} pauses, {moves} moves");
    assert!(pauses >= PAUSES, "{pauses} pauses");
    check(recorder, &vm, counts);
}
