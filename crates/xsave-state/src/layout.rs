//! Where each state component lies.
//!
//! Offsets differ between processors (PKRU is at 2688 on Intel's server processors and at 2432 on
//! AMD Zen 4), so they come from CPUID and never from a table.

mod check;
mod component;
mod cpuid;
mod error;
mod palette;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

pub use component::Component;
pub use error::LayoutError;
pub use palette::{Palette, PaletteError};

use crate::feature::{ComponentId, XFeatures};
use crate::format::{EXTENDED_OFFSET, INITIAL_MXCSR};

/// The most bytes that an area can have here. The largest known today has 11,008.
pub const MAX_AREA_BYTES: usize = 64 * 1024;
/// The highest palette that CPUID.(EAX=1DH,ECX=0):EAX can name here. Processors have one.
pub const MAX_PALETTES: u32 = 8;

const SLOTS: usize = ComponentId::COUNT as usize;
/// The MXCSR bits of every processor with XSAVE: 0 to 15 (SDM Vol. 1 §10.2.3, §11.6.6).
const MXCSR_MASK: u32 = 0xffff;
/// The bits that a mask of 0 stands for: all but MXCSR.DAZ (SDM Vol. 1 §11.6.6).
const MXCSR_MASK_OF_0: u32 = 0xffbf;

/// The state components of a processor or a guest: number, size, offset, alignment and kind of each.
///
/// Built once, from CPUID ([`from_cpuid`](Self::from_cpuid)) or from parts; a clone shares
/// it. Two layouts are equal when they have the same user components, palettes and MXCSR mask:
/// supervisor components, which have no place in the standard format, are not compared.
#[derive(Clone)]
pub struct Layout(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    components: [Option<Component>; SLOTS],
    user: XFeatures,
    supervisor: XFeatures,
    xfd: XFeatures,
    standard_size: usize,
    mxcsr_mask: u32,
    palettes: Vec<Palette>,
}

impl Layout {
    /// Returns x87 and SSE alone: the layout of a guest without XSAVE. KVM saves and restores such a
    /// vCPU in the same area, of which 576 bytes mean something (SDM Vol. 1 §13.4.1).
    #[must_use]
    pub fn legacy() -> Self {
        let mut components = [None; SLOTS];
        let [x87, sse, ..] = &mut components;
        *x87 = Component::legacy(ComponentId::X87);
        *sse = Component::legacy(ComponentId::SSE);
        Self(Arc::new(Inner {
            components,
            user: XFeatures::LEGACY,
            supervisor: XFeatures::empty(),
            xfd: XFeatures::empty(),
            standard_size: EXTENDED_OFFSET,
            mxcsr_mask: MXCSR_MASK,
            palettes: Vec::new(),
        }))
    }

    /// Replaces the mask of valid MXCSR bits by bytes 28 to 31 of an area that the processor wrote
    /// with FXSAVE or XSAVE, where a caller knows better than CPUID.
    ///
    /// 0 stands for 0xffbf, as it does there (SDM Vol. 1 §11.6.6). The bits of the initial MXCSR,
    /// 0x1f80, belong to every mask.
    #[must_use]
    pub fn with_mxcsr_mask(mut self, mask: u32) -> Self {
        let mask = if mask == 0 { MXCSR_MASK_OF_0 } else { mask };
        Arc::make_mut(&mut self.0).mxcsr_mask = mask | INITIAL_MXCSR;
        self
    }

    /// Returns the components that XCR0 can enable, CPUID.(EAX=0DH,ECX=0):EDX:EAX.
    #[must_use]
    pub fn user(&self) -> XFeatures {
        self.0.user
    }

    /// Returns the components that IA32_XSS can enable, CPUID.(EAX=0DH,ECX=1):EDX:ECX.
    #[must_use]
    pub fn supervisor(&self) -> XFeatures {
        self.0.supervisor
    }

    /// Returns the components that IA32_XFD can disable: those with
    /// [`has_xfd`](Component::has_xfd), so XTILEDATA wherever the layout has it.
    #[must_use]
    pub fn xfd(&self) -> XFeatures {
        self.0.xfd
    }

    /// Returns the component of that number, if the layout has it.
    #[must_use]
    pub fn component(&self, id: ComponentId) -> Option<&Component> {
        self.0.components.get(usize::from(id.number()))?.as_ref()
    }

    /// Iterates over all components, user and supervisor, in ascending order of their numbers.
    pub fn components(&self) -> impl Iterator<Item = &Component> {
        self.0.components.iter().flatten()
    }

    /// Returns the bytes of the standard format with all user components: the legacy region, the
    /// header, and everything up to the end of the last component. It is what
    /// CPUID.(EAX=0DH,ECX=0):ECX should say.
    #[must_use]
    pub fn standard_size(&self) -> usize {
        self.0.standard_size
    }

    /// Returns the bytes of the standard format up to the end of the last of `features`. Components
    /// that the layout lacks are ignored.
    #[must_use]
    pub fn standard_size_of(&self, features: XFeatures) -> usize {
        features
            .components()
            .filter_map(|id| self.component(id)?.range())
            .map(|range| range.end)
            .fold(EXTENDED_OFFSET, usize::max)
    }

    /// Iterates over `features` with the place of each in the compacted format when XCOMP_BV is
    /// `features` (SDM Vol. 1 §13.4.3): ascending from byte 576, aligned ones at multiples of 64
    /// bytes. Legacy components, and those that the layout lacks, are left out.
    pub fn compacted(
        &self,
        features: XFeatures,
    ) -> impl Iterator<Item = (&Component, Range<usize>)> {
        let mut next = EXTENDED_OFFSET;
        (features - XFeatures::LEGACY)
            .components()
            .filter_map(|id| self.component(id))
            .map(move |component| {
                let start = if component.is_aligned() {
                    next.next_multiple_of(64)
                } else {
                    next
                };
                next = start.saturating_add(component.size());
                (component, start..next)
            })
    }

    /// Returns the bytes of the compacted format when XCOMP_BV is `features`.
    #[must_use]
    pub fn compacted_size(&self, features: XFeatures) -> usize {
        self.compacted(features)
            .last()
            .map_or(EXTENDED_OFFSET, |(_, range)| range.end)
    }

    /// Returns the MXCSR bits that may be set.
    #[must_use]
    pub fn mxcsr_mask(&self) -> u32 {
        self.0.mxcsr_mask
    }

    /// Returns the tile palettes of CPUID.1DH, numbered from 1; none without XTILECFG.
    #[must_use]
    pub fn palettes(&self) -> &[Palette] {
        &self.0.palettes
    }
}

impl PartialEq for Layout {
    fn eq(&self, other: &Self) -> bool {
        let (ours, theirs) = (&*self.0, &*other.0);
        let user = |inner: &Inner, slot: usize| {
            let component = inner.components.get(slot).copied().flatten();
            component.filter(|component| component.offset().is_some())
        };
        Arc::ptr_eq(&self.0, &other.0)
            || ours.mxcsr_mask == theirs.mxcsr_mask
                && ours.palettes == theirs.palettes
                && (0..SLOTS).all(|slot| user(ours, slot) == user(theirs, slot))
    }
}

impl Eq for Layout {}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout")
            .field("user", &format_args!("{}", self.user()))
            .field("supervisor", &format_args!("{}", self.supervisor()))
            .field("xfd", &format_args!("{}", self.xfd()))
            .field("standard_size", &self.standard_size())
            .field("mxcsr_mask", &format_args!("{:#x}", self.mxcsr_mask()))
            .finish_non_exhaustive()
    }
}
