//! The vCPUs of a container in memory, each read without reading the others.

use thiserror::Error;

use super::blob::Blob;
use super::buffer::Buffer;
use super::codec::Codec;
use super::error::DecodeError;
use super::index::{ContainerError, Entry, HEADER_BYTES, Index, TRAILER_BYTES, Trailer};
use super::template::CHECKSUM_BYTES;
use crate::bytes;
use crate::state::ExtendedState;

/// A container whose index has been checked. Of its vCPUs nothing has been read.
#[derive(Clone, Copy, Debug)]
pub struct Container<'a> {
    bytes: &'a [u8],
    index: Index<'a>,
}

impl<'a> Container<'a> {
    /// Checks header, index and trailer of exactly `bytes`. It allocates nothing.
    ///
    /// # Errors
    ///
    /// They are not as [`Writer`](super::Writer) writes them.
    pub fn open(bytes: &'a [u8]) -> Result<Self, ContainerError> {
        let too_short = ContainerError::TooShort {
            required_bytes: HEADER_BYTES.saturating_add(TRAILER_BYTES),
            actual_bytes: bytes.len(),
        };
        let Some((header, rest)) = bytes.split_first_chunk() else {
            return Err(too_short);
        };
        let Some((members, trailer)) = rest.split_last_chunk() else {
            return Err(too_short);
        };
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let trailer = Trailer::parse(trailer, length)?;
        let count = usize::try_from(trailer.count()).unwrap_or(usize::MAX);
        let index_bytes = count.saturating_mul(super::index::ENTRY_BYTES);
        // The trailer has been checked: the index is what is before it.
        let states = members.len().saturating_sub(index_bytes);
        let index = members.get(states..).unwrap_or_default();
        let index = Index::parse(&trailer, header, index)?;
        Ok(Self { bytes, index })
    }

    /// Where each vCPU lies.
    #[must_use]
    pub const fn index(&self) -> &Index<'a> {
        &self.index
    }

    /// The vCPU of that identifier.
    #[must_use]
    pub fn member(&self, vcpu: u32) -> Option<Member<'a>> {
        self.index.find(vcpu).map(|entry| self.at(&entry))
    }

    /// All vCPUs, by ascending identifier.
    pub fn members(&self) -> impl Iterator<Item = Member<'a>> + use<'a> {
        let container = *self;
        self.index.entries().map(move |entry| container.at(&entry))
    }

    fn at(&self, entry: &Entry) -> Member<'a> {
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        Member {
            vcpu: entry.vcpu,
            checksum: entry.checksum,
            bytes: bytes::range(self.bytes, at(entry.range.start)..at(entry.range.end)),
        }
    }
}

/// One vCPU of a container. Nothing of its state has been read.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    vcpu: u32,
    checksum: u32,
    bytes: &'a [u8],
}

impl<'a> Member<'a> {
    /// Its identifier.
    #[must_use]
    pub const fn vcpu(&self) -> u32 {
        self.vcpu
    }

    /// Its encoded state, for example for [`Blob::parse`].
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its state: as [`Codec::decode`].
    ///
    /// # Errors
    ///
    /// The state is damaged, or not one of the codec's layout. Other vCPUs are not affected.
    pub fn decode<'b>(
        &self,
        codec: &Codec,
        buffer: &'b mut Buffer,
    ) -> Result<ExtendedState<'b>, MemberError> {
        self.check()?;
        codec.decode(self.bytes, buffer).map_err(|e| self.error(e))
    }

    /// Its state with its own layout: as [`Blob::parse`].
    ///
    /// # Errors
    ///
    /// The state is damaged. Other vCPUs are not affected.
    pub fn blob(&self) -> Result<Blob<'a>, MemberError> {
        self.check()?;
        Blob::parse(self.bytes).map_err(|e| self.error(e))
    }

    /// The state is the one that the index was written for.
    fn check(&self) -> Result<(), MemberError> {
        let checksum_at = self.bytes.len().saturating_sub(CHECKSUM_BYTES);
        let stored = bytes::u32_at(self.bytes, checksum_at);
        if stored != self.checksum {
            return Err(MemberError::Replaced {
                vcpu: self.vcpu,
                expected: self.checksum,
                stored,
            });
        }
        Ok(())
    }

    fn error(&self, error: DecodeError) -> MemberError {
        MemberError::Decode {
            vcpu: self.vcpu,
            error,
        }
    }
}

/// A vCPU of a container that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemberError {
    /// The state has another checksum than the index says: it is damaged there, or another one.
    #[error("vCPU {vcpu}: its checksum is {stored:#010x}, in the index it is {expected:#010x}")]
    Replaced {
        /// The vCPU.
        vcpu: u32,
        /// By the index.
        expected: u32,
        /// At the end of the state.
        stored: u32,
    },
    /// The state cannot be decoded.
    #[error("vCPU {vcpu}: {error}")]
    Decode {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        error: DecodeError,
    },
}
