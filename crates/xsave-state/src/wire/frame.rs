//! What holds an encoded state together, whatever is in it: magic, version, length, checksum, and
//! tables that are within it.

use super::error::DecodeError;
use super::template::{
    self, CHECKSUM_BYTES, COMPONENTS, ENTRY_BYTES, FLAGS, LAYOUT, MIN_STATE_BYTES, MXCSR, PALETTES,
    TABLES, TOTAL_BYTES, VCPU, VERSION_AT, XCR0, XFD, XFD_ERR, XSTATE_BV,
};
use super::{MAGIC, MAX_STATE_BYTES, PREFIX_BYTES, VERSION};
use crate::bytes;
use crate::feature::XFeatures;
use crate::registers::Registers;

/// Returns how many bytes the state has that begins with `start`, of which 16 are enough: to read one
/// state after the other from a stream. It is at most [`MAX_STATE_BYTES`].
///
/// # Errors
///
/// No state begins so, or none of a version that is read here. What follows is not checked.
///
/// ```
/// use std::io::{self, Read};
/// use xsave_state::wire;
///
/// /// Reads the next state of a stream.
/// fn next_state(stream: &mut impl Read) -> io::Result<Vec<u8>> {
///     let mut state = vec![0; 16];
///     stream.read_exact(&mut state)?;
///     state.resize(wire::stated_bytes(&state).map_err(io::Error::other)?, 0);
///     stream.read_exact(&mut state[16..])?;
///     Ok(state)
/// }
/// # let layout = xsave_state::Layout::legacy();
/// # let state = wire::encode(7, &xsave_state::ExtendedState::reset(&layout));
/// # let mut stream = &[state.clone(), state.clone()].concat()[..];
/// # assert_eq!(next_state(&mut stream)?, state);
/// # assert_eq!(next_state(&mut stream)?, state);
/// # assert!(next_state(&mut stream).is_err());
/// # Ok::<(), io::Error>(())
/// ```
pub fn stated_bytes(start: &[u8]) -> Result<usize, DecodeError> {
    let magic = bytes::prefix(start, MAGIC.len());
    if !MAGIC.starts_with(magic) {
        let mut actual = [0; MAGIC.len()];
        bytes::write(&mut actual, 0, magic);
        return Err(DecodeError::Magic { actual });
    }
    let actual_bytes = start.len();
    if actual_bytes < PREFIX_BYTES {
        return Err(DecodeError::TooShort { actual_bytes });
    }
    let version = bytes::u16_at(start, VERSION_AT);
    if !(1..=VERSION).contains(&version) {
        return Err(DecodeError::Version { version });
    }
    let stated_bytes = bytes::u32_at(start, TOTAL_BYTES);
    let total = usize::try_from(stated_bytes).unwrap_or(usize::MAX);
    if !(MIN_STATE_BYTES..=MAX_STATE_BYTES).contains(&total) {
        return Err(DecodeError::Length {
            stated_bytes,
            actual_bytes,
        });
    }
    Ok(total)
}

/// Returns the number of the vCPU in a header, or `None` where the version has none.
pub(super) fn vcpu(start: &[u8]) -> Option<u32> {
    let version = bytes::u16_at(start, VERSION_AT);
    let number = start.get(VCPU..)?.first_chunk()?;
    (version == VERSION).then_some(u32::from_le_bytes(*number))
}

/// Returns CRC-32 of IEEE 802.3.
#[inline]
pub(super) fn checksum(body: &[u8]) -> u32 {
    crc32fast::hash(body)
}

/// An encoded state whose checksum is right. Nothing else is known of what it says.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    /// All but the checksum.
    body: &'a [u8],
    /// Where the fields of its version begin.
    fields_at: usize,
    records_at: usize,
}

impl<'a> Frame<'a> {
    #[inline]
    pub(super) fn check(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let total = stated_bytes(bytes)?;
        if total != bytes.len() {
            return Err(DecodeError::Length {
                stated_bytes: bytes::u32_at(bytes, TOTAL_BYTES),
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
            return Err(DecodeError::Field {
                field: "the flags",
                offset: FLAGS,
                expected: 0,
                actual: flags.into(),
            });
        }
        let fields_at = template::fields(bytes::u16_at(body, VERSION_AT));
        let fields = body.get(fields_at..).unwrap_or_default();
        let entries = usize::from(bytes::u16_at(fields, COMPONENTS))
            .saturating_add(bytes::u16_at(fields, PALETTES).into());
        let required_bytes = entries.saturating_mul(ENTRY_BYTES).saturating_add(TABLES);
        if required_bytes > fields.len() {
            return Err(DecodeError::CutOff {
                offset: fields_at,
                required_bytes,
                actual_bytes: fields.len(),
            });
        }
        Ok(Self {
            body,
            fields_at,
            records_at: fields_at.saturating_add(required_bytes),
        })
    }

    pub(super) const fn body(&self) -> &'a [u8] {
        self.body
    }

    pub(super) const fn records_at(&self) -> usize {
        self.records_at
    }

    pub(super) fn version(&self) -> u16 {
        bytes::u16_at(self.body, VERSION_AT)
    }

    pub(super) fn vcpu(&self) -> Option<u32> {
        vcpu(self.body)
    }

    /// Fields and tables.
    pub(super) fn fields(&self) -> &'a [u8] {
        bytes::range(self.body, self.fields_at..self.records_at)
    }

    /// The layout's part of them.
    pub(super) fn layout(&self) -> &'a [u8] {
        self.fields().get(LAYOUT..).unwrap_or_default()
    }

    /// Where a field is in the state.
    pub(super) const fn offset_of(&self, field: usize) -> usize {
        self.fields_at.saturating_add(field)
    }

    pub(super) fn registers(&self) -> Registers {
        Registers {
            xcr0: self.bitmap(XCR0),
            xfd: self.bitmap(XFD),
            xfd_err: self.bitmap(XFD_ERR),
        }
    }

    pub(super) fn xstate_bv(&self) -> XFeatures {
        self.bitmap(XSTATE_BV)
    }

    fn bitmap(&self, field: usize) -> XFeatures {
        XFeatures::from_bits_retain(bytes::u64_at(self.body, self.offset_of(field)))
    }

    pub(super) fn mxcsr(&self) -> u32 {
        bytes::u32_at(self.body, self.offset_of(MXCSR))
    }
}
