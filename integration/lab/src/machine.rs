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
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};

use crate::boot_image::CONFIGURATION;
use crate::console::{self, News};
use crate::emulator::PROGRAM;
use crate::events::{self, Event, Receiver, Sender};
use crate::tools::last_lines;
use crate::watchdog::Watchdog;
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

/// How long the kernel's report of its crash may take once it has begun.
const CRASH_LIMIT: Duration = Duration::from_secs(20);

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

/// A running emulator. Ends when this is dropped, and, through the kernel, when this process ends in any way; and soon after its kernel
/// has begun to report a crash, even if the report has no end.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Arc<Mutex<Child>>,
    to_lab: PipeWriter,
    events: Receiver,
    reporter: Sender,
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
        let mut command = Command::new(emulator.join(PROGRAM));
        command.arg("-q").current_dir(folder).env_clear();
        match start {
            Start::Cold => command.args(["-f", CONFIGURATION]),
            Start::Save => command
                .args(["-f", CONFIGURATION])
                .env(SAVE_VARIABLE, STATE),
            Start::Resume => command.args(["-r", STATE]),
        };
        Self::spawn(command, CRASH_LIMIT, on_console)
    }

    /// Starts what behaves as the emulator does.
    pub(crate) fn spawn(
        mut command: Command,
        crash_limit: Duration,
        on_console: impl FnMut(&str) + Send + 'static,
    ) -> io::Result<Self> {
        let (job_reader, to_lab) = io::pipe()?;
        let (from_lab, frame_writer) = io::pipe()?;
        let (life_reader, life) = io::pipe()?;
        let (console_reader, console_writer) = io::pipe()?;
        // Large transfers wait less often. An administrator's limit on pipes is no reason to fail.
        let _ = rustix::pipe::fcntl_setpipe_size(&to_lab, wire::WINDOW_HALF);
        let mut log = tempfile::tempfile()?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
        // Ctrl-C is for us; we take the emulator with us.
        command.process_group(0);
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
        let killer = Killer(Arc::clone(&process));
        let (sender, events) = events::queue();
        let (crash_sender, reporter) = (sender.clone(), sender.clone());
        let crash_killer = killer.clone();
        let console = std::thread::spawn(move || {
            let mut watchdog = None;
            let tell = |news| {
                let event = match news {
                    News::CrashBegins => {
                        let killer = crash_killer.clone();
                        // The end of the emulator brings what there is of the report.
                        watchdog = Some(Watchdog::start(crash_limit, move || killer.kill()));
                        Event::CrashBegins
                    }
                    News::Crash(report) => Event::Crash(report),
                };
                // Nobody listens any more only when the machine is being dropped.
                let _ = crash_sender.send(event);
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
            if broken.is_some() {
                // It does not know that nobody listens any more, and its console ends only with it.
                killer.kill();
            }
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

    /// Waits for what comes next.
    pub(crate) fn next(&self) -> Event {
        self.events.next()
    }

    /// Whether nothing has come that was not taken: so it is between two programs, unless the lab has ended.
    pub(crate) fn is_quiet(&self) -> bool {
        self.events.is_empty()
    }

    /// Where others can report events.
    pub(crate) fn reporter(&self) -> Sender {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A script in the emulator's place, for what a sound emulator does not do: with its descriptors, and a lab that is up.
    pub(crate) fn played_by(script: &str, crash_limit: Duration) -> Machine {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        Machine::spawn(command, crash_limit, |_| {}).unwrap()
    }

    /// What comes of this, which must not take for ever.
    pub(crate) fn in_time<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(f()));
        receiver.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// Lines on the console.
    pub(crate) const PANIC: &str = "echo 'Kernel panic - not syncing: x' >&6;";
    pub(crate) const PANIC_END: &str = "echo '---[ end Kernel panic - not syncing: x ]---' >&6;";
    /// Takes nothing and lives on, as long as this process does.
    pub(crate) const HANG: &str = "exec cat <&5";

    #[test]
    fn a_report_without_end_is_cut_off() {
        let machine = played_by(&format!("{PANIC}{HANG}"), Duration::from_millis(1));
        assert!(matches!(machine.next(), Event::CrashBegins));
        let (machine, event) = in_time(|| {
            let event = machine.next();
            (machine, event)
        });
        let Event::Crash(report) = event else {
            panic!("what there is of the report")
        };
        assert_eq!(report, "Kernel panic - not syncing: x");
        assert!(matches!(machine.next(), Event::Gone(how) if how.contains("signal 9")));
    }

    #[test]
    fn a_broken_frame_ends_the_lab() {
        // Its length is larger than any.
        let script = format!(r"printf '\2\0\0\0\377\377\377\377' >&4; {HANG}");
        let machine = played_by(&script, CRASH_LIMIT);
        let Event::Gone(how) = in_time(move || machine.next()) else {
            panic!("there is no such frame")
        };
        assert!(how.contains("longer than the window"), "{how}");
    }
}
