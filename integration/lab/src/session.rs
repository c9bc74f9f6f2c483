//! A session: labs that stay up between programs, for whoever starts many programs one by one, as `cargo test` does.
//!
//! The server keeps the labs and listens on a socket; a runner that finds [`VARIABLE`] in its environment goes there. What the two say
//! to each other is what the lab's init and its host program say, and the end of a lab on top.

use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};

use crate::events::{self, Event};
use crate::lab::{Lab, LabError, LabOptions, Link, START_LIMIT};
use crate::machine::{Machine, Start};
use crate::progress::Progress;
use crate::saved::{self, Ready};
use crate::store::Store;
use crate::watchdog::Watchdog;
use crate::wire;

/// Tells programs below a session where it is.
pub const VARIABLE: &str = "AMX_LAB_SESSION";

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: String,
}

impl Server {
    /// Starts serving labs of this kind, at most `at_once` at a time.
    ///
    /// # Errors
    /// When the lab is not prepared or no socket can be made.
    pub fn start(
        store: &Store,
        options: &LabOptions,
        at_once: usize,
        progress: &dyn Progress,
    ) -> Result<Self, LabError> {
        let ready = saved::find_or_make(store, options, progress)?;
        let name = socket_name().map_err(LabError::start)?;
        // A name in the kernel and not in a folder: however this process ends, nothing is left.
        let listener = SocketAddr::from_abstract_name(&name)
            .and_then(|socket| UnixListener::bind_addr(&socket));
        let listener = Arc::new(listener.map_err(LabError::start)?);
        let start = if options.cold {
            Start::Cold
        } else {
            Start::Resume
        };
        for _ in 0..at_once.max(1) {
            let (listener, ready) = (Arc::clone(&listener), ready.clone());
            // It waits in accept until the process ends, and its lab ends then, too.
            std::thread::spawn(move || serve(&listener, &ready, start));
        }
        Ok(Self {
            address: address(options, &name),
        })
    }

    /// The value of [`VARIABLE`] for programs that are to use this session.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

fn address(options: &LabOptions, name: &str) -> String {
    let LabOptions {
        kernel,
        cpu,
        cpus,
        memory_mib,
        ..
    } = options;
    format!("{kernel},{cpu},{cpus},{memory_mib},{name}")
}

fn socket_name() -> io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(format!("amx-lab-{}", crate::store::hex(&random)))
}

/// Names in the kernel have no owner and no permissions, so each side looks at who is on the other.
fn check_peer(socket: &UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(socket)?;
    if peer.uid == rustix::process::getuid() {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// A lab of the session at `address`, if that serves labs of this kind. Waits until one is free.
///
/// # Errors
/// When the session does not answer.
pub fn connect(address: &str, options: &LabOptions) -> Option<Result<Lab, LabError>> {
    let name = name_of(address, options)?;
    let link = || {
        let socket = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
        check_peer(&socket)?;
        SocketLink::start(socket)
    };
    Some(
        link()
            .map_err(|source| LabError::Session { source })
            .and_then(|link| Lab::from_session(Box::new(link))),
    )
}

fn name_of<'a>(address: &'a str, options: &LabOptions) -> Option<&'a str> {
    let mut parts = address.splitn(5, ',');
    let of_this_kind = parts.next()? == options.kernel.suite()
        && parts.next()? == options.cpu.name()
        && parts.next()?.parse() == Ok(options.cpus)
        && parts.next()?.parse() == Ok(options.memory_mib)
        && !options.cold
        && options.without_patches.is_empty();
    if of_this_kind { parts.next() } else { None }
}

/// Serves one program after the other, with one lab as long as it lives.
fn serve(listener: &UnixListener, ready: &Ready, start: Start) {
    let mut machine = None;
    // A listener that fails has been taken from us; the runners say so.
    while let Ok((client, _)) = listener.accept() {
        if check_peer(&client).is_err() {
            continue;
        }
        // A client that goes away has no more use for an answer, and the next one gets a new lab.
        machine = serve_one(client, machine.take(), ready, start).unwrap_or(None);
    }
}

