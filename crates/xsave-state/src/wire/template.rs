//! What all states of one layout begin with: the header with its registers still zero, and the
//! tables of components and palettes.

use alloc::vec::Vec;

use super::error::DecodeError;
use super::{MAGIC, MAX_STATE_BYTES, PREFIX_BYTES, VERSION};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::INITIAL_MXCSR;
use crate::layout::{Component, Layout, LayoutError, MAX_AREA_BYTES, MAX_PALETTES, Palette};

// All versions begin with these.
pub(super) const VERSION_AT: usize = 8;
pub(super) const FLAGS: usize = 10;
pub(super) const TOTAL_BYTES: usize = 12;
/// From version 2 on.
pub(super) const VCPU: usize = 16;

// The rest of the header, from where the fields of its version begin.
pub(super) const XCR0: usize = 0;
pub(super) const XFD: usize = 8;
pub(super) const XFD_ERR: usize = 16;
pub(super) const XSTATE_BV: usize = 24;
pub(super) const MXCSR: usize = 32;
/// From here on the template is the layout.
pub(super) const LAYOUT: usize = 36;
const MXCSR_MASK: usize = 36;
pub(super) const COMPONENTS: usize = 40;
pub(super) const PALETTES: usize = 42;
const AREA_BYTES: usize = 44;
/// The tables.
pub(super) const TABLES: usize = 48;

/// An entry of either table.
pub(super) const ENTRY_BYTES: usize = 12;
const ENTRY_FLAGS: usize = 2;
pub(super) const RECORD_HEADER_BYTES: usize = 8;
/// A component's bytes are stored or left out by this many.
pub(super) const LINE_BYTES: usize = 64;
/// One word of the bitmap stands for this many lines.
pub(super) const WORD_LINES: usize = 64;
pub(super) const WORD_BYTES: usize = 8;
pub(super) const CHECKSUM_BYTES: usize = 4;
/// Of version 1; those of version 2 have 4 more.
pub(super) const MIN_STATE_BYTES: usize = fields(1) + TABLES + CHECKSUM_BYTES;

/// CPUID.(EAX=0DH,ECX=n):ECX, as in the table.
const ALIGNED: u8 = 1 << 1;
const HAS_XFD: u8 = 1 << 2;

// Both versions are in files. Nothing here changes: what has to change is version 3.
const _: () = {
    // Components beyond the legacy region: 2 to 62.
    const MAX_COMPONENTS: usize = ComponentId::COUNT as usize - 2;
    assert!(VERSION == 2 && VERSION_AT == 8 && FLAGS == 10 && TOTAL_BYTES == 12);
    assert!(MAGIC[0] == 0x89 && MAGIC[1] == b'X' && MAGIC[7] == b'\n');
    assert!(PREFIX_BYTES == 16 && VCPU == 16 && fields(1) == 16 && fields(2) == 20);
    assert!(XCR0 == 0 && XFD == 8 && XFD_ERR == 16 && XSTATE_BV == 24 && MXCSR == 32);
    // The layout's numbers take as much as an entry: a byte's place in its entry is known.
    assert!(TABLES - LAYOUT == ENTRY_BYTES);
    assert!(LAYOUT == 36 && MXCSR_MASK == 36 && COMPONENTS == 40 && PALETTES == 42);
    assert!(AREA_BYTES == 44 && TABLES == 48 && ENTRY_BYTES == 12 && MIN_STATE_BYTES == 68);
    assert!(ALIGNED == 2 && HAS_XFD == 4 && MAX_COMPONENTS == 61 && MAX_PALETTES == 8);
    assert!(RECORD_HEADER_BYTES == 8 && LINE_BYTES == 64 && WORD_LINES == 64 && WORD_BYTES == 8);
    assert!(CHECKSUM_BYTES == 4 && MAX_AREA_BYTES == 65_536 && MAX_STATE_BYTES == 73_728);
    assert!(INITIAL_MXCSR == 0x1f80);
    // Tables, then for each component a header and two words that are not full, then every line of
    // the area with its bit.
    assert!(
        fields(VERSION)
            + TABLES
            + ENTRY_BYTES * (MAX_COMPONENTS + MAX_PALETTES as usize)
            + (ComponentId::COUNT as usize) * (RECORD_HEADER_BYTES + 2 * WORD_BYTES)
            + MAX_AREA_BYTES
            + MAX_AREA_BYTES / (LINE_BYTES * 8)
            + CHECKSUM_BYTES
            <= MAX_STATE_BYTES
    );
};

/// Returns where the fields begin: behind the vCPU's number where the version has it.
pub(super) const fn fields(version: u16) -> usize {
    if version == 1 { PREFIX_BYTES } else { VCPU + 4 }
}

