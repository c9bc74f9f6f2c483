//! Files of both format versions, which decode forever. Those of version 2 encode to the same bytes.
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

use oracle::Decoded;
use xsave_state::wire::{self, Blob, Buffer, Codec};
use xsave_state::{ComponentId, ExtendedState, Registers};

macro_rules! golden {
    ($($name:literal)*) => {
        /// Name, version 1, version 2. Compiled in: the tests also run where the sources are not, as in
        /// the AMX lab.
        const GOLDEN: &[(&str, &[u8], &[u8])] = &[$((
            $name,
            include_bytes!(concat!("fixtures/wire/v1/", $name, ".xstate")),
            include_bytes!(concat!("fixtures/wire/v2/", $name, ".xstate")),
        )),*];
    };
}
golden! {
    "reset" "idle" "avx512" "full-tiles" "tile-3x5" "armed-lab" "live-tiles-lab" "mid-nm"
    "amd-zen4" "mpx"
}

/// If this fails, the format has changed: files that others have kept would not decode. What has to
/// change is version 3, with a reader that keeps both others. The files are not to be written anew.
#[test]
fn golden_files_decode_and_encode_to_the_same_bytes() {
    let states = states::all();
    assert_eq!(GOLDEN.len(), states.len());
    for (vcpu, ((name, v1, v2), (of, state))) in (0..).zip(GOLDEN.iter().zip(&states)) {
        assert_eq!(name, of);
        let (codec, mut buffer) = (Codec::new(state.layout()), Buffer::new());
        for golden in [v1, v2] {
            assert_eq!(&codec.decode(golden, &mut buffer).unwrap(), state, "{name}");
            let alone = wire::decode(golden).unwrap();
            assert_eq!(alone, *state, "{name}");
            assert!(wire::encode(vcpu, &alone) == *v2, "{name}: alone");
        }
        assert!(
            wire::encode(vcpu, state) == *v2,
            "{name}: encoded otherwise"
        );
        assert_eq!(Blob::parse(v1).unwrap().vcpu(), None);
        assert_eq!(Blob::parse(v2).unwrap().vcpu(), Some(vcpu));
    }
}

/// Version 2 is version 1 with the number of the vCPU: the documentation's words, byte by byte.
#[test]
fn version_2_is_version_1_with_a_number() {
    for (vcpu, (name, v1, v2)) in (0u32..).zip(GOLDEN) {
        let mut expected = v1.to_vec();
        expected[8] = 2;
        expected.splice(16..16, vcpu.to_le_bytes());
        assert!(oracle::sealed(expected) == *v2, "{name}");
    }
}

/// The documentation alone is enough to read the files.
#[test]
fn golden_files_are_what_the_documentation_says() {
    for (vcpu, ((name, v1, v2), (_, state))) in (0..).zip(GOLDEN.iter().zip(states::all())) {
        says(name, &oracle::decode(v1), None, &state);
        says(name, &oracle::decode(v2), Some(vcpu), &state);
    }
}

fn says(name: &str, decoded: &Decoded, vcpu: Option<u32>, state: &ExtendedState<'_>) {
    let Registers {
        xcr0, xfd, xfd_err, ..
    } = state.registers();
    assert_eq!(decoded.vcpu, vcpu, "{name}");
    assert_eq!(
        (decoded.xcr0, decoded.xfd, decoded.xfd_err),
        (xcr0.bits(), xfd.bits(), xfd_err.bits()),
        "{name}"
    );
    assert_eq!(decoded.xstate_bv, state.image().xstate_bv().bits());
    assert_eq!(decoded.mxcsr, state.image().mxcsr());
    for (number, offset, content) in &decoded.components {
        let id = ComponentId::new(*number as u8).unwrap();
        let place = state.layout().component(id).unwrap();
        assert_eq!(place.offset(), Some(*offset), "{name}: {id}");
        let mut expected = state.image().component(id).unwrap().to_vec();
        if id == ComponentId::X87 {
            expected[24..32].fill(0);
        }
        assert_eq!(*content, expected, "{name}: {id}");
    }
}

/// Only lines that are not zero are stored: each of 64 bytes costs as much.
#[test]
fn what_is_in_the_files() {
    let bytes = |name| GOLDEN.iter().find(|(of, ..)| *of == name).unwrap().2;
    let lines = |name| {
        let records = oracle::decode(bytes(name)).records;
        let end = bytes(name).len() - 4;
        let ends = records.iter().skip(1).copied().chain([end]);
        let sizes = records.iter().zip(ends).map(|(start, end)| end - start);
        sizes.collect::<Vec<_>>()
    };
    assert_eq!(lines("reset"), [0; 0]);
    // x87's 160 bytes, SSE's 256, AVX's 256, each with a header and a word of bitmap
    assert_eq!(lines("idle"), [176, 272, 272]);
    // TILECFG is one line; of 128 lines of tiles there are 3, and 2 words of bitmap
    assert_eq!(lines("tile-3x5"), [176, 80, 24 + 3 * 64]);
    // TMM0 and TMM7 have content.
    assert_eq!(lines("live-tiles-lab").last(), Some(&(24 + 2048)));
    let blob = |name| Blob::parse(bytes(name)).unwrap();
    let nm = blob("mid-nm").registers();
    assert_eq!((nm.xfd.bits(), nm.xfd_err.bits()), (0x40000, 0x40000));
    assert_eq!(blob("amd-zen4").layout().mxcsr_mask(), 0x2ffff);
    assert_eq!(blob("mpx").layout().user().bits(), 0x1f);
}

#[test]
fn sizes_stay_within_their_goals() {
    let amx = common::layout(states::AMX);
    let bytes = |state| wire::encode(0, &state).len();
    assert!(bytes(states::idle(&amx)) <= 900);
    assert!(bytes(states::two_tiles(&amx)) <= 3300);
    for (name, _, golden) in GOLDEN {
        println!("{name}: {} bytes", golden.len());
    }
}

/// A file of both versions: the states one behind the other.
#[test]
fn golden_files_in_a_row() {
    let files = || GOLDEN.iter().flat_map(|(_, v1, v2)| [*v1, *v2]);
    let row: Vec<u8> = files().flatten().copied().collect();
    let mut numbers = (0..).flat_map(|vcpu| [None, Some(vcpu)]);
    let mut buffer = Buffer::new();
    let mut states = wire::states(&row);
    for file in files() {
        let encoded = states.next().unwrap().unwrap();
        let state = wire::decode(file).unwrap();
        let codec = Codec::new(state.layout());
        assert_eq!(encoded.decode(&codec, &mut buffer).unwrap(), state);
        assert_eq!(encoded.vcpu(), numbers.next().unwrap());
    }
    assert!(states.next().is_none());
}
