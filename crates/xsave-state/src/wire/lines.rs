//! A component's bytes as a bitmap of its lines that are not zero, and those lines.

use alloc::vec::Vec;

use super::template::{LINE_BYTES, WORD_BYTES, WORD_LINES};
use crate::bytes;

/// Lines of a component of `size` bytes. The last may be shorter than the others.
pub(super) fn count(size: usize) -> usize {
    size.div_ceil(LINE_BYTES)
}

/// Bytes of the bitmap of a component of `size` bytes: whole words.
pub(super) fn bitmap_bytes(size: usize) -> usize {
    count(size).div_ceil(WORD_LINES).saturating_mul(WORD_BYTES)
}

/// Whether all bytes are zero.
#[inline]
fn is_zero(line: &[u8]) -> bool {
    match line.first_chunk().filter(|_| line.len() == LINE_BYTES) {
        Some(line) => is_zero_line(line),
        None => line.iter().all(|&byte| byte == 0),
    }
}

/// Most lines that are not zero show it in their first eight bytes.
#[inline]
fn is_zero_line(line: &[u8; LINE_BYTES]) -> bool {
    begins_with_zeros(line) && is_all_zero(line)
}

#[inline]
fn begins_with_zeros(line: &[u8; LINE_BYTES]) -> bool {
    let [a, b, c, d, e, f, g, h, ..] = *line;
    u64::from_le_bytes([a, b, c, d, e, f, g, h]) == 0
}

/// Whether every line shows in its first eight bytes that it is not zero. Without a branch for each:
/// the tiles of a program that computes are such lines.
#[inline]
fn all_begin_nonzero(lines: &[[u8; LINE_BYTES]]) -> bool {
    !lines
        .iter()
        .fold(false, |zeros, line| zeros | begins_with_zeros(line))
}

/// On its own, because where it is inlined the compiler does it for every line, and the first eight
/// bytes save nothing. Without an early exit it is vector code.
#[inline(never)]
fn is_all_zero(line: &[u8; LINE_BYTES]) -> bool {
    let words = line.as_chunks().0.iter();
    words.fold(0, |all, &word| all | u64::from_le_bytes(word)) == 0
}

/// The first of `lines` that is zero.
#[inline]
pub(super) fn first_zero(lines: &[u8]) -> Option<usize> {
    let (whole, rest) = lines.as_chunks();
    let first = if all_begin_nonzero(whole) {
        None
    } else {
        whole.iter().position(is_zero_line)
    };
    first.or_else(|| (!rest.is_empty() && is_zero(rest)).then_some(whole.len()))
}

/// A bit for each of at most 64 lines: whether it is not zero.
#[inline]
fn word_of(lines: &[u8]) -> u64 {
    let (whole, rest) = lines.as_chunks();
    let mut word = 0;
    let lines = u32::try_from(whole.len()).unwrap_or(0);
    if all_begin_nonzero(whole) {
        // 64 lines: the shift is out of range, and all bits are set.
        word = 1u64.checked_shl(lines).unwrap_or(0).wrapping_sub(1);
    } else {
        for (bit, line) in (0..).zip(whole) {
            if !is_zero_line(line) {
                word |= 1u64.wrapping_shl(bit);
            }
        }
    }
    if !is_zero(rest) {
        word |= 1u64.wrapping_shl(lines);
    }
    word
}

/// Appends the bitmap of `component`, and its lines that are not zero.
#[inline]
pub(super) fn compress(component: &[u8], out: &mut Vec<u8>) {
    let bitmap_at = out.len();
    let words = || component.chunks(LINE_BYTES * WORD_LINES);
    for lines in words() {
        out.extend_from_slice(&word_of(lines).to_le_bytes());
    }
    for (word_at, lines) in (bitmap_at..).step_by(WORD_BYTES).zip(words()) {
        let word = bytes::u64_at(out, word_at);
        for (stored, run) in Runs::new(word, lines.len()) {
            if stored {
                out.extend_from_slice(bytes::range(lines, run));
            }
        }
    }
}

/// How many bytes the lines of `bitmap` have, of a component of `size` bytes.
pub(super) fn stored_bytes(bitmap: &[u8], size: usize) -> usize {
    let stored = bitmap.as_chunks().0.iter().fold(0usize, |sum, &word| {
        let ones = u64::from_le_bytes(word).count_ones();
        sum.saturating_add(usize::try_from(ones).unwrap_or(usize::MAX))
    });
    let whole = stored.saturating_mul(LINE_BYTES);
    let last = count(size).saturating_sub(1);
    if is_set(bitmap, last) {
        let missing = count(size).saturating_mul(LINE_BYTES).saturating_sub(size);
        whole.saturating_sub(missing)
    } else {
        whole
    }
}

/// Whether line `line` is stored.
pub(super) fn is_set(bitmap: &[u8], line: usize) -> bool {
    let byte = bitmap.get(line / 8).copied().unwrap_or(0);
    byte & 1u8.wrapping_shl(u32::try_from(line % 8).unwrap_or(0)) != 0
}

