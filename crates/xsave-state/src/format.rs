//! Offsets, sizes and initial values that the architecture fixes for every XSAVE area
//! (SDM Vol. 1 §13.4, §13.6).

use core::ops::Range;

/// Offset of the extended region, in both formats (SDM Vol. 1 §13.4.3).
pub const EXTENDED_OFFSET: usize = LEGACY_BYTES + HEADER_BYTES;
/// MXCSR after reset and in the initial state (SDM Vol. 1 §13.6).
pub const INITIAL_MXCSR: u32 = 0x1f80;
/// The x87 control word in the initial state (SDM Vol. 1 §13.6).
pub const INITIAL_FCW: u16 = 0x37f;
/// Bytes of component 17, and of the memory operand of LDTILECFG and STTILECFG.
pub const TILECFG_BYTES: usize = 64;

/// Bytes of the legacy region, at offset 0 of every area (SDM Vol. 1 §13.4.1).
pub(crate) const LEGACY_BYTES: usize = 512;
/// Bytes of the header, at offset 512 of every area (SDM Vol. 1 §13.4.2).
pub(crate) const HEADER_BYTES: usize = 64;
/// Bit 63 of XCOMP_BV: the area has the compacted format (SDM Vol. 1 §13.4.2).
pub(crate) const COMPACTED: u64 = 1 << 63;
/// TILECFG has room for the shapes of this many tiles (SDM Vol. 1 §18.2).
pub(crate) const MAX_TILES: usize = 16;
/// Bytes of component 0. MXCSR and its mask, bytes 24 to 31, lie within them.
pub(crate) const X87_BYTES: usize = 160;
pub(crate) const MXCSR: usize = 24;
pub(crate) const MXCSR_MASK: usize = 28;
pub(crate) const XMM: Range<usize> = X87_BYTES..416;
pub(crate) const LEGACY_RESERVED: Range<usize> = 416..464;
pub(crate) const SOFTWARE: Range<usize> = 464..512;
pub(crate) const XSTATE_BV: usize = 512;
pub(crate) const XCOMP_BV: usize = 520;
pub(crate) const HEADER_RESERVED: Range<usize> = 528..576;
