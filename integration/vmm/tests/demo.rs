//! The demo as a user starts it.

#![allow(clippy::indexing_slicing)]

mod support;

use std::process::{Command, Output};

use serde_json::Value;
use support::host;

/// On this machine's KVM, whatever it has: `cargo demo` in the AMX lab is a step of CI.
fn demo(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_amx-demo"))
        .arg("--here")
        .args(arguments)
        .output()
        .expect("the program can be started")
}

#[test]
fn without_kvm_it_says_what_to_do_in_one_sentence() {
    let output = demo(&["--kvm", "/nonexistent/kvm"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        text,
        "amx-demo: there is no /nonexistent/kvm: load the kvm_intel or kvm_amd module, or run \
         this where virtualization is enabled\n"
    );
    assert_eq!(output.stdout, b"");
}

#[test]
fn what_is_not_kvm_is_not_used() {
    let output = demo(&["--kvm", "/dev/null"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("/dev/null"), "{text}");
}

#[test]
fn guests_move_and_the_control_is_seen() {
    if host().is_none() {
        return;
    }
    let output = demo(&["--moves", "8", "--seed", "5", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(report["good"], true, "{text}");
    assert_eq!(report["moves"], 8);
    assert_eq!(report["lost"], 0);
    assert_eq!(report["seed"], 5);
    assert_eq!(report["control_detected"], true);
    let controls = report["control"].as_array().expect("an array");
    assert!(controls.len() > 4, "{controls:?}");
    // Without its kernel there is none, and that is said.
    assert!(report["linux"].is_null() && report["linux_lacks"].is_string());
    assert_eq!(output.stderr, b"");
}

#[test]
fn without_a_terminal_there_are_no_colours_and_no_progress_bar() {
    if host().is_none() {
        return;
    }
    let output = demo(&["--moves", "2"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!text.contains('\x1b'), "{text}");
    assert!(text.contains("2 moves, 0 lost, control detected"), "{text}");
    let linux: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("Linux guest"))
        .collect();
    assert_eq!(
        linux.len(),
        1,
        "it says in one line why there is none: {linux:?}"
    );
    assert_eq!(output.stderr, b"");
}

/// Who asks for the Linux guest is not told that all was well without it.
#[test]
fn a_linux_guest_that_was_asked_for_has_to_be_there() {
    if host().is_none() {
        return;
    }
    let kernel = "/nonexistent/vmlinux";
    let output = demo(&["--moves", "2", "--guest-kernel", kernel, "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(
        (&report["good"], &report["lost"]),
        (&false.into(), &0.into())
    );
    let lacks = report["linux_lacks"].is_string();
    assert!(lacks || report["linux"]["trouble"].is_string(), "{text}");
}
