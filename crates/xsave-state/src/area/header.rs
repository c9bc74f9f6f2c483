//! The XSAVE header: XSTATE_BV, XCOMP_BV and 48 reserved bytes (SDM Vol. 1 §13.4.2).

use thiserror::Error;

use crate::bytes;
use crate::feature::XFeatures;
use crate::format::{COMPACTED, EXTENDED_OFFSET, HEADER_RESERVED, XCOMP_BV, XSTATE_BV};

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
    /// Reads bytes 512 to 575 of an area.
    ///
    /// # Errors
    ///
    /// The area ends before byte 576, or a reserved byte is not zero. For any of bytes 528 to 575
    /// KVM_SET_XSAVE gives EINVAL (arch/x86/kernel/fpu/xstate.c, `validate_user_xstate_header`);
    /// XRSTOR and XRSTORS of the compacted format raise #GP. XRSTOR of the standard format checks
    /// XCOMP_BV and bytes 528 to 535 only (SDM Vol. 1 §13.8).
    #[inline]
    pub fn parse(area: &[u8]) -> Result<Self, HeaderError> {
        if area.len() < EXTENDED_OFFSET {
            return Err(HeaderError::TooShort {
                required_bytes: EXTENDED_OFFSET,
                actual_bytes: area.len(),
            });
        }
        if let Some(offset) = bytes::first_nonzero(area, HEADER_RESERVED) {
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

    /// Returns true when bit 63 of XCOMP_BV says that the area has the compacted format.
    #[must_use]
    pub const fn is_compacted(&self) -> bool {
        self.xcomp_bv & COMPACTED != 0
    }
}

/// Errors from reading a header that KVM would refuse, and in the compacted format the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The area ends before its header does.
    #[error("the area has {actual_bytes} bytes; legacy region and header have {required_bytes}")]
    TooShort {
        /// Legacy region and header.
        required_bytes: usize,
        /// The length of the area.
        actual_bytes: usize,
    },
    /// A reserved byte is not zero.
    #[error(
        "byte {offset} of the area (XSAVE header) is reserved and must be 0, but is {value:#04x}"
    )]
    Reserved {
        /// Offset in the area, 528 to 575.
        offset: usize,
        /// Its value.
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
    fn a_header_that_is_cut_off_is_refused() {
        for actual_bytes in [0, 10, 512, 575] {
            assert_eq!(
                Header::parse(&[0; 576][..actual_bytes]),
                Err(HeaderError::TooShort {
                    required_bytes: 576,
                    actual_bytes
                })
            );
        }
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
