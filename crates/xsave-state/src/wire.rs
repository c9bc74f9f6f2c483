//! States as bytes: a format that is sparse, checksummed, versioned and self-contained.
//!
//! A VMM that stores the area of KVM_GET_XSAVE2 as it is stores 11,008 bytes for a vCPU whose guest
//! has AMX, mostly zeros, without the CPUID that says what they mean. Here a state has the
//! components in use only, of them only the 64-byte lines that are not zero, and with them the
//! registers, the layout that it was saved with and a checksum. docs/state-format.md describes
//! every byte.
//!
//! | to | use |
//! |---|---|
//! | save and load one state | [`encode`], [`decode`] |
//! | the same for many, without allocating | [`Codec`], for one [`Layout`](crate::Layout), and [`Buffer`] |
//! | look into bytes of which nothing is known | [`Blob`] |
//! | the vCPUs of a VM in one stream or file | [`Writer`], [`Container`] |
//!
//! What is decoded is a valid [`ExtendedState`] or a [`DecodeError`] that names the byte or the rule.
//! One state has one encoding: bytes that decode are the bytes that encoding gives again. The
//! checksum finds accidents, not forgers; a forged state is still only a valid state.
//!
//! # Snapshot
//!
//! ```
//! use xsave_state::{wire, ExtendedState, Layout};
//! # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
//! #     match (leaf, subleaf) {
//! #         (0, _) => [0xd, 0, 0, 0],
//! #         (0xd, 0) => [0x7, 832, 832, 0],
//! #         (0xd, 1) => [0xf, 832, 0, 0],
//! #         (0xd, 2) => [256, 576, 0, 0],
//! #         _ => [0; 4],
//! #     }
//! # }
//!
//! let layout = Layout::from_cpuid(cpuid)?;
//! let codec = wire::Codec::new(&layout);
//! let mut writer = wire::Writer::new();
//! let mut file = Vec::new();
//! for vcpu in 0..4 {
//!     let state = ExtendedState::reset(&layout); // from kvm::capture, in a VMM
//!     file.extend_from_slice(writer.push(vcpu, &codec, &state)?);
//! }
//! file.extend_from_slice(writer.finish());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Restore
//!
//! ```
//! use xsave_state::{wire, Layout};
//! # use xsave_state::ExtendedState;
//! # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
//! #     match (leaf, subleaf) {
//! #         (0, _) => [0xd, 0, 0, 0],
//! #         (0xd, 0) => [0x7, 832, 832, 0],
//! #         (0xd, 1) => [0xf, 832, 0, 0],
//! #         (0xd, 2) => [256, 576, 0, 0],
//! #         _ => [0; 4],
//! #     }
//! # }
//! # fn restore(_: &ExtendedState<'_>) {}
//! # let layout = Layout::from_cpuid(cpuid)?;
//! # let codec = wire::Codec::new(&layout);
//! # let mut writer = wire::Writer::new();
//! # let mut file = Vec::new();
//! # for vcpu in 0..4 {
//! #     let state = ExtendedState::reset(&layout);
//! #     file.extend_from_slice(writer.push(vcpu, &codec, &state)?);
//! # }
//! # file.extend_from_slice(writer.finish());
//!
//! let layout = Layout::from_cpuid(cpuid)?; // of the guest, whose CPUID is set first
//! let codec = wire::Codec::new(&layout);
//! let mut buffer = wire::Buffer::new(); // used for one vCPU after the other
//! let container = wire::Container::open(&file)?;
//! for member in container.members() {
//!     let state = member.decode(&codec, &mut buffer)?;
//!     restore(&state); // kvm::restore, in a VMM
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Move to another host
//!
//! ```
//! use xsave_state::relayout::{Allowed, relayout};
//! use xsave_state::wire::{self, DecodeError};
//! use xsave_state::{ExtendedState, Layout};
//! # use xsave_state::{Image, Registers};
//! # fn cpuid_with_pkru_at(offset: u32) -> impl Fn(u32, u32) -> [u32; 4] {
//! #     move |leaf, subleaf| match (leaf, subleaf) {
//! #         (0, _) => [0xd, 0, 0, 0],
//! #         (0xd, 0) => [0x207, offset + 8, offset + 8, 0],
//! #         (0xd, 2) => [256, 576, 0, 0],
//! #         (0xd, 9) => [8, offset, 0, 0],
//! #         _ => [0; 4],
//! #     }
//! # }
//!
//! /// What arrives at a host; `codec` is of its guest's layout.
//! fn arrived<'a>(
//!     bytes: &[u8],
//!     codec: &wire::Codec,
//!     buffer: &'a mut wire::Buffer,
//! ) -> Result<ExtendedState<'a>, Box<dyn std::error::Error>> {
//!     match codec.decode(bytes, buffer) {
//!         // From a host whose components lie elsewhere, as between Intel and AMD: a step of its
//!         // own, which lists all that the guest would lose.
//!         Err(DecodeError::OtherLayout { difference }) => {
//!             eprintln!("{difference}");
//!             let state = wire::decode(bytes)?;
//!             Ok(relayout(&state, codec.layout(), Allowed::NOTHING)?.state)
//!         }
//!         decoded => Ok(decoded?),
//!     }
//! }
//! # let intel = Layout::from_cpuid(cpuid_with_pkru_at(2688))?;
//! # let amd = Layout::from_cpuid(cpuid_with_pkru_at(2432))?;
//! # let mut area = vec![0; intel.standard_size()];
//! # area[512..520].copy_from_slice(&0x200u64.to_le_bytes());
//! # area[2688] = 0x54;
//! # let registers = Registers { xcr0: intel.user(), ..Registers::RESET };
//! # let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
//!
//! let bytes = wire::encode(&state); // there
//! let codec = wire::Codec::new(&amd); // here
//! let mut buffer = wire::Buffer::new();
//! let moved = arrived(&bytes, &codec, &mut buffer)?;
//! assert_eq!(moved.layout(), &amd);
//! # assert_eq!(moved.image().as_bytes()[2432], 0x54);
//! # let (codec, mut buffer) = (wire::Codec::new(&intel), wire::Buffer::new());
//! # assert_eq!(arrived(&bytes, &codec, &mut buffer)?, state);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The layout is the guest's. What the kernel of the new host lacks, [`sanitize`](crate::sanitize)
//! finds.
//!
//! # Look into a blob
//!
//! ```
//! use xsave_state::wire::{self, Blob};
//! # use xsave_state::{ExtendedState, Layout};
//! # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
//! #     match (leaf, subleaf) {
//! #         (0, _) => [0xd, 0, 0, 0],
//! #         (0xd, 0) => [0x7, 832, 832, 0],
//! #         (0xd, 1) => [0xf, 832, 0, 0],
//! #         (0xd, 2) => [256, 576, 0, 0],
//! #         _ => [0; 4],
//! #     }
//! # }
//! # let bytes = wire::encode(&ExtendedState::reset(&Layout::from_cpuid(cpuid)?));
//!
//! // No CPUID is needed: the blob says where its components belong.
//! let blob = Blob::parse(&bytes)?;
//! println!("XCR0 {}, {:?}", blob.registers().xcr0, blob.layout());
//! for record in blob.records() {
//!     println!("{}: {} of {} lines", record.id(), record.stored_lines(), record.lines());
//! }
//! # assert_eq!(blob.registers().xcr0.bits(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod blob;
mod buffer;
mod codec;
mod container;
mod difference;
mod error;
mod frame;
mod index;
mod lines;
mod record;
#[cfg(feature = "serde")]
mod serde;
mod template;
mod writer;

