//! A second reader of encoded states, one and several, written from docs/state-format.md with none of
//! xsave-state's code for them; and right checksums for bytes that a fuzzer has changed.

use std::ops::Range;

use xsave_state::Layout;

use crate::checker;

const MAGIC: [u8; 8] = *b"\x89XSTATE\n";
const MAX_BYTES: usize = 73_728;

/// What a state says.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    /// The number of its vCPU; version 1 has none.
    pub vcpu: Option<u32>,
    /// XCR0, IA32_XFD, IA32_XFD_ERR.
    pub registers: [u64; 3],
    /// The area, with zeros where the format has nothing.
    pub area: Vec<u8>,
}

/// Where the fields of a state of that version begin.
fn fields(version: u8) -> usize {
    12 + 4 * usize::from(version)
}

/// Reads exactly `bytes` for a reader with that layout; or a word for the rule that they break.
pub fn state(bytes: &[u8], layout: &Layout) -> Result<State, &'static str> {
    if !(68..=MAX_BYTES).contains(&bytes.len()) {
        return Err("length");
    }
    let (body, stored) = bytes.split_at(bytes.len() - 4);
    let version = body[8];
    if body[..8] != MAGIC || ![1, 2].contains(&version) || body[9..12] != [0; 3] {
        return Err("magic, version, flags");
    }
    if body[12..16] != (bytes.len() as u32).to_le_bytes() {
        return Err("stated length");
    }
    if stored != crc32(body).to_le_bytes() {
        return Err("checksum");
    }
    let fields = fields(version);
    if body.len() < fields + 48 {
        return Err("too short for its fields");
    }
    let vcpu = (version == 2).then(|| dword(body, 16));
    let registers = [0, 8, 16].map(|at| checker::word(body, fields + at));
    let (xstate_bv, mxcsr) = (checker::word(body, fields + 24), &body[fields + 32..][..4]);
    let mut tables = tables(layout);
    let mut rest = body[fields + 36..].strip_prefix(&tables[..]);
    if version == 1 && rest.is_none() {
        // The bit that says whether XFD can disable tile data may be 0.
        let mut entries = tables[12..].chunks_mut(12);
        if let Some(tile_data) = entries.find(|entry| entry[..2] == [18, 0]) {
            tile_data[2] &= !4;
        }
        rest = body[fields + 36..].strip_prefix(&tables[..]);
    }
    let Some(mut rest) = rest else {
        return Err("layout");
    };
    let mut area = vec![0; layout.standard_size()];
    let mut take = |len: usize| {
        let (taken, behind) = rest.split_at_checked(len).ok_or("too short")?;
        rest = behind;
        Ok(taken)
    };
    for component in layout.components() {
        let number = component.id().number();
        let Some(offset) = component.offset().filter(|_| xstate_bv >> number & 1 == 1) else {
            continue;
        };
        let (size, lines) = (component.size(), component.size().div_ceil(64));
        let header = u64::from(number) | (size as u64) << 32;
        if take(8)? != header.to_le_bytes() {
            return Err("header of a record");
        }
        let bitmap = take(lines.div_ceil(64) * 8)?;
        for line in 0..bitmap.len() * 8 {
            if bitmap[line / 8] >> (line % 8) & 1 == 0 {
                continue;
            }
            if line >= lines {
                return Err("a bit of no line");
            }
            let content = take(64.min(size - line * 64))?;
            if content.iter().all(|&byte| byte == 0) {
                return Err("a line of zeros");
            }
            area[offset + line * 64..][..content.len()].copy_from_slice(content);
        }
    }
    if !rest.is_empty() {
        return Err("bytes of nothing");
    }
    if xstate_bv & 1 == 0 {
        area[..2].copy_from_slice(&[0x7f, 3]);
    } else if area[24..32] != [0; 8] {
        return Err("MXCSR in x87");
    }
    if xstate_bv & 0b110 == 0 && *mxcsr != 0x1f80u32.to_le_bytes() {
        return Err("MXCSR of nothing");
    }
    area[24..28].copy_from_slice(mxcsr);
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    let (user, xfd) = (layout.user().bits(), layout.xfd().bits());
    let broken = checker::area(&area, layout)
        .or_else(|| checker::registers(registers, xstate_bv, user, xfd));
    match broken {
        Some(rule) => Err(rule),
        None => Ok(State {
            vcpu,
            registers,
            area,
        }),
    }
}

