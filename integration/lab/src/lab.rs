//! A booted lab, and running programs in it.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::boot_image::MOST_CPUS;
use crate::cpu::Cpu;
use crate::events::{self, Event};
use crate::job::{Job, JobError};
use crate::kernel::Kernel;
use crate::machine::{Machine, Start};
use crate::manifest::{Care, ManifestError};
use crate::out_folder::Unpacker;
use crate::patch_set::PatchError;
use crate::progress::Progress;
use crate::progress::Quiet;
use crate::saved::{self, Ready};
use crate::store::{Store, StoreError};
use crate::watchdog::Watchdog;
use crate::wire;

/// A lab that is not up after this is not coming up.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(180);

/// What kind of lab is wanted.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// The kernel of the host.
    pub kernel: Kernel,
    /// The host's processor.
    pub cpu: Cpu,
    /// How many processors the host has.
    pub cpus: u32,
    /// The host's memory.
    pub memory_mib: u32,
    /// Boot, and do not resume a machine that has been booted before.
    pub cold: bool,
    /// Names of patches that the emulator is to lack: to see which test notices.
    pub without_patches: Vec<String>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            kernel: Kernel::default(),
            cpu: Cpu::default(),
            cpus: 1,
            memory_mib: 512,
            cold: false,
            without_patches: Vec::new(),
        }
    }
}

/// Why a lab did not start, or what became of a run in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part of the lab is missing or damaged.
    #[error(transparent)]
    Part(#[from] ManifestError),
    /// There is no such patch.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// The number of processors is not one that the lab can have.
    #[error("{cpus} processors: the lab can have 1 to {MOST_CPUS}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
    /// The memory size is not one that the lab can have.
    #[error("{mib} MiB of memory: the lab can have 256 to 3072")]
    Memory {
        /// What was asked for.
        mib: u32,
    },
    /// The emulator could not be started.
    #[error("the emulator could not be started")]
    Start {
        /// Why.
        source: io::Error,
    },
    /// The session does not answer.
    #[error("the session does not answer")]
    Session {
        /// Why.
        source: io::Error,
    },
    /// The emulator ended by itself, or talked nonsense.
    #[error("the emulator failed: {how}")]
    Emulator {
        /// How.
        how: String,
    },
    /// The lab's kernel crashed.
    #[error("the lab's kernel crashed:\n{report}")]
    HostPanic {
        /// The kernel's own lines.
        report: String,
    },
    /// The program was still running.
    #[error("time is out: still running after {:.1} s", limit.as_secs_f64())]
    TimedOut {
        /// The time that it had.
        limit: Duration,
    },
    /// The job could not be put together.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The lab's kernel refused to start the program.
    #[error("the program could not be started in the lab: {}", io::Error::from_raw_os_error(*errno))]
    NotStarted {
        /// The kernel's error number.
        errno: i32,
    },
    /// The program's output could not be passed on.
    #[error("its output could not be passed on")]
    Output {
        /// Why.
        source: io::Error,
    },
    /// The out folder did not come whole.
    #[error("{path}: the out folder did not come whole", path = path.display())]
    OutFolder {
        /// The folder here.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The lab had no room or no place for the program or its files, so nothing was run.
    #[error("the program and its files could not be unpacked in the lab: {how}")]
    NotUnpacked {
        /// Which one, and why.
        how: String,
    },
    /// The program could not be sent.
    #[error("the program and its files could not be sent to the lab")]
    Send {
        /// Why.
        source: io::Error,
    },
}

impl LabError {
    pub(crate) fn start(source: io::Error) -> Self {
        Self::Start { source }
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl Ending {
    /// The status as a shell gives it: 128 more than the signal's number for a signal.
    #[must_use]
    pub fn status(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Signaled(signal) => signal.saturating_add(128),
        }
    }
}

/// Where a program's streams come from and go to.
pub struct Streams<'a> {
    pub(crate) stdin: Option<Box<dyn Read + Send>>,
    pub(crate) stdout: Box<dyn Write + 'a>,
    pub(crate) stderr: Box<dyn Write + 'a>,
}

impl fmt::Debug for Streams<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams")
            .field("stdin", &self.stdin.is_some())
            .finish_non_exhaustive()
    }
}

impl<'a> Streams<'a> {
    /// This process's own output; no input.
    #[must_use]
    pub fn inherit() -> Self {
        Self::to(io::stdout(), io::stderr())
    }

    /// Output goes here; no input.
    #[must_use]
    pub fn to(stdout: impl Write + 'a, stderr: impl Write + 'a) -> Self {
        Self {
            stdin: None,
            stdout: Box::new(stdout),
            stderr: Box::new(stderr),
        }
    }

