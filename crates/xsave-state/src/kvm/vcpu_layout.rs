//! The layout of one vCPU: its CPUID, compared with the host.

use std::vec::Vec;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;

use super::errno::Errno;
use super::host::HostArea;
use super::vcpu::Vcpu;
use crate::feature::{ComponentId, XFeatures};
use crate::layout::{Component, Layout, LayoutError};

/// The layout of one vCPU: what its CPUID lists and the host has.
///
/// KVM reads and writes every component at the host's place, whatever the guest's CPUID says, and
/// guests configure tiles and set MXCSR bits by what the processor has. So this value can only be had
/// by a comparison with the host, and has the host's palettes and MXCSR mask.
///
/// Make one for every vCPU after KVM_SET_CPUID2, and keep it beside the vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuLayout(Layout);

impl VcpuLayout {
    /// Reads the vCPU's own CPUID, which KVM may have changed since KVM_SET_CPUID2, and compares it
    /// with the host.
    ///
    /// # Errors
    ///
    /// The vCPU has no CPUID yet, or one that contradicts itself or the host: see
    /// [`VcpuLayoutError`]. A guest that ran with such a CPUID could not be saved.
    pub fn query(vcpu: &mut impl Vcpu, host: &HostArea) -> Result<Self, VcpuLayoutError> {
        let entries = vcpu.get_cpuid2().map_err(VcpuLayoutError::Cpuid)?;
        if entries.is_empty() {
            return Err(VcpuLayoutError::NoCpuid);
        }
        let guest = Layout::from_kvm_cpuid(&entries).map_err(VcpuLayoutError::Layout)?;
        Self::new(&guest, host)
    }

    /// Compares the layout of a guest's CPUID with the host, before its vCPU exists.
    ///
    /// Components that the host lacks are left out: KVM does not let a guest enable them.
    ///
    /// # Errors
    ///
    /// The guest's CPUID contradicts the host: see [`VcpuLayoutError`].
    pub fn new(guest: &Layout, host: &HostArea) -> Result<Self, VcpuLayoutError> {
        let hosts = host.layout();
        let extended = (guest.user() & hosts.user()) - XFeatures::LEGACY;
        let mut components = Vec::new();
        for id in extended.components() {
            let (Some(ours), Some(theirs)) = (guest.component(id), hosts.component(id)) else {
                continue;
            };
            if place(ours) != place(theirs) {
                return Err(VcpuLayoutError::Place {
                    component: id,
                    guest: place(ours),
                    host: place(theirs),
                });
            }
            components.push(*theirs);
        }
        for palette in guest.palettes() {
            if !hosts.palettes().contains(palette) {
                return Err(VcpuLayoutError::Palette {
                    palette: palette.id(),
                });
            }
        }
        let layout = Layout::from_parts(components, hosts.palettes().iter().copied())
            .map_err(VcpuLayoutError::Layout)?
            .with_mxcsr_mask(hosts.mxcsr_mask());
        if layout.standard_size() > host.bytes() {
            return Err(VcpuLayoutError::TooLarge {
                layout_bytes: layout.standard_size(),
                kvm_bytes: host.bytes(),
            });
        }
        Ok(Self(layout))
    }

    /// Returns the layout, for example for a codec of the [wire format](crate::wire).
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.0
    }
}

/// Returns offset and size in bytes.
fn place(component: &Component) -> (usize, usize) {
    (component.offset().unwrap_or(0), component.size())
}

impl Layout {
    /// Reads the layout from the entries of KVM_GET_CPUID2, KVM_SET_CPUID2 or
    /// KVM_GET_SUPPORTED_CPUID, and finds each as KVM does: the first entry of the leaf that has the
    /// sub-leaf, or whose flags say that sub-leaves do not matter
    /// (arch/x86/kvm/cpuid.c, `cpuid_entry2_find`).
    ///
    /// # Errors
    ///
    /// As [`from_cpuid`](Self::from_cpuid).
    pub fn from_kvm_cpuid(entries: &[kvm_cpuid_entry2]) -> Result<Self, LayoutError> {
        Self::from_cpuid(|leaf, subleaf| {
            let entry = entries.iter().find(|entry| {
                let any_subleaf = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0;
                entry.function == leaf && (any_subleaf || entry.index == subleaf)
            });
            entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        })
    }
}

