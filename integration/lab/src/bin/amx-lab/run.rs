//! run and shell.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use amx_lab::{
    Ending, Job, Lab, LabError, LabOptions, PrepareOptions, Progress, Show, Store, Streams,
    prepare, session,
};
use anyhow::{Result, bail};

use crate::cli::{GuestKernelArgs, LabArgs, RunArgs, ShellArgs};
use crate::codes;

/// How long the end of a lab whose time is out may take.
const GRACE: Duration = Duration::from_secs(5);

/// Variables that are passed on to programs: what test binaries of cargo are told, and what changes how programs print.
const PASSED: [&str; 9] = [
    "RUST_BACKTRACE",
    "RUST_LIB_BACKTRACE",
    "RUST_LOG",
    "RUST_LOG_STYLE",
    "NO_COLOR",
    "TERM",
    "LANG",
    "LC_ALL",
    "TZ",
];
/// Beginnings of the names of more.
const PASSED_FAMILIES: [&str; 8] = [
    "RUST_TEST_",
    "CARGO_PKG_",
    "CARGO_MANIFEST_",
    "CARGO_BIN_",
    "CARGO_CRATE_",
    "NEXTEST",
    "PROPTEST_",
    "AMX_TEST_",
];

pub(crate) fn run(args: &RunArgs) -> Result<u8> {
    let Some((program, arguments)) = args.program.split_first() else {
        bail!("no program was given")
    };
    let mut job = Job::new(program)?.args(arguments);
    for (name, value) in std::env::vars_os() {
        if is_passed(&name) {
            job = job.env(name, value);
        }
    }
    for pair in &args.env {
        let (name, value) = match split(pair, b'=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (pair.clone(), std::env::var_os(pair)),
        };
        if let Some(value) = value {
            job = job.env(name, value);
        }
    }
    job = with_files(job, &args.file)?;
    if let Some(folder) = &args.out {
        job = job.out(folder);
    }
    let mut lab = start(&args.lab, args.console)?;
    let mut streams = Streams::inherit();
    if args.stdin {
        streams = streams.stdin(std::io::stdin());
    }
    let limit = args.timeout.get();
    if let Some(limit) = limit {
        leave_after(limit);
    }
    Ok(status(lab.run(&job, streams, limit)?))
}

/// A lab whose time is out is ended, whatever happens to its output. We are still kept by a reader of it that does not read on, and leave
/// all the same.
fn leave_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit.saturating_add(GRACE));
        let (said, heard) = mpsc::channel();
        // Standard error may have the same reader.
        std::thread::spawn(move || {
            eprintln!(
                "amx-lab: time is out: after {:.1} s its output was not taken to its end",
                limit.as_secs_f64()
            );
            said.send(())
        });
        let _ = heard.recv_timeout(GRACE);
        std::process::exit(codes::TIMED_OUT.into());
    });
}

pub(crate) fn shell(args: &ShellArgs) -> Result<u8> {
    let show = Show::default();
    let store = Store::open()?;
    let busybox = amx_lab::busybox(&store, !args.lab.no_prepare, &show)?;
    drop(show);
    // Every command is a link to the one program, so the links come first.
    let inner = args
        .command
        .clone()
        .unwrap_or_else(|| OsString::from("exec sh -i"));
    let script = format!(
        "{0} mkdir -p /bin && {0} --install -s /bin && cd / && eval \"$0\"",
        busybox.display()
    );
    let job = Job::new(&busybox)?
        .arg("sh")
        .arg("-c")
        .arg(script)
        .arg(inner)
        .env("PS1", "lab# ")
        .env("TERM", "dumb");
    let job = with_files(job, &args.file)?;
    let mut lab = start(&args.lab, false)?;
    if args.command.is_none() {
        eprintln!(
            "amx-lab: Linux {} with AMX; leave with exit or Ctrl-D",
            lab.kernel_release()
        );
    }
    Ok(status(lab.run(
        &job,
        Streams::inherit().stdin(std::io::stdin()),
        None,
    )?))
}

