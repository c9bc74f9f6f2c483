//! The permission and KVM_SET_CPUID2 on the kernel that is here.
//!
//! Each errno comes from the kernel where this machine can provoke it. Those that it cannot provoke
//! come from a seccomp filter, on a thread of its own: the calls are real, the answer is not. What
//! the machine lacks is said as `skipped: why`.
#![allow(
    unsafe_code,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use cpuid_amx::kvm::{SetCpuidError, set_cpuid};
use cpuid_amx::{
    Contradiction, CpuidTable, GuestPermission, PermissionError, coherence, permission,
};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid2, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use xsave_state::XFeatures;

const ARCH_GET_XCOMP_SUPP: u32 = 0x1021;
const ARCH_GET_XCOMP_GUEST_PERM: u32 = 0x1024;
const ARCH_REQ_XCOMP_GUEST_PERM: u32 = 0x1025;
/// _IOW(KVMIO, 0x90, struct kvm_cpuid2)
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
/// _IOWR(KVMIO, 0x91, struct kvm_cpuid2)
const KVM_GET_CPUID2: u32 = 0xc008_ae91;

/// Runs `test` on a thread where system call `number` with `value` as argument `argument` (0 to 5)
/// gives `errno` and does nothing. Errno 0 is success.
fn with_errno<T: Send>(
    number: libc::c_long,
    argument: u32,
    value: u32,
    errno: i32,
    test: impl FnOnce() -> T + Send,
) -> T {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let unless_equal = |k: u32, skip: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let give = libc::BPF_RET | libc::BPF_K;
    // struct seccomp_data: the number at 0, the arguments from 16, each 8 bytes.
    let mut filter = [
        statement(load, 0),
        unless_equal(number as u32, 3),
        statement(load, 16 + 8 * argument),
        unless_equal(value, 1),
        statement(give, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(give, libc::SECCOMP_RET_ALLOW),
    ];
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let program = libc::sock_fprog {
                    len: filter.len() as u16,
                    filter: filter.as_mut_ptr(),
                };
                let (yes, no): (libc::c_ulong, libc::c_ulong) = (1, 0);
                // SAFETY: sets a flag of this thread; the arguments are numbers.
                let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, no, no, no) };
                assert_eq!(result, 0);
                // SAFETY: `program` describes `filter`, with its length, and both outlive the
                // call, which copies them.
                let result = unsafe {
                    libc::prctl(
                        libc::PR_SET_SECCOMP,
                        libc::SECCOMP_MODE_FILTER,
                        &raw const program,
                    )
                };
                assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
                test()
            })
            .join()
            .unwrap()
    })
}

fn request_with_errno(errno: i32) -> PermissionError {
    with_errno(
        libc::SYS_arch_prctl,
        0,
        ARCH_REQ_XCOMP_GUEST_PERM,
        errno,
        || GuestPermission::request().unwrap_err(),
    )
}

/// KVM with one VM, or why not.
fn vm() -> Option<(Kvm, VmFd)> {
    match Kvm::new() {
        Ok(kvm) => {
            let vm = kvm.create_vm().unwrap();
            Some((kvm, vm))
        }
        Err(error) => {
            println!("skipped: no KVM here: {error}");
            None
        }
    }
}

fn supported(kvm: &Kvm) -> CpuId {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()
}

fn user_components(cpuid: &CpuId) -> XFeatures {
    let [low, _, _, high] = cpuid.leaf(0xd, 0);
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

fn changed(cpuid: &CpuId, leaf: u32, subleaf: u32, register: usize, xor: u32) -> CpuId {
    let mut cpuid = cpuid.clone();
    let mut value = cpuid.leaf(leaf, subleaf);
    value[register] ^= xor;
    cpuid.set_leaf(leaf, subleaf, value).unwrap();
    cpuid
}

/// Runs a guest that executes HLT and nothing else.
fn run_to_halt(vm: &VmFd, vcpu: &mut VcpuFd) {
    vm.set_tss_address(0xfffb_d000).unwrap();
    // SAFETY: a new private mapping at an address of the kernel's choice; it replaces nothing.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: `memory` is a writable mapping of 4096 bytes that nothing else refers to.
    unsafe { memory.cast::<u8>().write(0xf4) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: memory as u64,
    };
    // SAFETY: the region is a mapping of that size which is never unmapped.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
}

/// Runs an ignored test in a process of its own: the permission and its lock belong to the process.
fn in_a_process_of_its_own(test: &str) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", test])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    assert!(output.status.success(), "{text}");
    // A name that no test has passes too.
    assert!(text.contains("test result: ok. 1 passed"), "{text}");
}

fn has_amx() -> bool {
    permission::supported().is_ok_and(|supported| supported.contains(XFeatures::XTILEDATA))
}

#[test]
fn the_permission_is_what_this_host_can_give() {
    in_a_process_of_its_own("request_and_query");
}