/// Errors from comparing a vCPU's CPUID with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VcpuLayoutError {
    /// KVM_GET_CPUID2 failed.
    #[error("KVM_GET_CPUID2: {0}")]
    Cpuid(Errno),
    /// The vCPU has no CPUID.
    #[error("the vCPU has no CPUID yet: call KVM_SET_CPUID2 first")]
    NoCpuid,
    /// The guest's CPUID describes an area that cannot exist.
    #[error("the guest's CPUID: {0}")]
    Layout(LayoutError),
    /// A component has another offset or size in the guest's CPUID than on this host. KVM and the
    /// processor use the host's, so the guest would compute with wrong bytes.
    #[error(
        "{component} is at offset {} with {} bytes in the guest's CPUID, but at {} with {} on this \
         host: take leaf 0DH from this host, or run the guest on one like its own",
        guest.0, guest.1, host.0, host.1
    )]
    Place {
        /// The component.
        component: ComponentId,
        /// Offset and size in bytes in the guest's CPUID.
        guest: (usize, usize),
        /// Offset and size in bytes on the host.
        host: (usize, usize),
    },
    /// A tile palette of the guest's CPUID is not one of the host's.
    #[error(
        "palette {palette} of the guest's CPUID.1DH is not one of this host: the guest would \
         configure tiles that the processor refuses"
    )]
    Palette {
        /// The palette.
        palette: u8,
    },
    /// The guest's components do not fit into what KVM copies: the process did not ask for the
    /// permission before its first vCPU.
    #[error(
        "the guest's CPUID requires {layout_bytes} bytes, but KVM copies {kvm_bytes}: ask for the \
         guest permission (ARCH_REQ_XCOMP_GUEST_PERM) before the first vCPU"
    )]
    TooLarge {
        /// The area by the guest's CPUID.
        layout_bytes: usize,
        /// [`HostArea::bytes`].
        kvm_bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::simulated::{SimulatedVcpu, amx_area, amx_host, amx_layout};
    use crate::layout::Palette;

    fn with(change: impl Fn(Component) -> Option<Component>) -> Layout {
        let layout = amx_layout();
        let parts = layout.components().skip(2).filter_map(|c| change(*c));
        Layout::from_parts(parts, [Palette::ONE]).unwrap()
    }

    #[test]
    fn a_component_at_another_place_is_refused() {
        let moved = with(|c| match c.id() {
            ComponentId::PKRU => Some(Component::user(c.id(), 20_000, 8)),
            _ => Some(c),
        });
        let error = VcpuLayout::new(&moved, &amx_host(true)).unwrap_err();
        let component = ComponentId::PKRU;
        let (guest, host) = ((20_000, 8), (2688, 8));
        assert_eq!(
            error,
            VcpuLayoutError::Place {
                component,
                guest,
                host
            }
        );
        let larger = with(|c| match c.id() {
            ComponentId::XTILEDATA => Some(Component::user(c.id(), 2816, 9000)),
            _ => Some(c),
        });
        let error = VcpuLayout::new(&larger, &amx_host(true)).unwrap_err();
        assert!(matches!(error, VcpuLayoutError::Place { .. }), "{error}");
    }

    #[test]
    fn what_the_host_lacks_is_not_in_the_layout() {
        let with_apx = with(|c| match c.id() {
            ComponentId::OPMASK => Some(Component::user(ComponentId::APX, 960, 128)),
            _ => Some(c),
        });
        let layout = VcpuLayout::new(&with_apx, &amx_host(true)).unwrap();
        assert_eq!(layout.layout().user().bits(), 0x602c7);
    }

    /// KVM ignores CPUID here, and so does the layout.
    #[test]
    fn tiles_can_be_disabled_and_configured_whatever_cpuid_hides() {
        let hidden = with(|c| match c.id() {
            ComponentId::XTILEDATA => Some(Component::user(c.id(), 2816, 8192)),
            _ => Some(c),
        });
        let hidden = Layout::from_parts(hidden.components().skip(2).copied(), []).unwrap();
        assert!(hidden.palettes().is_empty());
        let layout = VcpuLayout::new(&hidden, &amx_host(true)).unwrap();
        assert_eq!(layout.layout().palettes(), [Palette::ONE]);
        assert_eq!(layout.layout().xfd(), XFeatures::XTILEDATA);
    }

    /// LDMXCSR goes by the processor: AMD's has MXCSR.MM whatever the guest's CPUID says.
    #[test]
    fn mxcsr_is_limited_by_the_host_alone() {
        let amd = Layout::legacy().with_mxcsr_mask(0x2_ffff);
        let host = HostArea::new(4096, amd, true).unwrap();
        let layout = VcpuLayout::new(&Layout::legacy(), &host).unwrap();
        assert_eq!(layout.layout().mxcsr_mask(), 0x2_ffff);
        let claims_more = Layout::legacy().with_mxcsr_mask(0x2_ffff);
        let layout = VcpuLayout::new(&claims_more, &amx_host(true)).unwrap();
        assert_eq!(layout.layout().mxcsr_mask(), 0xffff);
    }

    #[test]
    fn an_invented_palette_is_refused() {
        let layout = amx_layout();
        let second = Palette::from_leaf(2, [0x0200_1000, 0x0008_0020, 0x10, 0]).unwrap();
        let parts = layout.components().skip(2).copied();
        let two = Layout::from_parts(parts, [Palette::ONE, second]).unwrap();
        assert_eq!(
            VcpuLayout::new(&two, &amx_host(true)),
            Err(VcpuLayoutError::Palette { palette: 2 })
        );
    }

    #[test]
    fn the_permission_that_is_missing_is_named() {
        let host = HostArea::new(4096, amx_layout(), true).unwrap();
        assert_eq!(
            VcpuLayout::new(&amx_layout(), &host),
            Err(VcpuLayoutError::TooLarge {
                layout_bytes: 11_008,
                kvm_bytes: 4096
            })
        );
        let without_tiles = with(|c| (!XFeatures::AMX.contains(c.id().bit())).then_some(c));
        assert!(VcpuLayout::new(&without_tiles, &host).is_ok());
    }

    #[test]
    fn a_vcpu_without_cpuid_has_no_layout() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0));
        vcpu.has_cpuid = false;
        let error = VcpuLayout::query(&mut vcpu, &amx_host(true)).unwrap_err();
        assert_eq!(error, VcpuLayoutError::NoCpuid);
    }

    #[test]
    fn entries_are_found_as_kvm_finds_them() {
        let entry = |function, index, flags, eax, ecx| kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ecx,
            ..Default::default()
        };
        let table = [
            entry(0, 0, 0, 0xd, 0),
            entry(1, 0, 0, 0, 1 << 26),
            // No flag: it answers for every sub-leaf.
            entry(0xd, 5, 0, 3, 576),
            entry(0xd, 0, 1, 7, 832),
        ];
        assert!(Layout::from_kvm_cpuid(&table).is_err());
        let flagged = table.map(|e| {
            if e.function == 0xd {
                entry(0xd, e.index, 1, e.eax, e.ecx)
            } else {
                e
            }
        });
        let mut flagged = flagged.to_vec();
        flagged.push(kvm_cpuid_entry2 {
            ebx: 576,
            ..entry(0xd, 2, 1, 256, 0)
        });
        assert_eq!(Layout::from_kvm_cpuid(&flagged).unwrap().user().bits(), 7);
    }
}
