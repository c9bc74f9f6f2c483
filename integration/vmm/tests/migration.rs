//! Running guests on their way to another VM over a socket: moved whole, or still there.
//!
//! Bare guests, on any live /dev/kvm. Linux guests are moved in tests/linux.rs.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use amx_guest::Workload;
use amx_vmm::linux::Guest;
use amx_vmm::migration::frame::FrameError;
use amx_vmm::migration::{
    Cancel, Options, ReceiveError, Received, Report, SendError, Stream, receive, send,
};
use amx_vmm::{Bus, BusError, Console, Host, Vm};
use support::lab::in_lab;
use support::midway::{Midway, midway, outlasting, slower};
use support::{finish, host, workloads};

/// Bytes of a message without content.
const MESSAGE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(20);
/// So often a guest is moved until it arrives with work left.
const TRIES: u32 = 12;

/// A stream that fails after so many bytes in both directions together, at whatever place that is.
struct Cut {
    stream: UnixStream,
    left: Arc<AtomicUsize>,
    /// So many from the first byte of Commit on, instead.
    from_commit: Option<usize>,
}

impl Cut {
    fn allow(&self, wanted: usize) -> io::Result<usize> {
        let left = self.left.load(Ordering::SeqCst);
        let taken = wanted.min(left);
        self.left.store(left - taken, Ordering::SeqCst);
        if taken == 0 && wanted > 0 {
            // The other end sees this one closed.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            return Err(io::ErrorKind::Other.into());
        }
        Ok(taken)
    }
}

/// The kind of Commit, in a message without content.
fn is_commit(bytes: &[u8]) -> bool {
    bytes.len() == MESSAGE && bytes[..4] == 7_u32.to_le_bytes()
}

impl Read for Cut {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let most = self.allow(bytes.len())?;
        let read = self.stream.read(&mut bytes[..most])?;
        self.left.fetch_add(most - read, Ordering::SeqCst);
        Ok(read)
    }
}

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.from_commit.filter(|_| is_commit(bytes)) {
            self.left.store(left, Ordering::SeqCst);
            self.from_commit = None;
        }
        let most = self.allow(bytes.len())?;
        self.stream.write(&bytes[..most])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Cut {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.stream.set_timeout(time)
    }
}

/// A guest in the middle of its work, which is not over when it has been moved.
fn guest(host: &Host) -> Midway {
    static SLOWER: OnceLock<u64> = OnceLock::new();
    let kind = host.best_kind().expect("any processor has SSE");
    let workloads = workloads(kind, 2, 31, kind.default_rounds());
    let factor = SLOWER.get_or_init(|| {
        outlasting(host, &workloads, |vm| {
            let (_, sent, received) = moved(host, vm, usize::MAX, None);
            sent.expect("it is moved");
            received.expect("it has come").vm
        })
    });
    midway(host, &slower(&workloads, *factor))
}

type Outcome = (
    Vm,
    Result<Report, SendError>,
    Result<Received, ReceiveError>,
);

/// Moves `vm` over a socket, of which the source's end is cut after `left` bytes.
fn moved(host: &Host, mut vm: Vm, left: usize, from_commit: Option<usize>) -> Outcome {
    let (here, there) = UnixStream::pair().expect("a socket");
    let stream = Cut {
        stream: here,
        left: Arc::new(AtomicUsize::new(left)),
        from_commit,
    };
    let options = Options::within(PATIENCE);
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, there, PATIENCE));
        let console = Console::default();
        let sent = send(&mut vm, host, (&console, None), stream, &options, |_| {});
        (vm, sent, received.join().expect("it does not panic"))
    })
}

fn assert_right(mut vm: Vm, workloads: &[Workload]) {
    let right = vec![[""; 0]; workloads.len()];
    assert_eq!(finish(&mut vm, workloads), right);
}

#[test]
fn a_running_guest_is_moved_and_computes_on() {
    let Some(host) = host() else { return };
    for _ in 0..TRIES {
        let Midway {
            vm,
            snapshot,
            workloads,
        } = guest(&host);
        let (vm, sent, received) = moved(&host, vm, usize::MAX, None);
        drop(vm);
        let report = sent.expect("it is moved");
        println!("{}: {report:#?}", workloads[0].kind());
        let (last, running) = report.rounds.split_last().expect("there are rounds");
        assert!(last.stopped && running.iter().all(|round| !round.stopped));
        let mut received = received.expect("it has come");
        let pages: usize = report.rounds.iter().map(|round| round.pages).sum();
        assert_eq!(received.pages, pages);
        assert!(report.downtime < report.total);
        let arrived = received.vm.capture(&host).expect("it is captured");
        let has_run = arrived
            .vcpus()
            .iter()
            .zip(snapshot.vcpus())
            .any(|(after, before)| after.general() != before.general());
        assert!(has_run, "it stood still while it was moved");
        if arrived.is_midway(&workloads) {
            assert_right(received.vm, &workloads);
            return;
        }
        // A busy machine may have let it come to its end before.
    }
    panic!("it has never any work left where it is moved to");
}

