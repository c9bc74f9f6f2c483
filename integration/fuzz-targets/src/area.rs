//! XSAVE areas from a few bytes: a template and the places where the input changes it.
//!
//! Areas have 11,008 bytes, of which some hundred have rules. An input names those that it changes,
//! so that inputs, and the committed corpora, stay small.

use xsave_state::{ComponentId, Layout};

use crate::input::Input;

/// Fill with bytes that differ from place to place, and TILECFG with the largest tiles.
pub const FULL: u8 = 1;
/// The area is cut to a length from the input.
const CUT: u8 = 2;

/// An area of the standard format: flags, XSTATE_BV (8 bytes), a length (2 bytes) where the flags
/// say so, then changes.
pub fn standard(input: &mut Input<'_>, layout: &Layout) -> Vec<u8> {
    let flags = input.u8();
    let xstate_bv = input.u64();
    let len = if flags & CUT != 0 {
        usize::from(input.u16())
    } else {
        layout.standard_size()
    };
    let mut area = vec![0; layout.standard_size()];
    if flags & FULL != 0 {
        fill(&mut area);
        for component in layout.components() {
            if component.id() == ComponentId::XTILECFG
                && let Some(offset) = component.offset()
            {
                tilecfg(&mut area[offset..offset + 64], layout);
            }
        }
    }
    head(&mut area, xstate_bv, 0);
    area.resize(len, 0);
    change(input, &mut area);
    area
}

/// An area of the compacted format: flags, XSTATE_BV and XCOMP_BV (8 bytes each), a length where the
/// flags say so, then changes.
pub fn compacted(input: &mut Input<'_>, layout: &Layout) -> Vec<u8> {
    let flags = input.u8();
    let xstate_bv = input.u64();
    let xcomp_bv = input.u64();
    let placed = xsave_state::XFeatures::from_bits_retain(xcomp_bv);
    let len = if flags & CUT != 0 {
        usize::from(input.u16())
    } else {
        layout.compacted_size(placed)
    };
    let mut area = vec![0; layout.compacted_size(placed)];
    if flags & FULL != 0 {
        fill(&mut area);
        for (component, range) in layout.compacted(placed) {
            if component.id() == ComponentId::XTILECFG {
                tilecfg(&mut area[range], layout);
            }
        }
    }
    head(&mut area, xstate_bv, xcomp_bv);
    area.resize(len, 0);
    change(input, &mut area);
    area
}

fn fill(area: &mut [u8]) {
    for (i, byte) in area.iter_mut().enumerate() {
        *byte = (i % 251) as u8 | 1;
    }
    area[..24].fill(0);
    area[416..464].fill(0);
}

/// The largest tiles of the first palette.
fn tilecfg(bytes: &mut [u8], layout: &Layout) {
    bytes.fill(0);
    if let Some(palette) = layout.palettes().first() {
        bytes[0] = palette.id();
        for tile in 0..usize::from(palette.tiles()) {
            bytes[16 + 2 * tile..][..2].copy_from_slice(&palette.row_bytes().to_le_bytes());
            bytes[48 + tile] = palette.rows() as u8;
        }
    }
}

fn head(area: &mut [u8], xstate_bv: u64, xcomp_bv: u64) {
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    area[520..528].copy_from_slice(&xcomp_bv.to_le_bytes());
    area[528..576].fill(0);
}

/// Each change is an offset (2 bytes), a number of bytes (1 byte) and those bytes.
fn change(input: &mut Input<'_>, area: &mut [u8]) {
    while !input.is_empty() {
        let offset = usize::from(input.u16());
        let len = usize::from(input.u8());
        let bytes = input.bytes(len);
        if let Some(place) = area.get_mut(offset..) {
            let len = place.len().min(bytes.len());
            place[..len].copy_from_slice(&bytes[..len]);
        }
    }
}
