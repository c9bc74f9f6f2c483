//! A guest in the middle of its work, a move of it, and who has it then.

use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use amx_guest::{Kind, Workload, area};
use amx_vmm::migration::destination::Stream;
use amx_vmm::migration::{
    MAX_THROTTLE_PERCENT, Options, ReceiveError, Received, Report, SendError, receive, send,
};
use amx_vmm::{Bus, Console, Ended, Host, Vm};

use crate::support;
use crate::table::{self, Outcome};

/// Longer than any answer takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How many vCPUs each guest has. Under emulation there is one processor, and a second vCPU would start
/// when the first has come to its end.
pub(crate) fn vcpus() -> u8 {
    if table::in_lab() { 1 } else { 2 }
}

/// The tasks of all guests. They are the same, so that the model computes their results once.
pub(crate) fn workloads(host: &Host) -> &'static [Workload] {
    static WORKLOADS: OnceLock<Vec<Workload>> = OnceLock::new();
    WORKLOADS.get_or_init(|| {
        let kind = kind(host);
        // Long enough to be moved in the middle; with the waiting, which costs the model nothing, no
        // longer than that.
        let (rounds, factor) = match kind {
            Kind::Tiles => (kind.default_rounds() / 2, 6),
            _ => (kind.default_rounds() / 10, 12),
        };
        let workloads = support::workloads(kind, vcpus(), 31, rounds);
        workloads
            .into_iter()
            .map(|workload| workload.slower(factor))
            .collect()
    })
}

pub(crate) fn kind(host: &Host) -> Kind {
    host.best_kind().expect("any processor has SSE")
}

/// A guest in the middle of its work: what its results need is in its registers.
pub(crate) fn guest(host: &Host) -> Vm {
    let workloads = workloads(host);
    let console = Console::default();
    let slice = Duration::from_micros(if table::in_lab() { 200 } else { 2000 });
    // A busy machine may let a vCPU come to its end before another one begins.
    for _ in 0..100 {
        let mut vm = Vm::boot(host, kind(host), workloads).expect("the guest boots");
        while vm.run(&console, slice).expect("it runs") == Ended::Stopped {
            if vm
                .capture(host)
                .expect("it is captured")
                .is_midway(workloads)
            {
                return vm;
            }
        }
    }
    panic!("no guest is ever in the middle of its work");
}

/// Lets it run to the end: right results.
pub(crate) fn assert_computes_on(host: &Host, vm: Vm) {
    assert_computes_on_with(host, vm, &Console::default());
}

pub(crate) fn assert_computes_on_with(host: &Host, mut vm: Vm, bus: &impl Bus) {
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
        patience: PATIENCE,
        // So that each move has the same messages: of a guest that does not come to its end meanwhile.
        max_rounds: 1,
        throttle_percent: MAX_THROTTLE_PERCENT,
        ..Options::default()
    }
}

/// Moves `vm` from one end of a connection to the other.
pub(crate) fn moved<S: Stream + Send, D: Stream + Send>(
    host: &Host,
    vm: &mut Vm,
    source: S,
    destination: D,
    patience: Duration,
) -> (Sent, Arrived) {
    let options = Options {
        patience,
        ..options()
    };
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, destination, patience));
        let console = Console::default();
        let sent = send(vm, host, (&console, None), source, &options, |_| {});
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
