//! Reads from byte slices that cannot fail: what is missing is zero.

use std::ops::Range;

pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    let there = bytes.get(at..).unwrap_or_default();
    for (to, &from) in array.iter_mut().zip(there) {
        *to = from;
    }
    array
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(crate) fn range(bytes: &[u8], range: Range<usize>) -> &[u8] {
    let end = range.end.min(bytes.len());
    bytes.get(range.start..end).unwrap_or_default()
}
