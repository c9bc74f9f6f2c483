//! One running emulator: its process, the channel's host side, and its console.

use std::fs::File;
use std::io::{self, PipeWriter, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};

use crate::boot_image::CONFIGURATION;
use crate::console::{self, News};
use crate::emulator::PROGRAM;
use crate::tools::last_lines;
use crate::wire;

/// Descriptors in the emulator: fixed in patches/15-amxlab-channel.patch, the last one in the emulator's configuration.
const TO_LAB: i32 = 3;
const FROM_LAB: i32 = 4;
const LIFE: i32 = 5;
const CONSOLE: i32 = 6;

/// Exit code that boot/bios.S asks for when the machine starts a second time.
const WAS_RESET: i32 = 3;

/// Where the emulator saves its state, inside the lab's folder.
pub(crate) const STATE: &str = "state";
const SAVE_VARIABLE: &str = "AMXLAB_SAVE";

/// How a machine is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Boot.
    Cold,
    /// Boot, save the state when the kernel is up, and end.
    Save,
    /// Go on from the saved state.
    Resume,
}

/// Something that comes from the machine.
#[derive(Debug)]
pub(crate) enum Event {
    /// A frame of the lab's init.
    Frame(u32, Vec<u8>),
    /// The kernel has begun to report a crash.
    CrashBegins,
    /// The kernel crashed: its report.
    Crash(String),
    /// The emulator has ended: how.
    Gone(String),
    /// A job could not be sent to its end, so the lab waits for the rest of it in vain.
    SendFailed(io::Error),
}

/// A running emulator. Ends when this is dropped, and, through the kernel, when this process ends in any way.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Arc<Mutex<Child>>,
    to_lab: PipeWriter,
    events: Receiver<Event>,
    reporter: mpsc::Sender<Event>,
    /// The emulator is sent SIGIO when no one holds this any more.
    _life: PipeWriter,
}

impl Machine {
    /// Starts the emulator in `folder`. Console lines go to `on_console` as they come.
    pub(crate) fn start(
        emulator: &Path,
        folder: &Path,
        start: Start,
        on_console: impl FnMut(&str) + Send + 'static,
    ) -> io::Result<Self> {
        let (job_reader, to_lab) = io::pipe()?;
        let (from_lab, frame_writer) = io::pipe()?;
        let (life_reader, life) = io::pipe()?;
        let (console_reader, console_writer) = io::pipe()?;
        // Large transfers wait less often. An administrator's limit on pipes is no reason to fail.
        let _ = rustix::pipe::fcntl_setpipe_size(&to_lab, wire::WINDOW_HALF);
        let mut log = tempfile::tempfile()?;
        let mut command = Command::new(emulator.join(PROGRAM));
        command
            .arg("-q")
            .current_dir(folder)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
        // Ctrl-C is for us; we take the emulator with us.
        command.process_group(0);
        match start {
            Start::Cold => command.args(["-f", CONFIGURATION]),
            Start::Save => command
                .args(["-f", CONFIGURATION])
                .env(SAVE_VARIABLE, STATE),
            Start::Resume => command.args(["-r", STATE]),
        };
        let mapping = |parent: OwnedFd, child| FdMapping {
            parent_fd: parent,
            child_fd: child,
        };
        command
            .fd_mappings(vec![
                mapping(job_reader.into(), TO_LAB),
                mapping(frame_writer.into(), FROM_LAB),
                mapping(life_reader.into(), LIFE),
                mapping(console_writer.into(), CONSOLE),
            ])
            .map_err(io::Error::other)?;
        let process = Arc::new(Mutex::new(command.spawn()?));
        // The command holds our copies of the emulator's ends; while they are open, no pipe ever ends.
        drop(command);
        let (sender, events) = mpsc::channel();
        let (crash_sender, reporter) = (sender.clone(), sender.clone());
        let console = std::thread::spawn(move || {
            let tell = |news| {
                // Nobody listens any more only when the machine is being dropped.
                let _ = crash_sender.send(match news {
                    News::CrashBegins => Event::CrashBegins,
                    News::Crash(report) => Event::Crash(report),
                });
            };
            console::watch(console_reader, on_console, tell);
        });
        let waited_for = Arc::clone(&process);
        std::thread::spawn(move || {
            let mut frames = io::BufReader::with_capacity(64 << 10, from_lab);
            let broken = loop {
                match wire::read_frame(&mut frames) {
                    Ok(Some((kind, payload))) => {
                        if sender.send(Event::Frame(kind, payload)).is_err() {
                            return;
                        }
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            };
            // The console's last words come first. Its thread cannot panic on any input; if it did, there are none.
            let _ = console.join();
            let status = waited_for
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .wait();
            let how = match (broken, status) {
                (Some(error), _) => format!("the channel broke: {error}"),
                (None, Ok(status)) if status.code() == Some(WAS_RESET) => {
                    "the lab's kernel has reset the machine".to_owned()
                }
                (None, Ok(status)) => format!("the emulator ended ({})", describe(status)),
                (None, Err(error)) => format!("the emulator ended: {error}"),
            };
            let _ = sender.send(Event::Gone(with_log(how, &mut log)));
        });
        Ok(Self {
            process,
            to_lab,
            events,
            reporter,
            _life: life,
        })
    }

    /// Another handle of the way into the lab.
    pub(crate) fn writer(&self) -> io::Result<PipeWriter> {
        self.to_lab.try_clone()
    }

    /// What comes next, if it comes by then.
    pub(crate) fn next(&self, until: Option<Instant>) -> Option<Event> {
        next_of(&self.events, until)
    }

    /// Where others can report events.
    pub(crate) fn reporter(&self) -> mpsc::Sender<Event> {
        self.reporter.clone()
    }

    /// What can end the emulator, for other threads.
    pub(crate) fn killer(&self) -> Killer {
        Killer(Arc::clone(&self.process))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.killer().kill();
    }
}

/// Ends an emulator.
#[derive(Debug, Clone)]
pub(crate) struct Killer(Arc<Mutex<Child>>);

impl Killer {
    pub(crate) fn kill(&self) {
        // try_lock: whoever holds the lock waits for a process that has closed its channel, so it is ending already.
        if let Ok(mut process) = self.0.try_lock() {
            // An error says that it has ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What comes next out of a channel of events, if it comes by then.
pub(crate) fn next_of(events: &Receiver<Event>, until: Option<Instant>) -> Option<Event> {
    let gone = || Event::Gone("the emulator is gone".to_owned());
    match until {
        None => Some(events.recv().unwrap_or_else(|_| gone())),
        Some(until) => match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => Some(gone()),
        },
    }
}

fn describe(status: std::process::ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or_default()),
    }
}

fn with_log(how: String, log: &mut File) -> String {
    let mut bytes = Vec::new();
    // A log that cannot be read is as good as an empty one.
    let _ = log.rewind().and_then(|()| log.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    // The banner and the rulers say nothing.
    let lines: Vec<_> = text
        .lines()
        .filter(|line| {
            !line.starts_with("==") && !line.starts_with("   ") && !line.trim().is_empty()
        })
        .collect();
    if lines.is_empty() {
        how
    } else {
        format!("{how}; it said:\n{}", last_lines(&lines.join("\n")))
    }
}
