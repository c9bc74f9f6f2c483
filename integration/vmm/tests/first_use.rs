//! The reference VMM with the gate: the XFD payload, booted and restored in the middle.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use amx_guest::Workload;
use amx_guest::workload::check_armed;
use amx_vmm::{Console, Doorbell, Ended, FirstUse, Vm};
use support::lab::skip;
use support::{LONG, amx_host, finish, host};
use vcpu_realloc::kvm::Mode;
use vcpu_realloc::{Answer, SavedGrant};

#[test]
fn the_first_use_is_seen_and_the_guest_goes_through() {
    let Some(host) = amx_host() else { return };
    let mut vm = Vm::boot_armed(&host).unwrap();
    let new = Some(SavedGrant::default());
    let mut first_use = FirstUse::watch(&host, &mut vm, new, Answer::Grant).unwrap();
    // Armed, and not used.
    let ended = vm.run_watched(&mut first_use, &Doorbell::default(), LONG);
    assert_eq!(ended.unwrap(), Ended::Stopped);
    assert_eq!(first_use.first_use(), None);
    assert_eq!(first_use.gate().mode(), Mode::Trapping);

    let snapshot = vm.capture(&host).unwrap();
    let mut restored = Vm::restore(&host, &snapshot).unwrap();
    let grant = Some(first_use.gate().saved_grant());
    let mut watched = FirstUse::watch(&host, &mut restored, grant, Answer::Grant).unwrap();
    for (vm, first_use) in [(&mut vm, &mut first_use), (&mut restored, &mut watched)] {
        // It rings again in the middle of its #NM handler.
        let mut ended = Ended::Stopped;
        while ended == Ended::Stopped {
            let bell = Doorbell::default();
            ended = vm.run_watched(first_use, &bell, LONG).unwrap();
        }
        assert!(check_armed(&vm.read_area(0).unwrap()).is_empty());
        assert!(matches!(first_use.first_use(), Some((0, _))));
        assert_eq!(first_use.gate().mode(), Mode::Lifted);
    }
}

/// A guest without AMX, or one that never arms it, is not touched.
#[test]
fn a_watched_guest_that_arms_nothing_goes_through() {
    let Some(host) = host() else { return };
    let Some(kind) = host.best_kind() else {
        skip(&"this host has nothing that the payloads use");
        return;
    };
    let workloads = [Workload::new(kind, 3, 50)];
    let mut vm = Vm::boot(&host, kind, &workloads).unwrap();
    let new = Some(SavedGrant::default());
    let mut first_use = FirstUse::watch(&host, &mut vm, new, Answer::Grant).unwrap();
    let ended = vm.run_watched(&mut first_use, &Console::default(), LONG);
    assert_eq!(ended.unwrap(), Ended::Halted);
    assert!(finish(&mut vm, &workloads).iter().all(Vec::is_empty));
    assert_eq!(first_use.first_use(), None);
}
