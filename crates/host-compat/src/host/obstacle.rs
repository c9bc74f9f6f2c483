//! What keeps guests from using AMX on a host.

use thiserror::Error;
use xsave_state::{Layout, XFeatures};

use crate::host::{Host, NoKvm, Permission};
use cpuid_amx::amx::{Amx, Unusable};
use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::permission::PermissionError;
use cpuid_amx::table::CpuidTable;

/// One thing that keeps guests from using AMX on a host. Each says what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The processor has no AMX, or its firmware, its kernel or the hypervisor below hides it.
    #[error(
        "the processor has no AMX, as far as its kernel sees: it needs a Sapphire Rapids or later, \
         and a kernel without clearcpuid=amx_tile (in a VM: AMX from the hypervisor below)"
    )]
    Processor,
    /// The kernel does not use AMX: ARCH_GET_XCOMP_SUPP is without XTILEDATA.
    #[error(
        "the kernel supports {components}, without XTILEDATA: it needs Linux 5.16 or later, XFD in \
         CPUID.0DH.1:EAX[4], and no noxsave or clearcpuid among its parameters"
    )]
    Kernel {
        /// ARCH_GET_XCOMP_SUPP.
        components: XFeatures,
    },
    /// The permission was refused.
    #[error(transparent)]
    Permission(#[from] PermissionError),
    /// There is no KVM.
    #[error(transparent)]
    Kvm(#[from] NoKvm),
    /// KVM does not give XTILEDATA to guests: KVM_X86_XCOMP_GUEST_SUPP.
    #[error(
        "KVM gives guests {components}, without XTILEDATA: it needs Linux 5.17 or later, and a KVM \
         that runs on the processor's own virtualization"
    )]
    Guest {
        /// KVM_X86_XCOMP_GUEST_SUPP.
        components: XFeatures,
    },
    /// A guest that gets all that KVM supports cannot use AMX.
    #[error("a guest that gets all that KVM supports cannot use AMX: {0}")]
    Cpuid(Unusable),
    /// The CPUID of such a guest contradicts itself.
    #[error("what KVM supports contradicts itself, a policy makes it coherent: {0}")]
    Contradiction(Contradiction),
    /// KVM copies less than the area of a guest with all that it supports.
    #[error(
        "KVM copies {copied_bytes} bytes of the extended state (KVM_CAP_XSAVE2), and its own CPUID \
         describes {required_bytes}: the description and the kernel do not belong together, describe \
         the host again"
    )]
    Area {
        /// KVM_CAP_XSAVE2.
        copied_bytes: u32,
        /// What CPUID.0DH describes.
        required_bytes: usize,
    },
}

