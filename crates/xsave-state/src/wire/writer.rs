//! A container as a stream: one vCPU after the other, then the index.

use alloc::vec::Vec;

use thiserror::Error;

use super::codec::Codec;
use super::error::EncodeError;
use super::index::{ENTRY_BYTES, HEADER_BYTES, TRAILER_BYTES, header, trailer};
use super::template::CHECKSUM_BYTES;
use super::{MAX_STATE_BYTES, MAX_VCPUS};
use crate::bytes;
use crate::state::ExtendedState;

/// Gives the bytes of a container piece by piece, for the caller to write wherever it goes: a file,
/// a socket, a `Vec`. What it gives, in the order in which it gives it, is the container.
///
/// It holds one encoded state and 16 bytes for each vCPU so far. Both buffers are kept when a
/// container is finished and the next begins, so that it then allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    piece: Vec<u8>,
    index: Vec<u8>,
    /// Bytes given so far.
    offset: u64,
    last: Option<u32>,
    vcpus: u32,
}

impl Writer {
    /// For a container to begin.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes the state of `vcpu`, an identifier of the caller's choice, and gives the next bytes.
    ///
    /// # Errors
    ///
    /// See [`WriteError`]. Nothing was added: the container can go on with another vCPU.
    pub fn push(
        &mut self,
        vcpu: u32,
        codec: &Codec,
        state: &ExtendedState<'_>,
    ) -> Result<&[u8], WriteError> {
        if let Some(previous) = self.last.filter(|&previous| previous >= vcpu) {
            return Err(WriteError::NotAscending { vcpu, previous });
        }
        if self.vcpus >= MAX_VCPUS {
            return Err(WriteError::TooMany { vcpu });
        }
        self.begin();
        let start = self.piece.len();
        codec
            .encode(state, &mut self.piece)
            .map_err(|error| WriteError::Encode { vcpu, error })?;
        let offset = self.offset.saturating_add(length(start));
        let encoded = bytes::range(&self.piece, start..self.piece.len());
        let checksum_at = encoded.len().saturating_sub(CHECKSUM_BYTES);
        self.index.extend_from_slice(&offset.to_le_bytes());
        self.index.extend_from_slice(&vcpu.to_le_bytes());
        let checksum: [u8; CHECKSUM_BYTES] = bytes::array(encoded, checksum_at);
        self.index.extend_from_slice(&checksum);
        self.offset = self.offset.saturating_add(length(self.piece.len()));
        self.last = Some(vcpu);
        self.vcpus = self.vcpus.saturating_add(1);
        Ok(&self.piece)
    }

    /// Gives the last bytes: the index and the trailer. What is pushed next begins another container.
    #[must_use = "without these bytes the others are no container"]
    pub fn finish(&mut self) -> &[u8] {
        self.begin();
        let index_at = self.offset.saturating_add(length(self.piece.len()));
        self.piece.extend_from_slice(&self.index);
        let total = index_at
            .saturating_add(length(self.index.len()))
            .saturating_add(length(TRAILER_BYTES));
        let trailer = trailer(index_at, total, self.vcpus, &self.index);
        self.piece.extend_from_slice(&trailer);
        self.index.clear();
        (self.offset, self.last, self.vcpus) = (0, None, 0);
        &self.piece
    }

    /// An empty piece, or the container's header where it begins.
    fn begin(&mut self) {
        self.piece.clear();
        if self.offset == 0 {
            self.piece.extend_from_slice(&header());
        }
    }
}

/// At most [`MAX_STATE_BYTES`] and a header.
fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

const _: () = assert!(HEADER_BYTES < MAX_STATE_BYTES && ENTRY_BYTES == 16);

/// A vCPU that cannot be added to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Identifiers have to ascend.
    #[error("vCPU {vcpu} cannot follow vCPU {previous}: identifiers ascend in a container")]
    NotAscending {
        /// This one.
        vcpu: u32,
        /// The one before.
        previous: u32,
    },
    /// The container is full.
    #[error("vCPU {vcpu} is one more than the {MAX_VCPUS} that a container can have")]
    TooMany {
        /// This one.
        vcpu: u32,
    },
    /// The state cannot be encoded.
    #[error("vCPU {vcpu}: {error}")]
    Encode {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        error: EncodeError,
    },
}
