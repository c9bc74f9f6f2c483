//! What the tests share: the lab's store, a static program to run, and a time limit for everything.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use amx_lab::{Kernel, PrepareOptions, Quiet, Store, prepare};

/// No test takes longer; a lab that hangs is killed and the test fails.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The store of whoever runs the tests, with the kernels prepared. The first time on a machine this takes minutes.
pub fn store(kernels: &[Kernel]) -> Store {
    let store = Store::open().unwrap();
    let options = PrepareOptions {
        kernels: kernels.to_vec(),
        ..PrepareOptions::default()
    };
    prepare(&store, &options, &Quiet)
        .unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)));
    store
}

/// The program tests/guest/probe.rs, compiled static.
pub fn probe() -> &'static Path {
    static PROBE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROBE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("probe");
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/probe.rs");
        let status = Command::new(rustc)
            .args([
                "--edition",
                "2024",
                "--target",
                "x86_64-unknown-linux-gnu",
                "-C",
                "target-feature=+crt-static",
                "-o",
            ])
            .arg(&path)
            .arg(source)
            .status()
            .unwrap();
        assert!(status.success());
        (folder, path)
    });
    path
}

/// An example of this crate, built static: with this test, as `cargo tests` does it, or now.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().with_file_name("examples").join(name);
    if cfg!(target_feature = "crt-static") && is_of_these_sources(&program) {
        return program;
    }
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        // A folder of its own: cargo holds the lock of the usual one while tests run under some tools.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("static");
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args([
                "build",
                "--quiet",
                "--package",
                "amx-lab",
                "--examples",
                "--target",
                "x86_64-unknown-linux-gnu",
            ])
            .arg("--target-dir")
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_BUILD_TARGET")
            .status()
            .unwrap();
        assert!(status.success());
        target.join("x86_64-unknown-linux-gnu/debug/examples")
    });
    folder.join(name)
}

/// Whether a program was built after the last change of what cargo says that it was built from.
fn is_of_these_sources(program: &Path) -> bool {
    let changed = |file: &Path| file.metadata().and_then(|file| file.modified()).ok();
    let Ok(rule) = std::fs::read_to_string(program.with_extension("d")) else {
        return false;
    };
    let Some((_, sources)) = rule.split_once(": ") else {
        return false;
    };
    let built = changed(program);
    sources
        .split_whitespace()
        .all(|source| changed(Path::new(source)).is_some_and(|changed| Some(changed) <= built))
}

/// The command line tool.
pub fn amx_lab() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_amx-lab"));
    // Tests that run inside a session would share labs that they end.
    command
        .env_remove("AMX_LAB_SESSION")
        .env_remove("AMX_LAB_KERNEL")
        .env_remove("AMX_LAB_CPU")
        .env_remove("AMX_LAB_CPUS")
        .env_remove("AMX_LAB_MEMORY")
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end, which must come in time.
pub fn output(command: &mut Command) -> Output {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let watch = Watch::new(child.id());
    let output = child.wait_with_output().unwrap();
    watch.stop();
    output
}

/// Waits until this is so, or the test fails.
pub fn until(what: &str, so: impl FnMut() -> bool) {
    until_within(LIMIT, what, so);
}

/// The same, with another limit.
pub fn until_within(limit: Duration, what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !so() {
        assert!(Instant::now() < end, "in vain: {what}");
        // There is nothing to wait on: other processes end when they end.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Kills a process that is not done in time.
pub struct Watch(std::sync::mpsc::Sender<()>);

impl Watch {
    pub fn new(process: u32) -> Self {
        Self::within(process, LIMIT)
    }

    pub fn within(process: u32, limit: Duration) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                signal(process, "KILL");
            }
        });
        Self(sender)
    }

    pub fn stop(self) {
        let _ = self.0.send(());
    }
}

/// Sends a signal to one process.
pub fn signal(process: u32, name: &str) {
    let status = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(process.to_string())
        .status()
        .unwrap();
    assert!(status.success());
}

/// Processes that this one has started.
pub fn children(process: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let after_name = stat.rsplit(") ").next().unwrap();
        if after_name.split_whitespace().nth(1) == Some(process.to_string().as_str()) {
            found.push(id);
        }
    }
    found
}

/// Whether a process still runs; one that only waits to be reaped does not.
pub fn runs(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap().starts_with(['Z', 'X']))
}

/// The text of a stream.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Takes a child's first line.
pub fn first_line(child: &mut Child) -> String {
    use std::io::BufRead;
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    line
}
