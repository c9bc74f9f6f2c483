//! Files of format version 1, which decode forever, and encode to the same bytes.
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

use xsave_state::wire::{self, Blob, Buffer, Codec, Container, Writer};
use xsave_state::{ComponentId, ExtendedState, Image, Registers};

macro_rules! golden {
    ($($name:literal)*) => {
        /// Compiled in: the tests also run where the sources are not, as in the AMX lab.
        const GOLDEN: &[(&str, &[u8])] =
            &[$(($name, include_bytes!(concat!("fixtures/wire/", $name, ".xstate")))),*];
    };
}
golden! {
    "reset" "idle" "avx512" "full-tiles" "tile-3x5" "armed-lab" "live-tiles-lab" "mid-nm"
    "amd-zen4" "mpx"
}
const CONTAINER: &[u8] = include_bytes!("fixtures/wire/vcpus.xvcpus");

/// If this fails, the format has changed: files that others have kept would not decode. What has to
/// change is version 2, with a reader that keeps version 1. The files are not to be written anew.
#[test]
fn golden_files_decode_and_encode_to_the_same_bytes() {
    let states = states::all();
    assert_eq!(GOLDEN.len(), states.len());
    for ((name, golden), (of, state)) in GOLDEN.iter().zip(&states) {
        assert_eq!(name, of);
        let codec = Codec::new(state.layout());
        assert_eq!(&codec.decode_owned(golden).unwrap(), state, "{name}");
        assert!(wire::encode(state) == *golden, "{name}: encoded otherwise");
        let alone = wire::decode(golden).unwrap();
        assert_eq!(with_layout_of(&alone, state), *state, "{name}");
        assert!(wire::encode(&alone) == *golden, "{name}: alone");
    }
}

/// The documentation alone is enough to read the files.
#[test]
fn golden_files_are_what_the_documentation_says() {
    for ((name, golden), (_, state)) in GOLDEN.iter().zip(states::all()) {
        let decoded = oracle::decode(golden);
        let Registers { xcr0, xfd, xfd_err } = state.registers();
        assert_eq!(
            (decoded.xcr0, decoded.xfd, decoded.xfd_err),
            (xcr0.bits(), xfd.bits(), xfd_err.bits()),
            "{name}"
        );
        assert_eq!(decoded.xstate_bv, state.image().xstate_bv().bits());
        assert_eq!(decoded.mxcsr, state.image().mxcsr());
        for (number, offset, content) in decoded.components {
            let id = ComponentId::new(number as u8).unwrap();
            let place = state.layout().component(id).unwrap();
            assert_eq!(place.offset(), Some(offset), "{name}: {id}");
            let mut expected = state.image().component(id).unwrap().to_vec();
            if id == ComponentId::X87 {
                expected[24..32].fill(0);
            }
            assert_eq!(content, expected, "{name}: {id}");
        }
    }
}

#[test]
fn what_is_in_the_files() {
    let blob = |name| {
        let (_, bytes) = GOLDEN.iter().find(|(of, _)| *of == name).unwrap();
        Blob::parse(bytes).unwrap()
    };
    let records = |name| -> Vec<String> {
        let text = |record: wire::Record<'_>| {
            format!(
                "{} {}/{}",
                record.id(),
                record.stored_lines(),
                record.lines()
            )
        };
        blob(name).records().map(text).collect()
    };
    assert_eq!(records("reset"), [""; 0]);
    assert_eq!(records("idle"), ["x87 3/3", "SSE 4/4", "AVX 4/4"]);
    assert_eq!(
        records("tile-3x5"),
        ["x87 3/3", "XTILECFG 1/1", "XTILEDATA 3/128"]
    );
    // TMM0 and TMM7 have content.
    let lab = blob("live-tiles-lab");
    let tiles = lab.records().last().unwrap();
    assert_eq!((tiles.id(), tiles.size()), (ComponentId::XTILEDATA, 8192));
    let stored: Vec<usize> = (0..128).filter(|&line| tiles.is_stored(line)).collect();
    assert_eq!(stored, (0..16).chain(112..128).collect::<Vec<_>>());
    assert_eq!(tiles.stored().len(), 2048);
    assert_eq!(lab.mxcsr(), 0x1f80);
    let nm = blob("mid-nm").registers();
    assert_eq!((nm.xfd.bits(), nm.xfd_err.bits()), (0x40000, 0x40000));
    assert_eq!(blob("amd-zen4").layout().mxcsr_mask(), 0x2ffff);
    assert_eq!(blob("mpx").layout().user().bits(), 0x1f);
}

#[test]
fn sizes_stay_within_their_goals() {
    let amx = common::layout(states::AMX);
    let bytes = |state| wire::encode(&state).len();
    assert!(bytes(states::idle(&amx)) <= 900);
    assert!(bytes(states::two_tiles(&amx)) <= 3300);
    for (name, golden) in GOLDEN {
        println!("{name}: {} bytes", golden.len());
    }
}

#[test]
fn the_golden_container() {
    let states = states::all();
    let mut writer = Writer::new();
    let mut written = Vec::new();
    for (vcpu, (_, state)) in (0..).zip(&states) {
        let codec = Codec::new(state.layout());
        written.extend_from_slice(writer.push(3 * vcpu, &codec, state).unwrap());
    }
    written.extend_from_slice(writer.finish());
    assert!(written == CONTAINER, "encoded otherwise");

    let container = Container::open(CONTAINER).unwrap();
    assert_eq!(container.index().len(), GOLDEN.len());
    for ((member, (name, golden)), (_, state)) in container.members().zip(GOLDEN).zip(&states) {
        assert!(member.as_bytes() == *golden, "{name}");
        let codec = Codec::new(state.layout());
        let mut buffer = Buffer::new();
        assert_eq!(
            &member.decode(&codec, &mut buffer).unwrap(),
            state,
            "{name}"
        );
    }
}

/// The same state with the other's layout, which may have supervisor components.
fn with_layout_of(state: &ExtendedState<'_>, other: &ExtendedState<'_>) -> ExtendedState<'static> {
    let image = Image::parse(state.image().as_bytes(), other.layout()).unwrap();
    ExtendedState::new(image, state.registers())
        .unwrap()
        .into_owned()
}
