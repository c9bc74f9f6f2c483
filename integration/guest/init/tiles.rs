//! Tile instructions, and what their registers should have.

use std::arch::asm;

use crate::report::{Event, Wrong};
use crate::worker::Outcome;

/// Bytes of a tile of 16 rows.
pub const TILE: usize = 1024;
/// Bytes of a row.
pub const ROW: usize = 64;

/// A tile's content.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Tile(pub [u8; TILE]);

/// A tile configuration (SDM vol. 1 §18.2).
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Config(pub [u8; 64]);

/// Palette 1, all tiles with 16 rows of 64 bytes.
pub const FULL: Config = config(16, 64);
/// Palette 1, all tiles with 3 rows of 20 bytes: for those who disturb.
pub const SMALL: Config = config(3, 20);

const fn config(rows: u8, columns: u8) -> Config {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = columns;
        bytes[48 + tile] = rows;
        tile += 1;
    }
    Config(bytes)
}

/// LDTILECFG.
pub fn load_config(config: &Config) {
    // SAFETY: the instruction reads 64 bytes at the address and changes tile registers only, which the compiler does not use.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &config.0, options(nostack, readonly, preserves_flags))
    }
}

/// STTILECFG.
pub fn store_config() -> Config {
    let mut config = Config([0xff; 64]);
    // SAFETY: the instruction writes 64 bytes at the address.
    unsafe { asm!("sttilecfg [{}]", in(reg) &mut config.0, options(nostack, preserves_flags)) }
    config
}

/// TILERELEASE.
pub fn release() {
    // SAFETY: it changes tile registers only.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
}

/// TILEZERO of tile 0, which is [`ZERO_BYTES`] long: whoever may not execute it can go on behind it.
#[inline(never)]
pub fn zero_skippable() {
    // SAFETY: it changes tile registers only.
    unsafe { asm!("tilezero tmm0", options(nomem, nostack, preserves_flags)) }
}

/// Bytes of the instruction: a three-byte VEX prefix, the opcode, ModRM.
pub const ZERO_BYTES: u64 = 5;

macro_rules! each_tile {
    ($number:expr, $instruction:ident($($arguments:tt)*)) => {
        match $number {
            0 => $instruction!("0", $($arguments)*),
            1 => $instruction!("1", $($arguments)*),
            2 => $instruction!("2", $($arguments)*),
            3 => $instruction!("3", $($arguments)*),
            4 => $instruction!("4", $($arguments)*),
            5 => $instruction!("5", $($arguments)*),
            6 => $instruction!("6", $($arguments)*),
            _ => $instruction!("7", $($arguments)*),
        }
    };
}

macro_rules! load {
    ($number:literal, $tile:expr) => {
        // SAFETY: the instruction reads at most 16 rows of 64 bytes, which the tile has, and changes a tile register only.
        unsafe {
            asm!(concat!("tileloadd tmm", $number, ", [{} + {}*1]"), in(reg) &$tile.0, in(reg) ROW,
                options(nostack, readonly, preserves_flags))
        }
    };
}

macro_rules! store {
    ($number:literal, $tile:expr) => {
        // SAFETY: the instruction writes at most 16 rows of 64 bytes, which the tile has.
        unsafe {
            asm!(concat!("tilestored [{} + {}*1], tmm", $number), in(reg) &mut $tile.0, in(reg) ROW,
                options(nostack, preserves_flags))
        }
    };
}

/// TILELOADD of tile `number`.
pub fn load(number: u8, tile: &Tile) {
    each_tile!(number, load(tile));
}

/// TILESTORED of tile `number`.
pub fn store(number: u8) -> Tile {
    let mut tile = Tile([0xee; TILE]);
    each_tile!(number, store(tile));
    tile
}

/// A product: tile 0 or 1 plus tile 4 times tile 5.
macro_rules! product {
    ($(#[$doc:meta])* $name:ident, $text:literal) => {
        $(#[$doc])*
        pub fn $name() {
            // SAFETY: it changes tile registers only, which the compiler does not use.
            unsafe { asm!($text, options(nomem, nostack, preserves_flags)) }
        }
    };
}

product!(
    /// TDPBSSD: signed bytes, into tile 0.
    signed, "tdpbssd tmm0, tmm4, tmm5"
);
product!(
    /// TDPBUUD: bytes without sign, into tile 1.
    unsigned, "tdpbuud tmm1, tmm4, tmm5"
);
product!(
    /// TDPBF16PS, into tile 0.
    halves, "tdpbf16ps tmm0, tmm4, tmm5"
);

/// The first wrong byte and how many there are.
pub struct Difference {
    first: Wrong,
    bytes: u32,
}

impl Difference {
    /// As the outcome of a round.
    pub fn in_round(self, round: u64) -> Outcome {
        Outcome::Wrong(Event::Wrong {
            round,
            first: self.first,
            bytes: self.bytes,
        })
    }

    /// Both: the first of the first, and all bytes.
    pub fn and(earlier: Option<Self>, later: Option<Self>) -> Option<Self> {
        match (earlier, later) {
            (Some(earlier), Some(later)) => Some(Self {
                bytes: earlier.bytes + later.bytes,
                ..earlier
            }),
            (earlier, later) => earlier.or(later),
        }
    }
}

/// Compares the content of tile `tile` (8: the configuration), of rows of `row_bytes`.
pub fn difference(tile: u8, expected: &[u8], found: &[u8], row_bytes: usize) -> Option<Difference> {
    let mut wrong = (0..).zip(expected.iter().zip(found));
    let (at, (&expected, &found)) = wrong.by_ref().find(|(_, (e, f))| e != f)?;
    let at: usize = at;
    Some(Difference {
        first: Wrong {
            tile,
            row: (at / row_bytes) as u8,
            byte: (at % row_bytes) as u8,
            expected,
            found,
        },
        bytes: 1 + wrong.filter(|(_, (e, f))| e != f).count() as u32,
    })
}
