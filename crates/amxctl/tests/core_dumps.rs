//! Core dumps of real processes, by gdb and by the kernel, have the registers that were put there.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use amxctl::open::open_bytes;
use amxctl::vcpu::{Owner, Places};
use amxctl::{Format, Given, Subject};
use xsave_state::ComponentId;

/// Runs to its end or, in time, to its death.
fn run(command: &mut Command) -> bool {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        std::thread::yield_now();
    }
}

fn subject(path: &Path) -> Subject {
    let mut snapshot = amxctl::open(path, &mut |_, _| {}).unwrap();
    assert_eq!(snapshot.format, Format::ElfCore);
    snapshot.vcpus.remove(0).subject(&Given::default())
}

#[test]
fn gdb_writes_the_vector_registers_that_it_has_set() {
    if Command::new("gdb").arg("--version").output().is_err() {
        println!("skipped: there is no gdb");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let core = folder.path().join("process.core");
    let in_time = run(Command::new("gdb").args([
        "-batch",
        "-nx",
        "-ex",
        "starti",
        "-ex",
        "set var $ymm5.v4_int64 = {0x1122334455667788, 2, 3, 0x99aabbccddeeff00}",
        "-ex",
        &format!("generate-core-file {}", core.display()),
        "-ex",
        "kill",
        "/bin/true",
    ]));
    assert!(in_time, "gdb took more than a minute");
    if !core.exists() {
        println!("skipped: gdb cannot trace a process here");
        return;
    }
    let subject = subject(&core);
    let xmm5 = &subject.component(ComponentId::SSE)[5 * 16..6 * 16];
    assert_eq!(xmm5[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(xmm5[8..], 2u64.to_le_bytes());
    let ymm5 = &subject.component(ComponentId::AVX)[5 * 16..6 * 16];
    assert_eq!(ymm5[..8], 3u64.to_le_bytes());
    assert_eq!(ymm5[8..], 0x99aa_bbcc_ddee_ff00u64.to_le_bytes());
    assert!(subject.state().is_ok());
}

#[test]
fn the_kernel_writes_where_the_components_lie() {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    if pattern.trim() != "core" {
        println!("skipped: core dumps go to {pattern:?}, not to the folder of the process");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let in_time = run(Command::new("sh")
        .args(["-c", "ulimit -c unlimited; exec sh -c 'kill -SEGV $$'"])
        .current_dir(folder.path()));
    assert!(in_time, "sh took more than a minute");
    let core = std::fs::read_dir(folder.path()).unwrap().next();
    let Some(Ok(core)) = core else {
        println!("skipped: the kernel wrote no core dump");
        return;
    };
    let bytes = std::fs::read(core.path()).unwrap();
    let snapshot = open_bytes(&bytes).unwrap();
    let Places::Layout(layout) = &snapshot.vcpus[0].places else {
        println!("skipped: this kernel does not write NT_X86_XSAVE_LAYOUT (Linux 6.12 does)");
        return;
    };
    // The processor's own answer, which is what the kernel had when it booted.
    let cpuid = std::arch::x86_64::__cpuid_count;
    for component in layout.components().skip(2) {
        let own = cpuid(0xd, u32::from(component.id().number()));
        assert_eq!(component.size(), own.eax as usize, "{}", component.id());
        assert_eq!(
            component.offset(),
            Some(own.ebx as usize),
            "{}",
            component.id()
        );
    }
}

/// A dump by Linux 6.18 on an AMD Zen 4, of which only the header and three notes were kept.
#[test]
fn a_dump_from_an_amd_has_amds_offsets() {
    let subject = common::subject(&common::fixture("process.core"));
    assert!(matches!(subject.owner, Owner::Thread(_)));
    let layout = &subject.layout.value;
    assert_eq!(layout.standard_size(), 2432);
    let offset = layout.component(ComponentId::HI16_ZMM).unwrap().offset();
    assert_eq!(offset, Some(1408));
    assert_eq!(subject.xcr0.value.bits(), 0xe7);
    assert!(subject.state().is_ok());
}
