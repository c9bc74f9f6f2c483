//! KVM_X86_XCOMP_GUEST_SUPP, an attribute of /dev/kvm itself.

#![allow(
    unsafe_code,
    reason = "KVM_GET_DEVICE_ATTR on /dev/kvm: kvm-ioctls has it for devices only"
)]

use kvm_bindings::{KVMIO, kvm_device_attr};
use kvm_ioctls::Kvm;
use nix::libc::c_ulong;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use xsave_state::XFeatures;

/// KVM_CAP_SYS_ATTRIBUTES.
pub(super) const CAP_SYS_ATTRIBUTES: c_ulong = 209;
const KVM_X86_XCOMP_GUEST_SUPP: u64 = 0;

ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// What guests may have, permission aside; `None` where the kernel has no such attribute.
pub(super) fn xcomp_guest_supp(kvm: &Kvm) -> Option<XFeatures> {
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
