//! The system call arch_prctl, for the state components that need a permission.

use xsave_state::{ComponentId, XFeatures};

// arch/x86/include/uapi/asm/prctl.h
const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_int = 0x1025;

/// A mask that the kernel gives. The numbers are from arch/x86/include/uapi/asm/prctl.h.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mask {
    /// ARCH_GET_XCOMP_SUPP: what the kernel supports.
    Supported = 0x1021,
    /// ARCH_GET_XCOMP_GUEST_PERM: what this process may expose to guests.
    GuestGranted = 0x1024,
}

/// ARCH_REQ_XCOMP_GUEST_PERM. The error is the errno.
pub(super) fn request_guest(component: ComponentId) -> Result<(), i32> {
    let number = libc::c_ulong::from(component.number());
    // SAFETY: arch_prctl takes an int and an unsigned long, which are passed as such. For this
    // operation the kernel takes the second as a component number, not as an address
    // (arch/x86/kernel/fpu/xstate.c, `fpu_xstate_prctl`), so that no memory is touched; kernels
    // that do not know the operation return EINVAL.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, number) };
    if result == 0 { Ok(()) } else { Err(errno()) }
}

/// ARCH_GET_XCOMP_SUPP or ARCH_GET_XCOMP_GUEST_PERM. The error is the errno.
pub(super) fn mask(mask: Mask) -> Result<XFeatures, i32> {
    let mut bits = 0u64;
    // SAFETY: arch_prctl takes an int and an unsigned long, here the address of `bits`, to which
    // both operations of `Mask` write one u64 and nothing else (arch/x86/kernel/fpu/xstate.c,
    // `fpu_xstate_prctl`: put_user to a u64 pointer). `bits` is a u64 that lives beyond the call
    // and that nothing else refers to; kernels that do not know the operation write nothing.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, mask as libc::c_int, &raw mut bits) };
    if result == 0 {
        Ok(XFeatures::from_bits_retain(bits))
    } else {
        Err(errno())
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
