//! KVM_SET_CPUID2.

use cpuid_amx::kvm::{SetCpuidError, set_cpuid};
use cpuid_amx::{Contradiction, CpuidTable, GuestPermission, coherence};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid2};
use xsave_state::XFeatures;

use crate::process::alone;
use crate::seccomp::with_errno;
use crate::vm::{changed, has_amx, run_to_halt, supported, user_components, vm, without_amx};

/// _IOW(KVMIO, 0x90, struct kvm_cpuid2)
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
/// _IOWR(KVMIO, 0x91, struct kvm_cpuid2)
const KVM_GET_CPUID2: u32 = 0xc008_ae91;

#[test]
fn amx_is_set_with_the_permission() {
    if !has_amx() {
        println!("skipped: no AMX on this host");
        return;
    }
    if !alone("cpuid::amx_is_set_with_the_permission") {
        return;
    }
    let Some((kvm, vm)) = vm() else { return };
    let before = supported(&kvm);
    let permission = GuestPermission::request().unwrap();
    let after = supported(&kvm);
    let vcpu = vm.create_vcpu(0).unwrap();

    if !user_components(&after).contains(XFeatures::XTILEDATA) {
        println!("skipped: this KVM has no AMX, although its host has");
        // With the permission it takes a table with AMX, and says nothing of leaving it out.
        let mut with_amx = after.clone();
        let [eax, ebx, ecx, edx] = after.leaf(0xd, 0);
        let both = [eax | 3 << 17, ebx, ecx, edx];
        with_amx.set_leaf(0xd, 0, both).unwrap();
        let set = set_cpuid(&vcpu, &with_amx, Some(&permission)).unwrap();
        let lost = set
            .unexpected()
            .find(|r| (r.leaf, r.subleaf) == (0xd, Some(0)))
            .unwrap();
        assert_eq!(lost.requested, Some(both));
        assert_eq!(lost.effective.unwrap()[0] & 3 << 17, 0);
        return;
    }

    // KVM filters 0DH alone, so that the first table contradicts itself and the second does not.
    assert!(
        coherence::check(&before)
            .iter()
            .any(|c| matches!(c, Contradiction::BeforePermission { .. }))
    );
    assert_eq!(coherence::check(&after), []);
    assert!(matches!(
        set_cpuid(&vcpu, &before, Some(&permission)),
        Err(SetCpuidError::TakenBeforePermission { .. })
    ));
    assert!(matches!(
        set_cpuid(&vcpu, &before, None),
        Err(SetCpuidError::TileWithoutPermission { .. })
    ));
    assert!(matches!(
        set_cpuid(&vcpu, &after, None),
        Err(SetCpuidError::NoPermission { .. })
    ));
    let set = set_cpuid(&vcpu, &after, Some(&permission)).unwrap();
    assert_eq!(set.unexpected().count(), 0);
}

#[test]
fn tile_data_without_a_proof_does_not_reach_kvm() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut cpuid = supported(&kvm);
    let [eax, ebx, ecx, edx] = cpuid.leaf(0xd, 0);
    let with_amx = [eax | 3 << 17, ebx, ecx, edx];
    cpuid.set_leaf(0xd, 0, with_amx).unwrap();
    // KVM would say EIO here: it is not asked.
    let result = with_errno(libc::SYS_ioctl, 1, KVM_SET_CPUID2, libc::EIO, || {
        set_cpuid(&vcpu, &cpuid, None)
    });
    assert!(matches!(result, Err(SetCpuidError::NoPermission { user })
        if user.contains(XFeatures::AMX)));
}

#[test]
fn what_kvm_makes_of_a_table_is_reported() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    // 0DH.0:EBX follows XCR0, which is 1 in a new vCPU, whatever the table says.
    let mut asked = without_amx(&kvm);
    let [eax, _, ecx, edx] = asked.leaf(0xd, 0);
    asked.set_leaf(0xd, 0, [eax, 0x1234, ecx, edx]).unwrap();
    assert!(coherence::check(&asked).iter().any(|c| matches!(
        c,
        Contradiction::EnabledSize {
            reported_bytes: 0x1234,
            ..
        }
    )));

    let set = set_cpuid(&vcpu, &asked, None).unwrap();
    let effective = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    let size = set
        .rewrites()
        .iter()
        .find(|r| (r.leaf, r.subleaf) == (0xd, Some(0)))
        .unwrap();
    assert_eq!(size.requested, Some([eax, 0x1234, ecx, edx]));
    assert_eq!(size.effective.unwrap()[1], 576);
    // All that differs is reported, and nothing else.
    for (asked, got) in asked.entries().zip(effective.entries()) {
        assert_eq!((asked.leaf, asked.subleaf), (got.leaf, got.subleaf));
        let reported = set
            .rewrites()
            .iter()
            .find(|r| (r.leaf, r.subleaf) == (asked.leaf, asked.subleaf));
        assert_eq!(
            reported.map(|r| (r.requested, r.effective)),
            (asked.value != got.value).then_some((Some(asked.value), Some(got.value)))
        );
    }
    for rewrite in set.unexpected() {
        println!("this KVM derives CPUID from its host: {rewrite}");
    }
    // What the vCPU has is taken as it is.
    let again = set_cpuid(&vcpu, &effective, None).unwrap();
    assert_eq!(again.rewrites(), []);
}

