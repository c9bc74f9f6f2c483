//! A Linux guest behind the gate: its first use of AMX is seen once, can be stopped and granted later, here or
//! elsewhere; and what it makes of a denial. Where there is a kernel for it: in the AMX lab, as `tests/linux.rs`.

#![allow(clippy::indexing_slicing)]

mod support;

use std::time::Duration;

use amx_guest::report::{LOADS, Load};
use amx_vmm::linux::devices::Devices;
use amx_vmm::linux::log::Log;
use amx_vmm::{FirstUse, Host, Linux, Snapshot, Vm};
use support::{LONG, linux_guest};
use vcpu_realloc::kvm::Mode;
use vcpu_realloc::{Answer, SavedGrant};
use xsave_state::XFeatures;

/// How long the guest runs between looks at what it has reported.
const SLICE: Duration = Duration::from_millis(20);
/// So many slices without what is waited for, and the guest hangs.
const SLICES: u32 = 500;

struct Guest {
    vm: Vm,
    devices: Devices,
    first_use: FirstUse,
}

impl Guest {
    fn boot(host: &Host, linux: &Linux, answer: Answer) -> Self {
        let mut vm = Vm::boot_linux(host, linux).expect("it is loaded");
        let devices = Devices::new(&vm);
        let new = Some(SavedGrant::default());
        let first_use = FirstUse::watch(host, &mut vm, new, answer).expect("it is watched");
        Self {
            vm,
            devices,
            first_use,
        }
    }

    fn run(&mut self, time: Duration) {
        let Self {
            vm,
            devices,
            first_use,
        } = self;
        vm.run_watched(first_use, devices, time)
            .expect("the guest runs");
    }

    /// Lets it run until `done`, and as long as all is right.
    fn run_until(&mut self, done: impl Fn(&Log) -> bool) {
        for _ in 0..SLICES {
            self.run(SLICE);
            let log = self.devices.log();
            assert!(log.is_right(), "{log:#?}\n{}", self.devices.console());
            if done(&log) {
                return;
            }
        }
        panic!(
            "it hangs: {:#?}\n{}",
            self.devices.log(),
            self.devices.console()
        );
    }

    /// Each of its processes has more rounds, all right, with one first use.
    fn computes_on(&mut self) {
        let before = self.devices.log();
        self.run_until(|log| log.went_on(&before, 3));
        let gate = self.first_use.gate();
        assert_eq!(gate.first_uses().len(), 1, "{:?}", gate.first_uses());
        // From here on no write of IA32_XFD leaves KVM.
        assert_eq!(gate.mode(), Mode::Lifted);
        for (load, process) in LOADS.iter().zip(&self.devices.log().processes) {
            assert!(process.lacks.is_none() && process.rounds > 0, "{load:?}");
        }
    }

    fn capture(&mut self, host: &Host) -> Snapshot {
        let snapshot = self.vm.capture_linux(host, &self.devices);
        snapshot.expect("it is captured")
    }
}

#[test]
fn its_first_use_is_seen_once_whatever_the_number_of_its_vcpus() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    for vcpus in [1, 2, 4] {
        linux.vcpus = vcpus;
        let mut guest = Guest::boot(&host, &linux, Answer::Grant);
        guest.computes_on();
    }
}

/// It stands in front of its write, as often as it is let run, and is granted there, or where it is restored.
#[test]
fn it_is_stopped_at_its_first_use_and_granted_later_here_or_elsewhere() {
    let Some((host, linux)) = linux_guest() else {
        return;
    };
    let mut guest = Guest::boot(&host, &linux, Answer::Stop);
    let mut last = None;
    let stopped = (0..SLICES).find_map(|_| {
        guest.run(LONG);
        let now = guest.capture(&host);
        let place = *now.vcpus()[0].general();
        (last.replace(place) == Some(place)).then_some(now)
    });
    let stopped = stopped.expect("it comes to its first use");
    let state = stopped.vcpus()[0].extended();
    assert_eq!(state.registers().xfd, XFeatures::XTILEDATA);
    assert!(!state.image().xstate_bv().contains(XFeatures::XTILEDATA));
    let grant = guest.first_use.gate().saved_grant();
    assert!(!grant.has_been());

    let platform = stopped.platform().expect("it is a Linux guest");
    let mut vm = Vm::restore(&host, &stopped).expect("it is restored");
    let devices = Devices::restore(&vm, platform.devices()).expect("they are restored");
    let first_use =
        FirstUse::watch(&host, &mut vm, Some(grant), Answer::Grant).expect("it is watched");
    let mut elsewhere = Guest {
        vm,
        devices,
        first_use,
    };
    elsewhere.computes_on();

    guest.first_use.set_answer(Answer::Grant);
    guest.computes_on();
}

/// Its kernel warns once and believes the write. So each task with tiles raises #NM without end: it gets nowhere, and
/// nobody ends it. The others compute on.
#[test]
fn denied_its_tasks_with_tiles_get_nowhere_and_never_end() {
    let Some((host, mut linux)) = linux_guest() else {
        return;
    };
    linux.command_line = linux.command_line.replace("quiet", "");
    let mut guest = Guest::boot(&host, &linux, Answer::Deny);
    let has_tiles = |load: &Load| !matches!(load, Load::Denied | Load::Xfd | Load::Vectors);
    for rounds in [3, 6, 9] {
        let others_work = |log: &Log| {
            let mut processes = LOADS.iter().zip(&log.processes);
            processes.all(|(load, process)| has_tiles(load) || process.rounds >= rounds)
        };
        guest.run_until(others_work);
        for (load, process) in LOADS.iter().zip(&guest.devices.log().processes) {
            let stands_still = (process.rounds, process.died, process.ended) == (0, None, false);
            assert!(stands_still || !has_tiles(load), "{load:?}: {process:?}");
        }
    }
    let gate = guest.first_use.gate();
    assert!(gate.first_uses().is_empty() && gate.mode() == Mode::Trapping);
    let warned = guest.devices.console();
    let warning = "unchecked MSR access error: WRMSR to 0x1c4";
    assert_eq!(warned.matches(warning).count(), 1, "{warned}");
}
