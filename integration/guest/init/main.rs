//! The first process of a Linux guest: starts the processes that use AMX, and carries what they say to the host.
//!
//! It is compiled by build.rs, static and with nothing but the standard library, and becomes /init of the guest's initial file system.

mod denied;
mod machine;
mod product;
#[path = "../src/report.rs"]
#[allow(dead_code, reason = "the host side uses the rest")]
mod report;
mod sys;
mod tiles;
mod vectors;
mod worker;
mod xfd;

use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter};
use std::process::ExitCode;

use report::{Event, LOADS, Load, REPORT_PORT, Report, Wish};

fn main() -> ExitCode {
    match run() {
        Ok(never) => match never {},
        Err(error) => {
            // The end of the first process is a panic of the kernel, which the host sees on the serial port with this line.
            eprintln!("guest: init failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<std::convert::Infallible> {
    machine::mount_all()?;
    let processors = machine::processors()?;
    sys::permit_port(REPORT_PORT)?;
    tell(&Report::Up {
        processors,
        kernel: machine::kernel()?,
        amx: machine::amx_flags()?,
    });
    let (from_workers, to_init) = io::pipe()?;
    let mut children = Vec::new();
    for (process, load) in (0..).zip(LOADS) {
        let child = sys::fork()?;
        if child == 0 {
            work(process, load, processors, to_init)
        }
        children.push(child);
    }
    // The pipe ends when the last of them has ended.
    drop(to_init);
    let wish = carry(from_workers, &children)?;
    for (process, child) in (0..).zip(children) {
        let status = sys::wait_for(child)?;
        if status != 0 {
            let event = Event::Died(status);
            tell(&Report::Process { process, event });
        }
    }
    tell(&Report::Finished);
    machine::end(wish)
}

/// Carries lines to the host until no process is left, and tells the processes when the host wants the end.
fn carry(from_workers: PipeReader, children: &[i32]) -> io::Result<Wish> {
    let mut wish = Wish::GoOn;
    for line in BufReader::new(from_workers).lines() {
        send(&line?);
        if wish == Wish::GoOn {
            wish = sys::read_wish(REPORT_PORT);
            if wish != Wish::GoOn {
                for child in children {
                    // Some may have ended already.
                    let _ = sys::terminate(*child);
                }
            }
        }
    }
    Ok(wish)
}

fn tell(report: &Report) {
    send(&report.to_string());
}

fn send(line: &str) {
    sys::write_port(REPORT_PORT, format!("{line}\n").as_bytes());
}

/// The life of one process.
fn work(process: u8, load: Load, processors: u32, to_init: PipeWriter) -> ! {
    let mut voice = worker::Voice::new(process, to_init);
    let result = worker::work(load, process, processors, &mut voice);
    let status = match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("guest: process {process}: {error}");
            1
        }
    };
    sys::exit(status)
}