#[test]
fn too_many_entries() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    let entries = without_amx(&kvm).as_slice().to_vec();
    // `CpuId` admits no more than 256 itself, so that its memory is laid out here.
    let size = size_of::<kvm_cpuid2>();
    let entry_size = size_of_val(&entries[0]);
    let count = 257;
    let mut raw: Vec<kvm_cpuid2> = Vec::new();
    raw.resize_with(1 + (count * entry_size).div_ceil(size), Default::default);
    raw[0].nent = 257;
    // SAFETY: the vector has the header and room for 257 entries behind it, all of it
    // initialised, and any bytes are a valid entry.
    let cpuid = unsafe { CpuId::from_raw(raw) };
    assert_eq!(
        set_cpuid(&vcpu, &cpuid, None),
        Err(SetCpuidError::TooManyEntries { entries: 257 })
    );
}

#[test]
fn linear_address_bits() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut cpuid = without_amx(&kvm);
    let [eax, ebx, ecx, edx] = cpuid.leaf(0x8000_0008, 0);
    let with_bits = [eax & !0xff00 | 40 << 8, ebx, ecx, edx];
    cpuid.set_leaf(0x8000_0008, 0, with_bits).unwrap();
    assert_eq!(
        set_cpuid(&vcpu, &cpuid, None),
        Err(SetCpuidError::LinearAddressBits { bits: 40 })
    );
}

#[test]
fn after_a_run_only_the_same_cpuid_is_taken() {
    let Some((kvm, vm)) = vm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let _ = set_cpuid(&vcpu, &without_amx(&kvm), None).unwrap();
    run_to_halt(&vm, &mut vcpu);

    let effective = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    // What KVM keeps up to date itself is no difference.
    let other = changed(&effective, 0xd, 0, 1, 0x1000);
    let other = changed(&other, 0x8000_0001, 0, 2, 1 << 5);
    match set_cpuid(&vcpu, &other, None) {
        Err(SetCpuidError::AlreadyRan {
            difference: Some(difference),
        }) => {
            assert_eq!(difference.leaf, 0x8000_0001);
            assert_eq!(difference.requested, Some(other.leaf(0x8000_0001, 0)));
            assert_eq!(difference.effective, Some(effective.leaf(0x8000_0001, 0)));
        }
        other => panic!("{other:?}"),
    }
    match set_cpuid(&vcpu, &effective, None) {
        Ok(set) => assert_eq!(set.rewrites(), []),
        // Linux 6.1 does not take even what it gives (seen in the lab).
        Err(SetCpuidError::AlreadyRan { difference: None }) => {
            println!("this kernel refuses its own table after a run");
        }
        Err(other) => panic!("{other:?}"),
    }
}

/// The one errno that cannot be provoked at will: the kernel would have to run out of memory.
#[test]
fn no_memory() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = without_amx(&kvm);
    for errno in [libc::EFAULT, libc::ENOMEM] {
        let result = with_errno(libc::SYS_ioctl, 1, KVM_SET_CPUID2, errno, || {
            set_cpuid(&vcpu, &cpuid, None)
        });
        assert_eq!(result, Err(SetCpuidError::OutOfMemory { errno }));
    }
}

#[test]
fn what_cannot_be_read_back_is_said() {
    let Some((kvm, vm)) = vm() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = without_amx(&kvm);
    let result = with_errno(libc::SYS_ioctl, 1, KVM_GET_CPUID2, libc::EFAULT, || {
        set_cpuid(&vcpu, &cpuid, None)
    });
    assert_eq!(
        result,
        Err(SetCpuidError::ReadBack {
            errno: libc::EFAULT
        })
    );
    // It is set.
    assert!(
        !vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .unwrap()
            .as_slice()
            .is_empty()
    );
}
