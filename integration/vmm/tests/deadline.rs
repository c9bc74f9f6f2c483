//! A destination cannot hold a guest: not by dripping its bytes, and not by saying nothing. And who cancels a
//! move, or whom it takes too long, has the guest where it was.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use amx_guest::Workload;
use amx_vmm::migration::frame::FrameError;
use amx_vmm::migration::{
    Cancel, Offer, Options, Progress, ReceiveError, SendError, Stream, receive, receive_with, send,
};
use amx_vmm::{Console, Host, Vm};
use support::midway::{Midway, midway};
use support::{finish, host, workloads};

/// For what is to happen.
const LONG: Duration = Duration::from_secs(60);
/// For what happens at once; so long waits who does not see it.
const SOON: Duration = Duration::from_secs(20);
/// For what is not.
const SHORT: Duration = Duration::from_millis(300);

/// Kinds of messages: docs of `migration::frame`.
const REFUSE: u32 = 3;
const READY: u32 = 6;
const COMMIT: u32 = 7;

fn guest(host: &Host) -> Midway {
    let kind = host.best_kind().expect("any processor has SSE");
    midway(host, &workloads(kind, 2, 77, kind.default_rounds()))
}

fn assert_computes_on(mut vm: Vm, workloads: &[Workload]) {
    let right = vec![[""; 0]; workloads.len()];
    assert_eq!(finish(&mut vm, workloads), right);
}

/// Passes messages on, up to the first of this kind, which it returns; `None` at the end of the stream.
fn pass(mut from: &UnixStream, mut to: &UnixStream, until: u32) -> Option<Vec<u8>> {
    loop {
        let mut message = vec![0; 16];
        from.read_exact(&mut message).ok()?;
        let field = |at: usize| {
            let bytes = message.get(at..).and_then(<[u8]>::first_chunk);
            u32::from_le_bytes(*bytes.expect("the header has it"))
        };
        let (kind, bytes) = (field(0), field(8));
        message.resize(message.len().saturating_add(bytes as usize), 0);
        from.read_exact(message.get_mut(16..).expect("it is there"))
            .ok()?;
        if kind == until {
            return Some(message);
        }
        to.write_all(&message).ok()?;
    }
}

/// Moves a guest to an honest destination, with `answers` in place of what it says from `kind` on. The guest is
/// at the source afterwards.
fn held(
    host: &Host,
    vm: &mut Vm,
    options: &Options,
    kind: u32,
    answers: impl FnOnce(UnixStream) + Send,
) -> (SendError, Result<(), ReceiveError>) {
    let [(here, middle), (behind, there)] = [(); 2].map(|()| UnixStream::pair().expect("a socket"));
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, there, LONG).map(drop));
        let clone = |stream: &UnixStream| stream.try_clone().expect("a socket");
        let (to_source, from_destination) = (clone(&middle), clone(&behind));
        scope.spawn(move || {
            if pass(&from_destination, &to_source, kind).is_some() {
                answers(to_source);
            }
        });
        scope.spawn(move || {
            // What the source says after that, nobody hears.
            pass(&middle, &behind, COMMIT);
            behind
                .shutdown(std::net::Shutdown::Both)
                .expect("it is open");
        });
        let console = Console::default();
        let sent = send(vm, host, (&console, None), here, options, |_| {});
        let error = sent.expect_err("it is held");
        (error, received.join().expect("it does not panic"))
    })
}

