//! What all states of one layout begin with: the header with its registers still zero, and the
//! tables of components and palettes.

use alloc::vec::Vec;

use super::{MAGIC, MAX_STATE_BYTES, VERSION};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::layout::{Layout, LayoutError, MAX_AREA_BYTES, MAX_PALETTES};
use crate::legacy::INITIAL_MXCSR;

pub(super) const VERSION_AT: usize = 8;
pub(super) const FLAGS: usize = 10;
pub(super) const TOTAL_BYTES: usize = 12;
pub(super) const XCR0: usize = 16;
pub(super) const XFD: usize = 24;
pub(super) const XFD_ERR: usize = 32;
pub(super) const XSTATE_BV: usize = 40;
pub(super) const MXCSR: usize = 48;
/// From here on the template is the layout.
pub(super) const LAYOUT: usize = 52;
const MXCSR_MASK: usize = 52;
pub(super) const COMPONENTS: usize = 56;
pub(super) const PALETTES: usize = 58;
const AREA_BYTES: usize = 60;
pub(super) const HEADER_BYTES: usize = 64;

/// An entry of either table.
pub(super) const ENTRY_BYTES: usize = 12;
pub(super) const RECORD_HEADER_BYTES: usize = 8;
/// A component's bytes are stored or left out by this many.
pub(super) const LINE_BYTES: usize = 64;
/// One word of the bitmap stands for this many lines.
pub(super) const WORD_LINES: usize = 64;
pub(super) const WORD_BYTES: usize = 8;
pub(super) const CHECKSUM_BYTES: usize = 4;
pub(super) const MIN_STATE_BYTES: usize = HEADER_BYTES + CHECKSUM_BYTES;

/// CPUID.(EAX=0DH,ECX=n):ECX, as in the table.
const ALIGNED: u16 = 1 << 1;
const HAS_XFD: u16 = 1 << 2;

// Version 1 is in files. Nothing here changes: what has to change is version 2.
const _: () = {
    // Components beyond the legacy region: 2 to 62.
    const MAX_COMPONENTS: usize = ComponentId::COUNT as usize - 2;
    assert!(VERSION == 1 && VERSION_AT == 8 && FLAGS == 10 && TOTAL_BYTES == 12);
    assert!(MAGIC[0] == 0x89 && MAGIC[1] == b'X' && MAGIC[7] == b'\n');
    assert!(XCR0 == 16 && XFD == 24 && XFD_ERR == 32 && XSTATE_BV == 40 && MXCSR == 48);
    assert!(LAYOUT == 52 && MXCSR_MASK == 52 && COMPONENTS == 56 && PALETTES == 58);
    assert!(AREA_BYTES == 60 && HEADER_BYTES == 64 && ENTRY_BYTES == 12);
    assert!(ALIGNED == 2 && HAS_XFD == 4 && MAX_COMPONENTS == 61 && MAX_PALETTES == 8);
    assert!(RECORD_HEADER_BYTES == 8 && LINE_BYTES == 64 && WORD_LINES == 64 && WORD_BYTES == 8);
    assert!(CHECKSUM_BYTES == 4 && MAX_AREA_BYTES == 65_536 && MAX_STATE_BYTES == 73_728);
    assert!(INITIAL_MXCSR == 0x1f80);
    // Tables, then for each component a header and two words that are not full, then every line of
    // the area with its bit.
    assert!(
        HEADER_BYTES
            + ENTRY_BYTES * (MAX_COMPONENTS + MAX_PALETTES as usize)
            + (ComponentId::COUNT as usize) * (RECORD_HEADER_BYTES + 2 * WORD_BYTES)
            + MAX_AREA_BYTES
            + MAX_AREA_BYTES / (LINE_BYTES * 8)
            + CHECKSUM_BYTES
            <= MAX_STATE_BYTES
    );
};

/// The user components beyond the legacy region, then the palettes.
pub(super) fn of(layout: &Layout) -> Vec<u8> {
    let mut template = Vec::new();
    template.extend_from_slice(&MAGIC);
    template.extend_from_slice(&VERSION.to_le_bytes());
    template.resize(LAYOUT, 0);
    let extended = layout.user() - XFeatures::LEGACY;
    template.extend_from_slice(&layout.mxcsr_mask().to_le_bytes());
    template.extend_from_slice(&count(extended.components()).to_le_bytes());
    template.extend_from_slice(&count(layout.palettes()).to_le_bytes());
    template.extend_from_slice(&word(layout.standard_size()).to_le_bytes());
    for component in extended.components().filter_map(|id| layout.component(id)) {
        let id = component.id();
        let mut flags = 0;
        if component.is_aligned() {
            flags |= ALIGNED;
        }
        if layout.xfd().contains(id.bit()) {
            flags |= HAS_XFD;
        }
        template.extend_from_slice(&u16::from(id.number()).to_le_bytes());
        template.extend_from_slice(&flags.to_le_bytes());
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

/// The layout that a header and its tables describe, through the same checks as any CPUID. What
/// they say beyond the layout, for example in an unknown flag, is for the caller to find: the
/// template of the layout is not theirs then.
pub(super) fn layout(template: &[u8]) -> Result<Layout, LayoutError> {
    let components = usize::from(bytes::u16_at(template, COMPONENTS));
    let tables = template.get(HEADER_BYTES..).unwrap_or_default();
    let (components, palettes) = tables
        .split_at_checked(components.saturating_mul(ENTRY_BYTES))
        .unwrap_or_default();
    let entries = || components.chunks_exact(ENTRY_BYTES);
    let mut user = XFeatures::LEGACY.bits();
    let mut xfd = 0;
    for entry in entries() {
        user |= 1u64
            .checked_shl(bytes::u16_at(entry, 0).into())
            .unwrap_or(0);
        xfd |= bytes::u16_at(entry, 2) & HAS_XFD;
    }
    let [a, b, c, d, e, f, g, h] = user.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    let layout = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0, _) => [0x1d, 0, 0, 0],
        (0xd, 0) => [low, 0, bytes::u32_at(template, AREA_BYTES), high],
        (0xd, 1) => [u32::from(xfd != 0) << 4, 0, 0, 0],
        (0xd, id) => entries()
            .find(|entry| u32::from(bytes::u16_at(entry, 0)) == id)
            .map_or([0; 4], |entry| {
                let flags = u32::from(bytes::u16_at(entry, 2));
                let (offset, size) = (bytes::u32_at(entry, 4), bytes::u32_at(entry, 8));
                [size, offset, flags, 0]
            }),
        (0x1d, 0) => [bytes::u16_at(template, PALETTES).into(), 0, 0, 0],
        (0x1d, id) => {
            let index = usize::try_from(id.saturating_sub(1)).unwrap_or(usize::MAX);
            let leaf = palettes.chunks_exact(ENTRY_BYTES).nth(index);
            let leaf = leaf.unwrap_or_default();
            [0, 4, 8, ENTRY_BYTES].map(|offset| bytes::u32_at(leaf, offset))
        }
        _ => [0; 4],
    })?;
    Ok(layout.with_mxcsr_mask(bytes::u32_at(template, MXCSR_MASK)))
}

/// A layout has at most 61 components and 8 palettes.
fn count<T>(of: impl IntoIterator<Item = T>) -> u16 {
    u16::try_from(of.into_iter().count()).unwrap_or(u16::MAX)
}

/// A layout has no number above [`MAX_AREA_BYTES`].
fn word(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
