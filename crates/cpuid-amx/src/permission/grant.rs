//! The request for the permission, and the proof that it was granted.

use xsave_state::{ComponentId, XFeatures};

use crate::permission::PermissionError;
use crate::permission::arch_prctl::{self, Mask};

/// Proof that this process may expose [`XFeatures::XTILEDATA`] to its guests.
///
/// There is no other way to get one than [`request`](Self::request), and the kernel never takes
/// the permission back.
///
/// ```no_run
/// use cpuid_amx::{GuestPermission, PermissionError};
///
/// // Before the first vCPU.
/// let permission = match GuestPermission::request() {
///     Ok(permission) => Some(permission),
///     // No AMX here: go on without it.
///     Err(PermissionError::NotSupported { .. } | PermissionError::KernelTooOld) => None,
///     Err(error) => return Err(error.into()),
/// };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPermission {
    granted: XFeatures,
}

impl GuestPermission {
    /// Asks for the permission, and makes sure that it is there. To ask again is allowed, also when
    /// vCPUs exist: what is granted stays granted.
    ///
    /// # Errors
    ///
    /// See [`PermissionError`]. Nothing has changed then, and guests without AMX are possible.
    pub fn request() -> Result<Self, PermissionError> {
        judge(
            arch_prctl::request_guest(ComponentId::XTILEDATA),
            || arch_prctl::mask(Mask::GuestGranted),
            || arch_prctl::mask(Mask::Supported),
        )
    }

    /// All components that the process may expose.
    #[must_use]
    pub const fn granted(&self) -> XFeatures {
        self.granted
    }

    /// A proof of nothing, to see what KVM does without permission.
    #[cfg(all(test, feature = "kvm"))]
    pub(crate) const fn pretend() -> Self {
        Self {
            granted: XFeatures::XTILEDATA,
        }
    }
}

/// What this kernel on this processor can grant or has: ARCH_GET_XCOMP_SUPP. It has
/// [`XFeatures::XTILEDATA`] where the host can use AMX.
///
/// # Errors
///
/// [`PermissionError::KernelTooOld`] (before 5.16), [`PermissionError::Filtered`] or
/// [`PermissionError::Other`].
pub fn supported() -> Result<XFeatures, PermissionError> {
    arch_prctl::mask(Mask::Supported).map_err(query_error)
}

/// What this process may expose to guests now: ARCH_GET_XCOMP_GUEST_PERM.
///
/// # Errors
///
/// [`PermissionError::KernelTooOld`], [`PermissionError::Filtered`] or
/// [`PermissionError::Other`].
pub fn granted() -> Result<XFeatures, PermissionError> {
    arch_prctl::mask(Mask::GuestGranted).map_err(query_error)
}

/// Tells what the answers of the kernel mean.
fn judge(
    requested: Result<(), i32>,
    granted: impl FnOnce() -> Result<XFeatures, i32>,
    supported: impl FnOnce() -> Result<XFeatures, i32>,
) -> Result<GuestPermission, PermissionError> {
    match requested {
        Ok(()) => {
            let granted = granted().map_err(query_error)?;
            if granted.contains(XFeatures::XTILEDATA) {
                Ok(GuestPermission { granted })
            } else {
                Err(PermissionError::NotGranted { granted })
            }
        }
        Err(libc::EOPNOTSUPP) => Err(PermissionError::NotSupported {
            supported: supported().unwrap_or(XFeatures::empty()),
        }),
        Err(libc::EBUSY) => Err(PermissionError::Locked {
            granted: granted().unwrap_or(XFeatures::empty()),
        }),
        Err(errno) => Err(query_error(errno)),
    }
}

fn query_error(errno: i32) -> PermissionError {
    match errno {
        // Component 18 is below XFEATURE_MAX in every kernel that knows the operation, so that
        // this is not about the number.
        libc::EINVAL => PermissionError::KernelTooOld,
        libc::EPERM | libc::EACCES | libc::ENOSYS => PermissionError::Filtered { errno },
        _ => PermissionError::Other { errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTED: XFeatures = XFeatures::from_bits_retain(0x602e7);
    const WITHOUT: XFeatures = XFeatures::from_bits_retain(0x2e7);

    fn refused(errno: i32) -> PermissionError {
        judge(Err(errno), || Ok(WITHOUT), || Ok(XFeatures::LEGACY)).unwrap_err()
    }

    #[test]
    fn a_grant_counts_when_the_mask_shows_it() {
        let never = || -> Result<XFeatures, i32> { panic!("not asked") };
        assert_eq!(
            judge(Ok(()), || Ok(GRANTED), never).map(|p| p.granted()),
            Ok(GRANTED)
        );
        assert_eq!(
            judge(Ok(()), || Ok(WITHOUT), never),
            Err(PermissionError::NotGranted { granted: WITHOUT })
        );
        assert_eq!(
            judge(Ok(()), || Err(libc::EPERM), never),
            Err(PermissionError::Filtered { errno: libc::EPERM })
        );
    }

    #[test]
    fn each_errno_has_its_meaning() {
        assert_eq!(
            refused(libc::EOPNOTSUPP),
            PermissionError::NotSupported {
                supported: XFeatures::LEGACY
            }
        );
        assert_eq!(
            refused(libc::EBUSY),
            PermissionError::Locked { granted: WITHOUT }
        );
        assert_eq!(refused(libc::EINVAL), PermissionError::KernelTooOld);
        for errno in [libc::EPERM, libc::EACCES, libc::ENOSYS] {
            assert_eq!(refused(errno), PermissionError::Filtered { errno });
        }
        assert_eq!(
            refused(libc::EIO),
            PermissionError::Other { errno: libc::EIO }
        );
    }
}