/// The first bit of `bitmap` that is set and stands for no line. Such bits are in the last word.
#[inline]
pub(super) fn first_beyond(bitmap: &[u8], size: usize) -> Option<usize> {
    let last = u64::from_le_bytes(*bitmap.last_chunk()?);
    let lines = u32::try_from(count(size) % WORD_LINES).unwrap_or(0);
    let meant = 1u64.wrapping_shl(lines).wrapping_sub(1);
    if lines == 0 || last & !meant == 0 {
        return None;
    }
    let bits = bitmap.len().saturating_mul(8);
    (count(size)..bits).find(|&line| is_set(bitmap, line))
}

/// Writes all of `component`: the lines of `stored`, which has as many as `bitmap` says, and zeros.
#[inline]
pub(super) fn expand(bitmap: &[u8], mut stored: &[u8], component: &mut [u8]) {
    let words = component.chunks_mut(LINE_BYTES * WORD_LINES);
    for (lines, &word) in words.zip(bitmap.as_chunks().0) {
        let len = lines.len();
        for (is_stored, run) in Runs::new(u64::from_le_bytes(word), len) {
            let Some(run) = lines.get_mut(run) else { break };
            if !is_stored {
                run.fill(0);
            } else if let Some((content, rest)) = stored.split_at_checked(run.len()) {
                run.copy_from_slice(content);
                stored = rest;
            }
        }
    }
}

/// The runs of equal bits in a word of a bitmap, from bit 0: their value, and the bytes that they
/// stand for of the `len` that the word stands for.
struct Runs {
    word: u64,
    bit: u32,
    at: usize,
    len: usize,
}

impl Runs {
    fn new(word: u64, len: usize) -> Self {
        Self {
            word,
            bit: 0,
            at: 0,
            len,
        }
    }
}

impl Iterator for Runs {
    type Item = (bool, core::ops::Range<usize>);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.len {
            return None;
        }
        let rest = self.word.wrapping_shr(self.bit);
        let stored = rest & 1 != 0;
        let run = if stored {
            rest.trailing_ones()
        } else {
            rest.trailing_zeros()
        };
        self.bit = self.bit.saturating_add(run);
        let end = if self.bit >= u64::BITS {
            self.len
        } else {
            let bit = usize::try_from(self.bit).unwrap_or(usize::MAX);
            self.len.min(bit.saturating_mul(LINE_BYTES))
        };
        let start = core::mem::replace(&mut self.at, end);
        Some((stored, start..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(size: usize, used: &[usize]) -> Vec<u8> {
        let mut component = vec![0; size];
        for &byte in used {
            component[byte] = 0x80;
        }
        component
    }

    /// Every size around a line and a word, each with its ends and its middle in use.
    #[test]
    fn there_and_back_at_every_boundary() {
        for size in (1..=200).chain([4095, 4096, 4097, 4160, 8192, 8193, 12_345]) {
            for used in [
                &[][..],
                &[0],
                &[size - 1],
                &[size / 2],
                &[0, size / 2, size - 1],
            ] {
                let component = sparse(size, used);
                let mut out = vec![7; 3];
                compress(&component, &mut out);
                let (bitmap, stored) = out[3..].split_at(bitmap_bytes(size));
                assert_eq!(
                    stored_bytes(bitmap, size),
                    stored.len(),
                    "{size} bytes, {used:?}"
                );
                assert_eq!(first_beyond(bitmap, size), None);
                let mut back = vec![0xff; size];
                expand(bitmap, stored, &mut back);
                assert_eq!(back, component, "{size} bytes, {used:?}");
            }
        }
    }

    #[test]
    fn each_byte_makes_its_line_stored() {
        for size in [8, 64, 160, 4160] {
            for byte in 0..size {
                let mut out = Vec::new();
                compress(&sparse(size, &[byte]), &mut out);
                let bitmap = &out[..bitmap_bytes(size)];
                let set: Vec<usize> = (0..count(size)).filter(|&l| is_set(bitmap, l)).collect();
                assert_eq!(set, [byte / 64], "byte {byte} of {size}");
            }
        }
    }

    #[test]
    fn zero_lines_are_left_out() {
        let mut out = Vec::new();
        compress(&[0; 8192], &mut out);
        assert_eq!(out, [0; 16]);
        for size in (1..300).chain([8192]) {
            let mut lines = vec![1; size];
            assert_eq!(first_zero(&lines), None);
            for line in 0..count(size) {
                let end = size.min(64 * line + 64);
                lines[64 * line..end].fill(0);
                assert_eq!(first_zero(&lines), Some(line), "{size} bytes");
                lines[end - 1] = 1;
                assert_eq!(first_zero(&lines), None, "{size} bytes");
            }
        }
    }

    #[test]
    fn bits_beyond_the_last_line_are_found() {
        for bit in 0..64 {
            let bitmap = (1u64 << bit).to_le_bytes();
            let beyond = (bit >= 3).then_some(bit);
            assert_eq!(first_beyond(&bitmap, 160), beyond);
        }
    }
}
