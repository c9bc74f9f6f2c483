//! KVM_X86_XCOMP_GUEST_SUPP, an attribute of /dev/kvm itself: kvm-ioctls has them for devices only.

use kvm_bindings::{KVMIO, kvm_device_attr};
use kvm_ioctls::Kvm;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use xsave_state::XFeatures;

/// KVM_CAP_SYS_ATTRIBUTES (include/uapi/linux/kvm.h).
pub(super) const CAP_SYS_ATTRIBUTES: libc::c_ulong = 209;
const KVM_X86_XCOMP_GUEST_SUPP: u64 = 0;

ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The components that guests can have on this host, permission aside: KVM_X86_XCOMP_GUEST_SUPP.
/// `None` where the kernel has no such attribute (before 5.17).
///
/// ```
/// use xsave_state::XFeatures;
///
/// if let Ok(kvm) = kvm_ioctls::Kvm::new() {
///     let guests = host_compat::xcomp_guest_supp(&kvm);
///     let amx = guests.is_some_and(|components| components.contains(XFeatures::XTILEDATA));
///     println!("AMX for guests: {amx}");
/// }
/// ```
#[must_use]
pub fn xcomp_guest_supp(kvm: &Kvm) -> Option<XFeatures> {
    if kvm.check_extension_raw(CAP_SYS_ATTRIBUTES) == 0 {
        return None;
    }
    let mut value = 0u64;
    let attribute = kvm_device_attr {
        group: 0,
        attr: KVM_X86_XCOMP_GUEST_SUPP,
        addr: (&raw mut value).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: The kernel reads `attribute`, which is borrowed for the call, and for this group and
    // attribute writes eight bytes to `addr` (arch/x86/kvm/x86.c, `kvm_x86_dev_get_attr`), which is
    // `value`: alive, aligned and borrowed by nobody else.
    let result = unsafe { ioctl_with_ref(kvm, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(XFeatures::from_bits_retain(value))
}
