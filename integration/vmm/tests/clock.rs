//! The guest's time in another VM: it goes on from where it was, neither back nor far ahead.

#![allow(clippy::arithmetic_side_effects)]

mod support;

use std::time::Duration;

use amx_vmm::{Console, Snapshot, Vm};
use support::{host, workloads};

/// SDM Vol. 4, table 2-2.
const MSR_IA32_TSC: u32 = 0x10;

/// A VM younger than a second has a TSC that KVM may take for that of a new vCPU.
#[test]
fn the_time_of_a_young_guest_goes_on_in_another_vm() {
    let Some(host) = host() else { return };
    let kind = host.best_kind().expect("any processor has SSE");
    let workloads = workloads(kind, 2, 5, 1 << 30);
    let mut vm = Vm::boot(&host, kind, &workloads).expect("the guest boots");
    // So long that the other VM is younger when its time is read.
    vm.run(&Console::default(), Duration::from_millis(400))
        .expect("it runs");
    let saved = vm.capture(&host).expect("it is captured");
    drop(vm);
    let mut restored = Vm::restore(&host, &saved).expect("it is restored");
    let after = restored.capture(&host).expect("it is captured");
    let (saved, after) = (times(&saved), times(&after));
    println!("TSC {saved:?}, in another VM {after:?}");
    // The guest stood still before either was read, and both go on from the first: what passed between
    // the two readings, neither has seen.
    let [stood_still, _] = saved;
    let khz = host.tsc_khz().expect("KVM knows the TSC's frequency");
    // Nothing here takes longer.
    let minute = 60 * 1000 * u64::from(khz);
    for after in after {
        assert!(after >= stood_still, "it has stepped back");
        assert!(after - stood_still < minute, "it has leapt");
    }
}

fn times(snapshot: &Snapshot) -> [u64; 2] {
    let of = |vcpu: &amx_vmm::snapshot::VcpuState| {
        let tsc = vcpu.msrs().iter().find(|msr| msr.index == MSR_IA32_TSC);
        tsc.expect("every KVM lists it").data
    };
    let [first, second] = snapshot.vcpus() else {
        panic!("two vCPUs")
    };
    [of(first), of(second)]
}
