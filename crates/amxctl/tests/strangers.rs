//! Files that nobody meant for this tool: nothing is taken for what it is not, and nothing is guessed
//! that decides.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::process::{Command, Output};

use amxctl::open::open_bytes;
use amxctl::rules::{Rule, Verdict, check};
use amxctl::vcpu::Doubt;
use amxctl::{Given, Subject};
use common::{fixture, fixtures};
use cpuid_amx::Table;
use xsave_state::XFeatures;

fn amxctl(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_amxctl"))
        .current_dir(fixtures())
        .args(arguments)
        .output()
        .unwrap()
}

fn raw(bytes: &[u8], cpuid: Option<&str>) -> Subject {
    let cpuid = cpuid.map(|name| {
        let text = String::from_utf8(fixture(name)).unwrap();
        (text.parse::<Table>().unwrap().into(), "--cpuid".to_owned())
    });
    let given = Given {
        cpuid,
        ..Given::default()
    };
    open_bytes(bytes).unwrap().vcpus.remove(0).subject(&given)
}

fn broken(subject: &Subject) -> Vec<Rule> {
    let findings = check(subject).into_iter();
    let broken = findings.filter(|finding| finding.verdict == Verdict::Broken);
    broken.map(|finding| finding.rule).collect()
}

#[test]
fn nothing_is_taken_for_an_area_that_is_none() {
    for len in [576, 2696, 4096, 5000, 11_008, 65_536] {
        for byte in [0, b' ', b'a', 0x7e, 0xff] {
            let error = open_bytes(&vec![byte; len]).unwrap_err().to_string();
            assert!(
                error.starts_with("unknown format"),
                "{len} of {byte}: {error}"
            );
        }
    }
}

#[test]
fn every_generation_of_firecracker_s_vmstate_is_named() {
    for magic in [
        0x0710_1984_8664_0000u64,
        0x0710_1984_8664_0001,
        0x0710_1984_8664_0002,
        0x0710_1984_aaaa_0000,
    ] {
        for before in [&[][..], &[0]] {
            for len in [64, 4096, 30_000] {
                let mut file = [before, &magic.to_le_bytes()].concat();
                file.resize(len, 0x11);
                let error = open_bytes(&file).unwrap_err().to_string();
                assert!(
                    error.contains("a Firecracker vmstate"),
                    "{magic:#x}: {error}"
                );
            }
        }
    }
}

#[test]
fn an_area_that_was_cut_is_not_guessed() {
    for name in ["intel-cut-2688", "intel-cut-2688-pkru-initial"] {
        let area = fixture(&format!("strangers/{name}.xsave"));
        let unknown = raw(&area, None);
        assert_eq!(broken(&unknown), []);
        let doubt = unknown.doubt.unwrap();
        assert!(matches!(doubt, Doubt::NoneFits(_)));
        let doubt = doubt.to_string();
        assert!(doubt.contains("2688 bytes"), "{doubt}");
        assert!(doubt.contains("--cpuid"), "{doubt}");
        // The guest's CPUID says how long it has to be, and what is in use is there.
        let known = raw(&area, Some("icelake.cpuid"));
        assert_eq!(broken(&known), [Rule::Length]);
    }
    // Nothing is said to be restorable, and nothing to be broken.
    let file = "strangers/intel-cut-2688.xsave";
    for arguments in [
        &["verify", file, "--on", "node-17.json"][..],
        &["compat", file, "node-17.json"],
    ] {
        let judged = amxctl(arguments);
        assert_eq!(judged.status.code(), Some(4), "{judged:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("whole.xsave2");
    let cut = "strangers/intel-cut-2688-pkru-initial.xsave";
    let convert = |more: &[&str]| {
        let to = [
            "convert",
            cut,
            "--to",
            "raw",
            "-o",
            output.to_str().unwrap(),
        ];
        amxctl(&[&to[..], more].concat())
    };
    assert!(!convert(&[]).status.success());
    assert!(!output.exists());
    let converted = convert(&["--cpuid", "icelake.cpuid"]);
    let text = String::from_utf8_lossy(&converted.stdout).into_owned();
    assert!(converted.status.success(), "{converted:?}");
    assert!(text.contains("length: 2688 bytes, now 2696"), "{text}");
    let (before, after) = (fixture(cut), std::fs::read(output).unwrap());
    assert_eq!(after[576..2688], before[576..]);
}

#[test]
fn a_guest_may_have_fewer_components_than_its_host() {
    let area = fixture("strangers/noamx-on-amx-host.xsave");
    // PKRU is in use, and two layouts have it at two places.
    let guessed = raw(&area, None);
    assert_eq!(broken(&guessed), []);
    assert!(matches!(guessed.doubt, Some(Doubt::Other(_))));
    let file = "strangers/noamx-on-amx-host.xsave";
    for arguments in [
        &["verify", file, "--on", "node-17.json"][..],
        &["compat", file, "node-17.json"],
    ] {
        let judged = amxctl(arguments);
        assert_eq!(judged.status.code(), Some(4), "{judged:?}");
    }
    let known = raw(&area, Some("icelake.cpuid"));
    assert_eq!(broken(&known), []);
    assert!(known.state().is_ok());
}

#[test]
fn a_compacted_area_is_shown_by_its_own_places() {
    let area = fixture("strangers/compacted.xsave");
    let subject = raw(&area, None);
    assert!(subject.is_compacted());
    assert_eq!(broken(&subject), [Rule::Format]);
    let placed = XFeatures::from_bits_retain(0x602e7);
    let mut seen = 0;
    for (component, range) in subject.layout.value.compacted(placed) {
        if subject.xstate_bv().contains(component.id().bit()) {
            assert_eq!(
                subject.component(component.id()),
                &area[range],
                "{component:?}"
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 5);
}
