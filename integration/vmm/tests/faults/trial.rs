//! A guest in the middle of its work, a move of it, and who has it then.

use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use amx_guest::{Kind, Workload, area};
use amx_vmm::migration::Stream;
use amx_vmm::migration::{
    MAX_THROTTLE_PERCENT, Options, ReceiveError, Received, Report, SendError, receive, send,
};
use amx_vmm::{Bus, Console, Host, Vm};

use crate::support::lab::in_lab;
use crate::support::{self, midway};
use crate::table::Outcome;

/// Longer than any answer takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How many vCPUs each guest has. Under emulation there is one processor, and a second vCPU would start
/// when the first has come to its end.
pub(crate) fn vcpus() -> u8 {
    if in_lab() { 1 } else { 2 }
}

/// Tells a process that a test has started how slow the guests are: it has not to find out again.
pub(crate) const SLOWER: &str = "AMX_VMM_SLOWER";

/// The tasks of all guests. They are the same, so that the model computes their results once.
pub(crate) fn workloads(host: &Host) -> &'static [Workload] {
    static WORKLOADS: OnceLock<Vec<Workload>> = OnceLock::new();
    WORKLOADS.get_or_init(|| {
        let kind = kind(host);
        let rounds = match kind {
            Kind::Tiles => kind.default_rounds() / 2,
            _ => kind.default_rounds() / 10,
        };
        let workloads = support::workloads(kind, vcpus(), 31, rounds);
        // Long enough to be in the middle still when it has been moved; with the waiting, which costs the
        // model nothing, and no longer than that.
        midway::slower(&workloads, slower(host, &workloads))
    })
}

/// How many times as long as they would, the guests wait in each round.
pub(crate) fn slower_by() -> u64 {
    if FACTOR.get().is_none() {
        workloads(&support::host().expect("there is one"));
    }
    *FACTOR.get().expect("it is known with the tasks")
}

static FACTOR: OnceLock<u64> = OnceLock::new();

fn slower(host: &Host, workloads: &[Workload]) -> u64 {
    *FACTOR.get_or_init(|| match std::env::var(SLOWER) {
        Ok(factor) => factor.parse().expect("a number"),
        Err(_) => midway::outlasting(host, workloads, |mut vm| {
            let (here, there) = pair();
            let (sent, received) = moved(host, &mut vm, here, there);
            sent.expect("it is moved");
            received.expect("it has come").vm
        }),
    })
}

pub(crate) fn kind(host: &Host) -> Kind {
    host.best_kind().expect("any processor has SSE")
}

/// A guest in the middle of its work: what its results need is in its registers.
pub(crate) fn guest(host: &Host) -> Vm {
    let guest = (0..10).find_map(|_| midway::caught(host, workloads(host)));
    guest.expect("a guest is in the middle of its work").vm
}

/// How many guests were let run to their end, and how many of them had come to it before: in the slice of time
/// that a source runs its guest in.
static COMPUTED_ON: AtomicUsize = AtomicUsize::new(0);
static WERE_DONE: AtomicUsize = AtomicUsize::new(0);

/// That guests compute on where they are is no claim about guests that have nothing left to compute.
pub(crate) fn assert_were_midway() {
    let [all, done] = [&COMPUTED_ON, &WERE_DONE].map(|count| count.load(Ordering::SeqCst));
    println!(
        "{all} guests were let compute on, and {done} of them had nothing left to compute; they wait {} times as long",
        slower_by()
    );
    // A busy machine may stop one too late.
    assert!(done <= all / 10, "{done} of {all}");
}

/// Lets it run to the end: right results.
pub(crate) fn assert_computes_on(host: &Host, vm: Vm) {
    assert_computes_on_with(host, vm, &Console::default());
}

pub(crate) fn assert_computes_on_with(host: &Host, mut vm: Vm, bus: &impl Bus) {
    let is_midway = midway::is_midway(host, &mut vm, workloads(host));
    COMPUTED_ON.fetch_add(1, Ordering::SeqCst);
    WERE_DONE.fetch_add(usize::from(!is_midway), Ordering::SeqCst);
    let mut slices = 0;
    // Where KVM has the interrupt controllers, it does not say that a vCPU has halted.
    while !is_done(&vm) {
        let ended = vm
            .run(bus, Duration::from_millis(10))
            .expect("the guest runs on");
        slices += 1;
        assert!(
            slices < 3000,
            "the guest does not come to its end: {ended:?}"
        );
    }
    for (index, workload) in (0..).zip(workloads(host)) {
        let area = vm.read_area(index).expect("it is in memory");
        assert_eq!(workload.check(&area), [], "vCPU {index}");
    }
}

fn is_done(vm: &Vm) -> bool {
    (0..vcpus()).all(|index| vm.read_area(index).expect("it is in memory")[area::DONE] == 1)
}

type Sent = Result<Report, SendError>;
type Arrived = Result<Received, ReceiveError>;

/// How all guests are moved.
pub(crate) fn options() -> Options {
    Options {
        // So that each move has the same messages: of a guest that does not come to its end meanwhile.
        max_rounds: 1,
        throttle_percent: MAX_THROTTLE_PERCENT,
        ..Options::within(PATIENCE)
    }
}

/// Moves `vm` from one end of a connection to the other.
pub(crate) fn moved<S: Stream + Send, D: Stream + Send>(
    host: &Host,
    vm: &mut Vm,
    source: S,
    destination: D,
) -> (Sent, Arrived) {
    moved_with(host, vm, source, destination, &options())
}

/// The same with the source's options, and their deadline at the destination.
pub(crate) fn moved_with<S: Stream + Send, D: Stream + Send>(
    host: &Host,
    vm: &mut Vm,
    source: S,
    destination: D,
    options: &Options,
) -> (Sent, Arrived) {
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, destination, options.deadline));
        let console = Console::default();
        let sent = send(vm, host, (&console, None), source, options, |_| {});
        (sent, received.join().expect("it does not panic"))
    })
}

/// Who has the guest, which then computes on there.
pub(crate) fn outcome(host: &Host, vm: Vm, sent: &Sent, received: Arrived) -> Outcome {
    // Undecided: it stands still here.
    let stays = sent
        .as_ref()
        .is_err_and(|error| !matches!(error, SendError::Undecided));
    match (stays, received) {
        (true, Ok(_)) => Outcome::Double,
        (false, Err(_)) => Outcome::Lost,
        (true, Err(_)) => {
            assert_computes_on(host, vm);
            Outcome::Stays
        }
        (false, Ok(received)) => {
            drop(vm);
            assert_computes_on(host, received.vm);
            Outcome::Moved
        }
    }
}

/// The two ends of a connection.
pub(crate) fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a socket")
}