    /// Input comes from here. It is read in a thread of its own, which goes on until the input's end.
    #[must_use]
    pub fn stdin(mut self, input: impl Read + Send + 'static) -> Self {
        self.stdin = Some(Box::new(input));
        self
    }
}

/// The side of a lab that can be talked to: an emulator of ours, or one in a session.
pub(crate) trait Link {
    fn writer(&self) -> io::Result<Box<dyn Write + Send>>;
    /// Waits for what comes next.
    fn next(&self) -> Event;
    /// Where the sender of a job tells that it failed.
    fn reporter(&self) -> events::Sender;
    /// What ends the lab, for other threads.
    fn killer(&self) -> Box<dyn Fn() + Send>;
}

impl Link for Machine {
    fn writer(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Self::writer(self)?))
    }

    fn next(&self) -> Event {
        Self::next(self)
    }

    fn reporter(&self) -> events::Sender {
        Self::reporter(self)
    }

    fn killer(&self) -> Box<dyn Fn() + Send> {
        let killer = Self::killer(self);
        Box::new(move || killer.kill())
    }
}

/// A booted host. It ends when this is dropped, and, whatever happens to this process, with it.
pub struct Lab {
    link: Box<dyn Link + Send>,
    release: String,
    usable: bool,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab")
            .field("release", &self.release)
            .field("usable", &self.usable)
            .finish_non_exhaustive()
    }
}

