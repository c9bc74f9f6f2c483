//! The first process of the lab: brings the machine up, then runs one program after the other for the host program.
//!
//! It is compiled by build.rs, static and with nothing but the standard library, and becomes /init of the lab's initial file system.

mod channel;
#[path = "../src/cpio.rs"]
#[allow(dead_code, reason = "the host side uses the rest")]
mod cpio;
mod guest_job;
mod machine;
mod sys;
#[path = "../src/wire.rs"]
#[allow(dead_code, reason = "the host side uses the rest")]
mod wire;

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        // The channel never ends from this side: the emulator leaves when the host program closes it.
        Ok(never) => match never {},
        Err(error) => {
            // The end of the first process is a panic of the kernel, which the host program shows with this line.
            eprintln!("amx-lab: init failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<std::convert::Infallible> {
    machine::mount_all()?;
    machine::load_modules()?;
    machine::loopback_up()?;
    std::fs::write("/proc/sys/kernel/hostname", "amx-lab")?;
    let channel = channel::Channel::open()?;
    // Where a saved lab resumes: everything from here on is done anew in each run.
    channel.save_point();
    let release = std::fs::read("/proc/sys/kernel/osrelease")?;
    channel.send(wire::READY, release.trim_ascii())?;
    loop {
        guest_job::serve_one(&channel)?;
    }
}
