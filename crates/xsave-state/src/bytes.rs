//! Reads from byte slices that cannot panic.
//!
//! All offsets in this crate are constants or come from a checked [`Layout`](crate::Layout), and
//! all slices are checked for length before. These helpers give 0 or an empty slice beyond the end,
//! so that a mistake there is a wrong value in a test and never a panic in a VMM.

use core::ops::Range;

/// The slice at `range`, or an empty one where it is not within `bytes`.
pub(crate) fn range(bytes: &[u8], range: Range<usize>) -> &[u8] {
    bytes.get(range).unwrap_or_default()
}

/// The first `len` elements, or all where there are fewer.
pub(crate) fn prefix<T>(slice: &[T], len: usize) -> &[T] {
    slice.get(..len).unwrap_or(slice)
}

/// `N` bytes at `offset`, or zeros where they are not within `bytes`.
#[inline]
pub(crate) fn array<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

pub(crate) fn u8_at(bytes: &[u8], offset: usize) -> u8 {
    u8::from_le_bytes(array(bytes, offset))
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(array(bytes, offset))
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array(bytes, offset))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array(bytes, offset))
}

/// Bits 15 to 0.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
pub(crate) const fn low_half(value: u32) -> u16 {
    value as u16
}

/// Bits 31 to 16.
pub(crate) const fn high_half(value: u32) -> u16 {
    low_half(value >> 16)
}

/// Bits 7 to 0.
#[expect(clippy::cast_possible_truncation, reason = "the lowest byte is meant")]
pub(crate) const fn low_byte(value: u32) -> u8 {
    value as u8
}

/// Offset in `bytes` of the first byte within `range` that is not zero.
///
/// Always inlined: with a constant range it is a few instructions.
#[inline(always)]
pub(crate) fn first_nonzero(bytes: &[u8], within: Range<usize>) -> Option<usize> {
    let start = within.start;
    let slice = range(bytes, within);
    // Eight bytes at a time and without an early exit; the search is for the error only.
    let (words, rest) = slice.as_chunks();
    let words = words
        .iter()
        .fold(0, |all, word| all | u64::from_ne_bytes(*word));
    if words == 0 && rest.iter().all(|&byte| byte == 0) {
        return None;
    }
    search(slice, start)
}

#[cold]
fn search(slice: &[u8], start: usize) -> Option<usize> {
    slice
        .iter()
        .position(|&byte| byte != 0)
        .map(|index| start.saturating_add(index))
}

/// Copies `content` to `offset` of `area`, as far as it is within.
pub(crate) fn write(area: &mut [u8], offset: usize, content: &[u8]) {
    if let Some(rest) = area.get_mut(offset..) {
        for (to, from) in rest.iter_mut().zip(content) {
            *to = *from;
        }
    }
}

/// Copies `content` to `offset` of `area`, if it fits there.
#[inline]
pub(crate) fn put<const N: usize>(area: &mut [u8], offset: usize, content: [u8; N]) {
    if let Some(to) = area
        .get_mut(offset..)
        .and_then(|rest| rest.first_chunk_mut())
    {
        *to = content;
    }
}

/// Copies `from` of one area to `offset` of another.
pub(crate) fn copy(area: &[u8], from: Range<usize>, to: &mut [u8], offset: usize) {
    write(to, offset, range(area, from));
}

/// Sets the bytes at `range`, as far as it is within `area`.
pub(crate) fn fill(area: &mut [u8], range: Range<usize>, value: u8) {
    if let Some(bytes) = area.get_mut(range) {
        bytes.fill(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_end_there_is_nothing() {
        let bytes = [1, 2, 3];
        assert!(range(&bytes, 2..4).is_empty());
        assert_eq!(prefix(&bytes, 9), bytes);
        assert_eq!(array::<2>(&bytes, 1), [2, 3]);
        assert_eq!(array::<2>(&bytes, 2), [0, 0]);
        assert_eq!(array::<2>(&bytes, usize::MAX), [0, 0]);
        assert_eq!(first_nonzero(&bytes, 1..9), None);
    }

    #[test]
    fn writes_stay_within_the_area() {
        let mut area = [0; 4];
        write(&mut area, 2, &[1, 2, 3]);
        assert_eq!(area, [0, 0, 1, 2]);
        write(&mut area, 9, &[1]);
        copy(&[5, 6, 7], 1..3, &mut area, 0);
        assert_eq!(area, [6, 7, 1, 2]);
        put(&mut area, 3, [8, 9]);
        assert_eq!(area, [6, 7, 1, 2]);
        put(&mut area, 2, [1, 2]);
        fill(&mut area, 3..4, 9);
        fill(&mut area, 3..5, 8);
        assert_eq!(area, [6, 7, 1, 9]);
    }

    #[test]
    fn numbers_are_little_endian() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(u8_at(&bytes, 3), 4);
        assert_eq!(u16_at(&bytes, 0), 0x0201);
        assert_eq!(u32_at(&bytes, 0), 0x0403_0201);
        assert_eq!(u64_at(&bytes, 0), 0x0807_0605_0403_0201);
        assert_eq!(low_half(0x1234_5678), 0x5678);
        assert_eq!(high_half(0x1234_5678), 0x1234);
    }

    #[test]
    fn the_first_nonzero_byte_is_found_within_the_range_only() {
        let bytes = [9, 0, 0, 7, 0];
        assert_eq!(first_nonzero(&bytes, 1..3), None);
        assert_eq!(first_nonzero(&bytes, 1..5), Some(3));
    }
}
