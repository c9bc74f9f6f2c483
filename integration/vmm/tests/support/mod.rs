//! What the tests share.

#![allow(
    dead_code,
    clippy::arithmetic_side_effects,
    reason = "no test program uses all of it; small numbers"
)]

pub(crate) mod lab;
pub(crate) mod midway;

use std::io::{ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use amx_guest::report::Wish;
use amx_guest::{Kind, Workload};
use amx_vmm::linux::devices::Devices;
use amx_vmm::linux::initramfs;
use amx_vmm::linux::log::{Log, Up};
use amx_vmm::snapshot::AtStop;
use amx_vmm::{Console, Ended, Host, HostError, Linux, Snapshot, Vm};
use lab::skip;
use xsave_state::XFeatures;

/// Where the lab's tests find what `amx-lab guest-kernel` has written.
pub(crate) const GUEST_KERNEL: &str = "/boot/guest";
/// Tells a test what to do in a process of its own.
pub(crate) const JOB: &str = "AMX_VMM_JOB";
/// No guest of these tests runs longer.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// The host, or `None` with a line that says what was skipped and why.
pub(crate) fn host() -> Option<Host> {
    match Host::probe() {
        Ok(host) => Some(host),
        Err(error @ (HostError::NoKvm { .. } | HostError::Permission { .. })) => {
            skip(&error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The host where its guests have AMX, or `None` with a line that says what was skipped and why.
pub(crate) fn amx_host() -> Option<Host> {
    let host = host()?;
    if !host.layout().user().contains(XFeatures::AMX) {
        skip(&"guests of this host have no AMX");
        return None;
    }
    Some(host)
}

/// `vcpus` tasks with different inputs.
pub(crate) fn workloads(kind: Kind, vcpus: u8, seed: u64, rounds: u64) -> Vec<Workload> {
    (0..u64::from(vcpus))
        .map(|vcpu| Workload::new(kind, seed * 1000 + vcpu, rounds))
        .collect()
}

/// Runs `vm` to the end and gives the wrong registers of each vCPU.
pub(crate) fn finish(vm: &mut Vm, workloads: &[Workload]) -> Vec<Vec<String>> {
    let console = Console::default();
    let ended = vm.run(&console, LONG).expect("the guest runs on");
    assert_eq!(ended, Ended::Halted, "the guest comes to its end");
    (0..)
        .zip(workloads)
        .map(|(index, workload)| {
            let area = vm.read_area(index).expect("the area is in guest memory");
            let differences = workload.check(&area);
            differences.into_iter().map(|d| d.register).collect()
        })
        .collect()
}

/// A guest of `kind` stopped in the middle, with its tasks.
pub(crate) fn stopped(host: &Host, kind: Kind, vcpus: u8, seed: u64) -> (Snapshot, Vec<Workload>) {
    let guest = midway::midway(host, &workloads(kind, vcpus, seed, kind.default_rounds()));
    (guest.snapshot, guest.workloads)
}

/// The host and a Linux guest for it, or `None` with a line that says what was skipped and why.
pub(crate) fn linux_guest() -> Option<(Host, Linux)> {
    let host = amx_host()?;
    let kernel = Path::new(GUEST_KERNEL).join(amx_lab::VMLINUX);
    if !kernel.is_file() {
        println!(
            "skipped: there is no kernel for guests at {}",
            kernel.display()
        );
        return None;
    }
    let module = std::fs::read(Path::new(GUEST_KERNEL).join(amx_lab::MSR_MODULE))
        .expect("the kernel came with its module");
    let mut linux = Linux::new(kernel);
    linux.initramfs = initramfs::with_init(&[(amx_lab::MSR_MODULE, &module)]);
    Some((host, linux))
}

/// How long a Linux guest runs between looks at what it has reported.
const SLICE: Duration = Duration::from_millis(20);
/// So many slices without the reports that are waited for, and the guest hangs.
const SLICES: u32 = 250;

/// Lets a Linux guest run until each of its processes has had `rounds` more rounds, all right.
pub(crate) fn let_work(vm: &mut Vm, devices: &Devices, rounds: u64) {
    let before = devices.log();
    run_until(vm, devices, |log| log.went_on(&before, rounds));
    assert_eq!(devices.switched(), None, "{}", devices.console());
}

/// Lets a Linux guest run until its init is up.
pub(crate) fn boot(vm: &mut Vm, devices: &Devices) -> Up {
    run_until(vm, devices, |log| log.up.is_some());
    devices.log().up.expect("it was waited for")
}

/// Asks a Linux guest to end, and gives all that it has reported: all right.
pub(crate) fn end(vm: &mut Vm, devices: &Devices, wish: Wish) -> Log {
    devices.wish(wish);
    run_until(vm, devices, |log| {
        log.finished && devices.switched().is_some()
    });
    let log = devices.log();
    for process in &log.processes {
        assert!(process.ended, "{log:#?}");
    }
    log
}

fn run_until(vm: &mut Vm, devices: &Devices, done: impl Fn(&Log) -> bool) {
    for _ in 0..SLICES {
        vm.run(devices, SLICE).expect("the guest runs");
        let log = devices.log();
        assert!(log.is_right(), "{log:#?}\n{}", devices.console());
        if done(&log) {
            return;
        }
    }
    panic!(
        "the guest hangs: {:#?}\n{}",
        devices.log(),
        devices.console()
    );
}

/// Runs the calling test again in a process of its own, which gets `job` and has to pass. `test` is
/// the test's name; in that process [`job`] gives the job. Gives what it has printed.
pub(crate) fn elsewhere(test: &str, job: &str) -> String {
    start_elsewhere(test, job).passes()
}

/// As [`elsewhere`], without waiting.
pub(crate) fn start_elsewhere(test: &str, job: &str) -> Elsewhere {
    let process = command(test, job)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this program can be started");
    Elsewhere {
        what: format!("{test}, {job}"),
        process,
    }
}

/// The command that runs `test` again with `job`.
pub(crate) fn command(test: &str, job: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("it has a path"));
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(JOB, job);
    command
}

/// A test in a process of its own.
pub(crate) struct Elsewhere {
    what: String,
    process: Child,
}

impl Elsewhere {
    /// The connection that it makes, unless it ends before.
    pub(crate) fn comes_to(&mut self, listener: &UnixListener) -> UnixStream {
        let process = &mut self.process;
        accept(listener, || {
            let ended = process.try_wait().expect("it can be asked")?;
            let mut said = String::new();
            if let Some(stderr) = &mut process.stderr {
                let _ = stderr.read_to_string(&mut said);
            }
            Some(format!("{ended}\n{said}"))
        })
    }

    /// Waits for its end; it has to pass.
    pub(crate) fn passes(self) -> String {
        let output = self.process.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{}: {text}", self.what);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{}: {}\n{}",
            self.what,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }
}

/// So long a connection is waited for.
const COMES: Duration = Duration::from_secs(60);
/// So long nobody looks whether it is there.
const LOOK: Duration = Duration::from_millis(5);

/// The connection that comes to `listener`.
///
/// # Panics
///
/// In time, where none comes; and before that, where `never` says why none will.
pub(crate) fn accept(
    listener: &UnixListener,
    mut never: impl FnMut() -> Option<String>,
) -> UnixStream {
    listener.set_nonblocking(true).expect("it is a socket");
    let deadline = Instant::now() + COMES;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).expect("it is a socket");
                return stream;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("nobody can come: {error}"),
        }
        if let Some(why) = never() {
            panic!("nobody will come: {why}");
        }
        assert!(Instant::now() < deadline, "nobody has come in {COMES:?}");
        thread::sleep(LOOK);
    }
}

/// What this process is to do, if it was started by [`elsewhere`].
pub(crate) fn job() -> Option<String> {
    std::env::var(JOB).ok()
}

/// Lets a Linux guest run until it is stopped with a program's tiles in a vCPU's registers, and gives its
/// state. Tiles that its kernel has saved already would not do: they may be lost, and nobody notices.
pub(crate) fn with_live_tiles(vm: &mut Vm, host: &Host, devices: &Devices) -> Snapshot {
    with_live(vm, host, devices, XFeatures::XTILEDATA)
}

/// The same with `components` in use on some vCPU.
pub(crate) fn with_live(
    vm: &mut Vm,
    host: &Host,
    devices: &Devices,
    components: XFeatures,
) -> Snapshot {
    for slice in 0..SLICES {
        // Not always at the same distance from the last stop.
        let time = Duration::from_micros(3000 + u64::from(slice * 1237 % 7000));
        vm.run(devices, time).expect("the guest runs");
        let vcpus = vm.at_stop(host).expect("it is captured");
        let live = |vcpu: &AtStop| {
            vcpu.user_mode && XFeatures::from_bits_retain(vcpu.in_use).contains(components)
        };
        if vcpus.iter().any(live) {
            return vm.capture_linux(host, devices).expect("it is captured");
        }
    }
    panic!("never {components} in use: {:#?}", devices.log());
}
