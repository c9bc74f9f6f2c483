//! KVM_SET_CPUID2, with errors that say what to do and with what KVM made of the table.

use alloc::vec::Vec;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use xsave_state::XFeatures;

use crate::amx::{AmxFeatures, LEAF_7, LEAF_XSAVE};
use crate::kvm::rewrite::{Rewrite, rewrites};
use crate::permission::GuestPermission;
use crate::table::CpuidTable;

/// CPUID.80000008H:EAX\[15:8\] may be one of these (arch/x86/kvm/cpuid.c, `kvm_check_cpuid`).
const LINEAR_ADDRESS_BITS: [u32; 3] = [0, 48, 57];
const LEAF_ADDRESSES: u32 = 0x8000_0008;

/// Gives a vCPU its CPUID. A table with XTILEDATA in 0DH needs the permission as a proof; one without
/// has no AMX-TILE in leaf 7 either, which KVM leaves there whatever the permission: a
/// [`Policy`](crate::Policy) makes all leaves agree.
///
/// CPUID comes before every other state of a vCPU: the first table that exposes XTILEDATA makes KVM
/// allocate a larger buffer and throw away what was in the old one.
///
/// # Return value
///
/// What KVM made of the table: see [`CpuidSet`].
///
/// # Errors
///
/// See [`SetCpuidError`]. The vCPU keeps the CPUID that it had, except with
/// [`SetCpuidError::ReadBack`].
///
/// ```no_run
/// use cpuid_amx::{GuestPermission, PermissionError, kvm};
/// use kvm_ioctls::Kvm;
///
/// // Before the first vCPU.
/// let permission = match GuestPermission::request() {
///     Ok(permission) => Some(permission),
///     Err(PermissionError::NotSupported { .. } | PermissionError::KernelTooOld) => None,
///     Err(error) => return Err(error.into()),
/// };
/// let kvm = Kvm::new()?;
/// // After the permission: KVM filters 0DH by it.
/// let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
/// let vcpu = kvm.create_vm()?.create_vcpu(0)?;
/// let set = kvm::set_cpuid(&vcpu, &cpuid, permission.as_ref())?;
/// for rewrite in set.unexpected() {
///     eprintln!("{rewrite}");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn set_cpuid(
    vcpu: &VcpuFd,
    cpuid: &CpuId,
    permission: Option<&GuestPermission>,
) -> Result<CpuidSet, SetCpuidError> {
    check_permission(cpuid, permission)?;
    if let Err(error) = vcpu.set_cpuid2(cpuid) {
        return Err(match error.errno() {
            libc::EINVAL => why_invalid(vcpu, cpuid),
            errno => refusal(errno, cpuid),
        });
    }
    let effective =
        vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| SetCpuidError::ReadBack {
                errno: error.errno(),
            })?;
    Ok(CpuidSet {
        rewrites: rewrites(cpuid, &effective),
    })
}

/// A table and a permission that do not belong together, before KVM sees them.
fn check_permission(
    cpuid: &CpuId,
    permission: Option<&GuestPermission>,
) -> Result<(), SetCpuidError> {
    let [.., edx] = cpuid.leaf(LEAF_7, 0);
    let features = AmxFeatures::from_leaf_7([0, 0, 0, edx], [0; 4]);
    let user = user(cpuid);
    let exposed = user.contains(XFeatures::XTILEDATA);
    match permission {
        None if exposed => Err(SetCpuidError::NoPermission { user }),
        None if features.contains(AmxFeatures::TILE) => {
            Err(SetCpuidError::TileWithoutPermission { user })
        }
        Some(permission) if !exposed && features.contains(AmxFeatures::TILE) => {
            Err(SetCpuidError::TakenBeforePermission {
                user,
                granted: permission.granted(),
            })
        }
        _ => Ok(()),
    }
}

