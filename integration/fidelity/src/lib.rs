//! Holds a processor with AMX, real or emulated, and the kernel on it, to the manual.
//!
//! The tests compare what instructions do with small models of the manual's own operation sections
//! ([`sdm`]). One piece of machine code, [`trial`], sets the registers, executes one instruction and
//! reads everything back. It runs in this process at CPL 3 and, from the same addresses, in a guest
//! under KVM at CPL 0 ([`guest`]), where IA32_XFD can be written and XSAVES and XRSTORS exist.
//!
//! "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual, order numbers 253665
//! (vol. 1) to 335592 (vol. 4).
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "what panics here is a failed test"
)]

pub mod arena;
pub mod changing_code;
pub mod cpuid;
pub mod frame;
pub mod guest;
pub mod pattern;
pub mod pkey;
pub mod process;
pub mod processors;
pub mod sdm;
pub mod ticks;
pub mod trap;
pub mod trial;

/// State component numbers (SDM vol. 1, 13.1).
pub mod component {
    /// x87.
    pub const X87: u32 = 0;
    /// XMM registers, and MXCSR.
    pub const SSE: u32 = 1;
    /// Upper halves of YMM0 to YMM15.
    pub const AVX: u32 = 2;
    /// AVX-512 opmasks.
    pub const OPMASK: u32 = 5;
    /// Upper halves of ZMM0 to ZMM15.
    pub const ZMM_HI256: u32 = 6;
    /// ZMM16 to ZMM31.
    pub const HI16_ZMM: u32 = 7;
    /// Protection-key rights.
    pub const PKRU: u32 = 9;
    /// Tile configuration.
    pub const TILECFG: u32 = 17;
    /// Tile data.
    pub const TILEDATA: u32 = 18;

    /// The components whose combinations are enumerated.
    pub const ENUMERATED: [u32; 7] = [AVX, OPMASK, ZMM_HI256, HI16_ZMM, PKRU, TILECFG, TILEDATA];
    /// Bit of the tile data in all bitmaps.
    pub const TILEDATA_BIT: u64 = 1 << TILEDATA;
    /// Both components of AMX.
    pub const AMX: u64 = 1 << TILECFG | 1 << TILEDATA;
    /// All enumerated ones.
    pub const ALL_ENUMERATED: u64 = subset(0x7f);

    /// The bitmap with the components of [`ENUMERATED`] that `selection` has bits for.
    #[must_use]
    pub const fn subset(selection: u32) -> u64 {
        let mut bits = 0;
        let mut i = 0;
        while i < ENUMERATED.len() {
            if selection >> i & 1 != 0 {
                bits |= 1 << ENUMERATED[i];
            }
            i += 1;
        }
        bits
    }
}
