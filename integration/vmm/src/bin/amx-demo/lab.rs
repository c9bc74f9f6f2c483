//! The same demo on a host that has AMX: this program runs itself in the AMX lab.

use std::io::{IsTerminal, stderr, stdout};
use std::path::Path;

use amx_lab::{
    Job, Lab, LabError, LabOptions, PrepareOptions, Show, Store, Streams, guest_kernel, prepare,
};
use anyhow::Context;

use crate::Options;
use crate::screen;

/// Set in the lab, by the lab.
const IN_LAB: &str = "AMX_LAB";
/// How many columns the terminal has to which the lab's standard error goes.
pub(crate) const COLUMNS: &str = "AMX_DEMO_COLUMNS";
/// Where the guests' kernel is in the lab.
pub(crate) const GUEST_KERNEL: &str = "/boot/guest";
/// Moves in the lab unless told otherwise: an emulated host takes longer for each.
pub(crate) const MOVES: u64 = 50;

/// Whether this process runs in the lab.
pub(crate) fn is_here() -> bool {
    std::env::var_os(IN_LAB).is_some()
}

/// Runs the demo in the lab, which is prepared first where it is not.
pub(crate) fn run(options: &Options) -> anyhow::Result<u8> {
    const INSTEAD: &str =
        "the AMX lab could not be used; cargo demo --here runs on this machine's KVM, without AMX";
    let program = std::env::current_exe().context("the path of this program")?;
    let mut job = Job::new(program)
        .context("this program must be static to run in the lab: start it with `cargo demo`")?
        .args(options.for_lab());
    for name in ["NO_COLOR", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            job = job.env(name, value);
        }
    }
    // In the lab neither output is a terminal; what they end up in may be one.
    if stdout().is_terminal() {
        job = job.env("CLICOLOR_FORCE", "1");
    }
    if stderr().is_terminal() && !options.json {
        let (_, columns) = console::Term::stderr().size();
        job = job.env(COLUMNS, columns.to_string());
    }

    let store = Store::open().context(INSTEAD)?;
    let lab_options = LabOptions::default();
    let show = Show::default();
    if let Err(LabError::Part(_)) = Lab::is_prepared(&store, &lab_options) {
        if !options.json {
            screen::preparing();
        }
        let wanted = PrepareOptions {
            kernels: vec![lab_options.kernel],
            memory_mib: lab_options.memory_mib,
            ..PrepareOptions::default()
        };
        prepare(&store, &wanted, &show).context(INSTEAD)?;
    }
    // The host's kernel is the guest's as well.
    let kernel = tempfile::Builder::new().prefix("amx-demo-").tempdir()?;
    guest_kernel(&store, lab_options.kernel, kernel.path()).context(INSTEAD)?;
    job = job.file(kernel.path(), Some(Path::new(GUEST_KERNEL)))?;
    let mut lab = Lab::start_watched(&store, &lab_options, &show, |_| {}).context(INSTEAD)?;
    drop(show);
    if !options.json {
        screen::in_lab(lab.kernel_release());
    }
    let ending = lab.run(&job, Streams::inherit(), None).context(INSTEAD)?;
    Ok(u8::try_from(ending.status() & 0xff).unwrap_or(u8::MAX))
}
