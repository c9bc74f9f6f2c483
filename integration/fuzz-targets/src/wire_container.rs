//! Containers: the index is what a second reader reads, a damaged vCPU is named, the others decode.

use std::ops::Range;

use xsave_state::wire::{
    self, Buffer, Codec, Container, Index, Member, MemberError, Trailer, WriteError, Writer,
};
use xsave_state::{ExtendedState, Image};

use crate::input::Input;
use crate::wire_decode::{codecs, decode, same, splice};
use crate::{encoded, states};

/// The bytes are a container of states, edited; otherwise they are the input.
const MADE: u8 = 1;
/// Each state then gets a right checksum.
const SEALED_STATES: u8 = 2;
/// The index gets the checksums that the states have.
const SEALED_COPIES: u8 = 4;
/// The index gets a right checksum.
const SEALED_INDEX: u8 = 8;

/// One vCPU as it was written.
struct Written {
    vcpu: u32,
    codec: &'static Codec,
    state: ExtendedState<'static>,
    place: Range<usize>,
    bytes: Vec<u8>,
}

/// Flags, a reader's layout, and then bytes; or vCPUs and edits where the flags say so.
pub fn wire_container(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let reader = input.pick(codecs());
    let (mut bytes, written) = if flags & MADE == 0 {
        (input.rest().to_vec(), Vec::new())
    } else {
        let (mut bytes, written) = write(&mut input);
        read_back(&bytes, &written);
        let index_at = written.last().map_or(16, |last| last.place.end);
        edit(&mut input, &mut bytes, &written, index_at);
        seal(flags, &mut bytes, &written, index_at);
        (bytes, written)
    };
    if flags & SEALED_INDEX != 0 {
        encoded::seal_index(&mut bytes);
    }
    let container = match (Container::open(&bytes), encoded::index(&bytes)) {
        (Ok(container), Ok(index)) => {
            assert_eq!(entries(container.index()), index);
            container
        }
        (Err(error), Err(_)) => {
            assert!(!error.to_string().is_empty());
            return salvage(&bytes, &written);
        }
        (opened, second) => panic!("opened: {opened:?}; the second reader says {second:?}"),
    };
    in_pieces(&bytes, &container);
    for member in container.members() {
        let original = written.iter().find(|one| one.vcpu == member.vcpu());
        let codec = original.map_or(reader, |original| original.codec);
        let decoded = read(&member, member_checksum(&container, &member), codec);
        if let Some(original) = original.filter(|one| one.bytes == member.as_bytes()) {
            // Whatever happened to the others; its entry in the index may have been edited.
            match decoded {
                Ok(state) => assert_eq!(state, original.state),
                Err(error) => assert!(matches!(error, MemberError::Replaced { .. }), "{error}"),
            }
        }
    }
}

/// A container of up to seven vCPUs. Each is: how far its identifier is from the last (1 byte), a
/// layout (1 byte), whether its codec is one of the next layout (1 byte), a state.
fn write(input: &mut Input<'_>) -> (Vec<u8>, Vec<Written>) {
    let (mut writer, mut bytes) = (Writer::new(), Vec::new());
    let mut written: Vec<Written> = Vec::new();
    let mut vcpu = 0;
    for _ in 0..input.u8() % 8 {
        vcpu += u32::from(input.u8());
        let layout = usize::from(input.u8()) % codecs().len();
        let other = usize::from(input.u8() & 1);
        let codec = &codecs()[(layout + other) % codecs().len()];
        let layout = codecs()[layout].layout();
        let Some(state) = states::any(input, layout) else {
            continue;
        };
        let last = written.last().map(|last| last.vcpu);
        let same_layout = encoded::tables(layout) == encoded::tables(codec.layout());
        match writer.push(vcpu, codec, &state) {
            Ok(piece) => {
                assert!(last.is_none_or(|last| last < vcpu) && same_layout);
                // The codec's layout may have other supervisor components.
                let image = Image::parse(state.image().as_bytes(), codec.layout()).unwrap();
                let state = ExtendedState::new(image, state.registers()).unwrap();
                // The first piece has the container's header.
                let header = if written.is_empty() { 16 } else { 0 };
                let start = bytes.len() + header;
                bytes.extend_from_slice(piece);
                written.push(Written {
                    vcpu,
                    codec,
                    state: state.into_owned(),
                    place: start..bytes.len(),
                    bytes: piece[header..].to_vec(),
                });
            }
            Err(WriteError::NotAscending { previous, .. }) => {
                assert_eq!(last, Some(previous));
                assert!(previous >= vcpu);
            }
            Err(WriteError::Encode { .. }) => assert!(!same_layout),
            Err(error) => panic!("{error}"),
        }
    }
    bytes.extend_from_slice(writer.finish());
    (bytes, written)
}

/// What was written is all there, and nothing else.
fn read_back(bytes: &[u8], written: &[Written]) {
    let container = Container::open(bytes).unwrap();
    assert_eq!(container.index().len(), written.len());
    for (member, written) in container.members().zip(written) {
        assert_eq!(member.vcpu(), written.vcpu);
        assert_eq!(member.as_bytes(), written.bytes);
        let second = encoded::state(&written.bytes, written.codec.layout()).unwrap();
        same(&written.state, &second);
        let mut buffer = Buffer::new();
        let decoded = member.decode(written.codec, &mut buffer);
        assert_eq!(decoded.as_ref(), Ok(&written.state));
    }
}

