//! The destination has too little memory: its process may map only so much more than it has.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use amx_vmm::Console;
use amx_vmm::Host;
use amx_vmm::migration::{receive, send};
use nix::sys::resource::{Resource, setrlimit};

use crate::groups::Group;
use crate::process::{Process, say};
use crate::table::{self, Outcome, Row};
use crate::trial::{self, PATIENCE};

/// The guest has 2 MiB; the last of these is enough for all of it.
const STEP: u64 = 128 << 10;
const STEPS: u64 = 24;
const ENOUGH: u64 = 64 << 20;

pub(crate) fn run(host: &Host) -> Vec<Row> {
    let mut row = Row::new("too little memory at the destination");
    let step = if table::in_lab() { 4 } else { 1 };
    for bytes in (0..STEPS).step_by(step).map(|step| step * STEP) {
        row.add(moved_to(host, bytes));
    }
    assert_eq!(moved_to(host, ENOUGH), Outcome::Moved, "it is the memory");
    assert!(row.count(Outcome::Stays) > 0, "there is always enough");
    vec![row]
}

fn moved_to(host: &Host, bytes: u64) -> Outcome {
    let (here, there) = trial::pair();
    let destination = Process::start(Group::Memory, &bytes.to_string(), OwnedFd::from(there));
    let mut vm = trial::guest(host);
    let console = Console::default();
    let sent = send(
        &mut vm,
        host,
        (&console, None),
        here,
        &trial::options(),
        |_| {},
    );
    // It may have ended where an allocation failed.
    let said = destination.ends();
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    match (sent, said.as_slice()) {
        (Err(_), [] | ["refused"]) => {
            trial::assert_computes_on(host, vm);
            Outcome::Stays
        }
        (Ok(_), ["taken", "right"]) => Outcome::Moved,
        (Ok(_), _) => Outcome::Lost,
        (Err(_), ["taken", ..]) => Outcome::Double,
        (Err(error), other) => panic!("{error}: {other:?}"),
    }
}

/// The destination, in its own process.
pub(crate) fn work(host: &Host, job: &str) {
    let more: u64 = job.parse().expect("bytes");
    let stdin = std::io::stdin();
    let fd = std::os::fd::AsFd::as_fd(&stdin)
        .try_clone_to_owned()
        .expect("the connection");
    nix::unistd::dup2_stdin(fs::File::open("/dev/null").expect("it is there"))
        .expect("it can be closed");
    // What it computes the results with is not to fail.
    let workloads = trial::workloads(host);
    let kib: u64 = fs::read_to_string("/proc/self/status")
        .expect("/proc is there")
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmSize:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .expect("it has a size");
    let limit = kib * 1024 + more;
    setrlimit(Resource::RLIMIT_AS, limit, nix::libc::RLIM_INFINITY).expect("it is lowered");
    let received = receive(host, UnixStream::from(fd), PATIENCE);
    setrlimit(
        Resource::RLIMIT_AS,
        nix::libc::RLIM_INFINITY,
        nix::libc::RLIM_INFINITY,
    )
    .expect("it is raised");
    match received {
        Err(_) => say("refused"),
        Ok(received) => {
            say("taken");
            assert!(!workloads.is_empty());
            trial::assert_computes_on(host, received.vm);
            say("right");
        }
    }
}
