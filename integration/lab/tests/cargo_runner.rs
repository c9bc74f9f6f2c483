//! The lab as cargo's runner: by one line of configuration, and by `amx-lab cargo`, where test binaries share labs.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;

use std::fs;
use std::process::Command;

use amx_lab::Kernel;
use common::{amx_lab, output, store, text};

/// A crate with two test binaries, each of which says how long its host has been up.
fn a_crate() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    write(
        "Cargo.toml",
        "[package]\nname = \"somebody\"\nedition = \"2024\"\n[workspace]\n",
    );
    let test = r#"
        #[test]
        fn in_the_lab() {
            let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
            assert!(cpu.contains("amx_tile") && std::fs::metadata("/dev/kvm").is_ok());
            assert_eq!(std::env::var("CARGO_PKG_NAME").unwrap(), "somebody");
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let up = std::fs::read_to_string("/proc/uptime").unwrap();
            println!("boot {} {}", boot.trim(), up.trim());
        }
        #[test]
        fn fails_if_asked_to() {
            let how = std::env::var_os("AMX_TEST_FAIL");
            while how.as_deref() == Some("hang".as_ref()) {
                std::thread::park();
            }
            assert!(how.is_none());
        }
    "#;
    write("src/lib.rs", test);
    write("tests/other.rs", test);
    folder
}

fn assert_passed(output: &std::process::Output) -> String {
    let printed = text(&output.stdout);
    assert!(output.status.success(), "{printed}{}", text(&output.stderr));
    let passed = printed
        .lines()
        .filter(|line| line.starts_with("test result: ok. 2 passed"))
        .count();
    assert_eq!(passed, 2, "{printed}");
    printed
}

#[test]
fn test_binaries_share_a_boot() {
    store(&[Kernel::Trixie]);
    let folder = a_crate();
    let mut command = amx_lab();
    command
        .args(["cargo", "--labs", "1", "test", "--", "--nocapture"])
        .current_dir(folder.path());
    let printed = assert_passed(&output(&mut command));
    let ups: Vec<f64> = printed
        .lines()
        .filter_map(|line| line.split("boot ").nth(1)?.split(' ').nth(1)?.parse().ok())
        .collect();
    // The second one's host went on where the first one's was; two that had been resumed would begin at the same time.
    assert_eq!(ups.len(), 2, "{printed}");
    assert!(ups[1] > ups[0], "{ups:?}");
    let failing = output(
        amx_lab()
            .args(["cargo", "test"])
            .env("AMX_TEST_FAIL", "1")
            .current_dir(folder.path()),
    );
    assert_eq!(failing.status.code(), Some(101));
    let hanging = output(
        amx_lab()
            .args(["cargo", "--timeout", "2", "test", "--lib"])
            .env("AMX_TEST_FAIL", "hang")
            .current_dir(folder.path()),
    );
    let message = text(&hanging.stderr);
    assert!(!hanging.status.success(), "{message}");
    assert!(
        message.contains("time is out: still running after 2.0 s"),
        "{message}"
    );
}

#[test]
fn a_path_with_a_space_is_no_obstacle() {
    store(&[Kernel::Trixie]);
    let folder = a_crate();
    // Beside the program, so that a second name is enough and nothing is copied.
    let elsewhere = tempfile::Builder::new()
        .prefix("amx lab ")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap();
    let program = elsewhere.path().join("amx lab");
    fs::hard_link(env!("CARGO_BIN_EXE_amx-lab"), &program).unwrap();
    let output = output(
        Command::new(program)
            .args(["cargo", "--labs", "1", "test", "--lib"])
            .env_remove("AMX_LAB_SESSION")
            .current_dir(folder.path()),
    );
    let (printed, said) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{printed}{said}");
    assert!(printed.contains("2 passed"), "{printed}");
}

#[test]
fn one_line_of_configuration_is_enough() {
    store(&[Kernel::Trixie]);
    let folder = a_crate();
    fs::create_dir(folder.path().join(".cargo")).unwrap();
    let line = format!(
        "target.x86_64-unknown-linux-gnu = {{ runner = \"{} run --\", rustflags = [\"-Ctarget-feature=+crt-static\"] }}\n",
        env!("CARGO_BIN_EXE_amx-lab")
    );
    fs::write(folder.path().join(".cargo/config.toml"), line).unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--target", "x86_64-unknown-linux-gnu"])
        .env_remove("AMX_LAB_SESSION")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .current_dir(folder.path());
    assert_passed(&output(&mut command));
}
