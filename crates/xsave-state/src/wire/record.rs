//! The record of one component in use.

use alloc::vec::Vec;

use super::error::DecodeError;
use super::lines;
use super::template::RECORD_HEADER_BYTES;
use crate::bytes;
use crate::feature::ComponentId;

/// What an encoded state has of one component in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    id: ComponentId,
    size: usize,
    bitmap: &'a [u8],
    stored: &'a [u8],
}

impl<'a> Record<'a> {
    /// The component.
    #[must_use]
    pub const fn id(&self) -> ComponentId {
        self.id
    }

    /// Its size in bytes, where it is expanded.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// How many 64-byte lines it has. The last may be shorter.
    #[must_use]
    pub fn lines(&self) -> usize {
        lines::count(self.size)
    }

    /// How many of them are not zero, and so are stored.
    #[must_use]
    pub fn stored_lines(&self) -> usize {
        lines::count(self.stored.len())
    }

    /// The lines that are stored, one after the other.
    #[must_use]
    pub const fn stored(&self) -> &'a [u8] {
        self.stored
    }

    /// Whether line `line` is stored: it is not zero.
    #[must_use]
    pub fn is_stored(&self, line: usize) -> bool {
        lines::is_set(self.bitmap, line)
    }

    /// Writes all of the component.
    pub(super) fn expand(&self, component: &mut [u8]) {
        lines::expand(self.bitmap, self.stored, component);
    }
}

/// The records of a state, one after the other.
pub(super) struct Records<'a> {
    /// The encoded state up to its checksum.
    body: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    pub(super) const fn new(body: &'a [u8], at: usize) -> Self {
        Self { body, at }
    }

    /// The component of the next record, where that begins with `head`, has every line, and shows at
    /// once that none is zero. If not, [`next`](Self::next) says what there is.
    #[inline]
    pub(super) fn next_whole(&mut self, head: &[u8], size: usize) -> Option<&'a [u8]> {
        let rest = self.body.get(self.at..)?.strip_prefix(head)?;
        let component = rest.get(..size)?;
        if !lines::are_nonzero(component) {
            return None;
        }
        self.at = self.at.saturating_add(head.len()).saturating_add(size);
        Some(component)
    }

    /// The next record, which has to be that of `id`, of `size` bytes.
    pub(super) fn next(&mut self, id: ComponentId, size: usize) -> Result<Record<'a>, DecodeError> {
        let at = self.at;
        let header = self.take(id, RECORD_HEADER_BYTES)?;
        let expected = header_of(id, size);
        if *header != expected {
            return Err(unexpected(header, at, id, size));
        }
        let bitmap = self.take(id, lines::bitmap_bytes(size))?;
        if let Some(bit) = lines::first_beyond(bitmap, size) {
            return Err(DecodeError::BitBeyondComponent {
                component: id,
                bit,
                lines: lines::count(size),
            });
        }
        let stored = self.take(id, lines::stored_bytes(bitmap, size))?;
        if let Some(index) = lines::first_zero(stored) {
            return Err(DecodeError::ZeroLine {
                component: id,
                index,
            });
        }
        Ok(Record {
            id,
            size,
            bitmap,
            stored,
        })
    }

    /// There is no record beyond those that XSTATE_BV announces.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        let rest = self.body.get(self.at..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        let kind = bytes::u16_at(rest, 0);
        if rest.len() < RECORD_HEADER_BYTES {
            return Err(DecodeError::Trailing {
                offset: self.at,
                bytes: rest.len(),
            });
        }
        Err(match component(kind) {
            Some(component) => DecodeError::NotAnnounced {
                component,
                offset: self.at,
            },
            None => DecodeError::UnknownSection {
                kind,
                offset: self.at,
            },
        })
    }

    fn take(&mut self, id: ComponentId, len: usize) -> Result<&'a [u8], DecodeError> {
        let rest = self.body.get(self.at..).unwrap_or_default();
        let Some(taken) = rest.get(..len) else {
            return Err(DecodeError::RecordTooShort {
                component: id,
                offset: self.at,
                required_bytes: len,
                actual_bytes: rest.len(),
            });
        };
        self.at = self.at.saturating_add(len);
        Ok(taken)
    }
}

/// How a record of every line begins: header and bitmap.
pub(super) fn head_of_whole(id: ComponentId, size: usize) -> Vec<u8> {
    let mut head = header_of(id, size).to_vec();
    head.extend(lines::full_bitmap(size).flat_map(u64::to_le_bytes));
    head
}

/// How a record begins: the component, 0, its size.
pub(super) fn header_of(id: ComponentId, size: usize) -> [u8; RECORD_HEADER_BYTES] {
    let size = u64::try_from(size).unwrap_or(u64::MAX);
    (size.wrapping_shl(32) | u64::from(id.number())).to_le_bytes()
}

#[cold]
fn unexpected(header: &[u8], offset: usize, expected: ComponentId, size: usize) -> DecodeError {
    let kind = bytes::u16_at(header, 0);
    let reserved = bytes::u16_at(header, 2);
    let Some(actual) = component(kind) else {
        return DecodeError::UnknownSection { kind, offset };
    };
    if actual != expected {
        return DecodeError::RecordOrder {
            expected,
            actual,
            offset,
        };
    }
    if reserved != 0 {
        return DecodeError::Reserved {
            offset: offset.saturating_add(2),
            value: reserved,
        };
    }
    DecodeError::RecordSize {
        component: expected,
        expected_bytes: size,
        actual_bytes: bytes::u32_at(header, 4),
    }
}

fn component(kind: u16) -> Option<ComponentId> {
    ComponentId::new(u8::try_from(kind).ok()?)
}