/// A layout as a state has it, from its mask of MXCSR bits on.
#[must_use]
pub fn tables(layout: &Layout) -> Vec<u8> {
    let mut entries = Vec::new();
    let (mut components, mut end) = (0u16, 576);
    for component in layout.components() {
        let number = component.id().number();
        let Some(offset) = component.offset().filter(|_| number > 1) else {
            continue;
        };
        let xfd = layout.xfd().bits() >> number & 1 == 1;
        let flags = u16::from(component.is_aligned()) << 1 | u16::from(xfd) << 2;
        entries.extend_from_slice(&u16::from(number).to_le_bytes());
        entries.extend_from_slice(&flags.to_le_bytes());
        entries.extend_from_slice(&(offset as u32).to_le_bytes());
        entries.extend_from_slice(&(component.size() as u32).to_le_bytes());
        components += 1;
        end = end.max(offset + component.size());
    }
    for palette in layout.palettes() {
        for half in [
            palette.total_bytes(),
            palette.tile_bytes(),
            palette.row_bytes(),
            palette.tiles(),
            palette.rows(),
            0,
        ] {
            entries.extend_from_slice(&half.to_le_bytes());
        }
    }
    let mut tables = layout.mxcsr_mask().to_le_bytes().to_vec();
    tables.extend_from_slice(&components.to_le_bytes());
    tables.extend_from_slice(&(layout.palettes().len() as u16).to_le_bytes());
    tables.extend_from_slice(&(end as u32).to_le_bytes());
    tables.extend_from_slice(&entries);
    tables
}

/// Where the states that lie one behind the other in `bytes` are, and what is none; and which of them
/// have a right checksum, no flags, and room for their tables.
#[must_use]
pub fn row(bytes: &[u8]) -> Vec<(Range<usize>, bool)> {
    let (mut at, mut in_vain) = (0, 0);
    let mut row = Vec::new();
    while at < bytes.len() {
        let rest = &bytes[at..];
        let next = (1..rest.len()).find(|&next| rest[next..].starts_with(&MAGIC));
        let next = next.unwrap_or(rest.len());
        let patient = in_vain <= 16 * (at + MAX_BYTES);
        let (len, whole) = match stated(rest).filter(|&total| total <= rest.len()) {
            None => (next, false),
            Some(total) => {
                let (state, behind) = rest.split_at(total);
                let ends = behind.is_empty() || behind.starts_with(&MAGIC);
                let (body, checksum) = state.split_at(total - 4);
                if !ends && !patient {
                    (next, false)
                } else if checksum == crc32(body).to_le_bytes() {
                    (total, has_room(body))
                } else if ends && !(patient && next < total && chain(rest, next, total)) {
                    (total, false)
                } else {
                    in_vain += total;
                    (next, false)
                }
            }
        };
        row.push((at..at + len, whole));
        at += len;
    }
    row
}

/// How long the state says that it is, if one begins here.
fn stated(bytes: &[u8]) -> Option<usize> {
    let head = bytes.get(..16)?;
    let total = dword(head, 12) as usize;
    let sound = head[..8] == MAGIC && [1, 2].contains(&head[8]) && head[9] == 0;
    (sound && (68..=MAX_BYTES).contains(&total)).then_some(total)
}

fn has_room(body: &[u8]) -> bool {
    let fields = fields(body[8]);
    body[10..12] == [0; 2]
        && body.len()
            >= fields + 48 + {
                let counts = body.get(fields + 40..fields + 44).unwrap_or(&[0; 4]);
                let count =
                    |at: usize| usize::from(u16::from_le_bytes([counts[at], counts[at + 1]]));
                12 * (count(0) + count(2))
            }
}

/// Whether states from `at` on, by their lengths, end at `end`.
fn chain(bytes: &[u8], at: usize, end: usize) -> bool {
    match at.cmp(&end) {
        std::cmp::Ordering::Less => stated(&bytes[at..])
            .is_some_and(|total| at + total <= end && chain(bytes, at + total, end)),
        order => order.is_eq(),
    }
}

/// Gives a state that was changed its length and a right checksum, where it is long enough for both.
pub fn seal_state(bytes: &mut [u8]) {
    let total = (bytes.len() as u32).to_le_bytes();
    if let Some(place) = bytes.get_mut(12..16) {
        place.copy_from_slice(&total);
        seal_checksum(bytes);
    }
}

/// Gives a state of unchanged length a right checksum.
pub fn seal_checksum(bytes: &mut [u8]) {
    if let Some((body, checksum)) = bytes.split_last_chunk_mut() {
        *checksum = crc32(body).to_le_bytes();
    }
}

/// Four bytes as a number.
#[must_use]
pub fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// CRC-32 of IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| {
        (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(super::crc32(b"123456789"), 0xcbf4_3926);
    }
}
