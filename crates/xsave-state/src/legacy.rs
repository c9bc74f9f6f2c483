//! The 512-byte legacy region: x87, XMM and MXCSR (SDM Vol. 1 §10.5.1, §13.4.1).

use thiserror::Error;

use crate::bytes;
use crate::header::LEGACY_BYTES;

/// MXCSR after reset and in the initial state (SDM Vol. 1 §13.6).
pub const INITIAL_MXCSR: u32 = 0x1f80;
/// The x87 control word in the initial state (SDM Vol. 1 §13.6).
pub const INITIAL_FCW: u16 = 0x37f;

pub(crate) const MXCSR: usize = 24;
pub(crate) const MXCSR_MASK: usize = 28;
pub(crate) const XMM: core::ops::Range<usize> = 160..416;
pub(crate) const RESERVED: core::ops::Range<usize> = 416..464;
const SOFTWARE: core::ops::Range<usize> = 464..512;

/// The legacy region of an area, with a valid MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy<'a>(&'a [u8]);

impl<'a> Legacy<'a> {
    /// Checks the first 512 bytes of `area`; `mxcsr_mask` has the MXCSR bits that may be set. Bytes
    /// that are missing count as zero: check the length before.
    ///
    /// # Errors
    ///
    /// See [`LegacyError`]. MXCSR is checked even where no component needs it, because XRSTOR of the
    /// standard format loads it regardless of XSTATE_BV (SDM Vol. 1 §13.8.1).
    #[inline]
    pub fn parse(area: &'a [u8], mxcsr_mask: u32) -> Result<Self, LegacyError> {
        if let Some(offset) = bytes::first_nonzero(area, RESERVED) {
            return Err(LegacyError::Reserved {
                offset,
                value: bytes::u8_at(area, offset),
            });
        }
        let mxcsr = bytes::u32_at(area, MXCSR);
        if mxcsr & !mxcsr_mask != 0 {
            return Err(LegacyError::Mxcsr {
                mxcsr,
                mask: mxcsr_mask,
            });
        }
        Ok(Self::of(area))
    }

    pub(crate) fn of(area: &'a [u8]) -> Self {
        Self(bytes::prefix(area, LEGACY_BYTES))
    }

    /// All 512 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// The x87 control word, bytes 0 and 1.
    #[must_use]
    pub fn fcw(&self) -> u16 {
        bytes::u16_at(self.0, 0)
    }

    /// MXCSR, bytes 24 to 27, as it is in the area. Where neither SSE nor AVX is in use the vCPU's
    /// is [`INITIAL_MXCSR`]: see [`Image::mxcsr`](crate::Image::mxcsr).
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        bytes::u32_at(self.0, MXCSR)
    }

    /// MXCSR_MASK, bytes 28 to 31: which MXCSR bits the processor that wrote the area has. It means
    /// nothing when the area is loaded.
    #[must_use]
    pub fn mxcsr_mask(&self) -> u32 {
        bytes::u32_at(self.0, MXCSR_MASK)
    }

    /// x87 register ST(`index`) or MM`index`, 0 to 7, without its 6 bytes of padding.
    #[must_use]
    pub fn st(&self, index: usize) -> Option<&'a [u8; 10]> {
        let registers = bytes::range(self.0, 32..160);
        registers.chunks_exact(16).nth(index)?.first_chunk()
    }

    /// The low 128 bits of vector register `index`, 0 to 15.
    #[must_use]
    pub fn xmm(&self, index: usize) -> Option<&'a [u8; 16]> {
        let registers = bytes::range(self.0, XMM);
        registers.chunks_exact(16).nth(index)?.first_chunk()
    }

    /// Bytes 464 to 511, which the processor leaves to software. KVM writes the host's feature
    /// bitmap to the first eight and ignores them in KVM_SET_XSAVE.
    #[must_use]
    pub fn software(&self) -> &'a [u8] {
        bytes::range(self.0, SOFTWARE)
    }
}

/// A legacy region that is not valid: by the processor and KVM, or by a rule of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LegacyError {
    /// MXCSR has a bit that the processor does not implement: XRSTOR raises #GP, and so does
    /// KVM_SET_XSAVE with EINVAL where x87, SSE or AVX is in use (arch/x86/kernel/fpu/xstate.c,
    /// `copy_uabi_to_xstate`).
    #[error("MXCSR is {mxcsr:#x}; the bits that may be set are {mask:#x}")]
    Mxcsr {
        /// What is in the area.
        mxcsr: u32,
        /// The bits that may be set.
        mask: u32,
    },
    /// A reserved byte is not zero. This is the crate's own rule: neither the processor nor KVM looks
    /// at these bytes, and neither writes them. What is there was not saved by either.
    #[error(
        "byte {offset} of the area (legacy region) is reserved and must be 0, but is {value:#04x}"
    )]
    Reserved {
        /// Offset in the area, 416 to 463.
        offset: usize,
        /// What is there.
        value: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area() -> [u8; 512] {
        let mut area = [0; 512];
        area[0..2].copy_from_slice(&INITIAL_FCW.to_le_bytes());
        area[24..28].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
        area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        area
    }

    #[test]
    fn registers_are_where_fxsave_puts_them() {
        let mut area = area();
        area[32 + 16 * 7 + 9] = 0x17;
        area[160 + 16 * 15 + 15] = 0x25;
        area[464] = 0xe7;
        let legacy = Legacy::parse(&area, 0xffff).unwrap();
        assert_eq!(legacy.fcw(), 0x37f);
        assert_eq!(legacy.mxcsr(), 0x1f80);
        assert_eq!(legacy.mxcsr_mask(), 0xffff);
        assert_eq!(legacy.st(7).unwrap()[9], 0x17);
        assert_eq!(legacy.st(8), None);
        assert_eq!(legacy.xmm(15).unwrap()[15], 0x25);
        assert_eq!(legacy.xmm(16), None);
        assert_eq!(legacy.software()[0], 0xe7);
        assert_eq!(legacy.as_bytes().len(), 512);
    }

    #[test]
    fn each_mxcsr_bit_beyond_the_mask_is_refused() {
        for bit in 0..32 {
            let mut area = area();
            area[24..28].copy_from_slice(&(1u32 << bit).to_le_bytes());
            let result = Legacy::parse(&area, 0x2ffff).map(|legacy| legacy.mxcsr());
            if 0x2ffff & 1 << bit != 0 {
                assert_eq!(result, Ok(1 << bit));
            } else {
                assert_eq!(
                    result,
                    Err(LegacyError::Mxcsr {
                        mxcsr: 1 << bit,
                        mask: 0x2ffff
                    })
                );
            }
        }
    }

    #[test]
    fn each_reserved_byte_must_be_zero_and_software_bytes_need_not() {
        for offset in 0..512 {
            let mut area = area();
            area[offset] |= 1;
            let result = Legacy::parse(&area, 0xffff);
            match offset {
                416..464 => assert_eq!(
                    result.unwrap_err(),
                    LegacyError::Reserved { offset, value: 1 }
                ),
                26 | 27 => assert!(matches!(result, Err(LegacyError::Mxcsr { .. }))),
                _ => assert!(result.is_ok(), "offset {offset}"),
            }
        }
    }
}
