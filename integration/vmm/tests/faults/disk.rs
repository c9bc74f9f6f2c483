//! The disk is full while a snapshot is written: really, and at every system call of it.

use std::fs;
use std::path::Path;

use amx_vmm::{Console, Ended, Host, Snapshot, Vm, file};
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::groups::Group;
use crate::inject::{self, mark, watched};
use crate::process::say;
use crate::table::{self, Outcome, Row};
use crate::trial;

const ERRORS: [Errno; 4] = [Errno::ENOSPC, Errno::EDQUOT, Errno::EIO, Errno::EINTR];

pub(crate) fn run(host: &Host) -> Vec<Row> {
    let mut rows = vec![each_call_fails()];
    rows.extend(full(host));
    rows
}

/// The calls that make a file, by their numbers.
fn name(number: libc::c_long) -> Option<&'static str> {
    Some(match number {
        libc::SYS_openat => "openat",
        libc::SYS_write => "write",
        libc::SYS_fsync => "fsync",
        libc::SYS_rename => "rename",
        libc::SYS_renameat => "renameat",
        libc::SYS_renameat2 => "renameat2",
        libc::SYS_ftruncate => "ftruncate",
        _ => return None,
    })
}

fn each_call_fails() -> Row {
    let mut calls = Vec::new();
    inject::run(Group::Disk, "1", 1, |call| {
        calls.extend(name(call.number));
        None
    });
    println!("calls of a snapshot: {calls:?}");
    assert!(
        calls.contains(&"write") && calls.contains(&"fsync"),
        "{calls:?}"
    );
    let mut row = Row::new("a system call of writing a snapshot fails");
    let faults: Vec<(usize, Errno)> = (0..calls.len())
        .flat_map(|at| ERRORS.map(|error| (at, error)))
        .collect();
    let (mut operation, mut seen, mut failed) = (usize::MAX, 0, 0);
    let said = inject::run(
        Group::Disk,
        &faults.len().to_string(),
        faults.len(),
        |call| {
            if call.operation != operation {
                (operation, seen) = (call.operation, 0);
            }
            name(call.number)?;
            let (at, error) = faults[operation];
            seen += 1;
            (seen == at + 1).then(|| {
                failed += 1;
                error
            })
        },
    );
    assert_eq!((failed, said.len()), (faults.len(), faults.len()));
    for said in said {
        println!("  {said}");
        row.add(Outcome::Stays);
    }
    row
}

/// Writes snapshots over an old one; the calls of that are marked.
pub(crate) fn work(host: &Host, job: &str) {
    let times: usize = job.parse().expect("a number");
    let folder = tempfile::tempdir().expect("a folder");
    trial::assert_computes_on(host, trial::guest(host));
    watched();
    for _ in 0..times {
        say(written(host, folder.path(), true));
    }
}

/// A guest is stopped and saved over an older file. Where that fails, the old file is whole, or the
/// new one has its name; there is no third; and the guest goes on.
fn written(host: &Host, folder: &Path, is_watched: bool) -> String {
    let path = folder.join("snapshot");
    let mut vm = trial::guest(host);
    let old = vm.capture(host).expect("it is captured").to_bytes();
    // Beside what limits the disk, it is there already.
    fs::write(&path, &old).expect("there is room for it");
    let ended = vm
        .run(&Console::default(), std::time::Duration::from_millis(1))
        .expect("it runs");
    assert_eq!(ended, Ended::Stopped);
    let new = vm.capture(host).expect("it is captured").to_bytes();
    if is_watched {
        mark();
    }
    let result = file::write(&path, &new);
    if is_watched {
        mark();
    }
    let found = fs::read(&path).expect("there is one");
    let names = fs::read_dir(folder).expect("it is there").count();
    assert_eq!(names, 1, "no temporary file is left: {result:?}");
    assert!(
        found == new || result.is_err() && found == old,
        "a whole file: {result:?}"
    );
    let snapshot = Snapshot::from_bytes(&found).expect("it is one");
    trial::assert_computes_on(
        host,
        Vm::restore(host, &snapshot).expect("it goes on from there"),
    );
    trial::assert_computes_on(host, vm);
    match result {
        Ok(()) => "written all the same".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// A file system with room for the old snapshot and so many pages of the new one.
fn full(host: &Host) -> Option<Row> {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = trial::guest(host)
        .capture(host)
        .expect("it is captured")
        .to_bytes()
        .len();
    let pages = bytes.div_ceil(4096);
    let mut row = Row::new("a full file system, after each page of a snapshot");
    let step = if table::in_lab() { 4 } else { 1 };
    for left in (0..pages).step_by(step) {
        let size = format!("size={}", (pages + left) * 4096);
        let mounted = mount(
            Some("none"),
            folder.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        );
        if let Err(error) = mounted {
            println!("no file system of its own: {error}");
            return None;
        }
        let mounted = Mounted(folder.path());
        let said = written(host, mounted.0, false);
        assert!(
            said.contains("No space left") || said.contains("os error 28"),
            "{left} pages: {said}"
        );
        row.add(Outcome::Stays);
    }
    Some(row)
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}