/// Each edit is a kind (1 byte): of one vCPU's state, of index and trailer, or one that moves what
/// is behind it; then an offset (2 bytes), a number of bytes (1 byte), and those bytes.
fn edit(input: &mut Input<'_>, bytes: &mut Vec<u8>, written: &[Written], index_at: usize) {
    while !input.is_empty() && bytes.len() < 1 << 20 {
        let kind = input.u8();
        if kind >= 0xf0 {
            splice(input, bytes, kind);
            continue;
        }
        let place = match usize::from(kind) % (written.len() + 1) {
            0 => index_at..bytes.len(),
            vcpu => written[vcpu - 1].place.clone(),
        };
        let (offset, len) = (usize::from(input.u16()), usize::from(input.u8()));
        let new = input.bytes(len);
        let rest = bytes
            .get_mut(place)
            .and_then(|place| place.get_mut(offset..));
        for (byte, new) in rest.unwrap_or_default().iter_mut().zip(new) {
            *byte = *new;
        }
    }
}

/// Repairs the checksums that the flags name.
fn seal(flags: u8, bytes: &mut [u8], written: &[Written], index_at: usize) {
    for (position, Written { place, .. }) in written.iter().enumerate() {
        let Some(state) = bytes.get_mut(place.clone()) else {
            continue;
        };
        if flags & SEALED_STATES != 0 {
            encoded::seal_checksum(state);
        }
        let checksum: [u8; 4] = *state.last_chunk().unwrap();
        let copy_at = index_at + 16 * position + 12;
        if flags & SEALED_COPIES != 0
            && let Some(copy) = bytes.get_mut(copy_at..copy_at + 4)
        {
            copy.copy_from_slice(&checksum);
        }
    }
}

/// Without an index: a state that nobody touched says where it ends, and decodes.
fn salvage(bytes: &[u8], written: &[Written]) {
    for written in written {
        let rest = bytes.get(written.place.start..).unwrap_or_default();
        if rest.starts_with(&written.bytes) {
            assert_eq!(wire::encoded_bytes(rest), Ok(written.bytes.len()));
            let decoded = written.codec.decode_owned(&written.bytes);
            assert_eq!(decoded.as_ref(), Ok(&written.state));
        }
    }
}

fn entries(index: &Index<'_>) -> Vec<encoded::Member> {
    let entries = index.entries().map(|entry| encoded::Member {
        vcpu: entry.vcpu,
        range: entry.range.start as usize..entry.range.end as usize,
        checksum: entry.checksum,
    });
    entries.collect()
}

/// As from a file: the trailer, the index, one vCPU.
fn in_pieces(bytes: &[u8], container: &Container<'_>) {
    let (header, tail) = (bytes.first_chunk(), bytes.last_chunk());
    let trailer = Trailer::parse(tail.unwrap(), bytes.len() as u64).unwrap();
    let Range { start, end } = trailer.index();
    let index = &bytes[start as usize..end as usize];
    let index = Index::parse(&trailer, header.unwrap(), index).unwrap();
    assert_eq!(entries(&index), entries(container.index()));
    assert_eq!(index.len(), trailer.count() as usize);
    assert_eq!(index.is_empty(), trailer.count() == 0);
    for entry in index.entries() {
        assert_eq!(index.find(entry.vcpu).as_ref(), Some(&entry));
        let next = entry.vcpu.wrapping_add(1);
        let found = container.member(next).map(|member| member.vcpu());
        let listed = index.entries().find(|entry| entry.vcpu == next);
        assert_eq!(found, listed.map(|entry| entry.vcpu));
    }
}

fn member_checksum(container: &Container<'_>, member: &Member<'_>) -> u32 {
    container.index().find(member.vcpu()).unwrap().checksum
}

/// The verdict on a member is that on its bytes, once its checksum is the one of the index; and
/// whatever is wrong names the vCPU.
fn read(
    member: &Member<'_>,
    expected: u32,
    codec: &'static Codec,
) -> Result<ExtendedState<'static>, MemberError> {
    let bytes = member.as_bytes();
    decode(bytes, codec);
    let mut buffer = Buffer::new();
    let decoded = member.decode(codec, &mut buffer);
    let blob = member.blob();
    let errors = [decoded.as_ref().err(), blob.as_ref().err()];
    for error in errors.into_iter().flatten() {
        let named = match error {
            MemberError::Replaced { vcpu, .. } | MemberError::Decode { vcpu, .. } => *vcpu,
            error => panic!("{error}"),
        };
        assert_eq!(named, member.vcpu());
        assert!(error.to_string().contains(&format!("vCPU {named}")));
    }
    let stored = bytes
        .last_chunk()
        .map_or(0, |last| u32::from_le_bytes(*last));
    if stored == expected {
        let alone = codec.decode_owned(bytes);
        assert_eq!(decoded.as_ref().ok(), alone.as_ref().ok());
        assert_eq!(blob.is_ok(), wire::Blob::parse(bytes).is_ok());
    } else {
        let replaced = Err(MemberError::Replaced {
            vcpu: member.vcpu(),
            expected,
            stored,
        });
        assert_eq!(decoded, replaced);
        assert_eq!(blob.map(drop), replaced.as_ref().map(drop).map_err(|&e| e));
    }
    decoded.map(ExtendedState::into_owned)
}
