//! The permission: whose it is, how long it lasts, and each way in which it is refused.

use cpuid_amx::kvm::set_cpuid;
use cpuid_amx::{GuestPermission, PermissionError, permission};
use xsave_state::XFeatures;

use crate::process::{alone, executed_anew, forked};
use crate::seccomp::with_errno;
use crate::vm::{has_amx, supported, user_components, vm};

const ARCH_GET_XCOMP_SUPP: u32 = 0x1021;
const ARCH_GET_XCOMP_GUEST_PERM: u32 = 0x1024;
const ARCH_REQ_XCOMP_GUEST_PERM: u32 = 0x1025;

fn request_with_errno(errno: i32) -> PermissionError {
    with_errno(
        libc::SYS_arch_prctl,
        0,
        ARCH_REQ_XCOMP_GUEST_PERM,
        errno,
        || GuestPermission::request().unwrap_err(),
    )
}

/// Whether this is a process of its own on a host with AMX.
fn alone_with_amx(test: &str) -> bool {
    if !has_amx() {
        println!("skipped: no AMX on this host, so that nothing can be granted");
        return false;
    }
    alone(test)
}

fn is_granted() -> bool {
    permission::granted()
        .unwrap()
        .contains(XFeatures::XTILEDATA)
}

fn is_locked() -> bool {
    matches!(
        GuestPermission::request(),
        Err(PermissionError::Locked { granted }) if !granted.contains(XFeatures::XTILEDATA)
    )
}

#[test]
fn the_permission_is_what_this_host_can_give() {
    if !alone("permission::the_permission_is_what_this_host_can_give") {
        return;
    }
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
            assert!(!is_granted());
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
    if !alone_with_amx("permission::the_first_vcpu_locks_the_permission") {
        return;
    }
    let Some((_kvm, vm)) = vm() else { return };
    // A VM alone does not.
    let before = vm.create_vcpu(0).unwrap();
    assert!(is_locked());
    // For good: the vCPU that locked it may be gone.
    drop(before);
    drop(vm);
    assert!(is_locked());
    assert!(!is_granted());
}

#[test]
fn any_thread_asks_for_all() {
    if !alone_with_amx("permission::any_thread_asks_for_all") {
        return;
    }
    let Some((kvm, vm)) = vm() else { return };
    let (ask, asked) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        // This one was there before, and has asked for nothing.
        let (kvm, vm) = (&kvm, &vm);
        let vcpu_thread = scope.spawn(move || {
            let permission: GuestPermission = asked.recv().unwrap();
            assert!(is_granted());
            let cpuid = supported(kvm);
            if !user_components(&cpuid).contains(XFeatures::XTILEDATA) {
                println!("skipped: this KVM has no AMX, although its host has");
                return;
            }
            let vcpu = vm.create_vcpu(0).unwrap();
            let set = set_cpuid(&vcpu, &cpuid, Some(&permission)).unwrap();
            assert_eq!(set.unexpected().count(), 0);
        });
        let asking = scope.spawn(|| GuestPermission::request().unwrap());
        ask.send(asking.join().unwrap()).unwrap();
        vcpu_thread.join().unwrap();
    });
    assert!(is_granted());
}

#[test]
fn a_thread_of_a_locked_process_is_locked() {
    if !alone_with_amx("permission::a_thread_of_a_locked_process_is_locked") {
        return;
    }
    let Some((_kvm, vm)) = vm() else { return };
    std::thread::scope(|scope| {
        scope.spawn(|| drop(vm.create_vcpu(0).unwrap()));
    });
    assert!(is_locked());
}

#[test]
fn a_fork_has_the_permission_of_its_parent() {
    if !alone_with_amx("permission::a_fork_has_the_permission_of_its_parent") {
        return;
    }
    // What a child asks for is its own.
    forked(|| {
        assert!(GuestPermission::request().is_ok());
        assert!(is_granted());
    });
    assert!(!is_granted());
    GuestPermission::request().unwrap();
    forked(|| {
        assert!(is_granted());
        assert!(GuestPermission::request().is_ok());
    });
}

#[test]
fn a_fork_of_a_locked_process_is_locked() {
    if !alone_with_amx("permission::a_fork_of_a_locked_process_is_locked") {
        return;
    }
    let Some((_kvm, vm)) = vm() else { return };
    let _vcpu = vm.create_vcpu(0).unwrap();
    forked(|| assert!(is_locked()));
}

#[test]
fn exec_takes_the_permission_away() {
    const NAME: &str = "permission::exec_takes_the_permission_away";
    if !alone_with_amx(NAME) {
        return;
    }
    let before = || {
        GuestPermission::request().unwrap();
        assert!(is_granted());
    };
    if !executed_anew(NAME, before) {
        return;
    }
    assert!(!is_granted());
    // It can be had again.
    GuestPermission::request().unwrap();
}

#[test]
fn exec_takes_the_lock_away() {
    const NAME: &str = "permission::exec_takes_the_lock_away";
    if !alone_with_amx(NAME) {
        return;
    }
    let before = || {
        let Some((_kvm, vm)) = vm() else { return };
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert!(is_locked());
    };
    if !executed_anew(NAME, before) {
        return;
    }
    GuestPermission::request().unwrap();
}

/// A filter is a denial, whatever the host has; that the host has nothing is no denial.
#[test]
fn a_denial_is_not_a_lack_of_support() {
    if !alone("permission::a_denial_is_not_a_lack_of_support") {
        return;
    }
    let lack = GuestPermission::request();
    for errno in [libc::EPERM, libc::ENOSYS] {
        assert_eq!(
            request_with_errno(errno),
            PermissionError::Filtered { errno }
        );
    }
    match lack {
        Err(PermissionError::NotSupported { .. }) => assert!(!has_amx()),
        Err(PermissionError::KernelTooOld) => {}
        other => assert!(other.is_ok() && has_amx(), "{other:?}"),
    }
}

/// A filter that lets the request through and not the question whether it was granted.
#[test]
fn a_grant_that_cannot_be_seen_is_none() {
    if !alone_with_amx("permission::a_grant_that_cannot_be_seen_is_none") {
        return;
    }
    for errno in [libc::EPERM, libc::ENOSYS] {
        let unseen = with_errno(
            libc::SYS_arch_prctl,
            0,
            ARCH_GET_XCOMP_GUEST_PERM,
            errno,
            GuestPermission::request,
        );
        assert_eq!(unseen, Err(PermissionError::Filtered { errno }));
    }
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
