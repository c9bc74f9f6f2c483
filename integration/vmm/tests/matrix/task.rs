//! What this program does when it has been sent into a lab.

use std::fs;
use std::path::Path;

use amx_guest::report::Wish;
use amx_vmm::linux::devices::Devices;
use amx_vmm::linux::initramfs;
use amx_vmm::linux::log::Log;
use amx_vmm::{Host, Linux, RestoreError, Snapshot, Vm, file};
use serde::{Deserialize, Serialize};
use xsave_state::XFeatures;

use crate::support::{GUEST_KERNEL, end, let_work, with_live};

/// Where the snapshot lies that was sent along.
pub(crate) const SNAPSHOT: &str = "/in/guest.snapshot";
/// What is left in the out folder.
pub(crate) const SAID: &str = "said.json";
pub(crate) const STOPPED: &str = "guest.snapshot";

/// One visit to a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Say what the host can do.
    Describe,
    /// Boot a guest, let it work, and leave its snapshot.
    Boot(Boot),
    /// Go on with the snapshot.
    GoOn(GoOn),
    /// The snapshot must be refused.
    Refuse,
}

/// What a guest without AMX is stopped with: the upper halves of YMM registers, which every processor has.
pub(crate) const VECTORS: XFeatures = XFeatures::AVX;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Boot {
    /// Hosts that it will go on on. It is stopped with live tiles where all of them have AMX, and otherwise with
    /// live vectors.
    pub(crate) others: Vec<host_compat::Host>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct GoOn {
    /// The extended state is put into the host's layout before.
    pub(crate) relayout: bool,
    /// The guest works and ends; otherwise it works and its snapshot is left.
    pub(crate) end: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Said {
    /// The host's kernel.
    pub(crate) host: String,
    /// The guest's kernel, where the guest has booted.
    pub(crate) guest: String,
    pub(crate) description: Option<host_compat::Host>,
    /// Why the snapshot was refused.
    pub(crate) refused: Option<String>,
    /// The components in use on each vCPU at the stop, and its XCR0.
    pub(crate) vcpus: Vec<(u64, u64)>,
    /// Bytes of the extended state of a vCPU: as it came, as it was restored, at the stop.
    pub(crate) bytes: Vec<usize>,
    pub(crate) processes: Vec<Process>,
}

/// A process of the guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its last round.
    pub(crate) round: u64,
    /// How many this host has seen, all right.
    pub(crate) rounds: u64,
}

impl Said {
    pub(crate) fn live(&self) -> XFeatures {
        let live = self.vcpus.iter().map(|(live, _)| *live);
        XFeatures::from_bits_retain(live.fold(0, |all, live| all | live))
    }

    pub(crate) fn xcr0(&self) -> XFeatures {
        XFeatures::from_bits_retain(self.vcpus.first().map_or(0, |(_, xcr0)| *xcr0))
    }

    pub(crate) fn rounds(&self) -> u64 {
        self.processes.iter().map(|process| process.rounds).sum()
    }

    /// Each process that works has gone on where it was: none has begun again, and none has skipped a round.
    pub(crate) fn went_on(&self, before: &Self) -> bool {
        let both = self.processes.iter().zip(&before.processes);
        let mut working = both.filter(|(now, _)| now.rounds > 0).peekable();
        working.peek().is_some()
            && working.all(|(now, before)| now.round == before.round + now.rounds)
    }

    fn has_log(&mut self, log: &Log) {
        if let Some(up) = &log.up {
            self.guest.clone_from(&up.kernel);
        }
        let processes = log.processes.iter().map(|process| Process {
            round: process.round,
            rounds: process.rounds,
        });
        self.processes = processes.collect();
    }

    fn is_stopped(&mut self, snapshot: &Snapshot) {
        self.has_bytes(snapshot);
        let vcpus = snapshot.vcpus().iter().map(|vcpu| {
            let extended = vcpu.extended();
            let live = extended.image().xstate_bv().bits();
            (live, extended.registers().xcr0.bits())
        });
        self.vcpus = vcpus.collect();
        let out = std::env::var("AMX_LAB_OUT").expect("the lab says where");
        file::write(&Path::new(&out).join(STOPPED), &snapshot.to_bytes()).expect("it is written");
    }

    fn has_bytes(&mut self, snapshot: &Snapshot) {
        let bytes = snapshot
            .vcpus()
            .first()
            .map(|vcpu| vcpu.extended().image().as_bytes().len());
        self.bytes.extend(bytes);
    }
}

/// In the lab.
pub(crate) fn act(task: &str) {
    let task: Task = serde_json::from_str(task).expect("this program has written it");
    let mut said = Said {
        host: amx_vmm::host::kernel().expect("/proc is there"),
        ..Said::default()
    };
    let host = Host::probe().expect("the lab has KVM");
    match task {
        Task::Describe => said.description = Some(host_compat::probe()),
        Task::Boot(boot) => boot.act(&host, &mut said),
        Task::GoOn(go_on) => go_on.act(&host, &mut said),
        Task::Refuse => match Vm::restore(&host, &snapshot()) {
            Err(RestoreError::Unfit(why)) => said.refused = Some(why.to_string()),
            Err(other) => panic!("refused too late: {other}"),
            Ok(_) => panic!("taken"),
        },
    }
    let out = std::env::var("AMX_LAB_OUT").expect("the lab says where");
    let text = serde_json::to_vec(&said).expect("it is plain data");
    fs::write(Path::new(&out).join(SAID), text).expect("it is written");
}

fn snapshot() -> Snapshot {
    let bytes = file::read(Path::new(SNAPSHOT)).expect("it was sent along");
    Snapshot::from_bytes(&bytes).expect("it is a snapshot")
}

/// What a guest is stopped with.
fn live(tiles: bool) -> XFeatures {
    if tiles { XFeatures::XTILEDATA } else { VECTORS }
}

impl Boot {
    fn act(self, host: &Host, said: &mut Said) {
        let folder = Path::new(GUEST_KERNEL);
        let module = fs::read(folder.join(amx_lab::MSR_MODULE)).expect("it was sent along");
        let mut linux = Linux::new(folder.join(amx_lab::VMLINUX));
        linux.initramfs = initramfs::with_init(&[(amx_lab::MSR_MODULE, &module)]);
        let has_tiles = |other: &host_compat::Host| {
            let features = other.guest_features();
            features.user().contains(XFeatures::XTILEDATA)
        };
        let live = live(self.others.iter().all(has_tiles));
        linux.others = self.others;
        let mut vm = Vm::boot_linux(host, &linux).expect("it is loaded");
        let devices = Devices::new(&vm);
        let_work(&mut vm, &devices, 1);
        let snapshot = with_live(&mut vm, host, &devices, live);
        said.has_log(&devices.log());
        said.is_stopped(&snapshot);
    }
}

impl GoOn {
    fn act(self, host: &Host, said: &mut Said) {
        let mut snapshot = snapshot();
        said.has_bytes(&snapshot);
        if self.relayout {
            snapshot = snapshot.relayout(host).expect("nothing is lost");
        }
        said.has_bytes(&snapshot);
        let tiles = snapshot.vcpus().iter().any(|vcpu| {
            let xcr0 = vcpu.extended().registers().xcr0;
            xcr0.contains(XFeatures::XTILEDATA)
        });
        let mut vm = Vm::restore(host, &snapshot).expect("it is restored");
        let platform = snapshot.platform().expect("it is of a Linux guest");
        let devices = Devices::restore(&vm, platform.devices()).expect("they are restored");
        drop(snapshot);
        let_work(&mut vm, &devices, 2);
        if self.end {
            said.has_log(&end(&mut vm, &devices, Wish::PowerOff));
        } else {
            let live = live(tiles);
            let snapshot = with_live(&mut vm, host, &devices, live);
            said.has_log(&devices.log());
            said.is_stopped(&snapshot);
        }
    }
}
