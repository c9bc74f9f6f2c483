//! Instructions that the gate adds to a VMM's loop for exits that are not its own, counted by callgrind.
//! Prints the table of docs/performance.md, and fails where the limit is not met.
//!
//! The loop is given exits that are made up: the vCPU never runs, but there must be one (/dev/kvm).
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::hint::black_box;
use std::process::Command;

use kvm_ioctls::{Kvm, MsrExitReason, VcpuExit, VcpuFd, WriteMsrExit};
use vcpu_realloc::kvm::{ExitHandler, Handled, Options, VmGate};
use vcpu_realloc::{Answer, Gate, Request};
use xsave_state::kvm::{HostArea, XsaveBuffer};
use xsave_state::{Component, ComponentId, Layout, Palette};

/// More instructions than this per exit are a failure.
const LIMIT: u64 = 5;
const CALLS: u64 = 1_000;
const EXITS: [&str; 3] = ["port access", "HLT", "WRMSR of another register"];

fn main() {
    // `cargo bench` passes --bench; a run under callgrind is told what to do.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if let [who, exit, calls] = &arguments[..] {
        return run(who == "with", exit, calls.parse().unwrap());
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: there is no valgrind");
        return;
    }
    if Kvm::new().is_err() {
        println!("skipped: /dev/kvm cannot be used");
        return;
    }
    println!("| instructions per exit | without | with the gate | added |\n|---|---|---|---|");
    for exit in EXITS {
        let [without, with] = ["without", "with"].map(|who| {
            // What a call costs: that of many less that of one.
            let all = instructions(who, exit, CALLS + 1) - instructions(who, exit, 1);
            // To the nearest: where a program is in memory moves a few of its start-up.
            (all + CALLS / 2) / CALLS
        });
        let added = with.saturating_sub(without);
        println!("| {exit} | {without} | {with} | {added} |");
        assert!(added <= LIMIT, "{exit}: {added} more than without the gate");
    }
}

fn instructions(who: &str, exit: &str, calls: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args([who, exit, &calls.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected : "));
    collected
        .unwrap_or_else(|| panic!("{text}"))
        .1
        .parse()
        .unwrap()
}

/// A VMM.
struct Vmm {
    vcpu: VcpuFd,
    handler: ExitHandler,
    buffer: XsaveBuffer,
    halts: u64,
    ports: u64,
    registers: u64,
}

fn grant(_: &Request) -> Result<Answer, ()> {
    Ok(Answer::Grant)
}

impl Vmm {
    /// Its loop as it is without the gate.
    #[inline(never)]
    fn without(&mut self, kvm: fn() -> VcpuExit<'static>, calls: u64) {
        for _ in 0..calls {
            match kvm() {
                VcpuExit::IoOut(port, _) => self.port(port),
                VcpuExit::X86Wrmsr(exit) => self.wrmsr(exit.index, exit.data),
                VcpuExit::Hlt => self.halt(),
                _ => panic!(),
            }
        }
    }

    /// The same with the gate's arm.
    #[inline(never)]
    fn with(&mut self, kvm: fn() -> VcpuExit<'static>, calls: u64) {
        for _ in 0..calls {
            match kvm() {
                VcpuExit::IoOut(port, _) => self.port(port),
                VcpuExit::X86Wrmsr(exit) => {
                    let (index, value) = (exit.index, exit.data);
                    let vcpu = &mut self.vcpu;
                    let buffer = &mut self.buffer;
                    match self.handler.handle(index, value, vcpu, buffer, &mut grant) {
                        Ok(Handled::NotOurs) => self.wrmsr(index, value),
                        Ok(_) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                VcpuExit::Hlt => self.halt(),
                _ => panic!(),
            }
        }
    }

    #[inline(never)]
    fn halt(&mut self) {
        self.halts = black_box(self.halts + 1);
    }

    #[inline(never)]
    fn port(&mut self, port: u16) {
        self.ports = black_box(self.ports + u64::from(port));
    }

    #[inline(never)]
    fn wrmsr(&mut self, index: u32, value: u64) {
        self.registers = black_box(self.registers + u64::from(index) + value);
    }
}

fn run(with: bool, exit: &str, calls: u64) {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let layout = Layout::from_parts(
        [
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )
    .unwrap();
    assert!(!Gate::new(&layout).has_passed());
    let gate = VmGate::install(&vm, &layout, Options::default()).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let buffer = XsaveBuffer::new(&HostArea::query(&vm, &vcpu).unwrap());
    let mut vmm = Vmm {
        handler: gate.vcpu(0, &mut grant).unwrap(),
        vcpu,
        buffer,
        halts: 0,
        ports: 0,
        registers: 0,
    };
    let kvm: fn() -> VcpuExit<'static> = match exit {
        "port access" => port_access,
        "HLT" => hlt,
        _ => wrmsr,
    };
    if with {
        vmm.with(kvm, calls);
    } else {
        vmm.without(kvm, calls);
    }
}

// What KVM_RUN gives.

fn port_access() -> VcpuExit<'static> {
    black_box(VcpuExit::IoOut(0x3f8, &[]))
}

fn hlt() -> VcpuExit<'static> {
    black_box(VcpuExit::Hlt)
}

fn wrmsr() -> VcpuExit<'static> {
    black_box(VcpuExit::X86Wrmsr(WriteMsrExit {
        error: Box::leak(Box::new(0)),
        reason: MsrExitReason::Filter,
        index: 0x10,
        data: 5,
    }))
}
