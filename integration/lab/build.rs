//! Compiles the lab's init, so that the library carries it: static, for the machine that is emulated, whatever this one is.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    for source in ["init", "src/cpio.rs", "src/wire.rs", "patches", "boot"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    // Not cargo: a build script that waits for a second cargo would need its own lock file and registry.
    let status = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "amx_lab_init",
            "--crate-type",
            "bin",
            "--target",
            "x86_64-unknown-linux-gnu",
        ])
        .args([
            "-C",
            "opt-level=s",
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
            "-C",
            "target-feature=+crt-static",
        ])
        .arg("init/main.rs")
        .arg("-o")
        .arg(Path::new(&out).join("amx-lab-init"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => {
            println!(
                "cargo::error=the lab's init did not compile: it needs the Rust target x86_64-unknown-linux-gnu \
                 (rustup target add x86_64-unknown-linux-gnu) and a C library to link with (on Debian: apt-get install gcc libc6-dev)"
            );
            exit(1);
        }
        Err(error) => {
            println!("cargo::error=rustc could not be started for the lab's init: {error}");
            exit(1);
        }
    }
}
