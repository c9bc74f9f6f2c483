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
