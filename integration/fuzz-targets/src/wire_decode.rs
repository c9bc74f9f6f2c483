//! Encoded states: the verdict is that of a second reader, and what decodes is what encoding the
//! result gives.

use std::sync::OnceLock;

use xsave_state::wire::{self, Blob, Buffer, Codec, DecodeError, DecodeErrorKind};
use xsave_state::{ExtendedState, Image, Registers};

use crate::input::Input;
use crate::{area, encoded, layouts, states};

/// The bytes begin as the encoding of a state; otherwise they are the input.
const MADE: u8 = 1;
/// The state has another layout than the reader.
const OTHER: u8 = 2;
/// At last they get their length and a right checksum.
const SEALED: u8 = 4;

/// Flags, the reader's layout, and then bytes; or the layout of a state where the flags say so, a
/// state, the number of its vCPU (4 bytes), and edits of its encoding: kind (1 byte) and what `splice` takes.
pub fn wire_decode(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let codec = input.pick(codecs());
    let mut bytes = if flags & MADE == 0 {
        input.rest().to_vec()
    } else {
        let source = match flags & OTHER {
            0 => codec.layout(),
            _ => layouts::pick(&mut input),
        };
        let Some(state) = states::any(&mut input, source) else {
            return;
        };
        let vcpu = input.u32();
        let mut bytes = wire::encode(vcpu, &state);
        same(&state, &encoded::state(&bytes, source).unwrap());
        while !input.is_empty() && bytes.len() < 1 << 17 {
            let kind = input.u8();
            splice(&mut input, &mut bytes, kind);
        }
        bytes
    };
    if flags & SEALED != 0 {
        encoded::seal_state(&mut bytes);
    }
    decode(&bytes, codec);
}

/// One of each layout, in the order of [`layouts::layouts`].
pub(crate) fn codecs() -> &'static [Codec] {
    static CODECS: OnceLock<Vec<Codec>> = OnceLock::new();
    CODECS.get_or_init(|| layouts::layouts().iter().map(Codec::new).collect())
}

/// For each of them a buffer that had bytes in every place. The same for every input: what fails once
/// fails again.
fn used(codec: &Codec) -> Buffer {
    static USED: OnceLock<Vec<Buffer>> = OnceLock::new();
    let all = USED.get_or_init(|| codecs().iter().map(use_up).collect());
    let same = codecs().iter().position(|one| std::ptr::eq(one, codec));
    all[same.unwrap()].clone()
}

fn use_up(codec: &Codec) -> Buffer {
    let layout = codec.layout();
    let mut full = vec![area::FULL];
    full.extend_from_slice(&layout.user().bits().to_le_bytes());
    let area = area::standard(&mut Input::new(&full), layout);
    let state = states::sanitized(&area, layout, Registers::RESET).unwrap();
    let mut bytes = Vec::new();
    codec.encode(0, &state, &mut bytes).unwrap();
    let mut buffer = Buffer::new();
    codec.decode(&bytes, &mut buffer).unwrap();
    buffer
}

/// What a reader, with a codec or without, says of `bytes`.
pub(crate) fn decode(bytes: &[u8], codec: &'static Codec) {
    let second = encoded::state(bytes, codec.layout());
    // What the buffer had before must not matter.
    let mut buffer = used(codec);
    let decoded = codec.decode(bytes, &mut buffer);
    let mut new = Buffer::new();
    assert_eq!(codec.decode(bytes, &mut new), decoded);
    let alone = wire::decode(bytes);
    let blob = Blob::parse(bytes);
    match (&decoded, &second) {
        (Ok(state), Ok(second)) => {
            same(state, second);
            assert!(state.image().as_bytes() == second.area);
            // Version 1 is not written any more.
            if let Some(vcpu) = second.vcpu {
                let mut again = Vec::new();
                codec.encode(vcpu, state, &mut again).unwrap();
                assert!(again == bytes);
            }
            assert!(alone.is_ok());
        }
        (Err(error), Err(_)) => {
            assert!(!error.to_string().is_empty());
            if error.kind() != DecodeErrorKind::OtherLayout {
                assert_eq!(alone.as_ref().err(), Some(error));
            }
        }
        _ => panic!("decoded: {decoded:?}; the second reader says {second:?}"),
    }
    // With the layout that the bytes carry, which no reader here need have.
    match &alone {
        Ok(state) => {
            let second = encoded::state(bytes, state.layout()).unwrap();
            same(state, &second);
            let again = wire::encode(second.vcpu.unwrap_or(0), state);
            assert!(second.vcpu.is_none() || again == bytes);
            assert_eq!(wire::decode(&again).as_ref(), Ok(state));
            assert_eq!(wire::stated_bytes(bytes), Ok(bytes.len()));
            let blob = blob.as_ref().unwrap();
            assert_eq!(blob.vcpu(), second.vcpu);
            assert_eq!(blob.registers(), state.registers());
            assert_eq!(blob.layout(), state.layout());
            assert!(blob.area() == second.area);
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let of_the_state = matches!(error, DecodeError::Image(_) | DecodeError::State(_));
            assert_eq!(blob.is_ok(), of_the_state, "{error}");
            assert!(blob.is_ok() || blob.err().as_ref() == Some(error));
        }
    }
}

/// The state is what the second reader read. Areas may differ in bytes that mean nothing.
pub(crate) fn same(state: &ExtendedState<'_>, second: &encoded::State) {
    let registers = state.registers();
    let registers = [registers.xcr0, registers.xfd, registers.xfd_err].map(|bits| bits.bits());
    assert_eq!(registers, second.registers);
    let image = Image::parse(&second.area, state.layout()).unwrap();
    assert_eq!(&image, state.image());
}

/// An edit: an offset (2 bytes), a number of bytes (1 byte) and, where it does not remove, those
/// bytes. By its kind it overwrites, inserts or removes.
pub(crate) fn splice(input: &mut Input<'_>, bytes: &mut Vec<u8>, kind: u8) {
    let at = usize::from(input.u16()).min(bytes.len());
    let len = usize::from(input.u8());
    let end = (at + len).min(bytes.len());
    match kind % 3 {
        0 => {
            let new = input.bytes(end - at);
            bytes[at..at + new.len()].copy_from_slice(new);
        }
        1 => drop(bytes.splice(at..at, input.bytes(len).iter().copied())),
        _ => drop(bytes.drain(at..end)),
    }
}
