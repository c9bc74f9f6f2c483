//! The states of several vCPUs, one behind the other in the same bytes.

use alloc::format;
use alloc::string::String;

use thiserror::Error;

use super::MAGIC;
use super::blob::Blob;
use super::buffer::Buffer;
use super::codec::Codec;
use super::error::DecodeError;
use super::frame::{self, Frame, stated_bytes};
use super::template::TOTAL_BYTES;
use crate::bytes;
use crate::state::ExtendedState;

/// For each byte so far, and for the first state, this many may be read in vain.
const PATIENCE: usize = 16;

/// Iterates over the encoded states that lie one behind the other in `bytes`.
///
/// What is no state, or no whole one, is an [`Unreadable`] that names its place; the states behind it
/// still come. They go on at the end that it states, if that can be believed, and otherwise at the next
/// [`MAGIC`]. The time is linear in the number of bytes, whatever they are.
///
/// Bytes can look like a state within a damaged one: a guest can put a whole state of its own making
/// into its registers. It is only a valid state, of a vCPU number that the guest has chosen. So a
/// reader compares the numbers with those that it expects, in order, and takes none twice:
///
/// ```
/// use xsave_state::wire::{self, Buffer, Codec};
/// # use xsave_state::{ExtendedState, Layout};
/// # let layout = Layout::legacy();
/// # let state = ExtendedState::reset(&layout);
/// # let file = [wire::encode(0, &state), wire::encode(1, &state)].concat();
/// # let restore = |_: ExtendedState<'_>| {};
///
/// let codec = Codec::new(&layout); // of the guest
/// let mut buffer = Buffer::new();
/// let mut expected = 0..2;
/// for encoded in wire::states(&file) {
///     let encoded = encoded?;
///     assert_eq!(encoded.vcpu(), expected.next());
///     restore(encoded.decode(&codec, &mut buffer)?);
/// }
/// assert!(expected.is_empty());
/// # Ok::<(), wire::Unreadable>(())
/// ```
#[must_use]
pub const fn states(bytes: &[u8]) -> States<'_> {
    States {
        bytes,
        at: 0,
        in_vain: 0,
    }
}

/// The iterator that [`states`] returns.
#[derive(Clone, Debug)]
pub struct States<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Bytes of wrong checksums of states whose end could not be believed.
    in_vain: usize,
}

impl<'a> Iterator for States<'a> {
    type Item = Result<Encoded<'a>, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.at;
        let rest = self.bytes.get(offset..).filter(|rest| !rest.is_empty())?;
        let (length, checked) = self.check(rest);
        self.at = offset.saturating_add(length);
        let vcpu = frame::vcpu(rest).filter(|_| rest.starts_with(&MAGIC));
        Some(match checked {
            Ok(frame) => Ok(Encoded {
                bytes: bytes::prefix(rest, length),
                frame,
                offset,
            }),
            Err(error) => Err(Unreadable {
                offset,
                vcpu,
                error,
            }),
        })
    }
}

impl<'a> States<'a> {
    /// Checks the state that `rest` begins with, and returns how far the next one is.
    fn check(&mut self, rest: &'a [u8]) -> (usize, Result<Frame<'a>, DecodeError>) {
        let total = match stated_bytes(rest) {
            Ok(total) => total,
            Err(error) => return (to_next(rest), Err(error)),
        };
        let length = |actual_bytes| DecodeError::Length {
            stated_bytes: bytes::u32_at(rest, TOTAL_BYTES),
            actual_bytes,
        };
        let Some((state, behind)) = rest.split_at_checked(total) else {
            return (to_next(rest), Err(length(rest.len())));
        };
        let is_followed = behind.is_empty() || behind.starts_with(&MAGIC);
        let first = super::MAX_STATE_BYTES;
        let patience = self.at.saturating_add(first).saturating_mul(PATIENCE);
        let is_patient = self.in_vain <= patience;
        if !is_followed && !is_patient {
            let next = to_next(rest);
            return (next, Err(length(next)));
        }
        let checked = Frame::check(state);
        let Err(DecodeError::Checksum { .. }) = checked else {
            return (total, checked);
        };
        let next = to_next(rest);
        if is_followed && !(is_patient && leads_to(rest, next, total)) {
            return (total, checked);
        }
        self.in_vain = self.in_vain.saturating_add(total);
        (next, checked)
    }
}

