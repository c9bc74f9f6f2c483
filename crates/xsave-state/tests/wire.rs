//! Encoded states and containers: there and back, damaged, and made up.
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

use common::{Dump, LAYOUTS, area, layout};
use oracle::sealed;
use proptest::prelude::*;
use states::{AMX, registers};
use xsave_state::wire::{
    self, Blob, Buffer, Codec, Container, ContainerError, DecodeError, Difference, EncodeError,
    Index, MAX_STATE_BYTES, MemberError, Trailer, WriteError, Writer,
};
use xsave_state::{
    ComponentId, ExtendedState, Image, ImageError, Layout, LayoutError, StateError, XFeatures,
};

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
    codec.encode(&everything, &mut bytes).unwrap();
    assert!(codec.decode(&bytes, &mut buffer).is_ok());
    buffer
}

/// Both readers must say the same; gives what they say.
fn verdict(bytes: &[u8], codec: &Codec) -> Result<(), DecodeError> {
    let mut used = used_up(codec);
    let decoded = codec.decode(bytes, &mut used).map(drop);
    assert_eq!(codec.decode_owned(bytes).map(drop), decoded);
    decoded
}

/// The error for an encoding of `state` after `change`, with a right length and checksum.
fn error(state: &ExtendedState<'_>, change: impl FnOnce(&mut Vec<u8>)) -> DecodeError {
    let codec = Codec::new(state.layout());
    let mut bytes = wire::encode(state);
    assert_eq!(verdict(&bytes, &codec), Ok(()), "sound before the change");
    change(&mut bytes);
    let bytes = sealed(bytes);
    let error = verdict(&bytes, &codec).expect_err("refused after the change");
    // Without a layout the same is found, unless only the reader's layout can tell.
    if !matches!(error, DecodeError::OtherLayout { .. }) {
        assert_eq!(wire::decode(&bytes).map(drop), Err(error));
    }
    error
}

