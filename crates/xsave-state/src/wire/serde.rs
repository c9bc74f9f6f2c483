//! States in serde's formats: their encoding as bytes, in hexadecimal where the format is text.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Unexpected, Visitor};
use serde::ser::{Serialize, Serializer};

use super::MAX_STATE_BYTES;
use crate::state::ExtendedState;

/// Serializes what [`wire::encode`](super::encode) gives for vCPU 0: bytes, or a string of lower-case
/// hexadecimal digits where the format is human-readable.
impl Serialize for ExtendedState<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = super::encode(0, self);
        if !serializer.is_human_readable() {
            return serializer.serialize_bytes(&bytes);
        }
        let mut text = String::with_capacity(bytes.len().saturating_mul(2));
        for byte in bytes {
            for digit in [byte >> 4, byte & 15] {
                text.extend(char::from_digit(digit.into(), 16));
            }
        }
        serializer.serialize_str(&text)
    }
}

/// Deserializes with all checks of [`wire::decode`](super::decode). The vCPU's number is ignored; nothing
/// is padded or cut off.
impl<'de> Deserialize<'de> for ExtendedState<'static> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(StateVisitor)
        } else {
            deserializer.deserialize_bytes(StateVisitor)
        }
    }
}

struct StateVisitor;

impl<'de> Visitor<'de> for StateVisitor {
    type Value = ExtendedState<'static>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an encoded extended state, as bytes or as a string of hexadecimal digits")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        super::decode(bytes).map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        if text.len() > 2 * MAX_STATE_BYTES {
            return Err(E::invalid_length(text.len(), &self));
        }
        let (pairs, odd) = text.as_bytes().as_chunks();
        if !odd.is_empty() {
            return Err(E::invalid_length(text.len(), &self));
        }
        let bytes: Result<Vec<u8>, usize> = (0usize..)
            .step_by(2)
            .zip(pairs)
            .map(|(at, &[high, low])| {
                let high = digit(high).ok_or(at)?;
                let low = digit(low).ok_or(at.saturating_add(1))?;
                Ok(high << 4 | low)
            })
            .collect();
        match bytes {
            Ok(bytes) => self.visit_bytes(&bytes),
            // The text is untrusted, and can be long: it has no place in an error.
            Err(offset) => Err(E::invalid_value(
                Unexpected::Other(&format!("no such digit at byte {offset}")),
                &self,
            )),
        }
    }

    /// For formats that have no bytes.
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = sequence.next_element()? {
            if bytes.len() >= MAX_STATE_BYTES {
                return Err(de::Error::invalid_length(bytes.len(), &self));
            }
            bytes.push(byte);
        }
        self.visit_bytes(&bytes)
    }
}

/// Lower-case only: one state has one encoding.
fn digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => digit.checked_sub(b'0'),
        b'a'..=b'f' => digit.checked_sub(b'a' - 10),
        _ => None,
    }
}