impl Lab {
    /// Starts a host. The first time with these options takes a boot; the parts must have been prepared.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(store: &Store, options: &LabOptions) -> Result<Self, LabError> {
        Self::start_watched(store, options, &Quiet, |_| {})
    }

    /// As [`Lab::start`], with news of what takes long, and with each line of the kernel's console.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_watched(
        store: &Store,
        options: &LabOptions,
        progress: &dyn Progress,
        on_console: impl FnMut(&str) + Send + 'static,
    ) -> Result<Self, LabError> {
        if options.cold {
            let boot = saved::find_or_make_boot(store, options, progress)?;
            return Self::start_ready(&boot.ready, Start::Cold, on_console);
        }
        let ready = saved::find_or_make(store, options, progress)?;
        Self::start_ready(&ready, Start::Resume, on_console)
    }

    /// Returns when it is up.
    fn start_ready(
        ready: &Ready,
        start: Start,
        on_console: impl FnMut(&str) + Send + 'static,
    ) -> Result<Self, LabError> {
        let machine = Machine::start(&ready.emulator, &ready.folder, start, on_console)
            .map_err(LabError::start)?;
        Self::from_link(Box::new(machine))
    }

    /// Whether all parts for these options are there and pass a glance.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn is_prepared(store: &Store, options: &LabOptions) -> Result<(), LabError> {
        if options.cold {
            return saved::has_parts(store, options, Care::Glance);
        }
        saved::find(store, options, Care::Glance).map(drop)
    }

    fn from_link(link: Box<dyn Link + Send>) -> Result<Self, LabError> {
        Self::when_ready(link, START_LIMIT)
    }

    /// A session's labs may all be busy for as long as their programs run, and each of those has its own limit; so there is none until
    /// one is free.
    pub(crate) fn from_session(link: Box<dyn Link + Send>) -> Result<Self, LabError> {
        Waiting::new(link.as_ref(), None).frame_of(wire::TAKEN)?;
        // The session has the same limit, and more to say.
        Self::when_ready(link, START_LIMIT.saturating_add(Duration::from_secs(10)))
    }

    fn when_ready(link: Box<dyn Link + Send>, limit: Duration) -> Result<Self, LabError> {
        let release = Waiting::new(link.as_ref(), Some(limit)).frame_of(wire::READY)?;
        Ok(Self {
            link,
            release: String::from_utf8_lossy(&release).into_owned(),
            usable: true,
        })
    }

    /// The release of the host's kernel, as `uname -r` prints it.
    #[must_use]
    pub fn kernel_release(&self) -> &str {
        &self.release
    }

    /// Whether another program can run here: not after a time-out or a crash.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.usable
    }

    /// Runs a program to its end. Each program finds the host as it was after boot, but for the time that has passed and for what
    /// earlier programs did to the kernel itself.
    ///
    /// # Errors
    /// When the program could not be run to its end; the lab is then of no more use, except after [`LabError::NotStarted`],
    /// [`LabError::NotUnpacked`] and [`LabError::OutFolder`].
    pub fn run(
        &mut self,
        job: &Job,
        streams: Streams<'_>,
        limit: Option<Duration>,
    ) -> Result<Ending, LabError> {
        if !self.usable {
            return Err(LabError::Emulator {
                how: "an earlier run has ended this lab".to_owned(),
            });
        }
        let waiting = Waiting::new(self.link.as_ref(), limit);
        let result = self.run_job(job, streams, &waiting);
        let goes_on = waiting.call_off()
            && matches!(
                result,
                Ok(_)
                    | Err(LabError::NotStarted { .. }
                        | LabError::NotUnpacked { .. }
                        | LabError::OutFolder { .. })
            );
        drop(waiting);
        if !goes_on {
            self.usable = false;
            self.link.killer()();
        }
        result
    }

    fn run_job(
        &self,
        job: &Job,
        mut streams: Streams<'_>,
        waiting: &Waiting<'_>,
    ) -> Result<Ending, LabError> {
        let unpacker = match &job.out {
            None => None,
            Some(folder) => {
                let out = |source| LabError::OutFolder {
                    path: folder.clone(),
                    source,
                };
                Some((folder, Unpacker::start(folder.clone()).map_err(out)?))
            }
        };
        let to_lab = self
            .link
            .writer()
            .map_err(|source| LabError::Send { source })?;
        let sender = Sender::start(
            to_lab,
            self.link.reporter(),
            job.clone(),
            streams.stdin.take(),
        );
        let output = |source| LabError::Output { source };
        let (ending, missing) = loop {
            let (kind, payload) = waiting.frame()?;
            match kind {
                wire::STDOUT => streams
                    .stdout
                    .write_all(&payload)
                    .and_then(|()| streams.stdout.flush())
                    .map_err(output)?,
                wire::STDERR => streams
                    .stderr
                    .write_all(&payload)
                    .and_then(|()| streams.stderr.flush())
                    .map_err(output)?,
                wire::FILES => {
                    if let Some((_, unpacker)) = &unpacker {
                        unpacker.take(payload);
                    }
                }
                wire::INPUT_END => sender.end_input(),
                wire::NOT_UNPACKED => {
                    return Err(LabError::NotUnpacked {
                        how: String::from_utf8_lossy(&payload).into_owned(),
                    });
                }
                wire::EXIT | wire::OUT_INCOMPLETE => match wire::Ending::from_bytes(&payload) {
                    Some(ending) => {
                        let said = payload.get(ending.to_bytes().len()..).unwrap_or_default();
                        let missing = (kind == wire::OUT_INCOMPLETE)
                            .then(|| String::from_utf8_lossy(said).into_owned());
                        break (ending, missing);
                    }
                    None => {
                        return Err(LabError::Emulator {
                            how: "the program's end was not understood".to_owned(),
                        });
                    }
                },
                other => {
                    return Err(LabError::Emulator {
                        how: format!("a frame of unknown kind {other}"),
                    });
                }
            }
        };
        if let Some((folder, unpacker)) = unpacker {
            let unpacked = unpacker.finish();
            // If something is missing there, this is no surprise to what unpacks here.
            missing
                .map_or(unpacked, |what| {
                    Err(io::Error::other(format!("{what}; the program {ending}")))
                })
                .map_err(|source| LabError::OutFolder {
                    path: folder.clone(),
                    source,
                })?;
        }
        match ending {
            wire::Ending::Exited(status) => Ok(Ending::Exited(status)),
            wire::Ending::Signaled(signal) => Ok(Ending::Signaled(signal)),
            wire::Ending::NotStarted(errno) => Err(LabError::NotStarted { errno }),
        }
    }
}

/// Waits for frames until time is out, and makes errors of all else. The limit holds whatever the thread is doing that waits here: passing
/// output on to somebody who does not read may take for ever.
struct Waiting<'a> {
    link: &'a dyn Link,
    watchdog: Option<(Duration, Watchdog)>,
}

impl<'a> Waiting<'a> {
    fn new(link: &'a dyn Link, limit: Option<Duration>) -> Self {
        let watchdog = limit.map(|limit| (limit, Watchdog::start(limit, link.killer())));
        Self { link, watchdog }
    }

    /// Whether what was waited for came in time. If not, the lab is gone.
    fn call_off(&self) -> bool {
        self.watchdog
            .as_ref()
            .is_none_or(|(_, watchdog)| watchdog.call_off())
    }

