//! A component's bytes as a bitmap of its lines that are not zero, and those lines.

use alloc::vec::Vec;

use super::template::{LINE_BYTES, WORD_BYTES, WORD_LINES};
use crate::bytes;

/// A line that is not the short one at a component's end.
type Line = [u8; LINE_BYTES];
/// Lines that are looked at together: those of one byte of the bitmap.
const GROUP_LINES: usize = 8;

/// Returns the lines of a component of `size` bytes. The last may be shorter than the others.
pub(super) fn count(size: usize) -> usize {
    size.div_ceil(LINE_BYTES)
}

/// Returns the bytes of the bitmap of a component of `size` bytes: whole words.
pub(super) fn bitmap_bytes(size: usize) -> usize {
    count(size).div_ceil(WORD_LINES).saturating_mul(WORD_BYTES)
}

/// Returns true when all bytes are zero. Without an early exit the compiler makes vector code of it.
#[inline]
fn is_zero(line: &Line) -> bool {
    let words = line.as_chunks().0.iter();
    words.fold(0, |all, &word| all | u64::from_le_bytes(word)) == 0
}

/// The same for a last line that is shorter than the others; no bytes are zero.
#[inline]
fn is_zero_rest(rest: &[u8]) -> bool {
    let (words, bytes) = rest.as_chunks();
    let words = words
        .iter()
        .fold(0, |all, &word| all | u64::from_le_bytes(word));
    words == 0 && bytes.iter().all(|&byte| byte == 0)
}

/// Most lines that are not zero show it in their first eight bytes, as those of a program that
/// computes do: then an eighth has to be read.
#[inline]
fn begins_nonzero(line: &Line) -> bool {
    let [a, b, c, d, e, f, g, h, ..] = *line;
    u64::from_le_bytes([a, b, c, d, e, f, g, h]) != 0
}

/// Returns true when all lines begin so. With one branch for eight of them.
#[inline]
fn all_begin_nonzero(group: &[Line; GROUP_LINES]) -> bool {
    group
        .iter()
        .fold(true, |all, line| all & begins_nonzero(line))
}

/// Returns true when every line of `component` shows at once that it is not zero. If not, some may be zero.
#[inline]
pub(super) fn are_nonzero(component: &[u8]) -> bool {
    let (whole, rest) = component.as_chunks();
    let (groups, others) = whole.as_chunks();
    groups.iter().all(all_begin_nonzero)
        && others.iter().all(begins_nonzero)
        && (rest.is_empty() || !is_zero_rest(rest))
}

/// Returns a bit for each of at most 64 whole lines: whether it is not zero.
#[inline]
fn bits_of(lines: &[Line]) -> u64 {
    if lines.iter().all(begins_nonzero) {
        return ones(lines.len());
    }
    let bits = (0..).zip(lines);
    bits.fold(0, |bits, (bit, line)| {
        bits | u64::from(!is_zero(line)).wrapping_shl(bit)
    })
}

/// Returns a word with the lowest `lines` bits set, at most 64.
#[inline]
fn ones(lines: usize) -> u64 {
    let others = WORD_LINES.saturating_sub(lines);
    let others = u32::try_from(others).unwrap_or(0);
    u64::MAX.checked_shr(others).unwrap_or(0)
}

/// The same for the lines of one word, of which the last may be shorter.
#[inline]
fn word_of(lines: &[u8]) -> u64 {
    let (whole, rest) = lines.as_chunks();
    let (groups, others) = whole.as_chunks::<GROUP_LINES>();
    let mut word = 0;
    let mut bit = 0u32;
    for group in groups {
        word |= bits_of(group).wrapping_shl(bit);
        bit = bit.wrapping_add(u8::BITS);
    }
    // With 64 whole lines there are no others, and no rest.
    word |= bits_of(others).wrapping_shl(bit);
    bit = bit.wrapping_add(u32::try_from(others.len()).unwrap_or(0));
    word | u64::from(!is_zero_rest(rest)).wrapping_shl(bit)
}

/// Returns the bitmap of a component of `size` bytes of which every line is stored.
pub(super) fn full_bitmap(size: usize) -> impl Iterator<Item = u64> {
    let lines = count(size);
    let words = (0..lines).step_by(WORD_LINES);
    words.map(move |first| ones(lines.saturating_sub(first).min(WORD_LINES)))
}

/// Appends the bitmap of `component`, and its lines that are not zero.
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

/// Returns how many bytes the lines of `bitmap` have, of a component of `size` bytes.
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

/// Returns the first of `lines` that is zero.
pub(super) fn first_zero(lines: &[u8]) -> Option<usize> {
    let (whole, rest) = lines.as_chunks();
    let first = whole.iter().position(is_zero);
    first.or_else(|| (!rest.is_empty() && is_zero_rest(rest)).then_some(whole.len()))
}

/// Returns true when line `line` is stored.
pub(super) fn is_set(bitmap: &[u8], line: usize) -> bool {
    let byte = bitmap.get(line / 8).copied().unwrap_or(0);
    byte & 1u8.wrapping_shl(u32::try_from(line % 8).unwrap_or(0)) != 0
}

/// Returns the line that stored line `index` is.
pub(super) fn nth_set(bitmap: &[u8], index: usize) -> usize {
    let lines = 0..bitmap.len().saturating_mul(8);
    let mut set = lines.filter(|&line| is_set(bitmap, line));
    set.nth(index).unwrap_or(usize::MAX)
}

/// Returns the first bit of `bitmap` that is set and stands for no line. Such bits are in the last word.
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
    fn at_first_glance_no_zero_line_is_missed() {
        for size in (1..300).chain([4095, 4096, 4097, 8192]) {
            let mut component = vec![1; size];
            assert!(are_nonzero(&component), "{size} bytes");
            let mut out = Vec::new();
            compress(&component, &mut out);
            let whole: Vec<u8> = full_bitmap(size).flat_map(u64::to_le_bytes).collect();
            assert_eq!(out, [whole, component.clone()].concat(), "{size} bytes");
            for line in 0..count(size) {
                let end = size.min(64 * line + 64);
                component[64 * line..end].fill(0);
                assert!(!are_nonzero(&component), "line {line} of {size} bytes");
                component[64 * line..end].fill(1);
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
