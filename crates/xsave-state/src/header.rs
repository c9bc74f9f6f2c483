//! The XSAVE header: XSTATE_BV, XCOMP_BV and 48 reserved bytes (SDM Vol. 1 §13.4.2).

use thiserror::Error;

use crate::bytes;
use crate::feature::XFeatures;

/// Bytes of the legacy region, at offset 0 of every area (SDM Vol. 1 §13.4.1).
pub const LEGACY_BYTES: usize = 512;
/// Bytes of the header, at offset 512 of every area.
pub const HEADER_BYTES: usize = 64;
/// Where the extended region starts, in both formats.
pub const EXTENDED_OFFSET: usize = LEGACY_BYTES + HEADER_BYTES;

/// Bit 63 of XCOMP_BV: the area has the compacted format.
pub const COMPACTED: u64 = 1 << 63;

pub(crate) const XSTATE_BV: usize = 512;
pub(crate) const XCOMP_BV: usize = 520;
pub(crate) const RESERVED: core::ops::Range<usize> = 528..576;

/// The two bitmaps of a header whose reserved bytes are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The components that are not in their initial state, as far as the area says.
    pub xstate_bv: XFeatures,
    /// 0 in the standard format. In the compacted format bit 63 and the components that have a
    /// place in the area.
    pub xcomp_bv: u64,
}

impl Header {
    /// Reads bytes 512 to 575 of an area. Bytes that are missing count as zero: check the length
    /// before.
    ///
    /// # Errors
    ///
    /// A reserved byte is not zero. KVM_SET_XSAVE gives EINVAL for any of bytes 528 to 575
    /// (arch/x86/kernel/fpu/xstate.c, `validate_user_xstate_header`); so do XRSTOR and XRSTORS with
    /// #GP in the compacted format. XRSTOR of the standard format looks at 528 to 535 alone, beside
    /// XCOMP_BV (SDM Vol. 1 §13.8).
    #[inline]
    pub fn parse(area: &[u8]) -> Result<Self, HeaderError> {
        if let Some(offset) = bytes::first_nonzero(area, RESERVED) {
            return Err(HeaderError::Reserved {
                offset,
                value: bytes::u8_at(area, offset),
            });
        }
        Ok(Self {
            xstate_bv: XFeatures::from_bits_retain(bytes::u64_at(area, XSTATE_BV)),
            xcomp_bv: bytes::u64_at(area, XCOMP_BV),
        })
    }

    /// Whether bit 63 of XCOMP_BV says that the area has the compacted format.
    #[must_use]
    pub const fn is_compacted(&self) -> bool {
        self.xcomp_bv & COMPACTED != 0
    }
}

/// A header that KVM would refuse, and in the compacted format the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// A reserved byte is not zero.
    #[error(
        "byte {offset} of the area (XSAVE header) is reserved and must be 0, but is {value:#04x}"
    )]
    Reserved {
        /// Offset in the area, 528 to 575.
        offset: usize,
        /// What is there.
        value: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bitmaps_are_read() {
        let mut area = [0; 576];
        area[512..520].copy_from_slice(&0x602a2u64.to_le_bytes());
        area[520..528].copy_from_slice(&(COMPACTED | 0x602e7).to_le_bytes());
        let header = Header::parse(&area).unwrap();
        assert_eq!(header.xstate_bv.bits(), 0x602a2);
        assert_eq!(header.xcomp_bv, COMPACTED | 0x602e7);
        assert!(header.is_compacted());
        area[527] = 0;
        assert!(!Header::parse(&area).unwrap().is_compacted());
    }

    #[test]
    fn each_reserved_byte_must_be_zero() {
        for offset in 528..576 {
            let mut area = [0; 576];
            area[offset] = 0x80;
            assert_eq!(
                Header::parse(&area),
                Err(HeaderError::Reserved {
                    offset,
                    value: 0x80
                })
            );
        }
    }
}