    fn frame(&self) -> Result<(u32, Vec<u8>), LabError> {
        loop {
            match (self.link.next(), &self.watchdog) {
                (Event::Frame(kind, payload), _) => return Ok((kind, payload)),
                // The lab ends soon, and by itself; its report is worth the time.
                (Event::CrashBegins, _) => {
                    self.call_off();
                }
                (Event::Crash(report), _) => return Err(LabError::HostPanic { report }),
                (Event::Gone(_) | Event::SendFailed(_), Some((limit, watchdog)))
                    if !watchdog.call_off() =>
                {
                    return Err(LabError::TimedOut { limit: *limit });
                }
                (Event::Gone(how), _) => return Err(LabError::Emulator { how }),
                (Event::SendFailed(source), _) => return Err(LabError::Send { source }),
            }
        }
    }

    /// The next frame, which is to be of this kind.
    fn frame_of(&self, kind: u32) -> Result<Vec<u8>, LabError> {
        match self.frame()? {
            (other, payload) if other == kind => Ok(payload),
            (other, _) => Err(LabError::Emulator {
                how: format!("a frame of kind {other} where {kind} was due"),
            }),
        }
    }
}

/// Sends a job, and then the program's input, in a thread of its own: the lab may answer before it has all of it.
struct Sender {
    way: Arc<Mutex<Way>>,
}

struct Way {
    to_lab: Box<dyn Write + Send>,
    input_open: bool,
}

impl Sender {
    fn start(
        to_lab: Box<dyn Write + Send>,
        reporter: events::Sender,
        job: Job,
        stdin: Option<Box<dyn Read + Send>>,
    ) -> Self {
        let way = Arc::new(Mutex::new(Way {
            to_lab,
            input_open: stdin.is_some(),
        }));
        let shared = Arc::clone(&way);
        std::thread::spawn(move || {
            let sent = {
                let way = &mut *lock(&shared);
                let mut buffered = io::BufWriter::with_capacity(wire::WINDOW_HALF, &mut way.to_lab);
                job.send(&mut buffered, stdin.is_some())
                    .and_then(|()| buffered.flush())
            };
            match (sent, stdin) {
                // The lab that is gone says more about itself than the broken pipe or session does.
                (Err(error), _)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) => {}
                (Err(error), _) => drop(reporter.send(Event::SendFailed(error))),
                (Ok(()), Some(stdin)) => carry_input(&shared, stdin),
                (Ok(()), None) => {}
            }
        });
        Self { way }
    }

    /// The program has ended before its input.
    fn end_input(&self) {
        lock(&self.way).end_input();
    }
}

fn lock(way: &Mutex<Way>) -> std::sync::MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}

fn carry_input(way: &Mutex<Way>, mut stdin: Box<dyn Read + Send>) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        // An error of the input ends it, as for a program that reads it here.
        let count = stdin.read(&mut buffer).unwrap_or(0);
        let way = &mut *lock(way);
        match buffer.get(..count) {
            Some(piece) if way.input_open && count > 0 => way.piece(piece),
            _ => return way.end_input(),
        }
    }
}

impl Way {
    /// Without a reader all further input is of no interest; that the lab is gone is noticed elsewhere.
    fn piece(&mut self, piece: &[u8]) {
        let length = u32::try_from(piece.len()).unwrap_or_default();
        if self
            .to_lab
            .write_all(&length.to_le_bytes())
            .and_then(|()| self.to_lab.write_all(piece))
            .is_err()
        {
            self.input_open = false;
        }
    }

    fn end_input(&mut self) {
        if self.input_open {
            self.piece(&[]);
            self.input_open = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;
    use crate::machine::tests::{HANG, in_time, played_by};

    /// A reader that waits until the process is gone whose number it is given.
    struct WaitsForTheEnd;

    impl Write for WaitsForTheEnd {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let process = Path::new("/proc").join(String::from_utf8_lossy(bytes).trim());
            while process.exists() {
                std::thread::yield_now();
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_limit_holds_while_output_is_not_taken() {
        in_time(|| {
            let folder = tempfile::tempdir().unwrap();
            let program = folder.path().join("program");
            std::fs::write(&program, crate::boot_image::INIT).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
            let job = Job::new(&program).unwrap();
            let script = format!(
                r"printf '\1\0\0\0\0\0\0\0' >&4; printf '\2\0\0\0\10\0\0\0%8d' $$ >&4; {HANG}"
            );
            let machine = played_by(&script, Duration::from_secs(3600));
            let mut lab = Lab::from_link(Box::new(machine)).unwrap();
            let limit = Duration::from_millis(10);
            let error = lab
                .run(&job, Streams::to(WaitsForTheEnd, io::sink()), Some(limit))
                .unwrap_err();
            assert!(
                matches!(error, LabError::TimedOut { limit: was } if was == limit),
                "{error}"
            );
            assert!(!lab.is_usable());
        });
    }
}
