//! Encoded states, one and several: there and back, damaged, and made up.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;
#[path = "common/oracle.rs"]
mod oracle;
#[path = "common/states.rs"]
mod states;

use common::{LAYOUTS, area, layout};
use oracle::sealed;
use proptest::prelude::*;
use states::{AMX, registers};
use xsave_state::wire::{
    self, Blob, Buffer, Codec, DecodeError, DecodeErrorKind, EncodeError, MAX_STATE_BYTES,
};
use xsave_state::{
    Component, ComponentId, ExtendedState, Image, ImageError, Layout, LayoutError, Misfit, Palette,
    StateError, XFeatures,
};

/// Where the fields and the tables of version 2 begin.
const FIELDS: usize = 20;
const TABLES: usize = 68;

/// A buffer that had bytes in every place.
fn used_up(codec: &Codec) -> Buffer {
    let layout = codec.layout();
    let mut buffer = Buffer::new();
    let everything = states::state(
        &area(layout, layout.user().bits()),
        layout,
        registers(1, 0, 0),
    );
    let mut bytes = Vec::new();
    codec.encode(0, &everything, &mut bytes).unwrap();
    assert!(codec.decode(&bytes, &mut buffer).is_ok());
    buffer
}

/// The codec's verdict, with a buffer that had bytes in every place and with a new one.
fn verdict(bytes: &[u8], codec: &Codec) -> Result<(), DecodeError> {
    let mut used = used_up(codec);
    let decoded = codec.decode(bytes, &mut used).map(drop);
    assert_eq!(codec.decode(bytes, &mut Buffer::new()).map(drop), decoded);
    decoded
}

fn owned(bytes: &[u8], codec: &Codec) -> Result<ExtendedState<'static>, DecodeError> {
    let mut buffer = Buffer::new();
    codec
        .decode(bytes, &mut buffer)
        .map(ExtendedState::into_owned)
}

/// The error for an encoding of `state` after `change`, with a right length and checksum.
fn error(state: &ExtendedState<'_>, change: impl FnOnce(&mut Vec<u8>)) -> DecodeError {
    let codec = Codec::new(state.layout());
    let mut bytes = wire::encode(0, state);
    assert_eq!(verdict(&bytes, &codec), Ok(()), "sound before the change");
    change(&mut bytes);
    let bytes = sealed(bytes);
    let error = verdict(&bytes, &codec).expect_err("refused after the change");
    // Without a layout the same is found, unless only the reader's layout can tell.
    if !matches!(error, DecodeError::OtherLayout { .. }) {
        assert_eq!(wire::decode(&bytes).map(drop), Err(error));
        assert_eq!(error.kind(), DecodeErrorKind::Invalid, "{error}");
    }
    error
}

