//! The 512-byte legacy region: x87, XMM and MXCSR (SDM Vol. 1 §10.5.1, §13.4.1).

use thiserror::Error;

use crate::bytes;
use crate::format::{LEGACY_BYTES, LEGACY_RESERVED, MXCSR, MXCSR_MASK, SOFTWARE, X87_BYTES, XMM};

/// The legacy region of an area, with a valid MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy<'a>(&'a [u8]);

impl<'a> Legacy<'a> {
    /// Checks the first 512 bytes of `area`; `mxcsr_mask` has the MXCSR bits that may be set.
    ///
    /// # Errors
    ///
    /// See [`LegacyError`]. MXCSR is checked even where no component needs it, because XRSTOR of the
    /// standard format loads it regardless of XSTATE_BV (SDM Vol. 1 §13.8.1).
    #[inline]
    pub fn parse(area: &'a [u8], mxcsr_mask: u32) -> Result<Self, LegacyError> {
        if area.len() < LEGACY_BYTES {
            return Err(LegacyError::TooShort {
                required_bytes: LEGACY_BYTES,
                actual_bytes: area.len(),
            });
        }
        if let Some(offset) = bytes::first_nonzero(area, LEGACY_RESERVED) {
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

    /// Returns all 512 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Returns the x87 control word, bytes 0 and 1.
    #[must_use]
    pub fn fcw(&self) -> u16 {
        bytes::u16_at(self.0, 0)
    }

    /// Returns MXCSR, bytes 24 to 27, as it is in the area. With neither SSE nor AVX in use, MXCSR of
    /// the vCPU is 0x1f80 whatever is here: see [`Image::mxcsr`](crate::Image::mxcsr).
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        bytes::u32_at(self.0, MXCSR)
    }

    /// Returns MXCSR_MASK, bytes 28 to 31: the MXCSR bits of the processor that wrote the area. It is
    /// ignored when the area is loaded.
    #[must_use]
    pub fn mxcsr_mask(&self) -> u32 {
        bytes::u32_at(self.0, MXCSR_MASK)
    }

    /// Returns x87 register ST(`index`) or MM`index`, 0 to 7, without its 6 bytes of padding.
    #[must_use]
    pub fn st(&self, index: usize) -> Option<&'a [u8; 10]> {
        let registers = bytes::range(self.0, 32..X87_BYTES);
        registers.chunks_exact(16).nth(index)?.first_chunk()
    }

    /// Returns the low 128 bits of vector register `index`, 0 to 15.
    #[must_use]
    pub fn xmm(&self, index: usize) -> Option<&'a [u8; 16]> {
        let registers = bytes::range(self.0, XMM);
        registers.chunks_exact(16).nth(index)?.first_chunk()
    }

    /// Returns bytes 464 to 511, which the processor leaves to software. KVM writes the host's feature
    /// bitmap to the first eight and ignores them in KVM_SET_XSAVE.
    #[must_use]
    pub fn software(&self) -> &'a [u8] {
        bytes::range(self.0, SOFTWARE)
    }
}

/// Errors from checking a legacy region, by the rules of the processor and KVM, and one of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LegacyError {
    /// The area ends within the legacy region.
    #[error("the area has {actual_bytes} bytes; the legacy region has {required_bytes}")]
    TooShort {
        /// The legacy region.
        required_bytes: usize,
        /// The length of the area.
        actual_bytes: usize,
    },
    /// MXCSR has a bit that the processor does not implement: XRSTOR raises #GP, and so does
    /// KVM_SET_XSAVE with EINVAL where x87, SSE or AVX is in use (arch/x86/kernel/fpu/xstate.c,
    /// `copy_uabi_to_xstate`).
    #[error("MXCSR is {mxcsr:#x}; the bits that may be set are {mask:#x}")]
    Mxcsr {
        /// Bytes 24 to 27 of the area.
        mxcsr: u32,
        /// The bits that may be set.
        mask: u32,
    },
    /// A reserved byte is not zero. This is the crate's own rule: neither the processor nor KVM reads
    /// or writes these bytes, so neither of them saved this value.
    #[error(
        "byte {offset} of the area (legacy region) is reserved and must be 0, but is {value:#04x}"
    )]
    Reserved {
        /// Offset in the area, 416 to 463.
        offset: usize,
        /// Its value.
        value: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{INITIAL_FCW, INITIAL_MXCSR};

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