fn user(cpuid: &CpuId) -> XFeatures {
    let [low, _, _, high] = cpuid.leaf(LEAF_XSAVE, 0);
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

/// EINVAL has more than one reason: the one that can be seen in the table, or else the vCPU.
fn why_invalid(vcpu: &VcpuFd, cpuid: &CpuId) -> SetCpuidError {
    let [eax, ..] = cpuid.leaf(LEAF_ADDRESSES, 0);
    let bits = eax >> 8 & 0xff;
    if !LINEAR_ADDRESS_BITS.contains(&bits) {
        return SetCpuidError::LinearAddressBits { bits };
    }
    let difference = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .ok()
        .and_then(|effective| {
            rewrites(cpuid, &effective)
                .into_iter()
                .find(|rewrite| !rewrite.is_runtime())
        });
    SetCpuidError::AlreadyRan { difference }
}

fn refusal(errno: i32, cpuid: &CpuId) -> SetCpuidError {
    let entries = cpuid.as_slice().len();
    match errno {
        libc::EPERM => SetCpuidError::Denied { user: user(cpuid) },
        libc::EFAULT | libc::ENOMEM => SetCpuidError::OutOfMemory { errno },
        libc::E2BIG => SetCpuidError::TooManyEntries { entries },
        _ => SetCpuidError::Other { errno },
    }
}

/// CPUID is set; and what KVM changed in it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "KVM may have changed what the guest sees"]
pub struct CpuidSet {
    rewrites: Vec<Rewrite>,
}

impl CpuidSet {
    /// Every entry of which KVM_GET_CPUID2 gives something else than was asked for, by leaf.
    #[must_use]
    pub fn rewrites(&self) -> &[Rewrite] {
        &self.rewrites
    }

    /// Those that are more than what KVM always [keeps up to date](Rewrite::is_runtime). On an
    /// ordinary KVM there are none; a KVM which derives CPUID from its host's has some, and what a
    /// VMM wanted to hide may be visible.
    pub fn unexpected(&self) -> impl Iterator<Item = &Rewrite> {
        self.rewrites.iter().filter(|rewrite| !rewrite.is_runtime())
    }
}

/// Why a vCPU has not got its CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SetCpuidError {
    /// The table exposes XTILEDATA, and there is no proof of permission. KVM was not asked.
    #[error(
        "CPUID.0DH.0 has {user}, and XTILEDATA needs the permission: call \
         GuestPermission::request() before the first vCPU, or take AMX out of the table"
    )]
    NoPermission {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// There is permission, and leaf 7 has AMX-TILE, but 0DH has no XTILEDATA. KVM was not asked:
    /// it would accept a table that the guest cannot use.
    #[error(
        "CPUID.7.0:EDX has AMX-TILE, but CPUID.0DH.0 has {user} without XTILEDATA, although \
         {granted} are granted: ask for KVM_GET_SUPPORTED_CPUID after the permission, or take AMX \
         out of leaf 7 too"
    )]
    TakenBeforePermission {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
        /// ARCH_GET_XCOMP_GUEST_PERM.
        granted: XFeatures,
    },
    /// There is no proof of permission and no XTILEDATA in 0DH, but leaf 7 has AMX-TILE: what
    /// KVM_GET_SUPPORTED_CPUID gives on a host with AMX without the permission. KVM was not asked: it
    /// would accept a table that contradicts itself.
    #[error(
        "CPUID.7.0:EDX has AMX-TILE, but CPUID.0DH.0 has {user} without XTILEDATA, and there is no \
         permission: call GuestPermission::request() before the first vCPU, or take AMX out of all \
         leaves with Policy::hide_amx()"
    )]
    TileWithoutPermission {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// EPERM: the process has no permission for a component of the table
    /// (arch/x86/kernel/fpu/xstate.c, `__xfd_enable_feature`). It comes also where the host has no
    /// AMX.
    #[error(
        "KVM denies CPUID.0DH.0 with {user} (EPERM): the permission is not that of this process, \
         or not for all of them; request it in the process that creates the vCPUs"
    )]
    Denied {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// EFAULT or ENOMEM: the kernel has no memory for the larger buffer of the vCPU
    /// (arch/x86/kernel/fpu/xstate.c: `fpstate_realloc` fails, and `__xfd_enable_feature` says
    /// EFAULT), or for its copy of the table.
    #[error(
        "the kernel has no memory for the extended state of this vCPU (errno {errno}): free \
         memory or raise the limit of the cgroup, and try again"
    )]
    OutOfMemory {
        /// EFAULT or ENOMEM.
        errno: i32,
    },
    /// E2BIG: the table has more entries than KVM takes (256; 80 before Linux 5.11).
    #[error("KVM takes no table with {entries} entries (E2BIG): leave out leaves that are zero")]
    TooManyEntries {
        /// How many there are.
        entries: usize,
    },
    /// EINVAL: the table gives an impossible number of linear address bits.
    #[error("CPUID.80000008H:EAX[15:8] has {bits} linear address bits; KVM takes 0, 48 or 57")]
    LinearAddressBits {
        /// CPUID.80000008H:EAX\[15:8\].
        bits: u32,
    },
    /// EINVAL: the vCPU has run, or runs a nested guest, and its CPUID can change no more. Only
    /// what KVM_GET_CPUID2 gives is accepted.
    #[error(
        "the vCPU has run, and its CPUID can change no more (EINVAL){}{}: set CPUID before the \
         first KVM_RUN, or make a new vCPU",
        if difference.is_some() { "; first difference: " } else { "" },
        difference.as_ref().map_or_else(alloc::string::String::new, alloc::string::ToString::to_string)
    )]
    AlreadyRan {
        /// The first entry in which the table differs from what the vCPU has. `None` where it does
        /// not (Linux 6.1 refuses even what KVM_GET_CPUID2 gives), or where the entries have another
        /// order or other flags only.
        difference: Option<Rewrite>,
    },
    /// KVM_GET_CPUID2 fails after KVM_SET_CPUID2: the CPUID is set, but what it is cannot be seen.
    #[error("CPUID is set, but KVM_GET_CPUID2 failed with errno {errno}: discard the vCPU")]
    ReadBack {
        /// The number.
        errno: i32,
    },
    /// An error that no known kernel gives.
    #[error("KVM_SET_CPUID2 failed with errno {errno}")]
    Other {
        /// The number.
        errno: i32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;
    use crate::table::Table;
    use std::eprintln;

    fn table() -> CpuId {
        let table: Table = crate::dump::EXAMPLE.parse().unwrap();
        let mut cpuid = CpuId::new(0).unwrap();
        for entry in table.entries() {
            cpuid.push_entry(entry).unwrap();
        }
        cpuid
    }

    fn permission() -> GuestPermission {
        GuestPermission::pretend()
    }

    #[test]
    fn tile_data_needs_a_proof() {
        let cpuid = table();
        let user = XFeatures::from_bits_retain(0x602e7);
        assert_eq!(
            check_permission(&cpuid, None),
            Err(SetCpuidError::NoPermission { user })
        );
        assert_eq!(check_permission(&cpuid, Some(&permission())), Ok(()));

        // TILEDATA is what counts, whatever leaf 7 says.
        let mut hidden = table();
        hidden.set_leaf(7, 0, [0; 4]).unwrap();
        assert_eq!(
            check_permission(&hidden, None),
            Err(SetCpuidError::NoPermission { user })
        );
    }

    #[test]
    fn a_table_from_before_the_permission_is_refused() {
        let mut cpuid = table();
        // Linux before 6.4 leaves XTILECFG there.
        for eax in [0x2e7, 0x202e7] {
            cpuid.set_leaf(0xd, 0, [eax, 0xa88, 0xa88, 0]).unwrap();
            assert_eq!(
                check_permission(&cpuid, Some(&permission())),
                Err(SetCpuidError::TakenBeforePermission {
                    user: XFeatures::from_bits_retain(u64::from(eax)),
                    granted: XFeatures::XTILEDATA
                })
            );
            // Nor without: the guest would see AMX that it cannot use.
            assert_eq!(
                check_permission(&cpuid, None),
                Err(SetCpuidError::TileWithoutPermission {
                    user: XFeatures::from_bits_retain(u64::from(eax))
                })
            );
        }
        // AMX hidden in leaf 7 too: a guest without AMX, whether there is a permission or not.
        Policy::hide_amx().apply(&mut cpuid).unwrap();
        assert_eq!(check_permission(&cpuid, Some(&permission())), Ok(()));
        assert_eq!(check_permission(&cpuid, None), Ok(()));
    }

    #[test]
    fn each_errno_has_its_meaning() {
        let cpuid = table();
        let entries = cpuid.as_slice().len();
        assert_eq!(
            refusal(libc::EPERM, &cpuid),
            SetCpuidError::Denied {
                user: XFeatures::from_bits_retain(0x602e7)
            }
        );
        for errno in [libc::EFAULT, libc::ENOMEM] {
            assert_eq!(refusal(errno, &cpuid), SetCpuidError::OutOfMemory { errno });
        }
        assert_eq!(
            refusal(libc::E2BIG, &cpuid),
            SetCpuidError::TooManyEntries { entries }
        );
        assert_eq!(
            refusal(libc::EIO, &cpuid),
            SetCpuidError::Other { errno: libc::EIO }
        );
    }

    #[test]
    fn rewrites_are_found_by_place_and_not_by_order() {
        let asked = table();
        let mut reversed: Vec<_> = asked.as_slice().to_vec();
        reversed.reverse();
        let mut got = CpuId::from_entries(&reversed).unwrap();
        assert_eq!(rewrites(&asked, &got), []);

        got.set_leaf(0xd, 0, [0x602e7, 576, 0x2b00, 0]).unwrap();
        got.set_leaf(7, 1, [0x1c30, 0, 0, 1]).unwrap();
        got.retain_leaves(|e| e.leaf != 0x1e);
        got.set_leaf(0x1f, 0, [1, 2, 3, 4]).unwrap();
        let set = CpuidSet {
            rewrites: rewrites(&asked, &got),
        };
        let all: Vec<_> = set
            .rewrites()
            .iter()
            .map(|r| (r.leaf, r.subleaf, r.requested, r.effective, r.is_runtime()))
            .collect();
        let (seven, d, tmul) = (
            [0x1c30, 0, 0, 0],
            [0x602e7, 0x2b00, 0x2b00, 0],
            [0, 0x4010, 0, 0],
        );
        assert_eq!(
            all,
            [
                (7, Some(1), Some(seven), Some([0x1c30, 0, 0, 1]), false),
                (0xd, Some(0), Some(d), Some([0x602e7, 576, 0x2b00, 0]), true),
                (0x1e, Some(0), Some(tmul), None, false),
                (0x1f, Some(0), None, Some([1, 2, 3, 4]), false),
            ]
        );
        let unexpected: Vec<u32> = set.unexpected().map(|r| r.leaf).collect();
        assert_eq!(unexpected, [7, 0x1e, 0x1f]);
    }

    /// On the live KVM: this process never asks for the permission, so that a proof is a lie, and
    /// KVM says so.
    #[test]
    fn kvm_denies_what_was_not_granted() {
        let kvm = match kvm_ioctls::Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: no KVM here: {error}");
                return;
            }
        };
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        let mut before = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        if !AmxFeatures::from_cpuid(|leaf, subleaf| before.leaf(leaf, subleaf)).is_empty() {
            Policy::hide_amx().apply(&mut before).unwrap();
        }
        let before_set = set_cpuid(&vcpu, &before, None).unwrap();
        let kept = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();

        let mut cpuid = before.clone();
        let [eax, ebx, ecx, edx] = cpuid.leaf(0xd, 0);
        let with_amx = [eax | 3 << 17, ebx, ecx, edx];
        cpuid.set_leaf(0xd, 0, with_amx).unwrap();
        assert_eq!(
            set_cpuid(&vcpu, &cpuid, Some(&permission())),
            Err(SetCpuidError::Denied { user: user(&cpuid) })
        );
        // The old CPUID stays.
        let now = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        assert!(now == kept);
        assert_eq!(set_cpuid(&vcpu, &before, None), Ok(before_set));
    }
}
