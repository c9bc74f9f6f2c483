//! The records of the components in use: header, bitmap and lines.

use alloc::vec::Vec;

use super::error::DecodeError;
use super::lines;
use super::template::RECORD_HEADER_BYTES;
use crate::feature::ComponentId;

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

    /// Writes all bytes of `component` from the next record, which has to be that of `id`. `whole` is
    /// how such a record begins where every line is stored.
    #[inline]
    pub(super) fn read(
        &mut self,
        id: ComponentId,
        whole: &[u8],
        component: &mut [u8],
    ) -> Result<(), DecodeError> {
        match self.next_whole(whole, component.len()) {
            Some(stored) => component.copy_from_slice(stored),
            None => self.next(id, component)?,
        }
        Ok(())
    }

    /// Returns the component of the next record, where that begins with `whole` and shows at once that
    /// no line is zero. If not, [`next`](Self::next) finds out what there is.
    #[inline]
    fn next_whole(&mut self, whole: &[u8], size: usize) -> Option<&'a [u8]> {
        let rest = self.body.get(self.at..)?.strip_prefix(whole)?;
        let component = rest.get(..size)?;
        if !lines::are_nonzero(component) {
            return None;
        }
        self.at = self.at.saturating_add(whole.len()).saturating_add(size);
        Some(component)
    }

    fn next(&mut self, id: ComponentId, component: &mut [u8]) -> Result<(), DecodeError> {
        let size = component.len();
        let offset = self.at;
        let header = self.take_chunk()?;
        let expected = header_of(id, size);
        if header != expected {
            return Err(DecodeError::Field {
                field: "the header of a record",
                offset,
                expected: u64::from_le_bytes(expected),
                actual: u64::from_le_bytes(header),
            });
        }
        let bitmap = self.take(lines::bitmap_bytes(size))?;
        let bad_line = |line| DecodeError::Line {
            component: id,
            line,
            last: lines::count(size).saturating_sub(1),
        };
        if let Some(line) = lines::first_beyond(bitmap, size) {
            return Err(bad_line(line));
        }
        let stored = self.take(lines::stored_bytes(bitmap, size))?;
        if let Some(index) = lines::first_zero(stored) {
            return Err(bad_line(lines::nth_set(bitmap, index)));
        }
        lines::expand(bitmap, stored, component);
        Ok(())
    }

    /// Checks that there is nothing beyond the records that XSTATE_BV announces.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        match self.body.len().saturating_sub(self.at) {
            0 => Ok(()),
            bytes => Err(DecodeError::Trailing {
                offset: self.at,
                bytes,
            }),
        }
    }

    fn take(&mut self, required_bytes: usize) -> Result<&'a [u8], DecodeError> {
        let rest = self.body.get(self.at..).unwrap_or_default();
        let Some(taken) = rest.get(..required_bytes) else {
            return Err(DecodeError::CutOff {
                offset: self.at,
                required_bytes,
                actual_bytes: rest.len(),
            });
        };
        self.at = self.at.saturating_add(required_bytes);
        Ok(taken)
    }

    fn take_chunk(&mut self) -> Result<[u8; RECORD_HEADER_BYTES], DecodeError> {
        let taken = self.take(RECORD_HEADER_BYTES)?;
        Ok(crate::bytes::array(taken, 0))
    }
}

/// Returns how a record of every line begins: header and bitmap.
pub(super) fn head_of_whole(id: ComponentId, size: usize) -> Vec<u8> {
    let mut head = header_of(id, size).to_vec();
    head.extend(lines::full_bitmap(size).flat_map(u64::to_le_bytes));
    head
}

/// Returns how a record begins: the component, 0, its size.
pub(super) fn header_of(id: ComponentId, size: usize) -> [u8; RECORD_HEADER_BYTES] {
    let size = u64::try_from(size).unwrap_or(u64::MAX);
    (size.wrapping_shl(32) | u64::from(id.number())).to_le_bytes()
}
