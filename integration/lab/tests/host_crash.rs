//! The order of KVM calls that takes a host down, on every kernel of the lab; and the same state by way of the crates, which does not.
//!
//! Seen in emulation only. See SECURITY.md.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;

use std::process::Command;

use amx_lab::Kernel;
use common::{amx_lab, example, output, store, text};

/// What runs in the lab, and what it ends with. The guest's write of IA32_XFD, trapped and performed by
/// the VMM, is the same as the VMM's own.
fn run(kernel: &str, how: &str) -> std::process::Output {
    output(
        amx_lab()
            .args(["run", "--timeout", "60", "--kernel", kernel, "--"])
            .arg(example("host-crash"))
            .arg(how),
    )
}

fn on_each_kernel(how: [&str; 2], check: impl Fn(&str, std::process::Output)) {
    store(&Kernel::ALL);
    for kernel in ["trixie", "sid", "bookworm"] {
        for how in how {
            check(&format!("{kernel}, {how}"), run(kernel, how));
        }
    }
}

#[test]
fn the_naive_order_takes_the_host_down_and_is_reported() {
    on_each_kernel(["naive", "trapped-naive"], |context, output| {
        let report = text(&output.stderr);
        assert_eq!(
            text(&output.stdout),
            "live tiles run\nbefore the run\n",
            "{context}: {report}"
        );
        assert_eq!(output.status.code(), Some(120), "{context}: {report}");
        for part in [
            "unexpected #NM exception",
            "restore_fpregs_from_fpstate",
            "Kernel panic - not syncing",
        ] {
            assert!(report.contains(part), "{context}, {part}: {report}");
        }
    });
}

#[test]
fn the_same_state_by_way_of_the_crates_runs_on() {
    on_each_kernel(["ours", "trapped-ours"], |context, output| {
        assert_eq!(
            text(&output.stdout),
            "live tiles run\nbefore the run\nthe host survived\n",
            "{context}: {}",
            text(&output.stderr)
        );
        assert_eq!(output.status.code(), Some(0), "{context}");
    });
}

#[test]
fn the_program_refuses_to_run_here() {
    let output = output(
        Command::new(example("host-crash"))
            .arg("naive")
            .env("AMX_LAB", "1"),
    );
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("it runs in the lab only"));
}