/// One byte of a long answer comes now and then, each well in time.
#[test]
fn who_drips_an_answer_does_not_hold_a_stopped_guest() {
    let Some(host) = host() else { return };
    let Midway {
        mut vm, workloads, ..
    } = guest(&host);
    let options = Options {
        max_downtime: SHORT,
        ..Options::within(LONG)
    };
    let (error, received) = held(&host, &mut vm, &options, READY, |mut source| {
        let header = [REFUSE, 1, 200, 0].map(u32::to_le_bytes).concat();
        let mut bytes = header.into_iter().chain(std::iter::repeat(b'x'));
        while let Some(byte) = bytes.next()
            && source.write_all(&[byte]).is_ok()
        {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let SendError::Frame(FrameError::Late { allowed }) = error else {
        panic!("{error}")
    };
    assert_eq!(allowed, SHORT);
    assert!(received.is_err());
    assert_computes_on(vm, &workloads);
}

/// The source does not know, and says so within the time that it was given.
#[test]
fn a_destination_that_hangs_after_the_hand_over_leaves_it_undecided() {
    let Some(host) = host() else { return };
    let Midway { mut vm, .. } = guest(&host);
    let options = Options {
        answer: SHORT,
        ..Options::within(LONG)
    };
    let (hangs, goes_on) = std::sync::mpsc::channel::<()>();
    let (here, there) = UnixStream::pair().expect("a socket");
    let (error, received) = thread::scope(|scope| {
        let received = scope.spawn(|| receive(&host, Silent::new(there, goes_on), LONG));
        let console = Console::default();
        let sent = send(&mut vm, &host, (&console, None), here, &options, |_| {});
        drop(hangs);
        (sent.expect_err("nobody answers"), received.join())
    });
    assert!(matches!(error, SendError::Undecided), "{error}");
    // It goes on later, and has the guest.
    assert!(received.expect("it does not panic").is_ok());
}

/// A stream whose process stands still when it has read Commit.
struct Silent {
    stream: UnixStream,
    goes_on: std::sync::mpsc::Receiver<()>,
    is_committed: AtomicBool,
}

impl Silent {
    fn new(stream: UnixStream, goes_on: std::sync::mpsc::Receiver<()>) -> Self {
        Self {
            stream,
            goes_on,
            is_committed: AtomicBool::new(false),
        }
    }
}

impl Read for Silent {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.stream.read(bytes)?;
        if read == 16 && bytes.starts_with(&COMMIT.to_le_bytes()) {
            self.is_committed
                .store(true, std::sync::atomic::Ordering::SeqCst);
        }
        Ok(read)
    }
}

impl Write for Silent {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.is_committed.load(std::sync::atomic::Ordering::SeqCst) {
            // That the other end is gone is the sign.
            let _ = self.goes_on.recv_timeout(SOON);
        }
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for Silent {
    fn set_timeout(&self, time: Duration) -> std::io::Result<()> {
        self.stream.set_timeout(time)
    }
}

/// Whoever waits for a side that says nothing can be told to stop, and tells the other one.
#[test]
fn a_move_is_cancelled_at_either_side() {
    let Some(host) = host() else { return };
    let Midway {
        mut vm, workloads, ..
    } = guest(&host);
    let options = Options::within(SOON);
    let (here, mut there) = UnixStream::pair().expect("a socket");
    let sent = thread::scope(|scope| {
        scope.spawn(|| {
            there.read_exact(&mut [0; 16]).expect("it says Hello");
            options.cancel.cancel();
            let mut rest = Vec::new();
            there.read_to_end(&mut rest).expect("it ends");
            let said = String::from_utf8_lossy(&rest);
            assert!(said.ends_with("the move was cancelled"), "{said:?}");
        });
        let console = Console::default();
        send(&mut vm, &host, (&console, None), here, &options, |_| {})
    });
    assert!(matches!(sent, Err(SendError::Cancelled)), "{sent:?}");

    // Among its pages, too.
    let options = Options::within(SOON);
    let (here, there) = UnixStream::pair().expect("a socket");
    let (sent, received) = thread::scope(|scope| {
        let received = scope.spawn(|| receive(&host, there, LONG).map(drop));
        let console = Console::default();
        let sent = send(&mut vm, &host, (&console, None), here, &options, |_| {
            options.cancel.cancel();
        });
        (sent, received.join().expect("it does not panic"))
    });
    assert!(matches!(sent, Err(SendError::Cancelled)), "{sent:?}");
    let Err(ReceiveError::Refused { reason }) = received else {
        panic!("{received:?}")
    };
    assert!(reason.contains("the move was cancelled"), "{reason}");
    assert_computes_on(vm, &workloads);

    let (cancel, offer) = (Cancel::default(), Offer::of(&host));
    let (here, there) = UnixStream::pair().expect("a socket");
    let received = thread::scope(|scope| {
        let waits = scope.spawn(|| receive_with(&host, &offer, there, SOON, &cancel, |_| {}));
        cancel.cancel();
        waits.join().expect("it does not panic").err()
    });
    drop(here);
    assert!(
        matches!(received, Some(ReceiveError::Cancelled)),
        "{received:?}"
    );
}

/// To stop it for longer than is allowed, and to let it run on then, is no use to anybody.
#[test]
fn a_guest_that_changes_too_much_is_not_even_stopped() {
    let Some(host) = host() else { return };
    for _ in 0..12 {
        let Midway {
            mut vm, workloads, ..
        } = guest(&host);
        let options = Options {
            downtime: Duration::ZERO,
            max_downtime: Duration::ZERO,
            max_rounds: 1,
            ..Options::within(LONG)
        };
        let (here, there) = UnixStream::pair().expect("a socket");
        let (mut stopped, console) = (false, Console::default());
        let sent = thread::scope(|scope| {
            scope.spawn(|| receive(&host, there, LONG).map(drop));
            let guest = (&console, None);
            send(&mut vm, &host, guest, here, &options, |progress| {
                stopped |= matches!(progress, Progress::Pages { stopped: true, .. });
            })
        });
        if let Err(SendError::Busy { expected, allowed }) = sent {
            assert!(expected > allowed && !stopped, "{expected:?}");
            assert_computes_on(vm, &workloads);
            return;
        }
        // It has not changed a page meanwhile.
    }
    panic!("no guest has changed a page");
}

/// Who looks at the clock later makes the time shorter than the guest's.
#[test]
fn the_time_that_a_guest_stands_still_is_counted_from_its_stop() {
    let Some(host) = host() else { return };
    let Midway { mut vm, .. } = guest(&host);
    let options = Options {
        max_rounds: 1,
        ..Options::within(LONG)
    };
    let (here, there) = UnixStream::pair().expect("a socket");
    let mut slow = Duration::ZERO;
    let (sent, received) = thread::scope(|scope| {
        let received = scope.spawn(|| receive(&host, there, LONG));
        let console = Console::default();
        let sent = send(&mut vm, &host, (&console, None), here, &options, |told| {
            if let Progress::Round(round) = told
                && !round.stopped
            {
                let start = Instant::now();
                thread::sleep(Duration::from_millis(50));
                slow = start.elapsed();
            }
        });
        (sent, received.join().expect("it does not panic"))
    });
    assert!(received.is_ok());
    let downtime = sent.expect("it is moved").downtime;
    assert!(
        slow > Duration::ZERO && downtime >= slow.as_secs_f64(),
        "{downtime} s, of which {slow:?} were a reader's"
    );
}
