//! How soon a program runs in the lab: from the start of `amx-lab run` to the program's first line. Fails where the limits are not met.
//!
//! Not a statistical benchmark: a boot takes seconds, and what counts is whether it is under the limit on a machine that does nothing else.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::Write;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use amx_lab::Kernel;
use common::{Watch, amx_lab, first_line, probe, store};

const COLD_LIMIT: Duration = Duration::from_secs(6);
const RESUMED_LIMIT: Duration = Duration::from_secs(1);
const FILES_LIMIT: Duration = Duration::from_secs(1);
const FILES_MB: usize = 60;

/// The shortest of a few times: others may use this machine as well.
fn best(rounds: usize, options: &[&str]) -> Duration {
    let once = || {
        let mut command = amx_lab();
        command
            .arg("run")
            .args(options)
            .arg("--")
            .arg(probe())
            .args(["echo", "here"]);
        let before = Instant::now();
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let watch = Watch::new(child.id());
        assert_eq!(first_line(&mut child), "here\n");
        let time = before.elapsed();
        child.wait().unwrap();
        watch.stop();
        time
    };
    (0..rounds).map(|_| once()).min().unwrap()
}

fn main() -> ExitCode {
    store(&Kernel::ALL);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let block: Vec<u8> = (0..1_000_000_u32)
        .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    for _ in 0..FILES_MB {
        file.write_all(&block).unwrap();
    }
    let path = file.path().to_str().unwrap().to_owned();
    let mut all_met = true;
    println!(
        "{:<10} {:>8} {:>8} {:>14}",
        "kernel", "cold", "resumed", "+60 MB in"
    );
    for kernel in Kernel::ALL {
        let name = kernel.to_string();
        let cold = best(3, &["--kernel", &name, "--cold"]);
        let resumed = best(5, &["--kernel", &name]);
        let with_files = best(3, &["--kernel", &name, "--file", &path]).saturating_sub(resumed);
        println!(
            "{name:<10} {:>7.2}s {:>7.2}s {:>13.2}s",
            cold.as_secs_f64(),
            resumed.as_secs_f64(),
            with_files.as_secs_f64()
        );
        all_met &= cold <= COLD_LIMIT && resumed <= RESUMED_LIMIT && with_files <= FILES_LIMIT;
    }
    println!(
        "limits     {:>7.2}s {:>7.2}s {:>13.2}s",
        COLD_LIMIT.as_secs_f64(),
        RESUMED_LIMIT.as_secs_f64(),
        FILES_LIMIT.as_secs_f64()
    );
    if all_met {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
