//! What holds an encoded state together, whatever is in it: magic, version, length, checksum, and
//! tables that are within it.

use super::error::DecodeError;
use super::template::{
    CHECKSUM_BYTES, COMPONENTS, ENTRY_BYTES, FLAGS, HEADER_BYTES, LAYOUT, MIN_STATE_BYTES, MXCSR,
    PALETTES, TOTAL_BYTES, VERSION_AT, XCR0, XFD, XFD_ERR, XSTATE_BV,
};
use super::{MAGIC, MAX_STATE_BYTES, VERSION};
use crate::bytes;
use crate::feature::XFeatures;
use crate::state::Registers;

/// How many bytes the encoded state has that `bytes` begin with, from its first 16: to read states
/// from a stream, one after the other. The number is not more than [`MAX_STATE_BYTES`].
///
/// # Errors
///
/// There is no state, or none of this version: see [`DecodeError`]. What follows is not checked.
pub fn encoded_bytes(bytes: &[u8]) -> Result<usize, DecodeError> {
    let magic = bytes::prefix(bytes, MAGIC.len());
    if !MAGIC.starts_with(magic) {
        let mut actual = [0; MAGIC.len()];
        bytes::write(&mut actual, 0, magic);
        return Err(DecodeError::Magic { actual });
    }
    if bytes.len() < XCR0 {
        return Err(DecodeError::TooShort {
            required_bytes: XCR0,
            actual_bytes: bytes.len(),
        });
    }
    let version = bytes::u16_at(bytes, VERSION_AT);
    if version != VERSION {
        return Err(DecodeError::Version {
            version,
            supported: VERSION,
        });
    }
    let stated = bytes::u32_at(bytes, TOTAL_BYTES);
    let total = usize::try_from(stated).unwrap_or(usize::MAX);
    if !(MIN_STATE_BYTES..=MAX_STATE_BYTES).contains(&total) {
        return Err(DecodeError::ImpossibleLength {
            stated_bytes: stated,
        });
    }
    Ok(total)
}

/// The checksum of `body`: CRC-32 of IEEE 802.3.
#[inline]
pub(super) fn checksum(body: &[u8]) -> u32 {
    crc32fast::hash(body)
}

/// An encoded state whose checksum is right. Nothing else is known of what it says.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    /// All but the checksum.
    body: &'a [u8],
    checksum: u32,
    records_at: usize,
}

impl<'a> Frame<'a> {
    #[inline]
    pub(super) fn check(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let total = encoded_bytes(bytes)?;
        if total != bytes.len() {
            return Err(DecodeError::Length {
                stated_bytes: total,
                actual_bytes: bytes.len(),
            });
        }
        let (body, stored) = bytes
            .split_last_chunk::<CHECKSUM_BYTES>()
            .unwrap_or((bytes, &[0; CHECKSUM_BYTES]));
        let (stored, computed) = (u32::from_le_bytes(*stored), checksum(body));
        if stored != computed {
            return Err(DecodeError::Checksum { stored, computed });
        }
        let flags = bytes::u16_at(body, FLAGS);
        if flags != 0 {
            return Err(DecodeError::UnknownFlags { flags });
        }
        let components = bytes::u16_at(body, COMPONENTS);
        let palettes = bytes::u16_at(body, PALETTES);
        let entries = usize::from(components).saturating_add(palettes.into());
        let records_at = entries
            .saturating_mul(ENTRY_BYTES)
            .saturating_add(HEADER_BYTES);
        if records_at > body.len() {
            return Err(DecodeError::TablesTooLong {
                components,
                palettes,
                required_bytes: records_at,
                actual_bytes: body.len(),
            });
        }
        Ok(Self {
            body,
            checksum: stored,
            records_at,
        })
    }

    pub(super) const fn body(&self) -> &'a [u8] {
        self.body
    }

    pub(super) const fn checksum(&self) -> u32 {
        self.checksum
    }

    pub(super) const fn records_at(&self) -> usize {
        self.records_at
    }

    /// Header and tables: a template of which the registers are set.
    pub(super) fn prefix(&self) -> &'a [u8] {
        bytes::prefix(self.body, self.records_at)
    }

    /// The layout's part of the template.
    pub(super) fn layout(&self) -> &'a [u8] {
        bytes::range(self.body, LAYOUT..self.records_at)
    }

    pub(super) fn registers(&self) -> Registers {
        let at = |offset| XFeatures::from_bits_retain(bytes::u64_at(self.body, offset));
        Registers {
            xcr0: at(XCR0),
            xfd: at(XFD),
            xfd_err: at(XFD_ERR),
        }
    }

    pub(super) fn xstate_bv(&self) -> XFeatures {
        XFeatures::from_bits_retain(bytes::u64_at(self.body, XSTATE_BV))
    }

    pub(super) fn mxcsr(&self) -> u32 {
        bytes::u32_at(self.body, MXCSR)
    }
}
