//! Errors from encoding and decoding.

use thiserror::Error;

use super::{MAX_STATE_BYTES, PREFIX_BYTES, VERSION};
use crate::area::ImageError;
use crate::feature::ComponentId;
use crate::fit::Misfit;
use crate::layout::LayoutError;
use crate::state::StateError;

/// Errors from encoding a state with a [`Codec`](super::Codec).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The state has another layout than the codec.
    #[error("the state has another layout than the codec: {misfit}")]
    OtherLayout {
        /// The first difference; the codec's layout is the target.
        misfit: Misfit,
    },
}

/// What a caller can do about bytes that do not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The bytes begin as something else: another reader may know them.
    NotAState,
    /// A state was cut off or changed since it was written: another copy may be whole.
    Damaged,
    /// A newer version of this crate wrote the state, and can read it.
    NewerVersion,
    /// The state is sound, but of a vCPU with another layout: [`decode`](super::decode) it with its own,
    /// then [`relocate`](crate::ExtendedState::relocate) it.
    OtherLayout,
    /// The checksum is right and the content is not: the writer is at fault, or a forger.
    Invalid,
}

/// Errors from decoding. [`kind`](Self::kind) says what can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes do not begin as a state does.
    #[error("no encoded state begins with the bytes {actual:02x?}")]
    Magic {
        /// The first eight, 0 where there are fewer.
        actual: [u8; 8],
    },
    /// The bytes end before they say how long the state is.
    #[error(
        "there are {actual_bytes} bytes; the first {PREFIX_BYTES} of a state say how long it is"
    )]
    TooShort {
        /// What is there.
        actual_bytes: usize,
    },
    /// The version is not one that is read here.
    #[error("the format has version {version}; this reader knows versions 1 to {VERSION}")]
    Version {
        /// Bytes 8 and 9.
        version: u16,
    },
    /// The length is not the one that the state says, or no state has that length.
    #[error(
        "the state says that it has {stated_bytes} bytes (of at most {MAX_STATE_BYTES}); there are \
         {actual_bytes}"
    )]
    Length {
        /// Bytes 12 to 15.
        stated_bytes: u32,
        /// What is there.
        actual_bytes: usize,
    },
    /// At least one bit is not as it was written.
    #[error(
        "the state is damaged: its checksum is {stored:#010x}, that of its bytes {computed:#010x}"
    )]
    Checksum {
        /// The last four bytes.
        stored: u32,
        /// CRC-32 of all the others.
        computed: u32,
    },
    /// A number is not the one that the rest of the state leaves for it.
    #[error("{field} at byte {offset} is {actual:#x}; in this state it can only be {expected:#x}")]
    Field {
        /// What is there.
        field: &'static str,
        /// Offset in the state.
        offset: usize,
        /// The only number that can be there.
        expected: u64,
        /// What is there.
        actual: u64,
    },
    /// The state ends within a table or a record.
    #[error("{required_bytes} bytes are required at byte {offset}, but {actual_bytes} are there")]
    CutOff {
        /// Where the table, or the part of a record, begins.
        offset: usize,
        /// How long it is.
        required_bytes: usize,
        /// What is there, up to the checksum.
        actual_bytes: usize,
    },
    /// There are bytes behind the last record.
    #[error("{bytes} bytes from byte {offset} on belong to no component in use")]
    Trailing {
        /// Where they begin.
        offset: usize,
        /// How many, up to the checksum.
        bytes: usize,
    },
    /// A bitmap has a bit for a line that is zero, or that does not exist.
    #[error(
        "line {line} of {component} is stored; only lines that are not zero are, of lines 0 to {last}"
    )]
    Line {
        /// The component.
        component: ComponentId,
        /// The line.
        line: usize,
        /// The last line that the component has.
        last: usize,
    },
    /// The tables describe an area that cannot exist.
    #[error("the layout in the state cannot exist: {0}")]
    Layout(LayoutError),
    /// The state was encoded with another layout than the reader's.
    #[error("the state was encoded with another layout: {misfit}")]
    OtherLayout {
        /// The first difference; the reader's layout is the target.
        misfit: Misfit,
    },
    /// The area is not valid.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registers do not go with the area.
    #[error(transparent)]
    State(#[from] StateError),
}

impl DecodeError {
    /// Returns what a caller can do about it.
    #[must_use]
    pub const fn kind(&self) -> DecodeErrorKind {
        match self {
            Self::Magic { .. } => DecodeErrorKind::NotAState,
            Self::Version { version } if *version > VERSION => DecodeErrorKind::NewerVersion,
            Self::TooShort { .. }
            | Self::Version { .. }
            | Self::Length { .. }
            | Self::Checksum { .. } => DecodeErrorKind::Damaged,
            Self::OtherLayout { .. } => DecodeErrorKind::OtherLayout,
            Self::Field { .. }
            | Self::CutOff { .. }
            | Self::Trailing { .. }
            | Self::Line { .. }
            | Self::Layout(_)
            | Self::Image(_)
            | Self::State(_) => DecodeErrorKind::Invalid,
        }
    }
}
