//! Why there is no permission.

use thiserror::Error;
use xsave_state::XFeatures;

/// Why there is no permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum PermissionError {
    /// EOPNOTSUPP: the processor has no AMX, or this kernel does not use it.
    #[error(
        "this host has no AMX for guests: its kernel supports {supported}, without XTILEDATA; go \
         on without AMX, or look for AMX and XFD in the host's CPUID and boot parameters"
    )]
    NotSupported {
        /// ARCH_GET_XCOMP_SUPP; empty where that fails too.
        supported: XFeatures,
    },
    /// EINVAL: the kernel does not know the operation.
    #[error("the kernel knows no permission for guests: AMX in guests needs Linux 5.17 or newer")]
    KernelTooOld,
    /// EBUSY: a vCPU exists, or did exist, in this process or in its parent before fork.
    #[error(
        "the first vCPU of this process has locked the permission (granted: {granted}): request \
         it before the first KVM_CREATE_VCPU, in a new process"
    )]
    Locked {
        /// ARCH_GET_XCOMP_GUEST_PERM; empty where that fails.
        granted: XFeatures,
    },
    /// EPERM, EACCES or ENOSYS, which arch_prctl itself does not give: a seccomp filter.
    #[error(
        "a seccomp filter keeps arch_prctl from the kernel (errno {errno}): allow it with \
         operations 0x1021, 0x1024 and 0x1025, or request the permission before the filter"
    )]
    Filtered {
        /// What the filter returned.
        errno: i32,
    },
    /// The request succeeded, but the permission is not there.
    #[error("the kernel accepted the request, but grants only {granted}: something answers for it")]
    NotGranted {
        /// ARCH_GET_XCOMP_GUEST_PERM.
        granted: XFeatures,
    },
    /// An error that no known kernel gives.
    #[error("arch_prctl failed with errno {errno}")]
    Other {
        /// The number.
        errno: i32,
    },
}