pub use blob::Blob;
pub use buffer::Buffer;
pub use codec::Codec;
pub use container::{Container, Member, MemberError};
pub use difference::Difference;
pub use error::{DecodeError, EncodeError};
pub use frame::encoded_bytes;
pub use index::{ContainerError, Entry, Index, Trailer};
pub use record::Record;
pub use writer::{WriteError, Writer};

use alloc::vec::Vec;

use crate::state::ExtendedState;

/// The first eight bytes of an encoded state. The first is no text, the last is the end of a line:
/// what mangles either is found here.
pub const MAGIC: [u8; 8] = *b"\x89XSTATE\n";
/// The version of the format that is written, and the only one that is read.
pub const VERSION: u16 = 1;
/// No encoded state has more bytes: everything that a layout can have, in use and not zero.
pub const MAX_STATE_BYTES: usize = 72 * 1024;
/// The first eight bytes of a container.
pub const CONTAINER_MAGIC: [u8; 8] = *b"\x89XVCPUS\n";
/// The version of the container that is written, and the only one that is read.
pub const CONTAINER_VERSION: u16 = 1;
/// No container has more vCPUs.
pub const MAX_VCPUS: u32 = 65_536;

/// A state as bytes, with the layout that it has.
#[must_use]
pub fn encode(state: &ExtendedState<'_>) -> Vec<u8> {
    let codec = Codec::new(state.layout());
    let mut bytes = Vec::new();
    codec.write(state, &mut bytes);
    bytes
}

/// A state from bytes alone, with the layout that they carry: the one that it was encoded with, less
/// its supervisor components, of which no state has any.
///
/// For a vCPU whose layout is known use [`Codec::decode`], which compares the two.
///
/// # Errors
///
/// Any byte is not as [`encode`] writes it, or the state would not be valid: see [`DecodeError`].
/// What is allocated is bounded by [`MAX_AREA_BYTES`](crate::layout::MAX_AREA_BYTES) plus a constant.
pub fn decode(bytes: &[u8]) -> Result<ExtendedState<'static>, DecodeError> {
    Blob::parse(bytes)?.decode()
}