pub(crate) fn guest_kernel(args: &GuestKernelArgs) -> Result<u8> {
    let options = args.lab.options();
    let show = Show::default();
    let store = Store::open()?;
    prepare_if_allowed(&store, &args.lab, &options, &show)?;
    match amx_lab::guest_kernel(&store, options.kernel, &args.folder) {
        Err(LabError::Part(_)) if !args.lab.no_prepare => {
            prepare_now(&store, &options, &show)?;
            amx_lab::guest_kernel(&store, options.kernel, &args.folder)?;
        }
        other => other?,
    }
    Ok(0)
}

fn with_files(mut job: Job, files: &[OsString]) -> Result<Job> {
    for file in files {
        job = match split(file, b':') {
            Some((host, guest)) => job.file(host, Some(Path::new(guest)))?,
            None => job.file(file, None)?,
        };
    }
    Ok(job)
}

/// Splits at the first such byte.
fn split(text: &OsStr, at: u8) -> Option<(&OsStr, &OsStr)> {
    let bytes = text.as_bytes();
    let position = bytes.iter().position(|byte| *byte == at)?;
    let (before, after) = bytes.split_at(position);
    Some((
        OsStr::from_bytes(before),
        OsStr::from_bytes(after.get(1..)?),
    ))
}

fn is_passed(name: &OsStr) -> bool {
    let name = name.as_bytes();
    PASSED.iter().any(|passed| passed.as_bytes() == name)
        || PASSED_FAMILIES
            .iter()
            .any(|family| name.starts_with(family.as_bytes()))
}

/// A lab of this kind: in the session that is running, or one of our own, which is prepared first if it must be.
fn start(args: &LabArgs, console: bool) -> Result<Lab> {
    let options = args.options();
    if let Some(lab) = std::env::var(session::VARIABLE)
        .ok()
        .and_then(|address| session::connect(&address, &options))
    {
        return Ok(lab?);
    }
    let show = Show::default();
    let store = Store::open()?;
    prepare_if_allowed(&store, args, &options, &show)?;
    let print = move |line: &str| {
        if console {
            eprintln!("console: {line}");
        }
    };
    Ok(Lab::start_watched(&store, &options, &show, print)?)
}

pub(crate) fn prepare_if_allowed(
    store: &Store,
    args: &LabArgs,
    options: &LabOptions,
    show: &dyn Progress,
) -> Result<()> {
    match Lab::is_prepared(store, options) {
        Ok(()) => return Ok(()),
        Err(LabError::Part(_)) if !args.no_prepare => {}
        Err(error) => return Err(error.into()),
    }
    prepare_now(store, options, show)
}

fn prepare_now(store: &Store, options: &LabOptions, show: &dyn Progress) -> Result<()> {
    let wanted = PrepareOptions {
        kernels: vec![options.kernel],
        cpu: options.cpu,
        cpus: options.cpus,
        memory_mib: options.memory_mib,
        cold: options.cold,
        mirror: std::env::var("AMX_LAB_MIRROR").ok(),
        without_patches: options.without_patches.clone(),
        ..PrepareOptions::default()
    };
    Ok(prepare(store, &wanted, show)?)
}

fn status(ending: Ending) -> u8 {
    // A status has eight bits wherever it is read.
    u8::try_from(ending.status() & 0xff).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_at_the_first_mark() {
        assert_eq!(
            split(OsStr::new("a=b=c"), b'='),
            Some((OsStr::new("a"), OsStr::new("b=c")))
        );
        assert_eq!(split(OsStr::new("a"), b'='), None);
    }

    #[test]
    fn secrets_stay_here() {
        assert!(
            is_passed(OsStr::new("CARGO_MANIFEST_DIR")) && is_passed(OsStr::new("RUST_BACKTRACE"))
        );
        assert!(!is_passed(OsStr::new("CARGO_REGISTRY_TOKEN")) && !is_passed(OsStr::new("HOME")));
    }
}
