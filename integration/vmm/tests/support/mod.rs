//! What the tests share.

#![allow(
    dead_code,
    clippy::arithmetic_side_effects,
    reason = "no test program uses all of it; small numbers"
)]

use std::time::Duration;

use amx_guest::{Kind, Workload};
use amx_vmm::{Console, Ended, Host, HostError, Snapshot, Vm};

/// No guest of these tests runs longer.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// The host, or `None` with a line that says what was skipped and why.
pub(crate) fn host() -> Option<Host> {
    match Host::probe() {
        Ok(host) => Some(host),
        Err(error @ (HostError::NoKvm { .. } | HostError::Permission { .. })) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// `vcpus` tasks with different inputs.
pub(crate) fn workloads(kind: Kind, vcpus: u8, seed: u64, rounds: u64) -> Vec<Workload> {
    (0..u64::from(vcpus))
        .map(|vcpu| Workload::new(kind, seed * 1000 + vcpu, rounds))
        .collect()
}

/// Runs `vm` to the end and gives the wrong registers of each vCPU.
pub(crate) fn finish(vm: &mut Vm, workloads: &[Workload]) -> Vec<Vec<String>> {
    let console = Console::default();
    let ended = vm.run(&console, LONG).expect("the guest runs on");
    assert_eq!(ended, Ended::Halted, "the guest comes to its end");
    (0..)
        .zip(workloads)
        .map(|(index, workload)| {
            let area = vm.read_area(index).expect("the area is in guest memory");
            let differences = workload.check(&area);
            differences.into_iter().map(|d| d.register).collect()
        })
        .collect()
}

/// A guest of `kind` stopped in the middle, with its tasks.
pub(crate) fn stopped(host: &Host, kind: Kind, vcpus: u8, seed: u64) -> (Snapshot, Vec<Workload>) {
    let workloads = workloads(kind, vcpus, seed, kind.default_rounds());
    let mut vm = Vm::boot(host, kind, &workloads).expect("the guest boots");
    let console = Console::default();
    // A busy machine may not have let each vCPU get to its first round.
    loop {
        let ended = vm
            .run(&console, Duration::from_millis(5))
            .expect("the guest runs");
        assert_eq!(ended, Ended::Stopped, "the guest was stopped in the middle");
        let snapshot = vm.capture(host).expect("it can be captured");
        if snapshot.is_midway(&workloads) {
            return (snapshot, workloads);
        }
    }
}
