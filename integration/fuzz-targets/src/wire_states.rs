//! States one behind the other: their places are those that a second reader finds, and what is whole
//! is read as if it were alone.

use xsave_state::wire::{self, Blob, Buffer, Codec, Encoded};

use crate::input::Input;
use crate::wire_decode::{codecs, decode, splice};
use crate::{encoded, states};

/// The bytes are states, edited; otherwise they are the input.
const MADE: u8 = 1;
/// Each state then gets a right checksum.
const SEALED: u8 = 2;

/// Flags, the reader's layout, and then bytes; or states and edits where the flags say so.
pub fn wire_states(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let reader = input.pick(codecs());
    let bytes = if flags & MADE == 0 {
        input.rest().to_vec()
    } else {
        made(&mut input, flags & SEALED != 0)
    };
    let mut found = wire::states(&bytes);
    for (place, whole) in encoded::row(&bytes) {
        match found.next().unwrap() {
            Ok(state) => {
                assert!(whole);
                assert!(state.as_bytes() == &bytes[place]);
                one(&state, reader);
            }
            Err(error) => {
                assert!(!whole);
                assert_eq!(error.offset, place.start);
                assert!(error.to_string().contains(&place.start.to_string()));
            }
        }
    }
    assert!(found.next().is_none());
}

/// Up to seven states. Each is: the number of its vCPU (1 byte), a layout (1 byte), a state. Then edits:
/// kind (1 byte) and what `splice` takes.
fn made(input: &mut Input<'_>, sealed: bool) -> Vec<u8> {
    let (mut bytes, mut buffer) = (Vec::new(), Buffer::new());
    let mut starts = Vec::new();
    for _ in 0..input.u8() % 8 {
        let vcpu = u32::from(input.u8());
        let codec = input.pick(codecs());
        let Some(state) = states::any(input, codec.layout()) else {
            continue;
        };
        let start = bytes.len();
        codec.encode(vcpu, &state, &mut bytes).unwrap();
        // What was written is there, with nothing else.
        let found = wire::states(&bytes).last().unwrap().unwrap();
        assert_eq!(found.vcpu(), Some(vcpu));
        assert!(found.as_bytes() == &bytes[start..]);
        assert_eq!(found.decode(codec, &mut buffer).as_ref(), Ok(&state));
        starts.push(start);
    }
    assert_eq!(wire::states(&bytes).count(), starts.len());
    while !input.is_empty() && bytes.len() < 1 << 17 {
        let kind = input.u8();
        splice(input, &mut bytes, kind);
    }
    let ends = starts.iter().skip(1).copied().chain([bytes.len()]);
    for (start, end) in starts.iter().copied().zip(ends) {
        if sealed && let Some(state) = bytes.get_mut(start..end) {
            encoded::seal_checksum(state);
        }
    }
    bytes
}

/// It is read as if it were alone.
fn one(state: &Encoded<'_>, reader: &'static Codec) {
    let bytes = state.as_bytes();
    decode(bytes, reader);
    let [mut buffer, mut alone] = [Buffer::new(), Buffer::new()];
    let decoded = state.decode(reader, &mut buffer);
    assert_eq!(
        decoded.map_err(|error| error.error),
        reader.decode(bytes, &mut alone)
    );
    let blob = state.blob().map_err(|error| error.error);
    assert_eq!(
        blob.map(|blob| blob.vcpu()),
        Blob::parse(bytes).map(|blob| blob.vcpu())
    );
}
