//! `amx-vmm` as an operator uses it: two processes and the orders to them.
//!
//! With a guest in the AMX lab, where the program has to be passed along; what needs no guest, anywhere.
//!
//! ```sh
//! cargo lab guest-kernel FOLDER
//! AMX_LAB_MEMORY=1024 AMX_LAB_FILES=FOLDER:/boot/guest,$PWD/target/x86_64-unknown-linux-gnu/debug/amx-vmm \
//!     cargo lab cargo test --package amx-vmm --test program
//! ```

#![allow(clippy::indexing_slicing)]

mod support;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use amx_vmm::migration::frame::{Hello, VERSION};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{self, Pid, Uid, pipe2};
use serde_json::Value;
use support::{accept, host, linux_guest};
use tempfile::TempDir;

/// Nothing here takes longer, also under emulation.
const PATIENCE: Duration = Duration::from_secs(300);
/// Another user.
const NOBODY: u32 = 65534;
/// A guest of which nothing is heard for so long does not work.
const STANDS_STILL: Duration = Duration::from_secs(30);

/// The program, or `None` with a line that says what was skipped and why.
fn program() -> Option<&'static Path> {
    let path = Path::new(env!("CARGO_BIN_EXE_amx-vmm"));
    if !path.is_file() {
        println!("skipped: {} is not passed along", path.display());
        return None;
    }
    Some(path)
}

/// Runs it to its end.
fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .expect("the program can be started")
}

fn events(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line} is no JSON"));
    text.lines().map(parse).collect()
}

/// A process of the program that runs beside the test.
struct Beside {
    process: Child,
    events: mpsc::Receiver<Value>,
    seen: Vec<Value>,
}

impl Beside {
    fn start(program: &Path, arguments: &[&str]) -> Self {
        let mut process = Command::new(program)
            .arg("--json")
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let stdout = process.stdout.take().expect("it is piped");
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let line = line.expect("it is text");
                let event = serde_json::from_str(&line).expect("each line is one JSON object");
                let _ = sender.send(event);
            }
        });
        Self {
            process,
            events,
            seen: Vec::new(),
        }
    }

    /// The next event of this name.
    fn event(&mut self, name: &str) -> Value {
        loop {
            let Ok(event) = self.events.recv_timeout(PATIENCE) else {
                panic!("no {name}: {:#?}", self.seen);
            };
            self.seen.push(event.clone());
            if event["event"] == name {
                return event;
            }
        }
    }

    fn state(&mut self, state: &str) {
        while self.event("state")["state"] != state {}
    }

    /// Its end, and all that it has said.
    fn ends(mut self) -> (Option<i32>, Vec<Value>) {
        // The channel ends with the process's output.
        while let Ok(event) = self.events.recv_timeout(PATIENCE) {
            self.seen.push(event);
        }
        let status = self.process.wait().expect("it ends");
        (status.code(), std::mem::take(&mut self.seen))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It has ended already, unless the test has failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events
        .iter()
        .filter(|event| event["event"] == name)
        .collect()
}

/// A folder for sockets and files, and paths in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        path.to_str().expect("it is text").to_owned()
    }
}

