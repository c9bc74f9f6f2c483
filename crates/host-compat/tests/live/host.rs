//! What this machine says of itself.

use cpuid_amx::{Amx, CpuidTable, PermissionError, coherence, permission};
use host_compat::host::{NoKvm, Permission};
use xsave_state::XFeatures;

use crate::process::alone;
use crate::seccomp::with_errno;

#[test]
fn this_machine_describes_itself() {
    if !alone("host::this_machine_describes_itself") {
        return;
    }
    let has_amx =
        permission::supported().is_ok_and(|supported| supported.contains(XFeatures::XTILEDATA));
    let host = host_compat::probe();
    assert!(!host.name.is_empty());
    assert!(!host.processor.vendor.is_empty());
    let kernel = host.kernel.as_ref().unwrap();
    assert!(!kernel.release.is_empty());
    // Each of the lab's kernels says which upstream version it is.
    assert!(kernel.upstream.is_some() || !has_amx, "{kernel:?}");
    println!("{kernel:?}");

    match host.permission {
        Permission::Granted(components) => {
            assert!(has_amx && components.contains(XFeatures::XTILEDATA));
        }
        Permission::Refused(
            PermissionError::NotSupported { .. } | PermissionError::KernelTooOld,
        ) => assert!(!has_amx),
        other => panic!("{other:?}"),
    }
    let kvm = match &host.kvm {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let capabilities = kvm.capabilities.unwrap();
    assert_eq!(capabilities.xsave, 1);
    let table = host.guest_cpuid().unwrap();
    let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    if amx.usable().is_ok() {
        assert_eq!(host.obstacles(), []);
        assert_eq!(coherence::check(table), []);
        assert_eq!(capabilities.xsave2, 11008);
        assert!(kvm.guest_components.unwrap().contains(XFeatures::AMX));
        assert_eq!(kvm.rewritten, None);
    } else {
        println!("skipped: no AMX for guests here");
        assert!(!host.obstacles().is_empty());
    }
    for obstacle in host.obstacles() {
        println!("{obstacle}");
    }
    // The same again, whichever processor it runs on.
    assert_eq!(host_compat::probe(), host);

    {
        let text = serde_json::to_string(&host).unwrap();
        println!("{text}");
        assert_eq!(
            serde_json::from_str::<host_compat::Host>(&text).unwrap(),
            host
        );
    }
}

#[test]
fn a_machine_without_kvm_says_why() {
    if !alone("host::a_machine_without_kvm_says_why") {
        return;
    }
    let without = host_compat::probe_at("/dev/no-kvm");
    assert_eq!(without.kvm, Err(NoKvm::NoDevice));
    assert_eq!(without.guest_cpuid(), None);
    assert!(!without.processor.vendor.is_empty());
    // Something that is no KVM.
    assert!(matches!(
        host_compat::probe_at("/dev/null").kvm,
        Err(NoKvm::NotKvm { version: -1 })
    ));
    // Something that may not be opened, whoever this is.
    const O_RDWR_CLOEXEC: u32 = 0o2_000_002;
    let denied = with_errno(libc::SYS_openat, 2, O_RDWR_CLOEXEC, libc::EACCES, || {
        host_compat::probe()
    });
    let is_here = std::path::Path::new("/dev/kvm").exists();
    assert!(denied.kvm == Err(NoKvm::NoAccess) || !is_here);
}

#[test]
fn a_filter_is_told_from_a_machine_without_amx() {
    if !alone("host::a_filter_is_told_from_a_machine_without_amx") {
        return;
    }
    const ARCH_REQ_XCOMP_GUEST_PERM: u32 = 0x1025;
    let filtered = with_errno(
        libc::SYS_arch_prctl,
        0,
        ARCH_REQ_XCOMP_GUEST_PERM,
        libc::EPERM,
        host_compat::probe,
    );
    let errno = libc::EPERM;
    assert_eq!(
        filtered.permission,
        Permission::Refused(PermissionError::Filtered { errno })
    );
}
