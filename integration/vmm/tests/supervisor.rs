//! IA32_XSS and what it enables: why the MSR list is enough.
//!
//! KVM_GET_XSAVE2 has no supervisor components. Their content has MSRs of its own, and IA32_XSS is in
//! KVM_GET_MSR_INDEX_LIST where a guest can have any of them (arch/x86/kvm/x86.c, `kvm_probe_msr_to_save`).
//! Where it is not in the list it can only be 0: that is what is tested here, on the KVM that is here.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use amx_guest::Workload;
use amx_vmm::{Host, Snapshot, Vm};
use cpuid_amx::{CpuidTable, FeatureSet};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use support::{finish, host};

/// SDM Vol. 4, table 2-2.
const MSR_IA32_XSS: u32 = 0xda0;

#[test]
fn it_is_among_the_msrs_or_it_is_0() {
    let Some(host) = host() else { return };
    let guest = host.guest_cpuid();
    let features = FeatureSet::from_cpuid(|l, s| CpuidTable::leaf(guest, l, s));
    let supervisor = features.supervisor();
    let listed = host.msr_indices().contains(&MSR_IA32_XSS);
    println!("guests have the supervisor components {supervisor}; IA32_XSS is listed: {listed}");
    if !supervisor.is_empty() {
        assert!(listed, "what can be enabled is saved");
    }
    if listed {
        return;
    }
    let (_vm, vcpu) = vcpu(&host);
    assert!(matches!(read(&vcpu, MSR_IA32_XSS), None | Some(0)));
    for bit in 0..64 {
        let taken = vcpu.set_msrs(&msr(MSR_IA32_XSS, 1 << bit));
        assert_eq!(
            taken.expect("it is asked"),
            0,
            "IA32_XSS[{bit}] can be set, and would not be saved"
        );
    }
}

/// A vCPU of its own VM, that has its CPUID.
fn vcpu(host: &Host) -> (VmFd, VcpuFd) {
    let vm = host.kvm().create_vm().expect("there is KVM");
    let vcpu = vm.create_vcpu(0).expect("it has room");
    let permission = host.permission().ok();
    let _ = cpuid_amx::kvm::set_cpuid(&vcpu, host.cpuid(), permission).expect("it is KVM's own");
    (vm, vcpu)
}

fn msr(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).expect("one has room")
}

fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = msr(index, 0);
    let read = vcpu.get_msrs(&mut msrs).expect("it is asked");
    (read == 1).then(|| msrs.as_slice()[0].data)
}

/// Nothing of the list is left out but the extended state's own two.
#[test]
fn all_msrs_of_the_list_that_can_be_read_are_captured_and_arrive() {
    const EXTENDED_STATE: [u32; 2] = [0x1c4, 0x1c5];
    let Some(host) = host() else { return };
    let kind = host.best_kind().expect("any processor has SSE");
    let workloads = [Workload::new(kind, 1, kind.default_rounds())];
    let mut vm = Vm::boot(&host, kind, &workloads).expect("it boots");
    let bytes = vm.capture(&host).expect("it is captured").to_bytes();
    let snapshot = Snapshot::from_bytes(&bytes).expect("it is read");
    let captured = |snapshot: &Snapshot| -> Vec<u32> {
        let msrs = snapshot.vcpus()[0].msrs().iter();
        msrs.map(|msr| msr.index).collect()
    };
    let (_vm, other) = vcpu(&host);
    let listed = host.msr_indices().iter().copied();
    let readable: Vec<u32> = listed
        .filter(|index| !EXTENDED_STATE.contains(index) && read(&other, *index).is_some())
        .collect();
    println!(
        "{} MSRs of {} are captured",
        captured(&snapshot).len(),
        host.msr_indices().len()
    );
    assert_eq!(captured(&snapshot), readable);
    for index in EXTENDED_STATE {
        assert!(!captured(&snapshot).contains(&index), "{index:#x}");
    }
    let mut restored = Vm::restore(&host, &snapshot).expect("it is restored");
    let again = restored.capture(&host).expect("it is captured");
    assert_eq!(captured(&again), captured(&snapshot));
    assert_eq!(finish(&mut restored, &workloads), [[""; 0]]);
}