/// Returns true when states that lie one behind the other from `at` on end at `end`: then a state that
/// states this end too is wrong about it.
fn leads_to(rest: &[u8], mut at: usize, end: usize) -> bool {
    let first = at;
    while at < end {
        let Ok(total) = stated_bytes(rest.get(at..).unwrap_or_default()) else {
            return false;
        };
        at = at.saturating_add(total);
    }
    at == end && first < end
}

/// Returns how far the next place is where a state can begin, or the end.
fn to_next(rest: &[u8]) -> usize {
    let mut at = 1;
    while let Some(behind) = rest.get(at..) {
        if behind.starts_with(&MAGIC) {
            return at;
        }
        let [first, ..] = MAGIC;
        let Some(next) = behind.iter().skip(1).position(|&byte| byte == first) else {
            break;
        };
        at = at.saturating_add(next).saturating_add(1);
    }
    rest.len()
}

/// One of several encoded states. Its checksum is right; no more of it has been read.
#[derive(Clone, Copy)]
pub struct Encoded<'a> {
    bytes: &'a [u8],
    frame: Frame<'a>,
    offset: usize,
}

impl<'a> Encoded<'a> {
    /// Returns its bytes, for example to keep them elsewhere.
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the number of its vCPU, or `None` for a state of version 1.
    #[must_use]
    pub fn vcpu(&self) -> Option<u32> {
        self.frame.vcpu()
    }

    /// Decodes it, as [`Codec::decode`] does.
    ///
    /// # Errors
    ///
    /// It is not of the codec's layout, or not valid.
    pub fn decode<'b>(
        &self,
        codec: &Codec,
        buffer: &'b mut Buffer,
    ) -> Result<ExtendedState<'b>, Unreadable> {
        let decoded = codec.decode_frame(&self.frame, buffer);
        decoded.map_err(|error| self.unreadable(error))
    }

    /// Looks into it, as [`Blob::parse`] does.
    ///
    /// # Errors
    ///
    /// Its format is wrong.
    pub fn blob(&self) -> Result<Blob, Unreadable> {
        Blob::of(&self.frame).map_err(|error| self.unreadable(error))
    }

    fn unreadable(&self, error: DecodeError) -> Unreadable {
        Unreadable {
            offset: self.offset,
            vcpu: self.vcpu(),
            error,
        }
    }
}

impl core::fmt::Debug for Encoded<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Encoded")
            .field("offset", &self.offset)
            .field("vcpu", &self.vcpu())
            .finish_non_exhaustive()
    }
}

/// Errors from reading one of several states. The others are not affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the state at byte {offset}{}: {error}", of_vcpu(*vcpu))]
#[non_exhaustive]
pub struct Unreadable {
    /// Where it begins.
    pub offset: usize,
    /// The number of its vCPU, as far as its header has one: with a wrong checksum, that may be what is
    /// wrong.
    pub vcpu: Option<u32>,
    /// Why it cannot be read.
    pub error: DecodeError,
}

fn of_vcpu(vcpu: Option<u32>) -> String {
    vcpu.map_or_else(String::new, |vcpu| format!(" (vCPU {vcpu})"))
}

#[cfg(test)]
mod tests {
    use super::super::MAX_STATE_BYTES;
    use super::*;

    /// Each 16 bytes begin a state that claims almost all that one can have, and ends where none begins.
    /// How much is read in vain is bounded by how many bytes there are, not by what they claim.
    #[test]
    fn hostile_bytes_are_read_a_bounded_number_of_times() {
        let claimed = u32::try_from(MAX_STATE_BYTES - 8).unwrap();
        let head = [&MAGIC[..], &[2, 0, 0, 0], &claimed.to_le_bytes()].concat();
        let hostile = head.repeat(1 << 14);
        let mut states = states(&hostile);
        assert_eq!(states.by_ref().filter(Result::is_err).count(), 1 << 14);
        assert!(states.in_vain > MAX_STATE_BYTES, "nothing was read");
        let bound = (hostile.len() + MAX_STATE_BYTES) * (PATIENCE + 1);
        assert!(states.in_vain <= bound, "{}", states.in_vain);
    }

    #[test]
    fn the_next_state_is_searched_from_the_next_byte_on() {
        let text = [&MAGIC[..], b"\x89\x89XSTATE", &MAGIC].concat();
        assert_eq!(to_next(&text), 16);
        assert_eq!(to_next(&text[1..]), 15);
        assert_eq!(to_next(&text[16..]), 8);
        assert_eq!((to_next(b"x"), to_next(b"\x89\x89")), (1, 2));
    }
}