/// Gives the lab back if another program can run in it.
fn serve_one(
    client: UnixStream,
    machine: Option<(Machine, Vec<u8>)>,
    ready: &Ready,
    start: Start,
) -> io::Result<Option<(Machine, Vec<u8>)>> {
    send(&client, wire::TAKEN, &[])?;
    let (machine, release) = match machine {
        Some((machine, release)) if machine.is_quiet() => (machine, release),
        // Between two programs a lab says nothing: it has ended.
        _ => match boot(ready, start) {
            Ok(up) => up,
            Err(how) => {
                send(&client, wire::GONE, how.as_bytes())?;
                return Ok(None);
            }
        },
    };
    send(&client, wire::READY, &release)?;
    let finished = Arc::new(AtomicBool::new(false));
    let (from_client, to_lab, killer) = (client.try_clone()?, machine.writer()?, machine.killer());
    rustix::io::ioctl_fionbio(&to_lab, true)?;
    let seen = Arc::clone(&finished);
    let carrier = std::thread::spawn(move || {
        let carried = carry(&from_client, &to_lab);
        if !seen.load(Ordering::Acquire) {
            killer.kill();
        }
        carried
    });
    let outcome = carry_events(&client, &machine, &finished);
    // The carrier reads from the client until now.
    let _ = client.shutdown(Shutdown::Both);
    // What was cut off is no place for the next job to start at.
    let all_arrived = matches!(carrier.join(), Ok(Ok(())));
    Ok((outcome? && all_arrived).then_some((machine, release)))
}

fn boot(ready: &Ready, start: Start) -> Result<(Machine, Vec<u8>), String> {
    let machine = Machine::start(&ready.emulator, &ready.folder, start, |_| {})
        .map_err(|error| error.to_string())?;
    // A lab that hangs as it starts would keep all programs that wait for it.
    let killer = machine.killer();
    let watchdog = Watchdog::start(START_LIMIT, move || killer.kill());
    loop {
        match machine.next() {
            Event::Frame(wire::READY, release) if watchdog.call_off() => {
                return Ok((machine, release));
            }
            Event::Gone(_) if !watchdog.call_off() => {
                return Err(format!("it was not up after {} s", START_LIMIT.as_secs()));
            }
            Event::Gone(how) => return Err(how),
            Event::Crash(report) => {
                return Err(format!("the lab's kernel crashed:\n{report}"));
            }
            Event::Frame(..) | Event::CrashBegins | Event::SendFailed(_) => {}
        }
    }
}

/// Passes on what the lab says, to the end of the job (true) or of the lab (false).
///
/// A client hangs up as soon as it knows of the job's end, so that must be `finished` before: a hang-up without it costs the lab.
fn carry_events(
    mut client: impl Write,
    machine: &dyn Link,
    finished: &AtomicBool,
) -> io::Result<bool> {
    loop {
        match machine.next() {
            Event::Frame(kind, payload) => {
                let last = wire::ends_job(kind);
                if last {
                    finished.store(true, Ordering::Release);
                }
                send(&mut client, kind, &payload)?;
                if last {
                    return Ok(true);
                }
            }
            Event::Crash(report) => {
                send(&mut client, wire::PANIC, report.as_bytes())?;
                return Ok(false);
            }
            Event::Gone(how) => {
                send(&mut client, wire::GONE, how.as_bytes())?;
                return Ok(false);
            }
            // A machine whose kernel crashes ends soon, with its report.
            Event::CrashBegins | Event::SendFailed(_) => {}
        }
    }
}

