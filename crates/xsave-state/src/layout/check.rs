//! Puts a layout together from parts, if an area of them can exist.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Component, Inner, Layout, LayoutError, MAX_AREA_BYTES, MAX_PALETTES, MXCSR_MASK};
use super::{Palette, SLOTS};
use crate::feature::{ComponentId, XFeatures};
use crate::format::{EXTENDED_OFFSET, TILECFG_BYTES};

impl Layout {
    /// Puts a layout together without CPUID, for tests and tools. x87 and SSE are always there and
    /// are not listed. Palettes mean nothing without XTILECFG, and are left out then. The MXCSR mask is
    /// 0xffff.
    ///
    /// # Errors
    ///
    /// The parts describe an area that cannot exist: see [`LayoutError`].
    ///
    /// ```
    /// use xsave_state::{Component, ComponentId, Layout, Palette};
    ///
    /// let layout = Layout::from_parts(
    ///     [
    ///         Component::user(ComponentId::AVX, 576, 256),
    ///         Component::user(ComponentId::PKRU, 2688, 8),
    ///         Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
    ///         Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
    ///     ],
    ///     [Palette::ONE],
    /// )?;
    /// assert_eq!(layout.standard_size(), 11_008);
    /// # Ok::<(), xsave_state::LayoutError>(())
    /// ```
    pub fn from_parts(
        components: impl IntoIterator<Item = Component>,
        palettes: impl IntoIterator<Item = Palette>,
    ) -> Result<Self, LayoutError> {
        let mut slots = [None; SLOTS];
        let [x87, sse, ..] = &mut slots;
        *x87 = Component::legacy(ComponentId::X87);
        *sse = Component::legacy(ComponentId::SSE);
        let mut supervisor = XFeatures::empty();
        let mut user = XFeatures::LEGACY;
        let mut xfd = XFeatures::empty();
        for component in components {
            check_component(&component)?;
            let id = component.id();
            let Some(slot) = slots.get_mut(usize::from(id.number())) else {
                continue;
            };
            if slot.replace(component).is_some() {
                return Err(LayoutError::Twice { component: id });
            }
            if component.offset().is_none() {
                supervisor |= id.bit();
                continue;
            }
            user |= id.bit();
            if component.has_xfd() {
                xfd |= id.bit();
            }
        }
        let standard_size = places(&slots)?;
        compacted_size(&slots)?;
        let palettes = check_palettes(palettes.into_iter().collect(), &slots)?;
        Ok(Layout(Arc::new(Inner {
            components: slots,
            user,
            supervisor,
            xfd,
            standard_size,
            mxcsr_mask: MXCSR_MASK,
            palettes,
        })))
    }
}

/// Returns the size of components whose content this crate or its users read, by the architecture
/// (SDM Vol. 1 §13.5). XTILEDATA's follows from the palette.
fn architectural_size(id: ComponentId) -> Option<usize> {
    Some(match id {
        ComponentId::AVX => 256,
        ComponentId::BNDREGS | ComponentId::BNDCSR | ComponentId::OPMASK => 64,
        ComponentId::ZMM_HI256 => 512,
        ComponentId::HI16_ZMM => 1024,
        ComponentId::PKRU => 8,
        ComponentId::XTILECFG => TILECFG_BYTES,
        _ => return None,
    })
}

/// Checks one component by itself.
fn check_component(component: &Component) -> Result<(), LayoutError> {
    let (id, size) = (component.id(), component.size());
    if size == 0 {
        return Err(LayoutError::NoSize { component: id });
    }
    // AMD Zen 2, which has no PKRU to enable, lists it with 64 bytes.
    let zen_2_pkru = id == ComponentId::PKRU && size == 64;
    if let Some(expected_bytes) = architectural_size(id).filter(|&expected| expected != size)
        && !zen_2_pkru
    {
        return Err(LayoutError::Size {
            component: id,
            expected_bytes,
            actual_bytes: size,
        });
    }
    if let Some(offset) = component.offset()
        && offset < EXTENDED_OFFSET
    {
        return Err(LayoutError::OffsetInHeader {
            component: id,
            offset,
        });
    }
    let end_bytes = component.offset().unwrap_or(0).saturating_add(size);
    if end_bytes > MAX_AREA_BYTES {
        return Err(LayoutError::TooLarge {
            component: id,
            end_bytes,
        });
    }
    Ok(())
}

/// Checks that user components do not overlap, and returns where the last one ends.
fn places(components: &[Option<Component>; SLOTS]) -> Result<usize, LayoutError> {
    let mut end = EXTENDED_OFFSET;
    for (index, second) in components.iter().flatten().enumerate() {
        let Some(range) = second.range() else {
            continue;
        };
        for first in components.iter().flatten().take(index) {
            let Some(other) = first.range() else {
                continue;
            };
            if range.start < other.end && other.start < range.end {
                return Err(LayoutError::Overlap {
                    first: first.id(),
                    first_offset: other.start,
                    second: second.id(),
                    second_offset: range.start,
                });
            }
        }
        end = end.max(range.end);
    }
    Ok(end)
}

/// Checks that all components together, each at the next multiple of 64 bytes at most, fit into an
/// area.
fn compacted_size(components: &[Option<Component>; SLOTS]) -> Result<(), LayoutError> {
    let extended = components.iter().flatten().skip(2);
    let total_bytes = extended
        .map(|component| component.size().saturating_add(63))
        .fold(EXTENDED_OFFSET, usize::saturating_add);
    if total_bytes > MAX_AREA_BYTES {
        return Err(LayoutError::CompactedTooLarge { total_bytes });
    }
    Ok(())
}

/// Checks that the palettes are numbered from 1, and that the tiles of each fit into component 18.
/// A layout without XTILECFG has none.
fn check_palettes(
    palettes: Vec<Palette>,
    components: &[Option<Component>; SLOTS],
) -> Result<Vec<Palette>, LayoutError> {
    let find = |id: ComponentId| components.get(usize::from(id.number()))?.as_ref();
    if find(ComponentId::XTILECFG).is_none() {
        return Ok(Vec::new());
    }
    let data = find(ComponentId::XTILEDATA);
    for (number, palette) in (1u32..).zip(&palettes) {
        if number > MAX_PALETTES {
            return Err(LayoutError::TooManyPalettes {
                max_palette: number,
            });
        }
        if u32::from(palette.id()) != number {
            return Err(LayoutError::PaletteNumber {
                expected: number,
                actual: palette.id(),
            });
        }
        let palette_bytes = usize::from(palette.total_bytes());
        if let Some(data) = data
            && palette_bytes > data.size()
        {
            return Err(LayoutError::TileData {
                palette: palette.id(),
                palette_bytes,
                component_bytes: data.size(),
            });
        }
    }
    Ok(palettes)
}
