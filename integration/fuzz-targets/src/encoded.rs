//! A second reader of encoded states and containers, written from docs/state-format.md with none of
//! xsave-state's code for them; and right checksums for bytes that a fuzzer has changed.

use std::ops::Range;

use xsave_state::Layout;

use crate::checker;

/// What a state says.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    /// XCR0, IA32_XFD, IA32_XFD_ERR.
    pub registers: [u64; 3],
    /// The area, with zeros where the format has nothing.
    pub area: Vec<u8>,
}

/// Reads exactly `bytes` for a reader with that layout; or a word for the rule that they break.
pub fn state(bytes: &[u8], layout: &Layout) -> Result<State, &'static str> {
    if !(68..=73_728).contains(&bytes.len()) {
        return Err("length");
    }
    let (body, stored) = bytes.split_at(bytes.len() - 4);
    if body[..8] != *b"\x89XSTATE\n" || body[8..12] != [1, 0, 0, 0] {
        return Err("magic, version, flags");
    }
    if body[12..16] != (bytes.len() as u32).to_le_bytes() {
        return Err("stated length");
    }
    if stored != crc32(&[body]).to_le_bytes() {
        return Err("checksum");
    }
    let registers = [16, 24, 32].map(|at| checker::word(body, at));
    let (xstate_bv, mxcsr) = (checker::word(body, 40), &body[48..52]);
    let Some(mut rest) = body[52..].strip_prefix(&tables(layout)[..]) else {
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
        None => Ok(State { registers, area }),
    }
}

/// A layout as a state has it, from byte 52 on.
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

/// One vCPU in the index of a container.
#[derive(Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identifier.
    pub vcpu: u32,
    /// Where its state is.
    pub range: Range<usize>,
    /// The copy of the state's checksum.
    pub checksum: u32,
}

/// Reads the index of a container; or a word for the rule that it breaks.
pub fn index(bytes: &[u8]) -> Result<Vec<Member>, &'static str> {
    if bytes.len() < 48 {
        return Err("length");
    }
    if bytes[..16] != *b"\x89XVCPUS\n\x01\0\0\0\0\0\0\0" {
        return Err("magic, version, reserved bytes");
    }
    let trailer_at = bytes.len() - 32;
    let trailer = &bytes[trailer_at..];
    let (index_at, count) = (checker::word(trailer, 0), dword(trailer, 16));
    if trailer[24..] != *b"\nXINDEX\x89" || checker::word(trailer, 8) != bytes.len() as u64 {
        return Err("trailer");
    }
    if count > 65_536 || index_at < 16 {
        return Err("place of the index");
    }
    if u128::from(index_at) + 16 * u128::from(count) != trailer_at as u128 {
        return Err("place of the index");
    }
    let index_at = index_at as usize;
    let entries = &bytes[index_at..trailer_at];
    if dword(trailer, 20) != crc32(&[&bytes[..16], entries, &trailer[..20]]) {
        return Err("checksum");
    }
    let starts = entries.chunks(16).map(|entry| checker::word(entry, 0));
    let ends = starts.clone().skip(1).chain([index_at as u64]);
    let mut members: Vec<Member> = Vec::new();
    let mut expected = 16;
    for ((entry, start), end) in entries.chunks(16).zip(starts).zip(ends) {
        let vcpu = dword(entry, 8);
        if start != expected || end <= start || end > index_at as u64 {
            return Err("order of states");
        }
        if members.last().is_some_and(|last| last.vcpu >= vcpu) {
            return Err("order of vCPUs");
        }
        expected = end;
        members.push(Member {
            vcpu,
            range: start as usize..end as usize,
            checksum: dword(entry, 12),
        });
    }
    if expected != index_at as u64 {
        return Err("bytes of no vCPU");
    }
    Ok(members)
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
        *checksum = crc32(&[body]).to_le_bytes();
    }
}

/// Gives a container that was changed a right checksum of its index, where it has one.
pub fn seal_index(bytes: &mut [u8]) {
    let Some(trailer_at) = bytes.len().checked_sub(32).filter(|&at| at >= 16) else {
        return;
    };
    let index_at = checker::word(bytes, trailer_at);
    let index_at = usize::try_from(index_at).unwrap_or(usize::MAX);
    let Some(entries) = bytes.get(index_at..trailer_at) else {
        return;
    };
    let crc = crc32(&[&bytes[..16], entries, &bytes[trailer_at..][..20]]);
    bytes[trailer_at + 20..][..4].copy_from_slice(&crc.to_le_bytes());
}

/// Four bytes as a number.
#[must_use]
pub fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// CRC-32 of IEEE 802.3 of the parts, one after the other.
fn crc32(parts: &[&[u8]]) -> u32 {
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
    let bytes = parts.iter().copied().flatten();
    !bytes.fold(!0, |crc, &byte| {
        (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(super::crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
    }
}
