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

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use amx_lab::Kernel;
use common::{amx_lab, output, store, text};

/// The example, built static.
fn host_crash() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // A folder of its own: cargo holds the lock of the usual one while tests run under some tools.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("static");
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args([
                "build",
                "--quiet",
                "--package",
                "amx-lab",
                "--example",
                "host-crash",
                "--target",
                "x86_64-unknown-linux-gnu",
            ])
            .arg("--target-dir")
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_BUILD_TARGET")
            .status()
            .unwrap();
        assert!(status.success());
        target.join("x86_64-unknown-linux-gnu/debug/examples/host-crash")
    })
}

#[test]
fn the_naive_order_takes_the_host_down_and_is_reported() {
    store(&Kernel::ALL);
    for kernel in ["trixie", "sid", "bookworm"] {
        let output = output(
            amx_lab()
                .args(["run", "--timeout", "60", "--kernel", kernel, "--"])
                .arg(host_crash())
                .arg("naive"),
        );
        let report = text(&output.stderr);
        assert_eq!(
            text(&output.stdout),
            "live tiles run\nbefore the run\n",
            "{kernel}: {report}"
        );
        assert_eq!(output.status.code(), Some(120), "{kernel}: {report}");
        for part in [
            "unexpected #NM exception",
            "restore_fpregs_from_fpstate",
            "Kernel panic - not syncing",
        ] {
            assert!(report.contains(part), "{kernel}, {part}: {report}");
        }
    }
}

#[test]
fn the_same_state_by_way_of_the_crates_runs_on() {
    store(&Kernel::ALL);
    for kernel in ["trixie", "sid", "bookworm"] {
        let output = output(
            amx_lab()
                .args(["run", "--timeout", "60", "--kernel", kernel, "--"])
                .arg(host_crash())
                .arg("ours"),
        );
        assert_eq!(
            text(&output.stdout),
            "live tiles run\nbefore the run\nthe host survived\n",
            "{kernel}: {}",
            text(&output.stderr)
        );
        assert_eq!(output.status.code(), Some(0), "{kernel}");
    }
}

#[test]
fn the_program_refuses_to_run_here() {
    let output = output(Command::new(host_crash()).arg("naive").env("AMX_LAB", "1"));
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("it runs in the lab only"));
}