/// Wherever the connection fails before Commit, the source has the guest, and it computes on.
#[test]
fn wherever_it_is_cut_before_the_commitment_the_guest_stays() {
    let Some(host) = host() else { return };
    // A guest has more bytes than this in pages that are not zero.
    let step = if in_lab() { 9001 } else { 1499 };
    for cut in (0..60_000).step_by(step) {
        let Midway { vm, workloads, .. } = guest(&host);
        let (vm, sent, received) = moved(&host, vm, cut, None);
        let error = sent.expect_err("it is cut");
        let is_stream = matches!(error, SendError::Frame(FrameError::Stream(_)));
        assert!(is_stream && received.is_err(), "cut at {cut}: {error}");
        assert_right(vm, &workloads);
    }
}

/// Wherever it fails from there on, one side has the guest, and only one; and it computes on.
#[test]
fn wherever_it_is_cut_at_the_commitment_one_side_has_the_guest() {
    let Some(host) = host() else { return };
    // Under emulation at the ends of both messages, and in the middle.
    let few = |cut: &usize| matches!(cut % MESSAGE, 0 | 8 | 15);
    for cut in (0..=2 * MESSAGE).filter(|cut| !in_lab() || few(cut)) {
        let Midway { vm, workloads, .. } = guest(&host);
        match moved(&host, vm, usize::MAX, Some(cut)) {
            // A part of Commit commits nobody.
            (vm, Err(SendError::Frame(FrameError::Stream(_))), Err(_)) if cut < MESSAGE => {
                assert_right(vm, &workloads);
            }
            // It cannot read the whole answer, so it stands still.
            (_, Err(SendError::Undecided), Ok(received))
                if (MESSAGE..2 * MESSAGE).contains(&cut) =>
            {
                assert_right(received.vm, &workloads);
            }
            (_, Ok(_), Ok(received)) if cut == 2 * MESSAGE => {
                assert_right(received.vm, &workloads);
            }
            (_, sent, received) => panic!(
                "cut {cut} bytes behind the start of Commit: {sent:?}, and the destination {:?}",
                received.err()
            ),
        }
    }
}

/// Counts what the guest tells its devices.
#[derive(Default)]
struct Counter(AtomicUsize);

impl Bus for Counter {
    fn port_write(&self, _vcpu: u8, _port: u16, _data: &[u8]) -> Result<(), BusError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Who accepts late, or describes itself slowly, does not hold a running guest.
#[test]
fn the_guest_runs_while_the_destination_takes_its_time() {
    let Some(host) = host() else { return };
    let mut vm = Vm::boot_counter(&host, 1, u64::MAX).expect("the guest boots");
    let (here, mut there) = UnixStream::pair().expect("a socket");
    let counter = Counter::default();
    let options = Options::within(PATIENCE);
    let sent = thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut hello = [0; MESSAGE];
            there.read_exact(&mut hello).expect("the source says so");
            let before = counter.0.load(Ordering::SeqCst);
            let asked = Instant::now();
            while counter.0.load(Ordering::SeqCst) < before + 100 {
                assert!(asked.elapsed() < PATIENCE / 2, "it stands still");
                thread::yield_now();
            }
            drop(there);
        });
        let sent = send(&mut vm, &host, (&counter, None), here, &options, |_| {});
        destination.join().expect("it runs");
        sent
    });
    assert!(matches!(sent, Err(SendError::Frame(_))), "{sent:?}");
}

#[test]
fn a_bare_guest_is_not_taken_for_a_linux_guest() {
    let Some(host) = host() else { return };
    let Midway {
        mut vm, workloads, ..
    } = guest(&host);
    let (here, there) = UnixStream::pair().expect("a socket");
    let options = Options::within(PATIENCE);
    let (sent, received) = thread::scope(|scope| {
        let received = scope
            .spawn(|| Guest::receive(&host, there, PATIENCE, &Cancel::default(), |_| {}).err());
        let console = Console::default();
        let sent = send(&mut vm, &host, (&console, None), here, &options, |_| {});
        (sent, received.join().expect("it does not panic"))
    });
    assert!(matches!(received, Some(ReceiveError::Bare)), "{received:?}");
    assert!(matches!(sent, Err(SendError::Refused { .. })), "{sent:?}");
    assert_right(vm, &workloads);
}