pub(super) fn find(host: &Host) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if !host.has_amx() {
        found.push(Obstacle::Processor);
    } else if let Some(components) = host.components
        && !components.contains(XFeatures::XTILEDATA)
    {
        found.push(Obstacle::Kernel { components });
    }
    // Without AMX there is nothing to permit.
    let consequence = !found.is_empty();
    match host.permission {
        Permission::Refused(PermissionError::NotSupported { .. }) if consequence => {}
        Permission::Refused(error) => found.push(Obstacle::Permission(error)),
        Permission::Granted(_) | Permission::NotAsked => {}
    }
    let kvm = match &host.kvm {
        Ok(kvm) => kvm,
        Err(error) => {
            found.push(Obstacle::Kvm(error.clone()));
            return found;
        }
    };
    if let Some(components) = kvm.guest_components
        && !consequence
        && !components.contains(XFeatures::XTILEDATA)
    {
        found.push(Obstacle::Guest { components });
    }
    let Some(table) = host.guest_cpuid() else {
        return found;
    };
    let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    let contradictions = coherence::check(table)
        .into_iter()
        .filter(|contradiction| !contradiction.is_recomputed_by_kvm());
    let before = |found: &Contradiction| matches!(found, Contradiction::BeforePermission { .. });
    match amx.usable() {
        // Said already, with its reason.
        Err(_) if !found.is_empty() => {}
        Err(unusable) => {
            let cause = contradictions.into_iter().find(before);
            found.push(cause.map_or(Obstacle::Cpuid(unusable), Obstacle::Contradiction));
        }
        Ok(()) => found.extend(contradictions.map(Obstacle::Contradiction)),
    }
    let copied = kvm.capabilities.as_ref().map(|kvm| kvm.xsave2);
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    if let (Some(copied_bytes), Ok(layout)) = (copied.filter(|&bytes| bytes != 0), layout)
        && usize::try_from(copied_bytes).unwrap_or(usize::MAX) < layout.standard_size()
    {
        found.push(Obstacle::Area {
            copied_bytes,
            required_bytes: layout.standard_size(),
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpuid_amx::amx::AmxFeatures;
    use cpuid_amx::table::Table;

    fn host() -> Host {
        Host::from_cpuid("a", cpuid_amx::dump::EXAMPLE.parse().unwrap())
    }

    fn with(change: impl FnOnce(&mut Host)) -> Vec<Obstacle> {
        let mut host = host();
        change(&mut host);
        host.obstacles()
    }

    fn cpuid(host: &mut Host) -> &mut Table {
        &mut host.kvm.as_mut().unwrap().cpuid
    }

    #[test]
    fn a_host_with_amx_has_none() {
        assert_eq!(host().obstacles(), []);
    }

    #[test]
    fn a_processor_without_amx_is_one_reason_and_not_five() {
        let supported = XFeatures::from_bits_retain(0x2e7);
        let found = with(|host| {
            let mut table = cpuid(host).clone();
            table.set_leaf(7, 0, [2, 0, 0, 0]).unwrap();
            *host = Host::from_cpuid("a", table);
            host.components = Some(supported);
            host.permission = Permission::Refused(PermissionError::NotSupported { supported });
            host.kvm.as_mut().unwrap().guest_components = Some(supported);
        });
        assert_eq!(found, [Obstacle::Processor]);
    }

    #[test]
    fn each_has_its_name() {
        let components = XFeatures::from_bits_retain(0x2e7);
        assert_eq!(
            with(|host| host.components = Some(components)),
            [Obstacle::Kernel { components }]
        );
        let filtered = PermissionError::Filtered { errno: 1 };
        assert_eq!(
            with(|host| host.permission = Permission::Refused(filtered)),
            [Obstacle::Permission(filtered)]
        );
        assert_eq!(
            with(|host| host.kvm = Err(NoKvm::NoAccess)),
            [Obstacle::Kvm(NoKvm::NoAccess)]
        );
        let in_guests = |host: &mut Host| {
            host.kvm.as_mut().unwrap().guest_components = Some(components);
        };
        assert_eq!(with(in_guests), [Obstacle::Guest { components }]);
        let no_components = with(|host| {
            cpuid(host)
                .set_leaf(0xd, 0, [0x2e7, 0xa88, 0xa88, 0])
                .unwrap();
        });
        assert!(matches!(
            no_components[..],
            [Obstacle::Contradiction(
                Contradiction::BeforePermission { .. }
            )]
        ));
        let no_palette = with(|host| cpuid(host).set_leaf(0x1d, 0, [0; 4]).unwrap());
        assert!(matches!(
            no_palette[..],
            [Obstacle::Cpuid(Unusable::NoPalette { .. })]
        ));
        let contradiction = with(|host| {
            cpuid(host).set_leaf(0x1e, 0, [0; 4]).unwrap();
        });
        assert_eq!(
            contradiction,
            [Obstacle::Contradiction(Contradiction::NoTmul {
                features: AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16
            })]
        );
    }

    #[test]
    fn what_kvm_writes_itself_is_no_obstacle() {
        let found = with(|host| {
            cpuid(host)
                .set_leaf(0xd, 0, [0x602e7, 1234, 0x2b00, 0])
                .unwrap();
        });
        assert_eq!(found, []);
    }
}
