//! The states that encoded forms are tested with, built without the crate's code for that.
#![allow(dead_code, reason = "each test binary uses a part")]

use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};

use crate::common::{ARMED, LIVE_TILES, area, layout};

/// What the AMX lab's guest has.
pub(crate) const AMX: &str = "sapphire-rapids-emulated-guest";

pub(crate) fn registers(xcr0: u64, xfd: u64, xfd_err: u64) -> Registers {
    Registers::RESET
        .with_xcr0(XFeatures::from_bits_retain(xcr0))
        .with_xfd(XFeatures::from_bits_retain(xfd))
        .with_xfd_err(XFeatures::from_bits_retain(xfd_err))
}

pub(crate) fn state(area: &[u8], layout: &Layout, registers: Registers) -> ExtendedState<'static> {
    let image = Image::parse(area, layout).unwrap().into_owned();
    ExtendedState::new(image, registers).unwrap()
}

/// x87, SSE and AVX in use, AMX enabled and disabled by XFD: a guest that computes, with no tiles.
pub(crate) fn idle(layout: &Layout) -> ExtendedState<'static> {
    state(&area(layout, 7), layout, registers(0x602e7, 0x40000, 0))
}

/// Everything in use, every tile full.
pub(crate) fn full_tiles(layout: &Layout) -> ExtendedState<'static> {
    state(&area(layout, 0x602e7), layout, registers(0x602e7, 0, 0))
}

/// Two of the eight tiles have content, as [`LIVE_TILES`]; what else a vector program uses.
pub(crate) fn two_tiles(layout: &Layout) -> ExtendedState<'static> {
    let mut area = area(layout, 0x60007);
    area[2816 + 1024..2816 + 7 * 1024].fill(0);
    state(&area, layout, registers(0x602e7, 0, 0))
}

/// Tile 0 has 3 rows of 5 bytes, and content in them only.
fn tile_3x5(layout: &Layout) -> ExtendedState<'static> {
    let mut area = area(layout, 0x60001);
    let tilecfg = layout.component(ComponentId::XTILECFG).unwrap();
    let start = tilecfg.offset().unwrap();
    area[start..].fill(0);
    area[start] = 1;
    area[start + 16] = 5;
    area[start + 48] = 3;
    for row in 0..3 {
        area[start + 64 + 64 * row..][..5].copy_from_slice(&[1, 2, 3, 4, row as u8]);
    }
    state(&area, layout, registers(0x602e7, 0, 0))
}

/// One of each kind, by the name of its golden file. Its vCPU's number is its index.
pub(crate) fn all() -> Vec<(&'static str, ExtendedState<'static>)> {
    let amx = layout(AMX);
    let of = |name, in_use, registers| {
        let layout = layout(name);
        state(&area(&layout, in_use), &layout, registers)
    };
    vec![
        ("reset", ExtendedState::reset(&amx)),
        ("idle", idle(&amx)),
        (
            "avx512",
            of("ice-lake-server", 0xe6, registers(0x2e7, 0, 0)),
        ),
        ("full-tiles", full_tiles(&amx)),
        ("tile-3x5", tile_3x5(&amx)),
        (
            "armed-lab",
            state(ARMED, &amx, registers(0x602e7, 0x40000, 0)),
        ),
        (
            "live-tiles-lab",
            state(LIVE_TILES, &amx, registers(0x602e7, 0, 0)),
        ),
        // The guest has used a tile while XFD disables them, and is on its way to its #NM handler.
        (
            "mid-nm",
            of(AMX, 0x20207, registers(0x602e7, 0x40000, 0x40000)),
        ),
        (
            "amd-zen4",
            of("amd-zen4-genoa", 0x2e7, registers(0x207, 0, 0)),
        ),
        ("mpx", of("skylake-client", 0x1f, registers(0x1f, 0, 0))),
    ]
}
