//! Compiles the init of Linux guests, so that the library carries it: static, for the machine that the guest has, whatever this one is.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    for source in ["init", "src/report.rs"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    // Not cargo: a build script that waits for a second cargo would need its own lock file and registry.
    let status = Command::new(rustc)
        .args(["--edition", "2024"])
        .args(["--crate-name", "amx_guest_init", "--crate-type", "bin"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "opt-level=2", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-C", "target-feature=+crt-static"])
        .arg("init/main.rs")
        .arg("-o")
        .arg(Path::new(&out).join("amx-guest-init"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => {
            println!(
                "cargo::error=the guests' init did not compile: it needs the Rust target x86_64-unknown-linux-gnu \
                 (rustup target add x86_64-unknown-linux-gnu) and a C library to link with (on Debian: apt-get install gcc libc6-dev)"
            );
            exit(1);
        }
        Err(error) => {
            println!("cargo::error=rustc could not be started for the guests' init: {error}");
            exit(1);
        }
    }
}