/// Carries a job and its input into the lab, until the client hangs up. A lab that takes no more, because it has crashed or its program does
/// not read, does not keep us from noticing that.
fn carry(mut client: &UnixStream, mut to_lab: &PipeWriter) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = match client.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            match to_lab.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_for_room(client, to_lab)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits until the lab takes more.
///
/// # Errors
/// When the client hangs up before.
fn wait_for_room(client: &UnixStream, to_lab: &PipeWriter) -> io::Result<()> {
    let mut both = [
        PollFd::new(client, PollFlags::RDHUP),
        PollFd::new(to_lab, PollFlags::OUT),
    ];
    match poll(&mut both, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let [client, _] = both;
    if client.revents().is_empty() {
        Ok(())
    } else {
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

fn send(mut client: impl Write, kind: u32, payload: &[u8]) -> io::Result<()> {
    let payload = payload
        .get(..payload.len().min(wire::LARGEST_PAYLOAD))
        .unwrap_or_default();
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    client.write_all(&wire::frame_header(kind, length))?;
    client.write_all(payload)
}

/// The client's side.
struct SocketLink {
    socket: Arc<UnixStream>,
    events: events::Receiver,
    reporter: events::Sender,
}

impl SocketLink {
    fn start(socket: UnixStream) -> io::Result<Self> {
        let mut reading = io::BufReader::new(socket.try_clone()?);
        let (reporter, events) = events::queue();
        let sender = reporter.clone();
        std::thread::spawn(move || {
            loop {
                let (event, last) = match wire::read_frame(&mut reading) {
                    Ok(Some((wire::PANIC, report))) => (
                        Event::Crash(String::from_utf8_lossy(&report).into_owned()),
                        true,
                    ),
                    Ok(Some((wire::GONE, how))) => (
                        Event::Gone(String::from_utf8_lossy(&how).into_owned()),
                        true,
                    ),
                    Ok(Some((kind, payload))) => (Event::Frame(kind, payload), false),
                    Ok(None) => (Event::Gone("the session ended".to_owned()), true),
                    Err(error) => (Event::Gone(format!("the session broke off: {error}")), true),
                };
                if sender.send(event).is_err() || last {
                    return;
                }
            }
        });
        Ok(Self {
            socket: Arc::new(socket),
            events,
            reporter,
        })
    }
}

impl Link for SocketLink {
    fn writer(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(self.socket.try_clone()?))
    }

    fn next(&self) -> Event {
        self.events.next()
    }

    fn reporter(&self) -> events::Sender {
        self.reporter.clone()
    }

    fn killer(&self) -> Box<dyn Fn() + Send> {
        let socket = Arc::clone(&self.socket);
        // The server ends a lab whose client has gone. An error says that it has gone already.
        Box::new(move || drop(socket.shutdown(Shutdown::Both)))
    }
}

impl Drop for SocketLink {
    fn drop(&mut self) {
        self.killer()();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::time::Duration;

    use super::*;
    use crate::machine::tests::{HANG, PANIC, PANIC_END, in_time, played_by};

    /// A lab that says what it is told to.
    struct Scripted(RefCell<VecDeque<Event>>);

    impl Link for Scripted {
        fn writer(&self) -> io::Result<Box<dyn Write + Send>> {
            Ok(Box::new(io::sink()))
        }

        fn next(&self) -> Event {
            self.0.borrow_mut().pop_front().unwrap()
        }

        fn reporter(&self) -> events::Sender {
            events::queue().0
        }

        fn killer(&self) -> Box<dyn Fn() + Send> {
            Box::new(|| {})
        }
    }

    /// A client that hangs up the moment it has heard of the program's end. Whether that costs the lab is decided by what the carrier
    /// sees then.
    struct Hasty<'a> {
        finished: &'a AtomicBool,
        heard: Vec<u8>,
        seen_by_carrier: Option<bool>,
    }

    impl Write for Hasty<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.extend_from_slice(bytes);
            let mut heard = self.heard.as_slice();
            while let Ok(Some((kind, _))) = wire::read_frame(&mut heard) {
                if kind == wire::EXIT {
                    self.seen_by_carrier = Some(self.finished.load(Ordering::Acquire));
                }
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_hang_up_after_the_end_does_not_cost_the_lab() {
        let end = wire::Ending::Exited(0).to_bytes().to_vec();
        let lab = Scripted(RefCell::new(VecDeque::from([
            Event::Frame(wire::STDOUT, b"last words".to_vec()),
            Event::Frame(wire::EXIT, end),
        ])));
        let finished = AtomicBool::new(false);
        let mut client = Hasty {
            finished: &finished,
            heard: Vec::new(),
            seen_by_carrier: None,
        };
        assert!(carry_events(&mut client, &lab, &finished).unwrap());
        assert_eq!(client.seen_by_carrier, Some(true));
    }

    /// Serves one client with a lab that behaves as this script does; whether that lab is kept.
    fn kept(script: String, client: impl FnOnce(UnixStream) + Send + 'static) -> bool {
        in_time(move || {
            // No crash limit comes to the session's help here.
            let machine = played_by(&script, Duration::from_secs(3600));
            let ready = Ready {
                emulator: "/nonexistent".into(),
                folder: "/nonexistent".into(),
            };
            let (theirs, ours) = UnixStream::pair().unwrap();
            theirs
                .set_write_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            let client = std::thread::spawn(move || client(theirs));
            let lab = serve_one(ours, Some((machine, Vec::new())), &ready, Start::Resume);
            client.join().unwrap();
            lab.is_ok_and(|lab| lab.is_some())
        })
    }

    fn kind(mut client: &UnixStream) -> u32 {
        wire::read_frame(&mut client).unwrap().unwrap().0
    }

    /// Takes a job of one byte, and ends.
    const ONE_JOB: &str = r"head -c 1 <&3 >&2; printf '\4\0\0\0\0\0\0\0' >&4;";
    /// More than sockets, pipes and buffers hold.
    const MUCH: usize = 8 << 20;

    #[test]
    fn a_lab_is_kept_for_the_next_program() {
        assert!(kept(format!("{ONE_JOB}{HANG}"), |mut client| {
            assert_eq!([kind(&client), kind(&client)], [wire::TAKEN, wire::READY]);
            client.write_all(b"x").unwrap();
            assert_eq!(kind(&client), wire::EXIT);
        }));
    }

    #[test]
    fn a_crash_with_a_job_in_transit_ends_the_lab() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("full");
        let wait = format!("until [ -e {} ]; do sleep 0.01; done;", full.display());
        assert!(!kept(
            format!("{wait}{PANIC}{PANIC_END}{HANG}"),
            move |mut client| {
                // Not all of it is taken in time.
                client.write_all(&vec![0; MUCH]).unwrap_err();
                std::fs::write(full, "").unwrap();
                while kind(&client) != wire::PANIC {}
            }
        ));
    }

    #[test]
    fn a_client_that_goes_with_its_input_in_transit_is_noticed() {
        assert!(!kept(HANG.to_owned(), |mut client| {
            client.write_all(&vec![0; MUCH]).unwrap_err();
        }));
    }

    #[test]
    fn a_lab_that_has_ended_meanwhile_is_not_given_to_anybody() {
        in_time(|| {
            let machine = played_by("exit 0", Duration::from_secs(1));
            while machine.is_quiet() {
                std::thread::yield_now();
            }
            let ready = Ready {
                emulator: "/nonexistent".into(),
                folder: "/nonexistent".into(),
            };
            let (client, ours) = UnixStream::pair().unwrap();
            // There is no emulator to take its place here: the client hears of that, and not of what ended before its time.
            assert!(
                serve_one(ours, Some((machine, Vec::new())), &ready, Start::Resume)
                    .unwrap()
                    .is_none()
            );
            assert_eq!(kind(&client), wire::TAKEN);
            let (kind, how) = wire::read_frame(&mut &client).unwrap().unwrap();
            let how = String::from_utf8(how).unwrap();
            assert!(kind == wire::GONE && how.contains("No such file"), "{how}");
        });
    }

    #[test]
    fn a_session_serves_only_its_own_kind() {
        let options = LabOptions::default();
        let address = address(&options, "a,b");
        assert_eq!(name_of(&address, &options).unwrap(), "a,b");
        for other in [
            LabOptions {
                kernel: crate::Kernel::Sid,
                ..options.clone()
            },
            LabOptions {
                cpu: crate::Cpu::TigerLake,
                ..options.clone()
            },
            LabOptions {
                cpus: 2,
                ..options.clone()
            },
            LabOptions {
                memory_mib: 1024,
                ..options.clone()
            },
            LabOptions {
                cold: true,
                ..options.clone()
            },
            LabOptions {
                without_patches: vec!["13-xfd".into()],
                ..options
            },
        ] {
            assert_eq!(name_of(&address, &other), None);
        }
    }
}