fn status(program: &Path, control: &str) -> Value {
    let output = run(program, &["status", "--control", control, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    events(&output).remove(0)
}

/// Waits until the guest is up and each process of it has been right, once more than `before`.
fn works(program: &Path, control: &str, before: &Value) -> Value {
    let start = Instant::now();
    loop {
        let now = status(program, control);
        assert_eq!(now["verdict"]["right"], true, "{now:#}");
        let processes = now["verdict"]["processes"].as_array().expect("a list");
        let before = before["verdict"]["processes"].as_array();
        let done = |number: usize, process: &Value| {
            let before = before.and_then(|before| before[number]["rounds_here"].as_u64());
            process["rounds_here"].as_u64() > before.or(Some(0)) || !process["lacks"].is_null()
        };
        let all = (0..)
            .zip(processes)
            .all(|(number, process)| done(number, process));
        if all {
            assert_eq!(now["state"], "running", "{now:#}");
            return now;
        }
        assert!(
            start.elapsed() < STANDS_STILL,
            "the guest stands still: {now:#}"
        );
    }
}

/// Kinds of messages: docs of `migration::frame`.
const COMMIT: u32 = 7;
const RUNNING: u32 = 8;
const NONSENSE: [u8; 16] = [0xff; 16];

/// Stands between source and destination. The source hears nonsense as the answer to Commit, which the
/// destination hears or does not.
fn between(at: &str, to: &str, hears_commit: bool) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(at).expect("the path is free");
    let destination = UnixStream::connect(to).expect("it waits");
    thread::spawn(move || {
        let mut source = accept(&listener, || None);
        let (back, mut answered) = (
            destination.try_clone().expect("a socket"),
            source.try_clone().expect("a socket"),
        );
        let answers = thread::spawn(move || {
            if pass(&back, &answered, RUNNING).is_some() {
                answered.write_all(&NONSENSE).expect("the source listens");
            }
        });
        let until = if hears_commit { u32::MAX } else { COMMIT };
        if pass(&source, &destination, until).is_some() {
            source.write_all(&NONSENSE).expect("the source listens");
            destination.shutdown(Shutdown::Both).expect("it is open");
        }
        answers.join().expect("it does not panic");
    })
}

/// Passes messages on, up to one of this kind or to the end.
fn pass(mut from: &UnixStream, mut to: &UnixStream, until: u32) -> Option<()> {
    from.set_read_timeout(Some(PATIENCE)).expect("it is not 0");
    loop {
        let mut header = [0; 16];
        from.read_exact(&mut header).ok()?;
        let [kind, _, bytes, _] = *header.as_chunks::<4>().0 else {
            panic!("it has four fields")
        };
        if u32::from_le_bytes(kind) == until {
            return Some(());
        }
        let mut content = vec![0; u32::from_le_bytes(bytes) as usize];
        from.read_exact(&mut content).ok()?;
        to.write_all(&[&header[..], &content].concat()).ok()?;
    }
}

/// Nobody can tell a source whose answer is nonsense who has the guest. It stands still there until the
/// operator, who looks at the destination, says so.
#[test]
fn a_guest_that_may_be_elsewhere_stands_still_until_the_operator_decides() {
    let Some((_, linux)) = linux_guest() else {
        return;
    };
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let [here, there] = ["here", "there"].map(|name| folder.path(name));
    let kernel = linux.kernel.to_str().expect("it is text");
    let mut source = Beside::start(program, &["run", "--kernel", kernel, "--control", &here]);
    source.state("running");
    works(program, &here, &Value::Null);

    let undecided = |socket: &str, hears_commit: bool, source: &mut Beside| {
        let between_them = format!("{socket}-between");
        let relay = between(&between_them, socket, hears_commit);
        let output = run(
            program,
            &[
                "send",
                &between_them,
                "--control",
                &here,
                "--json",
                "--max-downtime-ms",
                "300000",
                "--answer-s",
                "300",
            ],
        );
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        relay.join().expect("it does not panic");
        let told = events(&output);
        assert_eq!(named(&told, "undecided").len(), 1, "{told:#?}");
        assert_eq!(source.event("undecided"), *named(&told, "undecided")[0]);
    };

    // The destination has not heard of it, and ends. So the source may go on.
    let socket = folder.path("first");
    let mut never = Beside::start(program, &["receive", &socket]);
    never.state("waiting");
    undecided(&socket, false, &mut source);
    assert_eq!(never.ends().0, Some(3));
    let stands = status(program, &here);
    assert_eq!(stands["state"], "undecided");
    let output = run(program, &["send", &socket, "--control", &here, "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let reason = events(&output).remove(0)["reason"].to_string();
    assert!(
        reason.contains("amx-vmm resume") && reason.contains("amx-vmm stop"),
        "{reason}"
    );
    assert_eq!(status(program, &here), stands, "it does not run");
    let output = run(program, &["resume", "--control", &here, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    works(program, &here, &stands);

    // The destination has it. So the source lets go.
    let socket = folder.path("second");
    let mut destination = Beside::start(program, &["receive", &socket, "--control", &there]);
    destination.state("waiting");
    undecided(&socket, true, &mut source);
    destination.state("running");
    let output = run(program, &["stop", "--control", &here, "--json"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert_eq!(source.ends().0, Some(4));
    works(program, &there, &Value::Null);
    let output = run(program, &["stop", "--control", &there, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let (code, said) = destination.ends();
    assert_eq!(code, Some(0), "{said:#?}");
    let ended = named(&said, "ended")[0];
    assert_eq!(ended["verdict"]["right"], true, "{ended:#}");
}

/// A destination that has taken the connection and says nothing holds neither the guest nor the operator.
#[test]
fn a_move_answers_orders_and_is_cancelled() {
    let Some((_, linux)) = linux_guest() else {
        return;
    };
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let [here, socket] = ["here", "socket"].map(|name| folder.path(name));
    let kernel = linux.kernel.to_str().expect("it is text");
    let mut source = Beside::start(program, &["run", "--kernel", kernel, "--control", &here]);
    source.state("running");
    let before = works(program, &here, &Value::Null);
    let listener = UnixListener::bind(&socket).expect("the path is free");
    let order = |order: &str| run(program, &[order, "--control", &here, "--json"]);

    let send = ["send", &socket, "--control", &here, "--deadline-s", "300"];
    let mut sending = Beside::start(program, &send);
    let silent = accept(&listener, || None);
    sending.state("moving");
    assert_eq!(status(program, &here)["state"], "moving");
    let refused = order("resume");
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        events(&refused).remove(0)["reason"]
            .to_string()
            .contains("amx-vmm cancel")
    );
    let cancelled = order("cancel");
    assert_eq!(cancelled.status.code(), Some(0), "{cancelled:?}");
    let (code, said) = sending.ends();
    assert_eq!(code, Some(3), "{said:#?}");
    let reason = named(&said, "not_moved")[0]["reason"].to_string();
    assert!(reason.contains("cancelled"), "{reason}");
    drop(silent);
    works(program, &here, &before);
    assert_eq!(
        order("cancel").status.code(),
        Some(1),
        "there is nothing to cancel"
    );

    // To stop it is to cancel the move first.
    let mut sending = Beside::start(program, &send);
    let silent = accept(&listener, || None);
    sending.state("moving");
    let stopped = order("stop");
    assert_eq!(stopped.status.code(), Some(0), "{stopped:?}");
    assert_eq!(sending.ends().0, Some(3));
    drop(silent);
    let (code, said) = source.ends();
    assert_eq!(code, Some(0), "{said:#?}");
    assert_eq!(named(&said, "ended")[0]["how"], "off", "{said:#?}");
}

/// Nobody reads what the source says, and there is no room left for any of it.
#[test]
fn an_output_that_blocks_stops_no_guest() {
    let Some((_, linux)) = linux_guest() else {
        return;
    };
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let [here, there, socket] = ["here", "there", "socket"].map(|name| folder.path(name));
    let kernel = linux.kernel.to_str().expect("it is text");
    let (_unread, full) = full_pipe();
    let mut source = Command::new(program)
        .args(["run", "--kernel", kernel, "--control", &here, "--json"])
        .stdout(full)
        .spawn()
        .expect("the program can be started");
    let started = Instant::now();
    while !Path::new(&here).exists() {
        assert!(started.elapsed() < PATIENCE);
        thread::yield_now();
    }
    works(program, &here, &Value::Null);
    let mut destination = Beside::start(program, &["receive", &socket, "--control", &there]);
    destination.state("waiting");
    let sent = run(program, &["send", &socket, "--control", &here, "--json"]);
    assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    assert_eq!(source.wait().expect("it ends").code(), Some(0));
    destination.state("running");
    works(program, &there, &Value::Null);
    let output = run(program, &["stop", "--control", &there, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(destination.ends().0, Some(0));
}

/// Both ends of a pipe without room for another byte. Who writes to it waits.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = pipe2(OFlag::O_NONBLOCK).expect("a pipe");
    while unistd::write(&write, &[b'\n'; 512]).is_ok() {}
    while unistd::write(&write, b"\n").is_ok() {}
    fcntl(&write, FcntlArg::F_SETFL(OFlag::empty())).expect("it is ours");
    (read, write)
}

#[test]
fn a_guest_is_sent_saved_restored_and_stopped_by_hand() {
    let Some((_, linux)) = linux_guest() else {
        return;
    };
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let [here, there, later] = ["here", "there", "later"].map(|name| folder.path(name));
    let (socket, file) = (folder.path("socket"), folder.path("snapshot"));
    let kernel = linux.kernel.to_str().expect("it is text");

    let mut source = Beside::start(program, &["run", "--kernel", kernel, "--control", &here]);
    source.state("running");
    works(program, &here, &Value::Null);

    // Nobody is there, and somebody who is no destination: the guest stays, and both sides say why.
    let output = run(program, &["send", &socket, "--control", &here, "--json"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let reason = events(&output).remove(0)["reason"].clone();
    assert!(
        reason
            .as_str()
            .is_some_and(|reason| reason.contains("amx-vmm receive")),
        "{reason}"
    );
    let listener = UnixListener::bind(&socket).expect("the path is free");
    let stranger = thread::spawn(move || {
        let mut stream = accept(&listener, || None);
        stream.write_all(&[0xff; 64]).expect("it listens");
    });
    let output = run(program, &["send", &socket, "--control", &here, "--json"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    stranger.join().expect("it has written");
    let refused = events(&output);
    assert_eq!(named(&refused, "not_moved").len(), 1, "{refused:#?}");
    std::fs::remove_file(&socket).expect("it is ours");
    source.event("not_moved");
    assert_eq!(source.event("not_moved"), *named(&refused, "not_moved")[0]);
    source.state("running");

    let arguments = ["receive", &socket, "--control", &there];
    let mut destination = Beside::start(program, &arguments);
    destination.state("waiting");
    let output = run(
        program,
        &[
            "send",
            &socket,
            "--control",
            &here,
            "--json",
            "--downtime-ms",
            "1",
            "--max-rounds",
            "3",
            "--throttle-percent",
            "80",
            "--max-downtime-ms",
            "300000",
            "--answer-s",
            "300",
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    destination.state("running");
    let told = events(&output);
    let (code, said) = source.ends();
    assert_eq!(code, Some(0), "{said:#?}");
    // Who has given the order is told what the source itself says.
    assert!(said.ends_with(&told), "{said:#?}\n{told:#?}");
    let rounds = named(&told, "round");
    assert!((2..=4).contains(&rounds.len()), "{rounds:#?}");
    for (number, round) in rounds.iter().enumerate() {
        assert_eq!(round["round"], number);
        assert_eq!(round["stopped"], number + 1 == rounds.len());
        let bytes = round["pages"].as_u64().map(|pages| pages * 4096);
        assert_eq!(round["bytes"].as_u64(), bytes);
        assert!(round["bytes_per_second"].is_f64() && round["expected_downtime"].is_f64());
    }
    let within = named(&told, "pages");
    assert!(!within.is_empty(), "round 0 takes long enough: {told:#?}");
    assert!(
        within
            .iter()
            .all(|event| event["sent"].as_u64() <= event["of"].as_u64())
    );
    let report = named(&told, "handed_over")[0];
    assert!(
        report["downtime"].as_f64() < report["total"].as_f64(),
        "{report:#}"
    );
    assert!(report["vcpus"][0]["in_use"].is_u64(), "{report:#}");
    let came: u64 = rounds
        .iter()
        .filter_map(|round| round["pages"].as_u64())
        .sum();
    assert_eq!(named(&destination.seen, "taken_over")[0]["pages"], came);
    assert!(!Path::new(&socket).exists(), "it is taken away");

    // To a file, and from there to its end.
    let output = run(program, &["save", &file, "--control", &there, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(destination.ends().0, Some(0));
    let mut last = Beside::start(program, &["restore", &file, "--control", &later]);
    last.state("running");
    let output = run(program, &["stop", "--control", &later, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let (code, said) = last.ends();
    assert_eq!(code, Some(0), "{said:#?}");
    let ended = named(&said, "ended")[0];
    assert_eq!(ended["how"], "off");
    assert_eq!(ended["verdict"]["right"], true, "{ended:#}");
    assert_eq!(ended["verdict"]["finished"], true, "{ended:#}");
}

#[test]
fn who_sends_nonsense_is_refused_and_told_why() {
    if host().is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let socket = folder.path("socket");
    let mut destination = Beside::start(program, &["receive", &socket]);
    destination.state("waiting");
    let mut stream = UnixStream::connect(&socket).expect("it waits");
    stream.write_all(&[0xff; 64]).expect("it listens");
    let refused = destination.event("not_taken");
    assert!(refused["reason"].is_string(), "{refused}");
    assert_eq!(destination.ends().0, Some(3));
    assert!(!Path::new(&socket).exists());
}

/// Waits at a socket, with another one for orders. Sockets that the process has not made yet are waited for.
fn waits(program: &Path, folder: &Folder) -> (Child, [String; 2]) {
    let sockets = ["socket", "orders"].map(|name| folder.path(name));
    let mut process = Command::new(program)
        .args(["receive", &sockets[0], "--control", &sockets[1]])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let started = Instant::now();
    while !sockets.iter().all(|path| Path::new(path).exists()) {
        let ended = process.try_wait().expect("it is ours");
        assert!(ended.is_none() && started.elapsed() < PATIENCE, "{ended:?}");
        thread::yield_now();
    }
    (process, sockets)
}

/// Whoever has read what the program says may be gone. A guest that comes must not be lost for that.
#[test]
fn a_reader_that_is_gone_ends_nothing() {
    if host().is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let (mut process, [socket, _]) = waits(program, &folder);
    drop((process.stdout.take(), process.stderr.take()));
    let mut stream = UnixStream::connect(&socket).expect("it waits");
    stream.write_all(&[0xff; 64]).expect("it listens");
    let status = process.wait().expect("it ends");
    assert_eq!(
        status.code(),
        Some(3),
        "it has said twice what nobody reads"
    );
}

#[test]
fn the_first_ctrl_c_ends_the_waiting_and_takes_the_sockets_away() {
    if host().is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let (mut process, sockets) = waits(program, &folder);
    let id = i32::try_from(process.id()).expect("it is small");
    kill(Pid::from_raw(id), Signal::SIGINT).expect("it is ours");
    let status = process.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));
    for path in sockets {
        assert!(!Path::new(&path).exists(), "{path}");
    }
}

/// Whatever a source does, a signal ends the waiting for it: here it has said Hello, and nothing more.
#[test]
fn a_signal_ends_a_destination_whose_source_says_nothing() {
    if host().is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let socket = folder.path("socket");
    let mut destination = Beside::start(program, &["receive", &socket]);
    destination.state("waiting");
    let mut source = UnixStream::connect(&socket).expect("it waits");
    source.write_all(&hello(16 << 20)).expect("it listens");
    let mut header = [0; 16];
    source.read_exact(&mut header).expect("it offers something");
    let id = i32::try_from(destination.process.id()).expect("it is small");
    kill(Pid::from_raw(id), Signal::SIGTERM).expect("it is ours");
    let (code, said) = destination.ends();
    assert_eq!(code, Some(130), "{said:#?}");
    assert_eq!(named(&said, "not_taken").len(), 1, "{said:#?}");
}

/// The bytes of a Hello: docs of `migration::frame`.
fn hello(memory_bytes: u64) -> Vec<u8> {
    let content = postcard::to_allocvec(&Hello {
        version: VERSION,
        memory_bytes,
        has_platform: true,
    })
    .expect("it is a plain structure");
    let length = u32::try_from(content.len()).expect("it is short");
    let mut message: Vec<u8> = [1, 0, length]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    let checksum = crc32fast::hash(&[&message[..], &content].concat());
    message.extend(checksum.to_le_bytes());
    message.extend(content);
    message
}

#[test]
fn no_other_user_gives_orders() {
    if host().is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let (mut process, [socket, orders]) = waits(program, &folder);
    for path in [&socket, &orders] {
        let mode = std::fs::metadata(path).expect("it is there").mode();
        assert_eq!(mode & 0o777, 0o600, "{path}");
    }
    let as_another = || {
        let mut status = Command::new(program);
        status.args(["status", "--json", "--control", &orders]);
        status.uid(NOBODY).gid(NOBODY).output()
    };
    let end = |process: &mut Child| {
        let id = i32::try_from(process.id()).expect("it is small");
        kill(Pid::from_raw(id), Signal::SIGINT).expect("it is ours");
        process.wait().expect("it ends")
    };
    if !Uid::effective().is_root() {
        end(&mut process);
        println!("skipped: to be another user takes root");
        return;
    }
    // Even where somebody has opened the way to it.
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
    };
    open(folder.0.path(), 0o755);
    open(Path::new(&orders), 0o666);
    let refused = match as_another() {
        Ok(output) => output,
        Err(error) => {
            end(&mut process);
            println!("skipped: the program cannot be started by another user: {error}");
            return;
        }
    };
    let reason = events(&refused).remove(0)["reason"].to_string();
    assert!(reason.contains(&format!("user {NOBODY} ")), "{reason}");
    assert_eq!(refused.status.code(), Some(1));
    end(&mut process);
}

/// One line on standard error that says what to do, no colours, nothing else.
#[test]
fn errors_say_what_to_do() {
    let Some(program) = program() else { return };
    let folder = Folder::new();
    let nowhere = folder.path("nowhere");
    let has_kvm = host().is_some();
    for (arguments, says) in [
        (
            &["status", "--control", &nowhere][..],
            "amx-vmm run --control",
        ),
        (
            &["run", "--kernel", "k", "--kvm", &nowhere][..],
            "load the kvm_intel",
        ),
        (
            &["restore", &nowhere][..],
            if has_kvm { &nowhere } else { "/dev/kvm" },
        ),
    ] {
        let output = run(program, arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(
            text.starts_with("amx-vmm: ") && text.contains(says),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        let json = run(program, &[arguments, &["--json"]].concat());
        assert_eq!(named(&events(&json), "failed").len(), 1, "{json:?}");
        assert!(json.stderr.is_empty(), "{json:?}");
    }
}
