//! kill -9 of source or destination at each step of the protocol.
//!
//! Both are processes of their own. The one that is to be killed waits at its step, and says so; then it
//! is killed. What the guest tells its devices goes into a file that both append to: who ran when can
//! be read there, whoever has ended. The guest counts, so what was done twice or left out shows.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use amx_guest::area::COUNT_PORT;
use amx_vmm::migration::{SendError, receive, send};
use amx_vmm::{Bus, BusError, Console, Ended, Host, Vm};

use crate::frame;
use crate::groups::Group;
use crate::process::{Process, say};
use crate::relay::{Fate, Moment, Relay};
use crate::table::{Outcome, Row};
use crate::trial::{self, PATIENCE};
use crate::{connection, table};

/// The counting guest has not come to its end before it is moved.
fn counts() -> u64 {
    if table::in_lab() { 200 } else { 600 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Payload {
    /// All of its state is in registers, and its result is right or not.
    Registers,
    /// Each count leaves the guest in three ways.
    Counter,
}

/// A side stands still here, to be killed.
#[derive(Clone, Copy, Debug)]
struct Step {
    side: Side,
    kind: u32,
    moment: Moment,
}

impl Step {
    fn all() -> Vec<Self> {
        let mut steps = Vec::new();
        for side in [Side::Source, Side::Destination] {
            for kind in connection::MESSAGES {
                let of_destination = matches!(kind, frame::OFFER | frame::READY | frame::RUNNING);
                let writes = of_destination == (side == Side::Destination);
                let moments: &[Moment] = if writes {
                    &[Moment::Writing, Moment::Between, Moment::Written]
                } else {
                    &[Moment::Reading, Moment::Read]
                };
                steps.extend(moments.iter().map(|&moment| Self { side, kind, moment }));
            }
        }
        steps
    }

    /// Whether the side that is killed here has the guest: then the guest ends with it.
    fn has_guest(self) -> bool {
        let done = |kind| {
            let at = |kind| connection::MESSAGES.iter().position(|&other| other == kind);
            (at(self.kind), self.moment) > (at(kind), Moment::Between)
        };
        match self.side {
            Side::Source => !done(frame::COMMIT),
            Side::Destination => done(frame::RUNNING),
        }
    }
}

pub(crate) fn run(_host: &Host) -> Vec<Row> {
    let mut rows = Vec::new();
    for payload in [Payload::Registers, Payload::Counter] {
        for side in [Side::Source, Side::Destination] {
            let guest = match payload {
                Payload::Registers => "computes",
                Payload::Counter => "counts OUTs",
            };
            let mut row =
                Row::new(format!("kill -9 of the {side:?}, guest {guest}").to_lowercase());
            for step in Step::all().into_iter().filter(|step| step.side == side) {
                // Under emulation, each payload at half of the steps.
                let turn = (step.kind as usize + step.moment as usize + payload as usize) % 2;
                if !table::in_lab() || turn == 0 {
                    row.add(killed_at(step, payload));
                }
            }
            rows.push(row);
        }
    }
    rows
}

fn killed_at(step: Step, payload: Payload) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    let witness = folder.path().join("witness");
    File::create(&witness).expect("it can be made");
    let (here, there) = trial::pair();
    let start = |side: Side, socket: UnixStream| {
        let step = if side == step.side {
            format!("{} {:?}", step.kind, step.moment)
        } else {
            "0 -".to_owned()
        };
        let job = format!("{side:?} {payload:?} {step} {}", witness.display());
        Process::start(Group::Kill, &job, OwnedFd::from(socket))
    };
    // Each end belongs to its process alone: these here are closed.
    let mut source = start(Side::Source, here);
    let mut destination = start(Side::Destination, there);
    let (victim, survivor) = match step.side {
        Side::Source => (&mut source, destination),
        Side::Destination => (&mut destination, source),
    };
    assert_eq!(victim.hear().as_deref(), Some("at the step"), "{step:?}");
    victim.kill();
    let said = survivor.passes();
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    let victims = victim.hear();
    assert_eq!(victims, None, "it did nothing behind the step");
    let witnessed = fs::read(&witness).expect("it is there");
    match said.as_slice() {
        ["it is here", "right"] => {
            assert!(
                !step.has_guest(),
                "{step:?}: it ran in the one that was killed"
            );
            assert_whole(payload, &witnessed, true);
            match step.side {
                Side::Source => Outcome::Moved,
                Side::Destination => Outcome::Stays,
            }
        }
        ["it is not here"] => {
            assert_whole(payload, &witnessed, false);
            if step.has_guest() {
                Outcome::EndedWithItsOwner
            } else {
                Outcome::Lost
            }
        }
        other => panic!("{step:?}: {other:?}"),
    }
}

/// Nothing came twice and nothing is missing; all of it, where the guest has come to its end.
fn assert_whole(payload: Payload, witnessed: &[u8], to_its_end: bool) {
    match payload {
        Payload::Registers => {
            let text = String::from_utf8_lossy(witnessed);
            for vcpu in 0..trial::vcpus() {
                let times = text.matches(char::from(b'0' + vcpu)).count();
                assert!(times <= 1 && (times == 1 || !to_its_end), "{text}");
            }
        }
        Payload::Counter => {
            let mut next = [0_u64; 2];
            let (records, rest) = witnessed.as_chunks::<5>();
            assert_eq!(rest, [0; 0]);
            for &[vcpu, a, b, c, d] in records {
                let count = u64::from(u32::from_le_bytes([a, b, c, d]));
                let next = &mut next[usize::from(vcpu)];
                assert_eq!(count, *next, "vCPU {vcpu}");
                *next += 1;
            }
            assert!(!to_its_end || next == [counts(); 2], "{next:?}");
        }
    }
}

/// Devices whose output outlives the process.
struct Witness {
    payload: Payload,
    file: File,
    console: Console,
}

impl Bus for Witness {
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        let append = |bytes: &[u8]| {
            let written = (&self.file).write(bytes).expect("there is room");
            assert_eq!(written, bytes.len(), "with one call");
        };
        match (self.payload, port) {
            (Payload::Counter, COUNT_PORT) => append(&[&[vcpu], data].concat()),
            (Payload::Counter, _) => {}
            (Payload::Registers, amx_guest::area::SERIAL_PORT) => append(data),
            (Payload::Registers, _) => return self.console.port_write(vcpu, port, data),
        }
        Ok(())
    }
}