/// Returns header and tables for a layout: the user components beyond the legacy region, then the
/// palettes.
pub(super) fn of(layout: &Layout) -> Vec<u8> {
    let mut template = Vec::new();
    template.extend_from_slice(&MAGIC);
    template.extend_from_slice(&VERSION.to_le_bytes());
    template.resize(fields(VERSION).saturating_add(LAYOUT), 0);
    let extended = layout.user() - XFeatures::LEGACY;
    template.extend_from_slice(&layout.mxcsr_mask().to_le_bytes());
    template.extend_from_slice(&count(extended.components()).to_le_bytes());
    template.extend_from_slice(&count(layout.palettes()).to_le_bytes());
    template.extend_from_slice(&word(layout.standard_size()).to_le_bytes());
    for component in extended.components().filter_map(|id| layout.component(id)) {
        let mut flags = 0;
        if component.is_aligned() {
            flags |= ALIGNED;
        }
        if component.has_xfd() {
            flags |= HAS_XFD;
        }
        template.extend_from_slice(&[component.id().number(), 0, flags, 0]);
        template.extend_from_slice(&word(component.offset().unwrap_or(0)).to_le_bytes());
        template.extend_from_slice(&word(component.size()).to_le_bytes());
    }
    for palette in layout.palettes() {
        let (high, low) = (palette.tile_bytes(), palette.total_bytes());
        template.extend_from_slice(&low.to_le_bytes());
        template.extend_from_slice(&high.to_le_bytes());
        template.extend_from_slice(&palette.row_bytes().to_le_bytes());
        template.extend_from_slice(&palette.tiles().to_le_bytes());
        template.extend_from_slice(&u32::from(palette.rows()).to_le_bytes());
    }
    template
}

/// Builds the layout that the fields and tables of a state describe, through the same checks as any
/// other. What they say beyond the layout, for example in an unknown flag, is found by
/// [`require_canonical`].
pub(super) fn layout(fields: &[u8]) -> Result<Layout, LayoutError> {
    let components = usize::from(bytes::u16_at(fields, COMPONENTS));
    let tables = fields.get(TABLES..).unwrap_or_default();
    let (components, palettes) = tables
        .split_at_checked(components.saturating_mul(ENTRY_BYTES))
        .unwrap_or_default();
    let components = components
        .chunks_exact(ENTRY_BYTES)
        .filter_map(component)
        .collect::<Vec<_>>();
    let palettes = (1u8..=u8::MAX)
        .zip(palettes.chunks_exact(ENTRY_BYTES))
        .map(|(number, leaf)| {
            let leaf = [0, 4, 8, ENTRY_BYTES].map(|offset| bytes::u32_at(leaf, offset));
            Palette::from_leaf(number, leaf)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let layout = Layout::from_parts(components, palettes)?;
    Ok(layout.with_mxcsr_mask(bytes::u32_at(fields, MXCSR_MASK)))
}

/// Reads an entry; none where the number is not that of a component.
fn component(entry: &[u8]) -> Option<Component> {
    let id = ComponentId::new(u8::try_from(bytes::u16_at(entry, 0)).ok()?)?;
    let at = |offset| usize::try_from(bytes::u32_at(entry, offset)).unwrap_or(usize::MAX);
    let mut component = Component::user(id, at(4), at(8));
    let flags = bytes::u8_at(entry, ENTRY_FLAGS);
    if flags & ALIGNED != 0 {
        component = component.aligned();
    }
    if flags & HAS_XFD != 0 {
        component = component.with_xfd();
    }
    Some(component)
}

/// Checks that the layout's part of a state, at byte `offset`, is as encoding the layout gives it.
///
/// Writers of version 1 took CPUID's word for whether IA32_XFD can disable XTILEDATA, which KVM does
/// not ask: either value of that bit is taken, and means "yes".
pub(super) fn require_canonical(
    actual: &[u8],
    canonical: &[u8],
    version: u16,
    offset: usize,
) -> Result<(), DecodeError> {
    for (at, (&actual, &expected)) in (0usize..).zip(actual.iter().zip(canonical)) {
        // Of no other component can the two differ so: its bit in the layout is the one that is here.
        let is_xfd =
            version == 1 && at % ENTRY_BYTES == ENTRY_FLAGS && actual | HAS_XFD == expected;
        // Both have as many entries, unless two entries have the same number or one has none: then an
        // earlier byte, the number of components, differs.
        if actual != expected && !is_xfd {
            return Err(DecodeError::Field {
                field: "the layout",
                offset: offset.saturating_add(at),
                expected: expected.into(),
                actual: actual.into(),
            });
        }
    }
    Ok(())
}

/// A layout has at most 61 components and 8 palettes.
fn count<T>(of: impl IntoIterator<Item = T>) -> u16 {
    u16::try_from(of.into_iter().count()).unwrap_or(u16::MAX)
}

/// A layout has no number above [`MAX_AREA_BYTES`].
fn word(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