fn container(states: &[(u32, ExtendedState<'_>)]) -> Vec<u8> {
    let mut writer = Writer::new();
    let mut bytes = Vec::new();
    for (vcpu, state) in states {
        let codec = Codec::new(state.layout());
        bytes.extend_from_slice(writer.push(*vcpu, &codec, state).unwrap());
    }
    bytes.extend_from_slice(writer.finish());
    bytes
}

/// Every single bit flip of every kind of state, and which error finds it.
#[test]
fn every_bit_flip_in_a_state_is_detected() {
    for (name, state) in states::all() {
        let codec = Codec::new(state.layout());
        let mut bytes = wire::encode(&state);
        let mut buffer = Buffer::new();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = codec.decode(&bytes, &mut buffer).unwrap_err();
            let named = match bit / 8 {
                0..8 => matches!(error, DecodeError::Magic { .. }),
                8..10 => matches!(error, DecodeError::Version { .. }),
                12..16 => matches!(
                    error,
                    DecodeError::Length { .. } | DecodeError::ImpossibleLength { .. }
                ),
                _ => matches!(error, DecodeError::Checksum { .. }),
            };
            assert!(named, "{name}: bit {bit}: {error}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(verdict(&bytes, &codec), Ok(()));
    }
}

/// Every single bit flip of a container: in the index it is found when it is opened; in a vCPU it is
/// found there, and all others decode.
#[test]
fn every_bit_flip_in_a_container_is_detected() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let members = [
        (0, states::idle(&amx)),
        (3, ExtendedState::reset(&amx)),
        (4, states::two_tiles(&amx)),
    ];
    let mut bytes = container(&members);
    let ranges: Vec<_> = Container::open(&bytes)
        .unwrap()
        .index()
        .entries()
        .map(|entry| {
            (
                entry.vcpu,
                entry.range.start as usize..entry.range.end as usize,
            )
        })
        .collect();
    let mut buffer = Buffer::new();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let damaged = ranges.iter().find(|(_, range)| range.contains(&(bit / 8)));
        match (Container::open(&bytes), damaged) {
            (Err(_), None) => {}
            (Ok(container), Some((vcpu, _))) => {
                for (member, (_, state)) in container.members().zip(&members) {
                    match member.decode(&codec, &mut buffer) {
                        Ok(decoded) => {
                            assert_ne!(member.vcpu(), *vcpu, "bit {bit}");
                            assert_eq!(&decoded, state);
                        }
                        Err(
                            MemberError::Decode { vcpu: named, .. }
                            | MemberError::Replaced { vcpu: named, .. },
                        ) => assert_eq!((member.vcpu(), named), (*vcpu, *vcpu), "bit {bit}"),
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            (opened, _) => panic!("bit {bit}: {:?}", opened.map(drop)),
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn every_truncation_and_every_byte_too_many_is_named() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let bytes = wire::encode(&states::two_tiles(&amx));
    for len in 0..bytes.len() {
        let error = verdict(&bytes[..len], &codec).unwrap_err();
        let named = match len {
            0..16 => {
                matches!(error, DecodeError::TooShort { required_bytes: 16, actual_bytes } if actual_bytes == len)
            }
            _ => {
                error
                    == DecodeError::Length {
                        stated_bytes: bytes.len(),
                        actual_bytes: len,
                    }
            }
        };
        assert!(named, "{len}: {error}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(
        verdict(&longer, &codec),
        Err(DecodeError::Length { .. })
    ));

    let whole = container(&[(0, states::idle(&amx)), (1, states::two_tiles(&amx))]);
    for len in 0..whole.len() {
        assert!(Container::open(&whole[..len]).is_err(), "{len}");
    }
}

/// No bit of an encoding is without meaning: each flip that is given a right checksum is refused, or
/// is another valid state, which has that encoding.
#[test]
fn every_bit_flip_with_a_right_checksum_has_its_verdict() {
    let amx = layout(AMX);
    let state = states::all().remove(4).1; // three lines of tiles
    let codec = Codec::new(&amx);
    let bytes = wire::encode(&state);
    let mut accepted = 0;
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        if (12..16).contains(&(bit / 8)) || bit / 8 >= bytes.len() - 4 {
            continue;
        }
        let changed = sealed(changed);
        match codec.decode_owned(&changed) {
            Ok(other) => {
                accepted += 1;
                assert_ne!(other, state, "bit {bit} means nothing");
                assert!(wire::encode(&other) == changed, "bit {bit}");
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        // By itself the state may have another layout than the reader's. It is canonical too.
        if let Ok(other) = wire::decode(&changed) {
            assert!(wire::encode(&other) == changed, "bit {bit}");
        }
    }
    // Content of x87 and the tiles, mostly.
    assert!(accepted > 8 * 100, "{accepted}");
}

#[test]
fn a_later_version_has_its_own_name() {
    let state = ExtendedState::reset(&layout(AMX));
    assert_eq!(
        error(&state, |bytes| bytes[8] = 2),
        DecodeError::Version {
            version: 2,
            supported: 1
        }
    );
    // Whatever else version 2 changes: its length field, its checksum, its size.
    let mut later = wire::encode(&state);
    later[8] = 2;
    later[12..].fill(0xff);
    assert!(matches!(
        wire::decode(&later),
        Err(DecodeError::Version { version: 2, .. })
    ));
    later.truncate(16);
    assert!(matches!(
        wire::encoded_bytes(&later),
        Err(DecodeError::Version { version: 2, .. })
    ));

    let mut bytes = container(&[(0, state)]);
    bytes[8] = 2;
    assert_eq!(
        Container::open(&bytes).map(drop),
        Err(ContainerError::Version {
            version: 2,
            supported: 1
        })
    );
}

#[test]
fn states_in_a_row_tell_their_lengths() {
    let amx = layout(AMX);
    let bytes = wire::encode(&states::idle(&amx));
    assert_eq!(wire::encoded_bytes(&bytes[..16]), Ok(bytes.len()));
    assert_eq!(
        wire::encoded_bytes(b"\x89XSTATX"),
        Err(DecodeError::Magic {
            actual: *b"\x89XSTATX\0"
        })
    );
    for impossible in [0, 67, MAX_STATE_BYTES as u32 + 1, u32::MAX] {
        let mut bytes = bytes.clone();
        bytes[12..16].copy_from_slice(&impossible.to_le_bytes());
        assert_eq!(
            wire::encoded_bytes(&bytes),
            Err(DecodeError::ImpossibleLength {
                stated_bytes: impossible
            })
        );
    }
}

/// Of all that is refused with a right checksum: a change that makes it, and its name.
#[test]
fn what_is_made_up_has_its_name() {
    use DecodeError::*;
    let amx = layout(AMX);
    let idle = states::idle(&amx);
    let records = oracle::decode(&wire::encode(&idle)).records;
    let first = records[0];
    assert_eq!(first, 64 + 12 * 8);

    assert_eq!(
        error(&idle, |b| b[11] = 0x80),
        UnknownFlags { flags: 0x8000 }
    );
    assert!(matches!(
        error(&idle, |b| b[56] = 0xff),
        TablesTooLong {
            components: 255,
            palettes: 1,
            required_bytes: 3136,
            actual_bytes: 880
        }
    ));
    // A component that nobody has, and bit 63, in XSTATE_BV.
    assert!(matches!(
        error(&idle, |b| b[40 + 5] = 1),
        UnknownComponent { component, .. } if component.number() == 40
    ));
    assert!(matches!(error(&idle, |b| b[47] = 0x80), XstateBv63 { .. }));

    // Sections of later versions, instead of a record and behind the last.
    assert_eq!(
        error(&idle, |b| b[first + 1] = 1),
        UnknownSection {
            kind: 0x100,
            offset: first
        }
    );
    let behind = |kind: u8, len: usize| {
        move |b: &mut Vec<u8>| {
            let at = b.len() - 4;
            b.splice(at..at, [kind, 0, 0, 0, 0, 0, 0, 0].into_iter().take(len));
        }
    };
    assert_eq!(
        error(&idle, behind(63, 8)),
        UnknownSection {
            kind: 63,
            offset: 880
        }
    );
    assert!(matches!(
        error(&idle, behind(5, 8)),
        NotAnnounced {
            component: ComponentId::OPMASK,
            offset: 880
        }
    ));
    assert_eq!(
        error(&idle, behind(63, 7)),
        Trailing {
            offset: 880,
            bytes: 7
        }
    );

    assert!(matches!(
        error(&idle, |b| b[first] = 1),
        RecordOrder {
            expected: ComponentId::X87,
            actual: ComponentId::SSE,
            ..
        }
    ));
    assert_eq!(
        error(&idle, |b| b[first + 2] = 1),
        Reserved {
            offset: first + 2,
            value: 1
        }
    );
    assert!(matches!(
        error(&idle, |b| b[first + 4] = 161),
        RecordSize {
            component: ComponentId::X87,
            expected_bytes: 160,
            actual_bytes: 161
        }
    ));
    assert!(matches!(
        error(&idle, |b| b[first + 8] |= 8),
        BitBeyondComponent {
            component: ComponentId::X87,
            bit: 3,
            lines: 3
        }
    ));
    // A line fewer than the bitmap says, in the last record.
    assert!(matches!(
        error(&idle, |b| drop(b.drain(880 - 64..880))),
        RecordTooShort {
            component: ComponentId::AVX,
            required_bytes: 256,
            actual_bytes: 192,
            ..
        }
    ));
    assert!(matches!(
        error(&idle, |b| b[first + 16 + 64..][..64].fill(0)),
        ZeroLine {
            component: ComponentId::X87,
            index: 1
        }
    ));
    assert_eq!(
        error(&idle, |b| b[first + 16 + 31] = 0xff),
        MxcsrInX87 { value: 0xff << 56 }
    );

    // The state's own rules.
    assert!(matches!(
        error(&idle, |b| b[51] = 1),
        Image(ImageError::Legacy(_))
    ));
    assert!(matches!(
        error(&idle, |b| b[16] = 2),
        State(StateError::Xcr0(_))
    ));
    assert!(matches!(
        error(&idle, |b| b[24] = 4),
        State(StateError::Xfd { .. })
    ));
    assert!(matches!(
        error(&idle, |b| b[32] = 4),
        State(StateError::XfdErr { .. })
    ));
    let full = states::full_tiles(&amx);
    assert!(matches!(
        error(&full, |b| b[24 + 2] = 4),
        State(StateError::InUseWhileDisabled { .. })
    ));
    let tilecfg = oracle::decode(&wire::encode(&full)).records[7];
    assert!(matches!(
        error(&full, |b| b[tilecfg + 16] = 9),
        Image(ImageError::TileConfig(_))
    ));
    let reset = ExtendedState::reset(&amx);
    assert_eq!(
        error(&reset, |b| b[48] = 0xa0),
        MxcsrNotInUse { mxcsr: 0x1fa0 }
    );
}

/// The tables of the state against the architecture, against their own encoding, and against the
/// reader's layout.
#[test]
fn layouts_that_cannot_be_or_are_not_the_readers() {
    let amx = layout(AMX);
    let reset = ExtendedState::reset(&amx);
    let entry = |index: usize| 64 + 12 * index;
    // AVX within the header; an area smaller than its components.
    assert!(matches!(
        error(&reset, |b| b[entry(0) + 5] = 1),
        DecodeError::Layout(LayoutError::OffsetInHeader { .. })
    ));
    assert!(matches!(
        error(&reset, |b| b[61] -= 1),
        DecodeError::Layout(LayoutError::AreaTooSmall { .. })
    ));
    assert!(matches!(
        error(&reset, |b| b[entry(0) + 2] |= 1),
        DecodeError::Layout(LayoutError::Kind { .. })
    ));
    assert!(matches!(
        error(&reset, |b| b[entry(7) + 4] = 0),
        DecodeError::Layout(LayoutError::Palette(_))
    ));
    assert!(matches!(
        error(&reset, |b| b[58] = 9),
        DecodeError::TablesTooLong { .. }
    ));
    // An area larger than its components; an unknown flag; components out of order or twice.
    let byte = |offset, expected, actual| DecodeError::LayoutByte {
        offset,
        expected,
        actual,
    };
    assert_eq!(error(&reset, |b| b[61] += 1), byte(61, 0x2b, 0x2c));
    assert_eq!(
        error(&reset, |b| b[entry(0) + 3] = 0x80),
        byte(entry(0) + 3, 0, 0x80)
    );
    assert_eq!(
        error(&reset, |b| {
            let (first, second) = (entry(1), entry(2));
            for at in 0..12 {
                b.swap(first + at, second + at);
            }
        }),
        byte(entry(1), 5, 6)
    );
    assert_eq!(
        error(&reset, |b| b.copy_within(entry(1)..entry(2), entry(2))),
        byte(56, 6, 7)
    );
    assert!(matches!(
        error(&reset, |b| b[entry(0)] = 63),
        DecodeError::Layout(LayoutError::Bit63 { .. })
    ));
    assert_eq!(error(&reset, |b| b[entry(0)] = 0), byte(56, 6, 7));

    // No layout has a mask of 0, or one without the bits of the initial MXCSR.
    assert_eq!(error(&reset, |b| b[52..56].fill(0)), byte(52, 0xbf, 0));
    assert_eq!(error(&reset, |b| b[53] = 0xe0), byte(53, 0xff, 0xe0));

    // Sound, but another layout.
    let read_by = |bytes: &[u8], reader: &Layout| match verdict(bytes, &Codec::new(reader)) {
        Err(DecodeError::OtherLayout { difference }) => difference,
        other => panic!("{other:?}"),
    };
    let bytes = wire::encode(&reset);
    assert_eq!(
        read_by(&bytes, &layout("ice-lake-server")),
        Difference::Unknown {
            component: ComponentId::XTILECFG
        }
    );
    let older = wire::encode(&ExtendedState::reset(&layout("ice-lake-server")));
    assert_eq!(
        read_by(&older, &amx),
        Difference::Missing {
            component: ComponentId::XTILECFG
        }
    );
    let amd = wire::encode(&ExtendedState::reset(&layout("amd-zen4-genoa")));
    assert_eq!(
        read_by(&amd, &layout("ice-lake-server")).to_string(),
        "opmask has (offset, size, aligned, XFD) (832, 64, false, false) there and \
         (1088, 64, false, false) for the reader"
    );
    assert_eq!(
        read_by(&bytes, &amx.clone().with_mxcsr_mask(0x2ffff)),
        Difference::MxcsrMask {
            encoded: 0xffff,
            reader: 0x2ffff
        }
    );
    let mut other = Dump::read(AMX);
    *other.leaf_mut(0x1d, 1) = [0x0200_1000, 0x0008_0040, 8, 0];
    assert_eq!(
        read_by(&bytes, &other.layout().unwrap()),
        Difference::Palettes {
            encoded: 1,
            reader: 1
        }
    );
    for (subleaf, register, value) in [(2, 2, 2), (18, 2, 2)] {
        let mut other = Dump::read(AMX);
        other.leaf_mut(0xd, subleaf)[register] = value;
        assert!(matches!(
            read_by(&bytes, &other.layout().unwrap()),
            Difference::Component { .. }
        ));
    }
    let codec = Codec::new(&layout("ice-lake-server"));
    let mut out = vec![1, 2, 3];
    assert!(matches!(
        codec.encode(&reset, &mut out),
        Err(EncodeError::Layout {
            difference: Difference::Unknown { .. }
        })
    ));
    assert_eq!(out, [1, 2, 3]);
}

/// Supervisor components are in no area, and so in no encoding.
#[test]
fn a_layout_with_supervisor_components_is_the_same_to_a_state() {
    let host = layout("sapphire-rapids");
    assert!(!host.supervisor().is_empty());
    let state = states::state(&area(&host, 0x602e7), &host, registers(0x602e7, 0, 0));
    let bytes = wire::encode(&state);
    assert_eq!(Codec::new(&host).decode_owned(&bytes).unwrap(), state);
    let alone = wire::decode(&bytes).unwrap();
    assert_eq!(alone.layout().supervisor(), XFeatures::empty());
    assert_eq!(alone.layout().user(), host.user());
    let codec = Codec::new(alone.layout());
    let mut again = Vec::new();
    codec.encode(&state, &mut again).unwrap();
    assert_eq!(again, bytes);
}

/// What an area had before does not shine through, and the encoding says nothing of bytes that mean
/// nothing.
#[test]
fn buffers_are_written_all_over() {
    for (name, state) in states::all() {
        let codec = Codec::new(state.layout());
        let bytes = wire::encode(&state);
        assert!(bytes.len() <= codec.max_bytes(), "{name}");
        let fresh = codec.decode_owned(&bytes).unwrap();
        let mut after_failure = Buffer::new();
        let mut cut = wire::encode(&states::full_tiles(&layout(AMX)));
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
        assert!(wire::encode(&dirty) == bytes, "{name}");
    }
}

#[test]
fn containers_take_ascending_vcpus_only() {
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let reset = ExtendedState::reset(&amx);
    let mut writer = Writer::new();
    let mut bytes = writer.push(5, &codec, &reset).unwrap().to_vec();
    for vcpu in [5, 4] {
        assert_eq!(
            writer.push(vcpu, &codec, &reset).unwrap_err(),
            WriteError::NotAscending { vcpu, previous: 5 }
        );
    }
    let other = ExtendedState::reset(&layout("ice-lake-server"));
    assert!(matches!(
        writer.push(6, &codec, &other),
        Err(WriteError::Encode { vcpu: 6, .. })
    ));
    // After a refusal the container goes on.
    bytes.extend_from_slice(writer.push(6, &codec, &reset).unwrap());
    bytes.extend_from_slice(writer.finish());
    assert_eq!(bytes, container(&[(5, reset.clone()), (6, reset.clone())]));

    // The next container begins anew.
    assert_eq!(writer.finish(), container(&[]));
    assert!(Container::open(&container(&[])).unwrap().index().is_empty());
    // A first vCPU that is refused leaves the header to the next.
    assert!(writer.push(0, &codec, &other).is_err());
    let mut bytes = writer.push(1, &codec, &reset).unwrap().to_vec();
    bytes.extend_from_slice(writer.finish());
    assert_eq!(bytes, container(&[(1, reset)]));
}

/// As from a file: the trailer, the index, and then one vCPU, of which alone the bytes are read.
#[test]
fn one_vcpu_is_read_without_the_others() {
    let amx = layout(AMX);
    let members: Vec<_> = (0..100)
        .map(|vcpu| match vcpu % 3 {
            0 => (vcpu * 2, states::idle(&amx)),
            1 => (vcpu * 2, states::two_tiles(&amx)),
            _ => (vcpu * 2, ExtendedState::reset(&amx)),
        })
        .collect();
    let file = container(&members);
    let total = file.len() as u64;
    let part = |range: std::ops::Range<u64>| &file[range.start as usize..range.end as usize];
    let tail = part(total - Trailer::BYTES as u64..total);
    let trailer = Trailer::parse(tail.try_into().unwrap(), total).unwrap();
    assert_eq!(trailer.count(), 100);
    let header = part(0..Index::HEADER_BYTES as u64).try_into().unwrap();
    let index = Index::parse(&trailer, header, part(trailer.index())).unwrap();
    let entry = index.find(62).unwrap();
    let state = wire::decode(part(entry.range.clone())).unwrap();
    assert_eq!(state.layout().user(), amx.user());
    assert_eq!(index.find(63), None);

    // All other vCPUs may be gone.
    let mut ruined = file.clone();
    ruined[16..entry.range.start as usize].fill(0xff);
    ruined[entry.range.end as usize..trailer.index().start as usize].fill(0xff);
    let ruined = Container::open(&ruined).unwrap();
    let (codec, mut buffer) = (Codec::new(&amx), Buffer::new());
    let decoded = ruined
        .member(62)
        .unwrap()
        .decode(&codec, &mut buffer)
        .unwrap();
    assert_eq!(decoded, members[31].1);
    assert!(ruined.member(62).unwrap().blob().is_ok());
    let bad = ruined.members().filter(|m| m.blob().is_err()).count();
    assert_eq!(bad, 99);
    assert!(ruined.member(1).is_none());
}

/// A whole state of another vCPU or time in the place of one is found too.
#[test]
fn states_that_were_exchanged_are_named() {
    let amx = layout(AMX);
    let [one, two] =
        [3, 7].map(|in_use| states::state(&area(&amx, in_use), &amx, registers(0x602e7, 0, 0)));
    let (one, two) = (wire::encode(&one), wire::encode(&two));
    assert_ne!(one.len(), two.len());
    let idle = states::idle(&amx);
    let mut other = area(&amx, 7);
    other[600] ^= 0xff;
    let other = states::state(&other, &amx, idle.registers());
    let mut bytes = container(&[(0, idle.clone()), (1, other)]);
    let len = wire::encode(&idle).len();
    bytes[16..].rotate_left(0);
    let (first, second) = bytes[16..16 + 2 * len].split_at_mut(len);
    first.swap_with_slice(second);
    let container = Container::open(&bytes).unwrap();
    let codec = Codec::new(&amx);
    for member in container.members() {
        assert!(wire::decode(member.as_bytes()).is_ok());
        assert!(matches!(
            member.decode(&codec, &mut Buffer::new()),
            Err(MemberError::Replaced { vcpu, .. }) if vcpu == member.vcpu()
        ));
    }
}

/// The error for a container after `change`, with a right checksum of its index.
fn container_error(change: impl FnOnce(&mut Vec<u8>)) -> ContainerError {
    let amx = layout(AMX);
    let reset = ExtendedState::reset(&amx);
    let mut bytes = container(&[(0, reset.clone()), (1, reset)]);
    change(&mut bytes);
    let trailer = bytes.len() - 32;
    let index = u64::from_le_bytes(bytes[trailer..trailer + 8].try_into().unwrap()) as usize;
    let covered = [
        &bytes[..16],
        bytes.get(index..trailer).unwrap_or_default(),
        &bytes[trailer..trailer + 20],
    ];
    let crc = oracle::crc32(&covered.concat());
    bytes[trailer + 20..trailer + 24].copy_from_slice(&crc.to_le_bytes());
    Container::open(&bytes).map(drop).unwrap_err()
}

#[test]
fn containers_that_are_made_up_have_their_names() {
    use ContainerError::*;
    let len = container(&[
        (0, ExtendedState::reset(&layout(AMX))),
        (1, ExtendedState::reset(&layout(AMX))),
    ])
    .len();
    let (index, trailer) = (len - 64, len - 32);
    assert!(matches!(container_error(|b| b[0] = b'X'), Magic { .. }));
    assert!(matches!(container_error(|b| b[len - 1] = 0), End { .. }));
    assert!(matches!(
        container_error(|b| b[10] = 1),
        UnknownFlags {
            flags: [1, 0, 0, 0, 0, 0]
        }
    ));
    assert!(matches!(
        container_error(|b| b[trailer + 8] ^= 1),
        Length { .. }
    ));
    assert!(matches!(
        container_error(|b| b[trailer] ^= 1),
        IndexPlace { .. }
    ));
    // More vCPUs than there is room for, and more than there may be.
    assert!(matches!(
        container_error(|b| b[trailer + 16] = 3),
        IndexPlace { count: 3, .. }
    ));
    assert!(matches!(
        container_error(|b| b[trailer + 16..trailer + 20].fill(0xff)),
        IndexPlace {
            count: u32::MAX,
            ..
        }
    ));
    // A gap before the first state, states that overlap, vCPUs twice.
    assert!(matches!(
        container_error(|b| b[index] = 17),
        EntryOrder { position: 0, .. }
    ));
    assert!(matches!(
        container_error(|b| b[index + 16] = 16),
        EntryOrder { position: 0, .. }
    ));
    assert!(matches!(
        container_error(|b| b[index + 16 + 7] = 0xff),
        EntryOrder {
            position: 0 | 1,
            ..
        }
    ));
    assert!(matches!(
        container_error(|b| b[index + 16 + 8] = 0),
        EntryOrder {
            position: 1,
            vcpu: 0,
            ..
        }
    ));
    // Bytes that no vCPU claims.
    assert!(matches!(
        container_error(|b| {
            b[trailer] += 32; // index_at
            b[trailer + 16] = 0;
        }),
        Unclaimed { bytes } if bytes == (index + 32 - 16) as u64
    ));
    assert!(matches!(
        Container::open(&[0; 47]),
        Err(TooShort {
            required_bytes: 48,
            actual_bytes: 47
        })
    ));

    // Trailer and index that do not belong together.
    let amx = layout(AMX);
    let bytes = container(&[(0, ExtendedState::reset(&amx))]);
    let trailer = Trailer::parse(bytes.last_chunk().unwrap(), bytes.len() as u64).unwrap();
    let index = &bytes[trailer.index().start as usize..][..16];
    let header = bytes.first_chunk().unwrap();
    assert!(Index::parse(&trailer, header, index).is_ok());
    assert!(matches!(
        Index::parse(&trailer, header, &index[1..]),
        Err(Checksum { .. })
    ));
}

/// 1,024 vCPUs with AMX idle, into buffers that were used once before.
#[test]
fn many_vcpus_are_encoded_and_decoded_without_allocating() {
    const VCPUS: u32 = 1024;
    let amx = layout(AMX);
    let codec = Codec::new(&amx);
    let idle = states::idle(&amx);
    let (mut writer, mut file, mut buffer) = (Writer::new(), Vec::new(), Buffer::new());
    let mut there_and_back = || {
        file.clear();
        for vcpu in 0..VCPUS {
            file.extend_from_slice(writer.push(vcpu, &codec, &idle).unwrap());
        }
        file.extend_from_slice(writer.finish());
        let container = Container::open(&file).unwrap();
        for member in container.members() {
            assert_eq!(member.decode(&codec, &mut buffer).unwrap(), idle);
        }
        file.len()
    };
    let first = allocation_counter::measure(|| {
        there_and_back();
    });
    // Growing the three buffers, not one allocation for each vCPU.
    assert!((1..100).contains(&first.count_total), "{first:?}");
    let again = allocation_counter::measure(|| {
        there_and_back();
    });
    assert_eq!(again.count_total, 0);
    assert_eq!(there_and_back(), 16 + 1024 * (884 + 16) + 32);
}

/// Whatever the bytes say, memory is asked for what one area needs.
#[test]
fn hostile_lengths_allocate_little() {
    let amx = layout(AMX);
    let bytes = wire::encode(&states::idle(&amx));
    for at in (12..64).chain([64 + 8, 64 + 12 * 8 + 4]) {
        for width in [1, 2, 4] {
            let mut changed = bytes.clone();
            changed[at..at + width].fill(0xff);
            let sealed = if at < 16 { changed } else { sealed(changed) };
            let allocated = allocation_counter::measure(|| {
                let _ = Blob::parse(&sealed);
                let _ = wire::decode(&sealed);
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
    fn there_and_back_is_the_identity(state in any_state(), used in any::<u8>()) {
        let codec = Codec::new(state.layout());
        let mut bytes = vec![used; 5];
        codec.encode(&state, &mut bytes).unwrap();
        let bytes = bytes.split_off(5);
        prop_assert!(bytes.len() <= codec.max_bytes() && bytes.len() <= MAX_STATE_BYTES);
        prop_assert_eq!(wire::encoded_bytes(&bytes), Ok(bytes.len()));
        let mut buffer = if used % 2 == 0 { Buffer::new() } else { used_up(&codec) };
        prop_assert_eq!(&codec.decode(&bytes, &mut buffer).unwrap(), &state);
        let alone = wire::decode(&bytes).unwrap();
        prop_assert!(wire::encode(&alone) == bytes);
        // The second reader, and the look inside.
        let decoded = oracle::decode(&bytes);
        let blob = Blob::parse(&bytes).unwrap();
        prop_assert_eq!(blob.registers(), state.registers());
        prop_assert_eq!(blob.mxcsr(), state.image().mxcsr());
        let inside: Vec<_> = blob.records().map(|r| (u16::from(r.id().number()), r.size())).collect();
        let second: Vec<_> = decoded.components.iter().map(|(n, _, c)| (*n, c.len())).collect();
        prop_assert_eq!(inside, second);
    }

    /// Anything can happen to bytes on their way to somebody who repairs the checksum: what is
    /// accepted then has exactly one encoding, and nothing panics.
    #[test]
    fn what_decodes_encodes_to_the_same_bytes(
        state in any_state(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = wire::encode(&state);
        for (at, value) in changes {
            let at = at.index(bytes.len().min(400));
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(16 + cut.index(bytes.len() - 16));
        }
        let bytes = if bytes.len() >= 20 { sealed(bytes) } else { bytes };
        let codec = Codec::new(state.layout());
        if let Ok(decoded) = codec.decode_owned(&bytes) {
            prop_assert!(wire::encode(&decoded) == bytes);
        }
        if let Ok(decoded) = wire::decode(&bytes) {
            prop_assert!(wire::encode(&decoded) == bytes);
            prop_assert!(Blob::parse(&bytes).is_ok());
        }
        let _ = Container::open(&bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = (wire::decode(&bytes), Blob::parse(&bytes), Container::open(&bytes));
        let mut sealed_bytes = wire::MAGIC.to_vec();
        sealed_bytes.extend_from_slice(&[1, 0, 0, 0]);
        sealed_bytes.extend_from_slice(&bytes);
        if sealed_bytes.len() >= 68 {
            let _ = wire::decode(&sealed(sealed_bytes));
        }
    }
}