/// What one side does, in its own process.
pub(crate) fn work(host: &Host, job: &str) {
    let [side, payload, kind, moment, witness] = job
        .splitn(5, ' ')
        .collect::<Vec<_>>()
        .try_into()
        .expect("five words");
    let payload = if payload == "Counter" {
        Payload::Counter
    } else {
        Payload::Registers
    };
    let bus = Witness {
        payload,
        file: File::options()
            .append(true)
            .open(Path::new(witness))
            .expect("it is there"),
        console: Console::default(),
    };
    let kind: u32 = kind.parse().expect("a number");
    let mut step = Waiting {
        kind,
        moment: moment.to_owned(),
        read: 0,
        is_source: side == "Source",
    };
    let stdin = std::io::stdin();
    let fd = std::os::fd::AsFd::as_fd(&stdin)
        .try_clone_to_owned()
        .expect("the connection");
    // So that it is closed where it is dropped.
    nix::unistd::dup2_stdin(File::open("/dev/null").expect("it is there"))
        .expect("it can be closed");
    let relay = Relay::new(UnixStream::from(fd), |moment, message| {
        step.hook(moment, message)
    });
    if side == "Source" {
        let mut vm = match payload {
            Payload::Registers => trial::guest(host),
            Payload::Counter => {
                let mut vm = Vm::boot_counter(host, 2, counts()).expect("the guest boots");
                let ended = vm.run(&bus, Duration::from_millis(2)).expect("it runs");
                assert_eq!(ended, Ended::Stopped);
                vm
            }
        };
        match send(
            &mut vm,
            host,
            (&bus, None),
            relay,
            &trial::options(),
            |_| {},
        ) {
            Ok(_) => say("it is not here"),
            Err(SendError::Undecided) => say("undecided"),
            Err(_) => goes_on(host, vm, payload, &bus),
        }
    } else {
        match receive(host, relay, PATIENCE) {
            Ok(received) => goes_on(host, received.vm, payload, &bus),
            Err(_) => say("it is not here"),
        }
    }
}

/// The step at which this process is to be killed.
struct Waiting {
    kind: u32,
    moment: String,
    /// Messages that have been read.
    read: usize,
    is_source: bool,
}

impl Waiting {
    fn hook(&mut self, moment: Moment, message: &mut [u8]) -> Fate {
        let of_destination = [frame::OFFER, frame::READY, frame::RUNNING];
        let of_source = [frame::HELLO, frame::PAGES, frame::STATE, frame::COMMIT];
        let kind = match moment {
            Moment::Reading if self.is_source => of_destination.get(self.read).copied(),
            Moment::Reading => of_source.get(self.read).copied(),
            _ => Some(frame::kind(message)),
        };
        if moment == Moment::Read {
            self.read += 1;
        }
        if kind == Some(self.kind) && format!("{moment:?}") == self.moment {
            wait_to_be_killed();
        }
        Fate::Pass
    }
}

fn wait_to_be_killed() -> ! {
    say("at the step");
    loop {
        thread::park();
    }
}

fn goes_on(host: &Host, mut vm: Vm, payload: Payload, bus: &Witness) {
    say("it is here");
    // To its last word, which comes after its results.
    let ended = vm.run(bus, PATIENCE).expect("the guest runs on");
    assert_eq!(ended, Ended::Halted);
    if payload == Payload::Registers {
        trial::assert_computes_on_with(host, vm, bus);
    }
    say("right");
}