/// Every single bit flip of every kind of state, and which error finds it.
#[test]
fn every_bit_flip_in_a_state_is_detected() {
    for (name, state) in states::all() {
        let codec = Codec::new(state.layout());
        let mut bytes = wire::encode(0, &state);
        let mut buffer = Buffer::new();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = codec.decode(&bytes, &mut buffer).unwrap_err();
            let named = match bit / 8 {
                0..8 => matches!(error, DecodeError::Magic { .. }),
                // 2 becomes 0, 3 and larger numbers.
                8..10 => matches!(error, DecodeError::Version { .. }),
                12..16 => matches!(error, DecodeError::Length { .. }),
                _ => matches!(error, DecodeError::Checksum { .. }),
            };
            assert!(named, "{name}: bit {bit}: {error}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(verdict(&bytes, &codec), Ok(()));
    }
}

/// Every single bit flip in a row of states: the damaged one is named by where it begins, and all
/// others decode.
#[test]
fn every_bit_flip_in_a_row_of_states_leaves_the_others() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let members = [
        states::idle(&amx),
        ExtendedState::reset(&amx),
        states::two_tiles(&amx),
    ];
    let (mut bytes, starts) = row(&members);
    let mut buffer = Buffer::new();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let damaged = starts.iter().rposition(|&start| start <= bit / 8).unwrap();
        let mut seen = 0;
        for encoded in wire::states(&bytes) {
            match encoded {
                Ok(encoded) => {
                    let vcpu = encoded.vcpu().unwrap() as usize;
                    assert_ne!(vcpu, damaged, "bit {bit}");
                    assert_eq!(seen, vcpu, "bit {bit}");
                    let decoded = encoded.decode(&codec, &mut buffer).unwrap();
                    assert_eq!(decoded, members[vcpu]);
                }
                Err(error) => {
                    assert_eq!(
                        (seen, error.offset),
                        (damaged, starts[damaged]),
                        "bit {bit}"
                    );
                    // The header's number is told, unless its place is not known.
                    let place = bit / 8 - starts[damaged];
                    if !matches!(place, 0..10 | 16..20) {
                        assert_eq!(error.vcpu, Some(damaged as u32), "bit {bit}");
                    }
                }
            }
            seen += 1;
        }
        assert_eq!(seen, 3, "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

/// States one behind the other, numbered from 0, and where each begins.
fn row(states: &[ExtendedState<'_>]) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut starts) = (Vec::new(), Vec::new());
    for (vcpu, state) in (0..).zip(states) {
        starts.push(bytes.len());
        let codec = Codec::new(state.layout());
        codec.encode(vcpu, state, &mut bytes).unwrap();
    }
    (bytes, starts)
}

/// Which states are found in `bytes`, by number, and where something is not.
fn found(bytes: &[u8]) -> Vec<Result<Option<u32>, (usize, DecodeErrorKind)>> {
    wire::states(bytes)
        .map(|encoded| match encoded {
            Ok(encoded) => Ok(encoded.vcpu()),
            Err(error) => Err((error.offset, error.error.kind())),
        })
        .collect()
}

/// What is between and behind states, and what does not end, costs no other state.
#[test]
fn states_are_found_behind_what_is_none() {
    use DecodeErrorKind::*;
    let amx = layout(AMX);
    let (bytes, starts) = row(&[
        states::idle(&amx),
        states::two_tiles(&amx),
        states::idle(&amx),
    ]);
    let len = bytes.len();
    assert_eq!(found(&[]), []);
    assert_eq!(found(&bytes), [Ok(Some(0)), Ok(Some(1)), Ok(Some(2))]);
    assert_eq!(found(b"no state"), [Err((0, NotAState))]);

    // Bytes before, between and behind.
    let gap = |at: usize, text: &[u8]| [&bytes[..at], text, &bytes[at..]].concat();
    let all = [0, 1, 2].map(|vcpu| Ok(Some(vcpu)));
    for text in [
        &b"x"[..],
        b"\x89",
        b"\x89XSTATX\n",
        b"\x89XSTATE",
        &[0x89; 100],
    ] {
        for (position, at) in starts.iter().copied().chain([len]).enumerate() {
            let mut expected = all.to_vec();
            let kind = if at == len && wire::MAGIC.starts_with(text) {
                Damaged
            } else {
                NotAState
            };
            expected.insert(position, Err((at, kind)));
            assert_eq!(found(&gap(at, text)), expected, "{text:x?} at byte {at}");
        }
    }
    // Cut off, at every byte of the last state.
    for cut in starts[2] + 1..len {
        let expected = [Ok(Some(0)), Ok(Some(1)), Err((starts[2], Damaged))];
        assert_eq!(found(&bytes[..cut]), expected, "{cut}");
    }
    // A length that ends where a state behind the next one begins, or where all bytes end.
    for end in [starts[2], len] {
        let mut longer = bytes.clone();
        longer[12..16].copy_from_slice(&(end as u32).to_le_bytes());
        let expected = [Err((0, Damaged)), Ok(Some(1)), Ok(Some(2))];
        assert_eq!(found(&longer), expected, "{end}");
    }
    // One of a newer version, whatever its length field means.
    let mut newer = bytes.clone();
    newer[starts[1] + 8] = 3;
    newer[starts[1] + 12..starts[1] + 16].fill(0xff);
    let expected = [Ok(Some(0)), Err((starts[1], NewerVersion)), Ok(Some(2))];
    assert_eq!(found(&newer), expected);
    // A right checksum with flags that nobody knows: its length can be believed.
    let mut flagged = bytes[starts[1]..starts[2]].to_vec();
    flagged[11] = 1;
    let flagged = [
        &bytes[..starts[1]],
        &sealed(flagged),
        b"x",
        &bytes[starts[2]..],
    ]
    .concat();
    let behind = starts[2];
    let expected = [
        Ok(Some(0)),
        Err((starts[1], Invalid)),
        Err((behind, NotAState)),
        Ok(Some(2)),
    ];
    assert_eq!(found(&flagged), expected);
}

/// A guest can have bytes in its registers that look like a state. In a whole state they are content;
/// in a damaged one they are only skipped where its end can be believed.
#[test]
fn a_state_within_a_state() {
    let amx = layout(AMX);
    let forged = wire::encode(9, &ExtendedState::reset(&amx));
    let mut content = area(&amx, 0x60007);
    content[2816..2816 + forged.len()].copy_from_slice(&forged);
    let outer = states::state(&content, &amx, registers(0x602e7, 0, 0));
    let (bytes, starts) = row(&[outer, states::idle(&amx)]);
    assert_eq!(found(&bytes), [Ok(Some(0)), Ok(Some(1))]);

    let mut damaged = bytes.clone();
    damaged[100] ^= 1;
    let kind = DecodeErrorKind::Damaged;
    assert_eq!(found(&damaged), [Err((0, kind)), Ok(Some(1))]);
    // The length is damaged too: only the forged number tells.
    damaged[12] ^= 4;
    let inner = bytes.windows(forged.len()).position(|part| part == forged);
    let behind = inner.unwrap() + forged.len();
    assert!(behind < starts[1]);
    let expected = [
        Err((0, kind)),
        Ok(Some(9)),
        Err((behind, DecodeErrorKind::NotAState)),
        Ok(Some(1)),
    ];
    assert_eq!(found(&damaged), expected);
}

#[test]
fn every_truncation_and_every_byte_too_many_is_named() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let bytes = wire::encode(0, &states::two_tiles(&amx));
    let stated_bytes = bytes.len() as u32;
    let length = |actual_bytes| DecodeError::Length {
        stated_bytes,
        actual_bytes,
    };
    for len in 0..bytes.len() {
        let error = verdict(&bytes[..len], &codec).unwrap_err();
        let expected = match len {
            0..16 => DecodeError::TooShort { actual_bytes: len },
            _ => length(len),
        };
        assert_eq!(error, expected);
        assert_eq!(error.kind(), DecodeErrorKind::Damaged);
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(verdict(&longer, &codec), Err(length(longer.len())));
}

/// No bit of an encoding is without meaning: each flip that is given a right checksum is refused, or
/// is another valid state, which has that encoding.
#[test]
fn every_bit_flip_with_a_right_checksum_has_its_verdict() {
    let amx = layout(AMX);
    let state = states::all().remove(4).1; // three lines of tiles
    let codec = Codec::new(&amx);
    let bytes = wire::encode(0, &state);
    let number = FIELDS - 4..FIELDS;
    let mut accepted = 0;
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        if (12..16).contains(&(bit / 8)) || bit / 8 >= bytes.len() - 4 {
            continue;
        }
        let changed = sealed(changed);
        // By itself the state may have another layout than the reader's. It is canonical too.
        if let Ok(other) = wire::decode(&changed) {
            let vcpu = Blob::parse(&changed).unwrap().vcpu().unwrap();
            assert!(wire::encode(vcpu, &other) == changed, "bit {bit}");
            assert_eq!(vcpu != 0, number.contains(&(bit / 8)));
        }
        match owned(&changed, &codec) {
            Ok(other) => {
                accepted += 1;
                let means_something = other != state || number.contains(&(bit / 8));
                assert!(means_something, "bit {bit} means nothing");
                assert_eq!(wire::decode(&changed).unwrap(), other);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    // Content of x87 and the tiles, mostly.
    assert!(accepted > 8 * 100, "{accepted}");
}

#[test]
fn a_later_version_has_its_own_name() {
    let state = ExtendedState::reset(&layout(AMX));
    // Whatever else version 3 changes: its length field, its checksum, its size.
    let mut later = wire::encode(0, &state);
    later[8] = 3;
    later[12..].fill(0xff);
    let named = DecodeError::Version { version: 3 };
    assert_eq!(named.kind(), DecodeErrorKind::NewerVersion);
    assert_eq!(wire::decode(&later), Err(named));
    assert_eq!(verdict(&later, &Codec::new(state.layout())), Err(named));
    later.truncate(16);
    assert_eq!(wire::stated_bytes(&later), Err(named));
    // There was no version 0.
    later[8] = 0;
    let error = wire::stated_bytes(&later).unwrap_err();
    assert_eq!(error, DecodeError::Version { version: 0 });
    assert_eq!(error.kind(), DecodeErrorKind::Damaged);
}

#[test]
fn states_in_a_row_tell_their_lengths() {
    let amx = layout(AMX);
    let bytes = wire::encode(0, &states::idle(&amx));
    assert_eq!(wire::stated_bytes(&bytes[..16]), Ok(bytes.len()));
    let error = wire::stated_bytes(b"\x89XSTATX").unwrap_err();
    let actual = *b"\x89XSTATX\0";
    assert_eq!(error, DecodeError::Magic { actual });
    assert_eq!(error.kind(), DecodeErrorKind::NotAState);
    for stated_bytes in [0, 67, MAX_STATE_BYTES as u32 + 1, u32::MAX] {
        let mut bytes = bytes.clone();
        bytes[12..16].copy_from_slice(&stated_bytes.to_le_bytes());
        let actual_bytes = bytes.len();
        assert_eq!(
            wire::stated_bytes(&bytes),
            Err(DecodeError::Length {
                stated_bytes,
                actual_bytes
            })
        );
    }
}

/// A field that is not what it has to be.
fn field(field: &'static str, offset: usize, expected: u64, actual: u64) -> DecodeError {
    DecodeError::Field {
        field,
        offset,
        expected,
        actual,
    }
}

/// Of all that is refused with a right checksum: a change that makes it, and its name.
#[test]
fn what_is_made_up_has_its_name() {
    use DecodeError::*;
    let amx = layout(AMX);
    let idle = states::idle(&amx);
    let bytes = wire::encode(0, &idle);
    let records = oracle::decode(&bytes).records;
    let (first, end) = (records[0], bytes.len() - 4);
    assert_eq!((first, end), (TABLES + 12 * 8, 884));

    assert_eq!(
        error(&idle, |b| b[11] = 0x80),
        field("the flags", 10, 0, 0x8000)
    );
    assert_eq!(
        error(&idle, |b| b[FIELDS + 40] = 0xff),
        CutOff {
            offset: FIELDS,
            required_bytes: 48 + 12 * 256,
            actual_bytes: end - FIELDS
        }
    );
    // No room for the numbers of the fields: the shortest state of version 1.
    let reset = ExtendedState::reset(&amx);
    let short = error(&reset, |b| drop(b.drain(64..b.len() - 4)));
    assert!(matches!(short, CutOff { offset: FIELDS, .. }), "{short}");
    // A component that nobody has, and bit 63, in XSTATE_BV.
    for bit in [40, 63] {
        assert_eq!(
            error(&idle, |b| b[FIELDS + 24 + bit / 8] |= 1 << (bit % 8)),
            field("XSTATE_BV", FIELDS + 24, 7, 7 | 1 << bit)
        );
    }

    // The header of a record: a section of a later version, another component, reserved bytes, a size.
    let x87 = 160u64 << 32;
    let header = |actual| field("the header of a record", first, x87, actual);
    assert_eq!(error(&idle, |b| b[first + 1] = 1), header(x87 | 0x100));
    assert_eq!(error(&idle, |b| b[first] = 1), header(x87 | 1));
    assert_eq!(error(&idle, |b| b[first + 2] = 1), header(x87 | 1 << 16));
    assert_eq!(error(&idle, |b| b[first + 4] = 161), header(161 << 32));
    // Behind the last record.
    for len in [1, 7, 8, 9] {
        let trailing = error(&idle, |b| drop(b.splice(end..end, vec![5; len])));
        let offset = end;
        assert_eq!(trailing, Trailing { offset, bytes: len });
    }

    let line = |line, last| Line {
        component: ComponentId::X87,
        line,
        last,
    };
    assert_eq!(error(&idle, |b| b[first + 8] |= 8), line(3, 2));
    assert_eq!(
        error(&idle, |b| b[first + 16 + 64..][..64].fill(0)),
        line(1, 2)
    );
    // Line 2 is zero, and is the second that is stored.
    let second = error(&idle, |b| {
        b[first + 8] = 0b101;
        b.drain(first + 16 + 64..first + 16 + 128);
        b[first + 16 + 64..][..32].fill(0);
    });
    assert_eq!(second, line(2, 2));
    // A line fewer than the bitmap says, in the last record.
    assert_eq!(
        error(&idle, |b| drop(b.drain(end - 64..end))),
        CutOff {
            offset: end - 256,
            required_bytes: 256,
            actual_bytes: 192
        }
    );
    let at = first + 16 + 24;
    assert_eq!(
        error(&idle, |b| b[at + 7] = 0xff),
        field("MXCSR in x87", at, 0, 0xff << 56)
    );
    assert_eq!(
        error(&reset, |b| b[FIELDS + 32] = 0xa0),
        field("MXCSR", FIELDS + 32, 0x1f80, 0x1fa0)
    );

    // The state's own rules.
    assert!(matches!(
        [
            error(&idle, |b| b[FIELDS + 35] = 1),
            error(&idle, |b| b[FIELDS] = 2),
            error(&idle, |b| b[FIELDS + 8] = 4),
            error(&idle, |b| b[FIELDS + 16] = 4),
        ],
        [
            Image(ImageError::Legacy(_)),
            State(StateError::Xcr0(_)),
            State(StateError::Xfd { .. }),
            State(StateError::XfdErr { .. }),
        ]
    ));
    let full = states::full_tiles(&amx);
    assert!(matches!(
        error(&full, |b| b[FIELDS + 8 + 2] = 4),
        State(StateError::InUseWhileDisabled { .. })
    ));
    let tilecfg = oracle::decode(&wire::encode(0, &full)).records[7];
    assert!(matches!(
        error(&full, |b| b[tilecfg + 16] = 9),
        Image(ImageError::TileConfig(_))
    ));
}

/// What breaks only a rule of states has an area and registers that can be looked at.
#[test]
fn a_state_that_breaks_a_rule_can_be_looked_at() {
    let amx = layout(AMX);
    let full = states::full_tiles(&amx);
    let mut bytes = wire::encode(5, &full);
    bytes[FIELDS + 8 + 2] = 4; // IA32_XFD
    let blob = Blob::parse(&sealed(bytes)).unwrap();
    assert_eq!((blob.vcpu(), blob.layout()), (Some(5), &amx));
    assert_eq!(blob.registers().xfd, XFeatures::XTILEDATA);
    let image = Image::parse(blob.area(), blob.layout()).unwrap();
    assert_eq!(&image, full.image());
    assert!(matches!(blob.clone().decode(), Err(DecodeError::State(_))));
}

/// The tables of the state against the architecture and against their own encoding.
#[test]
fn layouts_that_cannot_be() {
    let amx = layout(AMX);
    let reset = ExtendedState::reset(&amx);
    let entry = |index: usize| TABLES + 12 * index;
    let impossible = |change: fn(&mut [u8])| match error(&reset, |b| change(&mut b[TABLES..])) {
        DecodeError::Layout(error) => error,
        other => panic!("{other}"),
    };
    // AVX within the header, AVX twice, SSE, a palette that cannot be.
    let offset = impossible(|tables| tables[5] = 1);
    assert!(
        matches!(offset, LayoutError::OffsetInHeader { .. }),
        "{offset}"
    );
    let twice = impossible(|tables| tables.copy_within(..12, 12));
    assert!(matches!(twice, LayoutError::Twice { .. }), "{twice}");
    let sse = impossible(|tables| {
        tables[..12].copy_from_slice(&[1, 0, 0, 0, 0x40, 2, 0, 0, 0, 1, 0, 0]);
    });
    assert!(matches!(sse, LayoutError::Twice { component } if component == ComponentId::SSE));
    let palette = impossible(|tables| tables[12 * 7 + 4] = 0);
    assert!(matches!(palette, LayoutError::Palette(_)), "{palette}");

    let byte = |offset, expected, actual| field("the layout", offset, expected, actual);
    // An area larger and smaller than its components.
    let area = FIELDS + 45;
    assert_eq!(error(&reset, |b| b[area] += 1), byte(area, 0x2b, 0x2c));
    assert_eq!(error(&reset, |b| b[area] -= 1), byte(area, 0x2b, 0x2a));
    // Unknown flags: the bit for supervisor components, and others.
    for (at, bit) in [(2, 1), (3, 0x80)] {
        let at = entry(0) + at;
        assert_eq!(error(&reset, |b| b[at] |= bit), byte(at, 0, bit.into()));
    }
    // Components out of order, and one that is none.
    let swapped = error(&reset, |b| {
        let (first, second) = (entry(1), entry(2));
        for at in 0..12 {
            b.swap(first + at, second + at);
        }
    });
    assert_eq!(swapped, byte(entry(1), 5, 6));
    let count = FIELDS + 40;
    assert_eq!(error(&reset, |b| b[entry(0)] = 63), byte(count, 6, 7));
    assert_eq!(error(&reset, |b| b[entry(0) + 1] = 1), byte(count, 6, 7));
    // No layout has a mask of 0, or one without the bits of the initial MXCSR.
    let mask = FIELDS + 36;
    assert_eq!(
        error(&reset, |b| b[mask..mask + 4].fill(0)),
        byte(mask, 0xbf, 0)
    );
    assert_eq!(
        error(&reset, |b| b[mask + 1] = 0xe0),
        byte(mask + 1, 0xff, 0xe0)
    );
    // IA32_XFD can disable tile data whatever CPUID says: version 2 has one way to say it.
    let flags = entry(6) + 2;
    assert_eq!(error(&reset, |b| b[flags] = 2), byte(flags, 6, 2));
}

/// Writers of version 1 took CPUID's word for it that XFD cannot disable tile data. Such states decode,
/// for a reader with a layout and without, and nothing else becomes optional.
#[test]
fn version_1_has_states_without_xfd_for_tile_data() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let of_version_1 = |state: &ExtendedState<'_>| {
        let mut bytes = wire::encode(0, state);
        bytes[8] = 1;
        bytes.drain(16..20);
        bytes
    };
    // The same bit elsewhere: the size of the area.
    let mpx = ExtendedState::reset(&layout("skylake-client"));
    let mut bytes = of_version_1(&mpx);
    assert_eq!(bytes[60..64], 1088u32.to_le_bytes());
    bytes[61] ^= 4;
    let refused = field("the layout", 61, 4, 0);
    assert_eq!(wire::decode(&sealed(bytes)), Err(refused));

    let of_amx = |(_, state): &(_, ExtendedState<'_>)| *state.layout() == amx;
    for (_, state) in states::all().into_iter().filter(of_amx) {
        let bytes = of_version_1(&state);
        assert_eq!(verdict(&sealed(bytes.clone()), &codec), Ok(()));
        let flags = |index: usize| 64 + 12 * index + 2;
        assert_eq!(bytes[flags(6)], 6, "aligned, XFD");
        for (index, bit) in (0..7).flat_map(|index| (0..8).map(move |bit| (index, bit))) {
            let mut other = bytes.clone();
            other[flags(index)] ^= 1 << bit;
            let other = sealed(other);
            if (index, bit) == (6, 2) {
                assert_eq!(owned(&other, &codec).unwrap(), state);
                assert_eq!(wire::decode(&other).unwrap(), state);
            } else {
                assert!(verdict(&other, &codec).is_err(), "entry {index}, bit {bit}");
            }
        }
    }
}

/// Sound states of another layout, and the first difference in the words for what does not fit.
#[test]
fn states_of_another_layout_are_not_the_readers() {
    let amx = layout(AMX);
    let ice_lake = layout("ice-lake-server");
    let read_by = |source: &Layout, reader: &Layout| {
        let bytes = wire::encode(0, &ExtendedState::reset(source));
        let error = verdict(&bytes, &Codec::new(reader)).unwrap_err();
        assert_eq!(error.kind(), DecodeErrorKind::OtherLayout);
        let mut out = vec![1, 2, 3];
        let encoded = Codec::new(reader).encode(0, &ExtendedState::reset(source), &mut out);
        assert_eq!(out, [1, 2, 3]);
        match (error, encoded) {
            (
                DecodeError::OtherLayout { misfit },
                Err(EncodeError::OtherLayout { misfit: encoded }),
            ) if misfit == encoded => misfit,
            other => panic!("{other:?}"),
        }
    };
    let component = ComponentId::XTILECFG;
    assert_eq!(read_by(&amx, &ice_lake), Misfit::Missing { component });
    assert_eq!(
        read_by(&ice_lake, &amx),
        Misfit::Size {
            component,
            source_bytes: 0,
            target_bytes: 64
        }
    );
    assert_eq!(
        read_by(&layout("amd-zen4-genoa"), &ice_lake).to_string(),
        "opmask is at offset 832 in the state and at 1088 on the target"
    );
    assert_eq!(
        read_by(&amx, &amx.clone().with_mxcsr_mask(0x2ffff)),
        Misfit::MxcsrMask {
            source_mask: 0xffff,
            target_mask: 0x2ffff
        }
    );

    let tiles = |data, palettes: &[Palette]| {
        let config = Component::user(ComponentId::XTILECFG, 2752, 64).aligned();
        Layout::from_parts([config, data], palettes.iter().copied()).unwrap()
    };
    let data = Component::user(ComponentId::XTILEDATA, 2816, 8192);
    let small = Palette::from_leaf(1, [0x0200_1000, 0x0008_0040, 8, 0]).unwrap();
    let second = Palette::from_leaf(2, [0x0400_2000, 0x0008_0040, 16, 0]).unwrap();
    let one = tiles(data, &[Palette::ONE]);
    for (other, palette) in [(&[small][..], 1), (&[], 1), (&[Palette::ONE, second], 2)] {
        let misfit = read_by(&one, &tiles(data, other));
        assert_eq!(misfit, Misfit::Palette { component, palette });
    }
    let component = ComponentId::XTILEDATA;
    let aligned = tiles(data.aligned(), &[Palette::ONE]);
    assert_eq!(read_by(&one, &aligned), Misfit::Properties { component });
    let larger = tiles(Component::user(component, 2816, 8256), &[Palette::ONE]);
    assert_eq!(
        read_by(&one, &larger),
        Misfit::Size {
            component,
            source_bytes: 8192,
            target_bytes: 8256
        }
    );
    let component = ComponentId::AVX;
    let avx = Component::user(component, 576, 256);
    let of = |part| Layout::from_parts([part], []).unwrap();
    let xfd = of(avx.with_xfd());
    assert_eq!(read_by(&of(avx), &xfd), Misfit::Properties { component });
}

/// Supervisor components are in no area, and so in no encoding; nor do they make a difference to whether
/// states are equal.
#[test]
fn a_layout_with_supervisor_components_is_the_same_to_a_state() {
    let emulated = layout(AMX);
    let beyond_legacy = |component: &Component| component.id().number() > 1;
    let of_guest = emulated.components().copied().filter(beyond_legacy);
    let cet = [
        Component::supervisor(ComponentId::CET_U, 16),
        Component::supervisor(ComponentId::CET_S, 24),
    ];
    let guest = Layout::from_parts(of_guest.chain(cet), [Palette::ONE]).unwrap();
    for layout in [layout("sapphire-rapids"), guest] {
        assert!(!layout.supervisor().is_empty());
        let state = states::state(&area(&layout, 0x602e7), &layout, registers(0x602e7, 0, 0));
        let bytes = wire::encode(0, &state);
        assert_eq!(owned(&bytes, &Codec::new(&layout)).unwrap(), state);
        let alone = wire::decode(&bytes).unwrap();
        assert_eq!(alone, state);
        assert_eq!(alone.layout().supervisor(), XFeatures::empty());
        assert_eq!(alone.layout().user(), layout.user());
        let mut again = Vec::new();
        let codec = Codec::new(alone.layout());
        codec.encode(0, &state, &mut again).unwrap();
        assert_eq!(again, bytes);
    }
}

/// What an area had before does not shine through, and the encoding says nothing of bytes that mean
/// nothing.
#[test]
fn buffers_are_written_all_over() {
    for (name, state) in states::all() {
        let codec = Codec::new(state.layout());
        let bytes = wire::encode(0, &state);
        let fresh = owned(&bytes, &codec).unwrap();
        let mut after_failure = Buffer::new();
        let mut cut = wire::encode(0, &states::full_tiles(&layout(AMX)));
        cut.truncate(cut.len() - 1);
        let full = Codec::new(&layout(AMX));
        assert!(full.decode(&sealed(cut), &mut after_failure).is_err());
        for mut buffer in [
            Buffer::new(),
            used_up(&codec),
            used_up(&full),
            // Has bytes where Intel's processors have none.
            used_up(&Codec::new(&layout("amd-zen4-genoa"))),
            after_failure,
        ] {
            for _ in 0..2 {
                let decoded = codec.decode(&bytes, &mut buffer).unwrap();
                assert!(
                    decoded.image().as_bytes() == fresh.image().as_bytes(),
                    "{name}"
                );
            }
        }
        // Bytes of components that are initial, between components, and left to software.
        let mut dirty = state.image().as_bytes().to_vec();
        let in_use = state.image().xstate_bv();
        let mut means = vec![false; dirty.len()];
        means[416..464].fill(true); // must be 0
        means[512..576].fill(true);
        means[24..28].fill(true);
        for id in in_use.components() {
            let place = state.layout().component(id).unwrap();
            means[place.offset().unwrap()..][..place.size()].fill(true);
        }
        means[28..32].fill(false); // MXCSR_MASK
        for (byte, _) in dirty.iter_mut().zip(means).filter(|(_, means)| !means) {
            *byte = 0xee;
        }
        let image = Image::parse(&dirty, state.layout()).unwrap();
        let dirty = ExtendedState::new(image, state.registers()).unwrap();
        assert!(wire::encode(0, &dirty) == bytes, "{name}");
    }
}

/// 1,024 vCPUs with AMX idle, into buffers that were used once before.
#[test]
fn many_vcpus_are_encoded_and_decoded_without_allocating() {
    const VCPUS: u32 = 1024;
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let idle = states::idle(&amx);
    let (mut file, mut buffer) = (Vec::new(), Buffer::new());
    let mut there_and_back = || {
        file.clear();
        for vcpu in 0..VCPUS {
            codec.encode(vcpu, &idle, &mut file).unwrap();
        }
        let mut expected = 0..VCPUS;
        for encoded in wire::states(&file) {
            let encoded = encoded.unwrap();
            assert_eq!(encoded.vcpu(), expected.next());
            assert_eq!(encoded.decode(&codec, &mut buffer).unwrap(), idle);
        }
        assert!(expected.is_empty());
        file.len()
    };
    let first = allocation_counter::measure(|| {
        there_and_back();
    });
    // Growing the buffers, not one allocation for each vCPU.
    assert!((1..100).contains(&first.count_total), "{first:?}");
    let again = allocation_counter::measure(|| {
        there_and_back();
    });
    assert_eq!(again.count_total, 0);
    assert_eq!(there_and_back(), 1024 * 888);
}

/// Whatever the bytes say, memory is asked for what one area needs.
#[test]
fn hostile_lengths_allocate_little() {
    let amx = layout(AMX);
    let bytes = wire::encode(0, &states::idle(&amx));
    for at in (12..TABLES).chain([TABLES + 8, TABLES + 12 * 8 + 4]) {
        for width in [1, 2, 4] {
            let mut changed = bytes.clone();
            changed[at..at + width].fill(0xff);
            let sealed = if at < 16 { changed } else { sealed(changed) };
            let allocated = allocation_counter::measure(|| {
                let _ = Blob::parse(&sealed);
                let _ = wire::decode(&sealed);
                let _ = wire::states(&sealed).count();
            });
            assert!(allocated.bytes_max < 200 * 1024, "{at}: {allocated:?}");
        }
    }
}

fn any_state() -> impl Strategy<Value = ExtendedState<'static>> {
    (
        prop::sample::select(LAYOUTS.to_vec()),
        any::<u64>(),
        prop::collection::vec(
            (any::<prop::sample::Index>(), 1usize..200, any::<u8>()),
            0..24,
        ),
        any::<(bool, bool, bool)>(),
    )
        .prop_map(|(name, in_use, fills, (armed, error, all))| {
            let layout = layout(name);
            let xfd = if armed {
                layout.xfd()
            } else {
                XFeatures::empty()
            };
            let in_use = in_use & layout.user().bits() & !xfd.bits();
            let mut area = area(&layout, in_use);
            let tilecfg = layout
                .component(ComponentId::XTILECFG)
                .map(|c| c.offset().unwrap());
            for (at, len, value) in fills {
                let at = 576 + at.index(area.len() - 576);
                let end = (at + len * 7).min(area.len());
                let keep = tilecfg.map(|at| area[at..at + 64].to_vec());
                area[at..end].fill(value.saturating_sub(128));
                if let (Some(at), Some(keep)) = (tilecfg, keep) {
                    area[at..at + 64].copy_from_slice(&keep);
                }
            }
            let xfd_err = if error { layout.xfd().bits() } else { 0 };
            let xcr0 = if all { layout.user().bits() } else { 1 };
            states::state(&area, &layout, registers(xcr0, xfd.bits(), xfd_err))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn there_and_back_is_the_identity(state in any_state(), used in any::<u8>(), vcpu in any::<u32>()) {
        let codec = Codec::new(state.layout());
        let mut bytes = vec![used; 5];
        codec.encode(vcpu, &state, &mut bytes).unwrap();
        let bytes = bytes.split_off(5);
        prop_assert!(bytes.len() <= MAX_STATE_BYTES);
        prop_assert_eq!(wire::stated_bytes(&bytes), Ok(bytes.len()));
        let mut buffer = if used % 2 == 0 { Buffer::new() } else { used_up(&codec) };
        prop_assert_eq!(&codec.decode(&bytes, &mut buffer).unwrap(), &state);
        let alone = wire::decode(&bytes).unwrap();
        prop_assert_eq!(&alone, &state);
        prop_assert!(wire::encode(vcpu, &alone) == bytes);
        // The second reader, and the look inside.
        let decoded = oracle::decode(&bytes);
        let blob = Blob::parse(&bytes).unwrap();
        prop_assert_eq!((decoded.vcpu, blob.vcpu()), (Some(vcpu), Some(vcpu)));
        prop_assert_eq!(blob.registers(), state.registers());
        let image = Image::parse(blob.area(), blob.layout()).unwrap();
        prop_assert_eq!(&image, state.image());
        for (number, _, content) in decoded.components {
            let id = ComponentId::new(number as u8).unwrap();
            let mut component = image.component(id).unwrap().to_vec();
            if id == ComponentId::X87 {
                component[24..32].fill(0);
            }
            prop_assert_eq!(component, content);
        }
        let encoded: Vec<_> = wire::states(&bytes).map(|encoded| encoded.unwrap().as_bytes()).collect();
        prop_assert_eq!(encoded, [&bytes[..]]);
    }

    /// Anything can happen to bytes on their way to somebody who repairs the checksum: what is
    /// accepted then has exactly one encoding, and nothing panics.
    #[test]
    fn what_decodes_encodes_to_the_same_bytes(
        state in any_state(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = wire::encode(0, &state);
        for (at, value) in changes {
            let at = at.index(bytes.len().min(400));
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(16 + cut.index(bytes.len() - 16));
        }
        let bytes = if bytes.len() >= 20 { sealed(bytes) } else { bytes };
        let codec = Codec::new(state.layout());
        let alone = wire::decode(&bytes);
        if let Ok(decoded) = owned(&bytes, &codec) {
            prop_assert_eq!(alone.as_ref(), Ok(&decoded));
        }
        if let Ok(decoded) = alone {
            let blob = Blob::parse(&bytes).unwrap();
            // Version 1 has no number, and version 2 has no other bytes for the same.
            if let Some(vcpu) = blob.vcpu() {
                prop_assert!(wire::encode(vcpu, &decoded) == bytes);
            }
        }
        let _ = found(&bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), version in 1u8..3) {
        let _ = (wire::decode(&bytes), Blob::parse(&bytes), found(&bytes));
        let mut sealed_bytes = wire::MAGIC.to_vec();
        sealed_bytes.extend_from_slice(&[version, 0, 0, 0]);
        sealed_bytes.extend_from_slice(&bytes);
        if sealed_bytes.len() >= 68 {
            let sealed_bytes = sealed(sealed_bytes);
            let _ = wire::decode(&sealed_bytes);
            let _ = found(&[sealed_bytes, bytes].concat());
        }
    }
}
