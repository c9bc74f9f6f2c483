//! A lab that is resumed is the machine that was booted: all that a program can see of the processor and of KVM is the same.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;

use std::path::Path;

use amx_lab::{Cpu, Kernel};
use common::{amx_lab, example, output, store, text};
use cpuid_amx::{AmxFeatures, Level};

/// What the program `look` says in such a lab.
fn look(kernel: Kernel, cpu: Cpu, cpus: u32, module: &Path, how: &[&str]) -> Vec<String> {
    let output = output(
        amx_lab()
            .args([
                "run",
                "--timeout",
                "100",
                "--kernel",
                kernel.suite(),
                "--cpu",
                cpu.name(),
                "--cpus",
                &cpus.to_string(),
            ])
            .args(how)
            .arg("--file")
            .arg(format!("{}:/msr.ko", module.display()))
            .arg("--")
            .arg(example("look"))
            .arg("/msr.ko"),
    );
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(str::to_owned).collect()
}

/// Holds a processor to the AMX features of its name, in CPUID and where Linux shows them. It has words for those of
/// the first processors only.
fn has_its_amx(cpu: Cpu, lines: &[String]) {
    let level = cpu.name().parse::<Level>();
    let expected = level.map_or(AmxFeatures::empty(), Level::features);
    let cpuid = |leaf: u32, subleaf: u32| {
        let start = format!("cpuid 0 {leaf:08x}.{subleaf:02x}: ");
        let line = lines.iter().find_map(|line| line.strip_prefix(&start));
        let mut registers = line.unwrap_or_default().split_whitespace();
        [(); 4].map(|()| u32::from_str_radix(registers.next().unwrap_or("0"), 16).unwrap())
    };
    let found = AmxFeatures::from_cpuid(cpuid);
    assert_eq!(found, expected, "{cpu}");
    let flags = lines
        .iter()
        .find_map(|line| line.strip_prefix("cpuinfo flags"))
        .unwrap();
    let mut shown: Vec<&str> = flags
        .split_whitespace()
        .filter(|flag| flag.starts_with("amx"))
        .collect();
    shown.sort_unstable();
    let words: &[&str] = if expected.is_empty() {
        &[]
    } else {
        &["amx_bf16", "amx_int8", "amx_tile"]
    };
    assert_eq!(shown, words, "{cpu}");
}

fn is_the_same(kernel: Kernel, cpu: Cpu, cpus: u32) {
    let folder = tempfile::tempdir().unwrap();
    let written = output(
        amx_lab()
            .args(["guest-kernel", "--kernel", kernel.suite()])
            .arg(folder.path()),
    );
    assert!(written.status.success(), "{}", text(&written.stderr));
    let module = folder.path().join("msr.ko");
    let resumed = look(kernel, cpu, cpus, &module, &[]);
    let booted = look(kernel, cpu, cpus, &module, &["--cold"]);
    let differing: Vec<_> = booted
        .iter()
        .zip(&resumed)
        .filter(|(booted, resumed)| booted != resumed)
        .take(20)
        .collect();
    assert!(
        differing.is_empty() && booted.len() == resumed.len(),
        "{kernel} on {cpu}, {} lines booted, {} resumed; the first that differ: {differing:#?}",
        booted.len(),
        resumed.len()
    );
    for number in 0..cpus {
        let processor = format!("msr {number} 0000003a: ");
        assert!(
            booted.iter().any(|line| line.starts_with(&processor)),
            "processor {number}"
        );
    }
    has_its_amx(cpu, &booted);
    // It has looked: some of each kind.
    for kind in [
        "cpuid 0 0000000d.01: ",
        "msr 0 0000003a: ",
        "kvm supported ",
        "kvm feature ",
        "vcpu msr ",
        "cpuinfo flags",
    ] {
        assert!(booted.iter().any(|line| line.starts_with(kind)), "{kind}");
    }
}

#[test]
fn each_kernel_is_the_same() {
    store(&Kernel::ALL);
    for kernel in Kernel::ALL {
        is_the_same(kernel, Cpu::default(), 2);
    }
}

#[test]
fn each_processor_is_the_same() {
    store(&[Kernel::default()]);
    for cpu in Cpu::ALL {
        if cpu != Cpu::default() {
            is_the_same(Kernel::default(), cpu, 1);
        }
    }
}
