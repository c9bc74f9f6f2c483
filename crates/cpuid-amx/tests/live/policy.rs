//! What policies make of KVM's own table, and that KVM takes it and gives it to the guest.

use cpuid_amx::kvm::set_cpuid;
use cpuid_amx::{
    Amx, AmxFeatures, CpuidTable, FeatureSet, GuestPermission, Level, Policy, PolicyError, Table,
    coherence,
};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::process::alone;
use crate::vm::{has_amx, supported, vm, without_amx};

/// A vCPU that has this table, and the table that KVM made of it.
fn vcpu_with(vm: &VmFd, id: u64, cpuid: &CpuId, permission: &GuestPermission) -> (VcpuFd, Table) {
    let vcpu = vm.create_vcpu(id).unwrap();
    let set = set_cpuid(&vcpu, cpuid, Some(permission)).unwrap();
    assert_eq!(set.unexpected().count(), 0);
    let effective = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    // As a sorted table, without what nobody sees: Linux 6.1 fills it up with zeros for leaf 0.
    (vcpu, effective.entries().collect())
}

fn features(cpuid: &impl CpuidTable) -> FeatureSet {
    FeatureSet::from_cpuid(|leaf, subleaf| cpuid.leaf(leaf, subleaf))
}

#[test]
fn kvm_takes_what_each_policy_makes() {
    if !alone("policy::kvm_takes_what_each_policy_makes") {
        return;
    }
    if !has_amx() {
        println!("skipped: no AMX on this host");
        return;
    }
    let Some((kvm, vm)) = vm() else { return };
    let permission = GuestPermission::request().unwrap();
    let table = supported(&kvm);
    if !features(&table).amx.contains(AmxFeatures::TILE) {
        println!("skipped: this KVM has no AMX, although its host has");
        return;
    }
    let available = features(&table).amx;
    // Each set with AMX-TILE that this processor can carry, each level, none, and all.
    let sets = (0..=AmxFeatures::all().bits())
        .map(AmxFeatures::from_bits_retain)
        .filter(|set| set.contains(AmxFeatures::TILE) && available.contains(*set))
        .map(|set| (Policy::exactly(set), set));
    let levels = Level::ALL
        .into_iter()
        .filter(|level| available.contains(level.features()))
        .map(|level| (Policy::level(level), level.features()));
    let others = [
        (Policy::hide_amx(), AmxFeatures::empty()),
        (Policy::expose_all(), available),
        (
            Policy::expose_all().permitted(permission.granted()),
            available,
        ),
    ];
    let mut count = 0;
    for (id, (policy, expected)) in (0..).zip(sets.chain(levels).chain(others)) {
        let mut cpuid = table.clone();
        policy.apply(&mut cpuid).unwrap();
        assert_eq!(coherence::check(&cpuid), []);
        let (_vcpu, effective) = vcpu_with(&vm, id, &cpuid, &permission);
        // What the guest sees is what the policy says, also with KVM's own sizes for XCR0 = 1.
        assert_eq!(features(&effective).amx, expected);
        assert_eq!(coherence::check(&effective), []);
        let amx = Amx::from_cpuid(|leaf, subleaf| effective.leaf(leaf, subleaf));
        assert_eq!(amx.usable().is_ok(), !expected.is_empty());
        count += 1;
    }
    // At least the sets of Sapphire Rapids.
    assert!(count >= 4 + 1 + 3, "{count}");
}

/// KVM's own table, asked for before the permission, contradicts itself; every policy makes it whole.
#[test]
fn a_table_from_before_the_permission_becomes_coherent() {
    if !alone("policy::a_table_from_before_the_permission_becomes_coherent") {
        return;
    }
    let Some((kvm, vm)) = vm() else { return };
    let mut before = supported(&kvm);
    let other = vm.create_vcpu(1).unwrap();
    let rewrites = set_cpuid(&other, &without_amx(&kvm), None)
        .is_ok_and(|set| set.unexpected().next().is_some());
    Policy::expose_all().apply(&mut before).unwrap();
    assert_eq!(coherence::check(&before), []);
    assert_eq!(features(&before).amx, AmxFeatures::empty());
    assert!(matches!(
        Policy::level(Level::SapphireRapids).apply(&mut before),
        Err(PolicyError::Unusable { .. })
    ));
    let vcpu = vm.create_vcpu(0).unwrap();
    let set = set_cpuid(&vcpu, &before, None).unwrap();
    if rewrites {
        println!("skipped: this KVM takes CPUID from the processor");
    } else {
        assert_eq!(set.unexpected().count(), 0);
    }
}