#[test]
#[ignore = "run in a process of its own"]
fn request_and_query() {
    let supported = permission::supported();
    match GuestPermission::request() {
        Ok(permission) => {
            assert!(permission.granted().contains(XFeatures::XTILEDATA));
            assert_eq!(permission::granted(), Ok(permission.granted()));
            assert!(has_amx());
            // Asking again is allowed, also after a vCPU.
            let _kept = vm().map(|(_, vm)| vm.create_vcpu(0).unwrap());
            assert_eq!(GuestPermission::request(), Ok(permission));
        }
        Err(PermissionError::NotSupported { supported: named }) => {
            println!("skipped: no AMX on this host, so that nothing can be granted");
            assert_eq!(supported, Ok(named));
            assert!(named.contains(XFeatures::LEGACY));
            assert!(!named.contains(XFeatures::XTILEDATA));
            let granted = permission::granted().unwrap();
            assert!(!granted.contains(XFeatures::XTILEDATA));
        }
        Err(PermissionError::KernelTooOld) => {
            println!("skipped: this kernel is older than 5.17");
            assert_eq!(permission::granted(), Err(PermissionError::KernelTooOld));
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_first_vcpu_locks_the_permission() {
    if has_amx() {
        in_a_process_of_its_own("a_vcpu_and_then_the_permission");
    } else {
        println!("skipped: no AMX on this host, so that there is nothing to lock");
    }
}

#[test]
#[ignore = "run in a process of its own, where there is AMX"]
fn a_vcpu_and_then_the_permission() {
    let Some((_kvm, vm)) = vm() else { return };
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(
        GuestPermission::request(),
        Err(PermissionError::Locked { granted }) if !granted.contains(XFeatures::XTILEDATA)
    ));
}

#[test]
fn amx_is_set_with_the_permission() {
    if has_amx() {
        in_a_process_of_its_own("a_permission_and_then_amx");
    } else {
        println!("skipped: no AMX on this host");
    }
}

#[test]
#[ignore = "run in a process of its own, where there is AMX"]
fn a_permission_and_then_amx() {
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
        set_cpuid(&vcpu, &after, None),
        Err(SetCpuidError::NoPermission { .. })
    ));
    let set = set_cpuid(&vcpu, &after, Some(&permission)).unwrap();
    assert_eq!(set.unexpected().count(), 0);
}

#[test]
fn each_answer_to_the_request_has_its_name() {
    let granted = permission::granted().unwrap_or(XFeatures::empty());
    assert_eq!(
        request_with_errno(libc::EBUSY),
        PermissionError::Locked { granted }
    );
    assert_eq!(
        request_with_errno(libc::EOPNOTSUPP),
        PermissionError::NotSupported {
            supported: permission::supported().unwrap_or(XFeatures::empty())
        }
    );
    assert_eq!(
        request_with_errno(libc::EINVAL),
        PermissionError::KernelTooOld
    );
    for errno in [libc::EPERM, libc::EACCES, libc::ENOSYS] {
        assert_eq!(
            request_with_errno(errno),
            PermissionError::Filtered { errno }
        );
    }
    assert_eq!(
        request_with_errno(libc::EIO),
        PermissionError::Other { errno: libc::EIO }
    );
}

#[test]
fn a_success_that_granted_nothing_is_not_believed() {
    if permission::granted().is_ok_and(|granted| granted.contains(XFeatures::XTILEDATA)) {
        println!("skipped: this process has the permission already");
        return;
    }
    assert!(matches!(
        request_with_errno(0),
        PermissionError::NotGranted { granted } if !granted.contains(XFeatures::XTILEDATA)
    ));
}

#[test]
fn queries_that_fail_have_their_names() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let filtered = with_errno(
            libc::SYS_arch_prctl,
            0,
            ARCH_GET_XCOMP_SUPP,
            errno,
            permission::supported,
        );
        assert_eq!(filtered, Err(PermissionError::Filtered { errno }));
    }
    let old = with_errno(
        libc::SYS_arch_prctl,
        0,
        ARCH_GET_XCOMP_GUEST_PERM,
        libc::EINVAL,
        permission::granted,
    );
    assert_eq!(old, Err(PermissionError::KernelTooOld));
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
    let mut asked = supported(&kvm);
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
    let entries = supported(&kvm).as_slice().to_vec();
    // `CpuId` admits no more than 256 itself, so that its memory is laid out here.
    let size = size_of::<kvm_cpuid2>();
    let entry_size = size_of_val(&entries[0]);
    let count = 257;
    let mut raw: Vec<kvm_cpuid2> = Vec::new();
    raw.resize_with(1 + (count * entry_size).div_ceil(size), Default::default);
    raw[0].nent = count as u32;
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
    let mut cpuid = supported(&kvm);
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
    let _ = set_cpuid(&vcpu, &supported(&kvm), None).unwrap();
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
    let cpuid = supported(&kvm);
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
    let cpuid = supported(&kvm);
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
