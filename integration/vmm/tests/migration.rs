//! Running guests on their way to another VM over a socket: moved whole, or still there.
//!
//! Bare guests, on any live /dev/kvm. Linux guests are moved in tests/linux.rs.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use amx_guest::{Kind, Workload};
use amx_vmm::migration::destination::Stream;
use amx_vmm::migration::frame::FrameError;
use amx_vmm::migration::{Options, ReceiveError, Received, Report, SendError, receive, send};
use amx_vmm::{Console, Ended, Host, Vm};
use support::{finish, host, workloads};

const PATIENCE: Duration = Duration::from_secs(20);

/// A stream that fails after so many bytes in both directions together, at whatever place that is.
struct Cut {
    stream: UnixStream,
    left: Arc<AtomicUsize>,
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
        let most = self.allow(bytes.len())?;
        self.stream.write(&bytes[..most])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Cut {
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.stream.set_patience(patience)
    }
}

/// A guest in the middle of its work.
fn guest(host: &Host) -> (Kind, Vm, Vec<Workload>) {
    let kind = host.best_kind().expect("any processor has SSE");
    let workloads = workloads(kind, 2, 31, kind.default_rounds());
    let mut vm = Vm::boot(host, kind, &workloads).expect("the guest boots");
    let ended = vm.run(&Console::default(), Duration::from_millis(2));
    assert_eq!(ended.expect("it runs"), Ended::Stopped);
    (kind, vm, workloads)
}

type Outcome = (
    Vm,
    Result<Report, SendError>,
    Result<Received, ReceiveError>,
);

/// Moves `vm` over a socket, of which the source's end is cut after `left` bytes.
fn moved(host: &Host, mut vm: Vm, left: usize) -> Outcome {
    let (here, there) = UnixStream::pair().expect("a socket");
    let stream = Cut {
        stream: here,
        left: Arc::new(AtomicUsize::new(left)),
    };
    let options = Options {
        patience: PATIENCE,
        ..Options::default()
    };
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
    let (kind, vm, workloads) = guest(&host);
    let (vm, sent, received) = moved(&host, vm, usize::MAX);
    drop(vm);
    let report = sent.expect("it is moved");
    println!("{kind}: {report:#?}");
    let last = report.rounds.last().expect("there are rounds");
    assert!(last.stopped && report.rounds.len() > 1);
    let received = received.expect("it has come");
    let pages: usize = report.rounds.iter().map(|round| round.pages).sum();
    assert_eq!(received.pages, pages);
    assert!(report.downtime < report.total);
    assert_right(received.vm, &workloads);
}

/// Wherever the connection is cut, one side has the guest, and only one; and it computes on.
#[test]
fn wherever_it_is_cut_one_side_has_the_guest() {
    let Some(host) = host() else { return };
    // How many bytes there are in all changes a little with the pages that the guest has changed.
    let (_, vm, workloads) = guest(&host);
    let left = Arc::new(AtomicUsize::new(usize::MAX));
    let total = {
        let (here, there) = UnixStream::pair().expect("a socket");
        let stream = Cut {
            stream: here,
            left: Arc::clone(&left),
        };
        let mut vm = vm;
        thread::scope(|scope| {
            let received = scope.spawn(|| receive(&host, there, PATIENCE));
            let console = Console::default();
            let options = Options::default();
            send(&mut vm, &host, (&console, None), stream, &options, |_| {}).expect("it is moved");
            let received = received.join().expect("it does not panic");
            assert_right(received.expect("it has come").vm, &workloads);
        });
        usize::MAX - left.load(Ordering::SeqCst)
    };
    let (mut here, mut there, mut undecided) = (0, 0, 0);
    // Every byte of the last messages; before, one of many.
    let near_the_end = (total - 100..total + 60).step_by(3);
    for cut in (0..total - 100).step_by(total / 40).chain(near_the_end) {
        let (_, vm, workloads) = guest(&host);
        match moved(&host, vm, cut) {
            (_, Ok(_), Ok(received)) => {
                there += 1;
                assert_right(received.vm, &workloads);
            }
            (vm, Err(error), Err(_)) => {
                here += 1;
                assert!(
                    matches!(error, SendError::Frame(FrameError::Stream(_))),
                    "{error}"
                );
                assert_right(vm, &workloads);
            }
            // It could not read the answer, so it stands still.
            (_, Err(SendError::Undecided), Ok(received)) => {
                undecided += 1;
                assert_right(received.vm, &workloads);
            }
            (_, sent, received) => panic!(
                "cut at {cut} of {total}: {sent:?}, and the destination {:?}",
                received.err()
            ),
        }
    }
    println!(
        "{total} bytes: stayed {here}, moved {there}, moved and not known to the source {undecided}"
    );
    assert!(here > 40 && there > 0 && undecided > 0);
}
