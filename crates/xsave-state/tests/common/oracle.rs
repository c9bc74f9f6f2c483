//! A second reader of encoded states, written from docs/state-format.md without the crate's code,
//! and a way to make up states with a right checksum.
#![allow(dead_code, reason = "each test binary uses a part")]

/// CRC-32 of IEEE 802.3, bit by bit.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    !crc
}

/// Gives bytes that were changed their length and a right checksum.
pub(crate) fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 4;
    let total = bytes.len() as u32;
    bytes[12..16].copy_from_slice(&total.to_le_bytes());
    let crc = crc32(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) struct Decoded {
    /// Not in version 1.
    pub(crate) vcpu: Option<u32>,
    pub(crate) xcr0: u64,
    pub(crate) xfd: u64,
    pub(crate) xfd_err: u64,
    pub(crate) mxcsr: u32,
    pub(crate) xstate_bv: u64,
    /// Number, offset, content of each component in use.
    pub(crate) components: Vec<(u16, usize, Vec<u8>)>,
    /// Where the records of components begin.
    pub(crate) records: Vec<usize>,
}

pub(crate) fn decode(bytes: &[u8]) -> Decoded {
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(&bytes[..8], b"\x89XSTATE\n");
    let version = u16_at(8);
    assert!([1, 2].contains(&version));
    assert_eq!(u16_at(10), 0);
    assert_eq!(u32_at(12) as usize, bytes.len());
    let end = bytes.len() - 4;
    assert_eq!(u32_at(end), crc32(&bytes[..end]));
    // Version 1 has no number of a vCPU: all that follows is 4 bytes earlier.
    let number = if version == 1 { 0 } else { 4 };

    let mut places = vec![(0, 0, 160), (1, 160, 256)];
    let (components, palettes) = (
        usize::from(u16_at(56 + number)),
        usize::from(u16_at(58 + number)),
    );
    for entry in 0..components {
        let at = 64 + number + 12 * entry;
        let place = (u16_at(at), u32_at(at + 4) as usize, u32_at(at + 8) as usize);
        assert!(place.1 + place.2 <= u32_at(60 + number) as usize);
        places.push(place);
    }
    let xstate_bv = u64_at(40 + number);
    let mut at = 64 + number + 12 * (components + palettes);
    let mut decoded = Decoded {
        vcpu: (version == 2).then(|| u32_at(16)),
        xcr0: u64_at(16 + number),
        xfd: u64_at(24 + number),
        xfd_err: u64_at(32 + number),
        mxcsr: u32_at(48 + number),
        xstate_bv,
        components: Vec::new(),
        records: Vec::new(),
    };
    for (number, offset, size) in places {
        if xstate_bv >> number & 1 == 0 {
            continue;
        }
        decoded.records.push(at);
        assert_eq!((u16_at(at), u16_at(at + 2)), (number, 0));
        assert_eq!(u32_at(at + 4) as usize, size);
        let lines = size.div_ceil(64);
        let bitmap = at + 8;
        at = bitmap + 8 * lines.div_ceil(64);
        let mut content = Vec::new();
        for line in 0..lines {
            let len = (size - 64 * line).min(64);
            if bytes[bitmap + line / 8] >> (line % 8) & 1 == 1 {
                content.extend_from_slice(&bytes[at..at + len]);
                at += len;
            } else {
                content.resize(content.len() + len, 0);
            }
        }
        decoded.components.push((number, offset, content));
    }
    assert_eq!(at, end);
    decoded
}
