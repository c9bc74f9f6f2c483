//! States in serde's formats, and states from a fuzzer's bytes.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;
#[path = "common/states.rs"]
mod states;

use arbitrary::{Arbitrary, Unstructured};
use xsave_state::{ExtendedState, Image, wire};

/// Each state there and back, as text and as bytes. What is read has the same encoding.
#[test]
fn serde_there_and_back() {
    for (name, state) in states::all() {
        let encoded = wire::encode(0, &state);
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json.len(), 2 + 2 * encoded.len(), "{name}");
        let back: ExtendedState<'static> = serde_json::from_str(&json).unwrap();
        assert!(wire::encode(0, &back) == encoded, "{name}");
        let bitcode = bitcode::serialize(&state).unwrap();
        assert!(bitcode.len() <= encoded.len() + 8, "{name}");
        let back: ExtendedState<'static> = bitcode::deserialize(&bitcode).unwrap();
        assert!(wire::encode(0, &back) == encoded, "{name}");
    }
}

/// Nothing is padded, cut off or repaired.
#[test]
fn serde_validates() {
    let read = |json: &str| serde_json::from_str::<ExtendedState<'static>>(json);
    let json = serde_json::to_string(&states::idle(&common::layout(states::AMX))).unwrap();
    assert!(read(&json).is_ok());
    let refused = |json: String| read(&json).unwrap_err().to_string();
    let bad_digit = refused(json.replacen("89", "8A", 1));
    assert!(
        bad_digit.contains("no such digit at byte 1,"),
        "{bad_digit}"
    );
    assert!(bad_digit.len() < 200, "{bad_digit}");
    assert!(refused(format!("{}0\"", &json[..json.len() - 1])).contains("hexadecimal digits"));
    assert!(refused(format!("{}00\"", &json[..json.len() - 1])).contains("there are 889"));
    assert!(refused(format!("{}\"", &json[..json.len() - 3])).contains("there are 887"));
    assert!(refused("\"\"".into()).contains("there are 0 bytes"));
    assert!(refused(format!("\"{}\"", "0".repeat(200_000))).contains("invalid length"));
    assert!(refused("7".into()).contains("an encoded extended state"));
    let numbers: Vec<u8> = wire::encode(0, &states::idle(&common::layout(states::AMX)));
    assert!(read(&serde_json::to_string(&numbers).unwrap()).is_err());
    for digit in (1..json.len() - 1).step_by(37) {
        let other = if &json[digit..=digit] == "0" {
            "1"
        } else {
            "0"
        };
        refused(format!("{}{other}{}", &json[..digit], &json[digit + 1..]));
    }
}

/// Each is a state that parsing accepts, and all that a state can have occurs.
#[test]
fn arbitrary_states_are_valid() {
    let mut seen = [0usize; 6];
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..2000 {
        let bytes: Vec<u8> = (0..round * 8)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let Ok(state) = ExtendedState::arbitrary(&mut Unstructured::new(&bytes)) else {
            continue;
        };
        let image = Image::parse(state.image().as_bytes(), state.layout()).unwrap();
        assert_eq!(ExtendedState::new(image, state.registers()).unwrap(), state);
        let encoded = wire::encode(0, &state);
        assert_eq!(wire::decode(&encoded).unwrap(), state);
        let amx = state.image().xstate_bv().bits() >> 17;
        for (count, there) in seen.iter_mut().zip([
            true,
            amx & 1 != 0,
            amx & 2 != 0,
            state.image().tile_config().is_some(),
            !state.registers().xfd.is_empty(),
            state.registers().xcr0.bits() == 0x602e7,
        ]) {
            *count += usize::from(there);
        }
    }
    assert!(seen.iter().all(|&count| count > 20), "{seen:?}");
    assert!(seen[0] > 1500, "{seen:?}");
}
