//! States as bytes: a format that is sparse, checksummed, versioned and self-contained.
//!
//! A VMM that stores the area of KVM_GET_XSAVE2 as it is stores 11,008 bytes for a vCPU whose guest
//! has AMX, mostly zeros, without the CPUID that says what they mean. Here a state has the
//! components in use only, of them only the 64-byte lines that are not zero, and with them the
//! registers, the layout that it was saved with, the number of its vCPU and a checksum.
//! docs/state-format.md describes every byte.
//!
//! | to | use |
//! |---|---|
//! | save and load one state | [`encode`], [`decode`] |
//! | the same for many, without allocating | [`Codec`], for one [`Layout`](crate::Layout), and [`Buffer`] |
//! | the vCPUs of a VM in one file | their states one behind the other; [`states`] finds them again |
//! | the same in a stream | [`stated_bytes`], which says how much to read |
//! | look into bytes of which nothing is known | [`Blob`] |
//!
//! What is decoded is a valid [`ExtendedState`] or a [`DecodeError`] that names the byte or the rule,
//! and whose [`kind`](DecodeError::kind) says what can be done. One state has one encoding: bytes that
//! decode are the bytes that encoding gives again (those of version 1, with the number of the vCPU
//! added). The checksum finds accidents, not forgers; a forged state is still only a valid state.
//!
//! # Snapshot and restore
//!
//! ```
//! use xsave_state::wire::{self, Buffer, Codec};
//! use xsave_state::{Component, ComponentId, ExtendedState, Layout};
//! # let avx = Component::user(ComponentId::AVX, 576, 256);
//! # let restore = |_: &ExtendedState<'_>| {};
//!
//! let layout = Layout::from_parts([avx], [])?; // from the vCPU's CPUID, in a VMM
//! let codec = Codec::new(&layout);
//! let mut file = Vec::new();
//! for vcpu in 0..4 {
//!     let state = ExtendedState::reset(&layout); // from kvm::capture, in a VMM
//!     codec.encode(vcpu, &state, &mut file)?;
//! }
//!
//! let mut buffer = Buffer::new(); // used for one vCPU after the other
//! for (encoded, vcpu) in wire::states(&file).zip(0..) {
//!     let encoded = encoded?;
//!     assert_eq!(encoded.vcpu(), Some(vcpu));
//!     let state = encoded.decode(&codec, &mut buffer)?;
//!     restore(&state); // kvm::restore, in a VMM
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Move to another host
//!
//! ```
//! use xsave_state::wire::{self, Codec, DecodeErrorKind};
//! use xsave_state::{Component, ComponentId, ExtendedState, Layout, Losses};
//! # use xsave_state::{Image, Registers};
//!
//! /// What arrives at a host; `codec` is of its guest's layout.
//! fn arrived<'a>(
//!     bytes: &[u8],
//!     codec: &Codec,
//!     buffer: &'a mut wire::Buffer,
//! ) -> Result<ExtendedState<'a>, Box<dyn std::error::Error>> {
//!     match codec.decode(bytes, buffer) {
//!         // From a host whose components lie elsewhere, as between Intel and AMD: a step of its
//!         // own, which lists all that the guest would lose.
//!         Err(error) if error.kind() == DecodeErrorKind::OtherLayout => {
//!             let state = wire::decode(bytes)?;
//!             Ok(state.relocate(codec.layout(), Losses::empty())?.state)
//!         }
//!         decoded => Ok(decoded?),
//!     }
//! }
//!
//! let intel = Layout::from_parts([Component::user(ComponentId::PKRU, 2688, 8)], [])?;
//! let amd = Layout::from_parts([Component::user(ComponentId::PKRU, 2432, 8)], [])?;
//! # let mut area = vec![0; intel.standard_size()];
//! # area[512..520].copy_from_slice(&0x200u64.to_le_bytes());
//! # area[2688] = 0x54;
//! # let registers = Registers::RESET.with_xcr0(intel.user());
//! # let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
//! let bytes = wire::encode(0, &state); // there
//! let (codec, mut buffer) = (Codec::new(&amd), wire::Buffer::new()); // here
//! let moved = arrived(&bytes, &codec, &mut buffer)?;
//! assert_eq!(moved.image().component(ComponentId::PKRU).unwrap()[0], 0x54);
//! # let (codec, mut buffer) = (Codec::new(&intel), wire::Buffer::new());
//! # assert_eq!(arrived(&bytes, &codec, &mut buffer)?, state);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The layout is the guest's. What the kernel of the new host lacks, [`sanitize`](crate::sanitize)
//! finds.

mod blob;
mod buffer;
mod codec;
mod error;
mod frame;
mod lines;
mod misfit;
mod records;
#[cfg(feature = "serde")]
mod serde;
mod states;
mod template;

pub use blob::Blob;
pub use buffer::Buffer;
pub use codec::Codec;
pub use error::{DecodeError, DecodeErrorKind, EncodeError};
pub use frame::stated_bytes;
pub use states::{Encoded, States, Unreadable, states};

use alloc::vec::Vec;

use crate::state::ExtendedState;

/// The first eight bytes of an encoded state. The first is no text, the last is the end of a line:
/// what mangles either is found here.
pub const MAGIC: [u8; 8] = *b"\x89XSTATE\n";
/// The version of the format that is written. It and version 1 are read.
pub const VERSION: u16 = 2;
/// No encoded state has more bytes: everything that a layout can have, in use and not zero.
pub const MAX_STATE_BYTES: usize = 72 * 1024;

/// Bytes that tell how many a state has.
const PREFIX_BYTES: usize = 16;

/// Encodes a state, of vCPU number `vcpu`, with the layout that it has.
#[must_use]
pub fn encode(vcpu: u32, state: &ExtendedState<'_>) -> Vec<u8> {
    let codec = Codec::new(state.layout());
    let mut bytes = Vec::new();
    codec.write(vcpu, state, &mut bytes);
    bytes
}

/// Decodes a state from bytes alone, with the layout that they carry: the one that it was encoded
/// with, without supervisor components, of which no state has any.
///
/// For a vCPU whose layout is known use [`Codec::decode`], which compares the two.
///
/// # Errors
///
/// Any byte is not as [`encode`] writes it, or the state is not valid: see [`DecodeError`].
/// What is allocated is bounded by [`MAX_AREA_BYTES`](crate::layout::MAX_AREA_BYTES) plus a constant.
pub fn decode(bytes: &[u8]) -> Result<ExtendedState<'static>, DecodeError> {
    Blob::parse(bytes)?.decode()
}
