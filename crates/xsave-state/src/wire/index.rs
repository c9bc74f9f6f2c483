//! Where each vCPU lies in a container: its header, its index and its trailer.

use core::ops::Range;

use thiserror::Error;

use super::{CONTAINER_MAGIC, CONTAINER_VERSION, MAX_VCPUS};
use crate::bytes;

pub(super) const HEADER_BYTES: usize = 16;
pub(super) const ENTRY_BYTES: usize = 16;
pub(super) const TRAILER_BYTES: usize = 32;

const VERSION: usize = 8;
const FLAGS: usize = 10;
const ENTRY_VCPU: usize = 8;
const ENTRY_CHECKSUM: usize = 12;
const TOTAL_BYTES: usize = 8;
const COUNT: usize = 16;
const CHECKSUM: usize = 20;
const END: usize = 24;
const END_MAGIC: [u8; 8] = *b"\nXINDEX\x89";

// Version 1 is in files. Nothing here changes: what has to change is version 2.
const _: () = {
    assert!(CONTAINER_VERSION == 1 && VERSION == 8 && FLAGS == 10 && HEADER_BYTES == 16);
    assert!(ENTRY_BYTES == 16 && ENTRY_VCPU == 8 && ENTRY_CHECKSUM == 12);
    assert!(TOTAL_BYTES == 8 && COUNT == 16 && CHECKSUM == 20 && END == 24 && TRAILER_BYTES == 32);
    assert!(CONTAINER_MAGIC[0] == 0x89 && END_MAGIC[7] == 0x89 && MAX_VCPUS == 65_536);
};

/// How every container begins.
pub(super) fn header() -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    bytes::put(&mut header, 0, CONTAINER_MAGIC);
    bytes::put(&mut header, VERSION, CONTAINER_VERSION.to_le_bytes());
    header
}

/// How a container ends.
pub(super) fn trailer(index_at: u64, total: u64, count: u32, index: &[u8]) -> [u8; TRAILER_BYTES] {
    let mut trailer = [0; TRAILER_BYTES];
    bytes::put(&mut trailer, 0, index_at.to_le_bytes());
    bytes::put(&mut trailer, TOTAL_BYTES, total.to_le_bytes());
    bytes::put(&mut trailer, COUNT, count.to_le_bytes());
    let checksum = checksum(&header(), index, &trailer);
    bytes::put(&mut trailer, CHECKSUM, checksum.to_le_bytes());
    bytes::put(&mut trailer, END, END_MAGIC);
    trailer
}

/// CRC-32 of the header, the index, and the trailer up to where the checksum is.
fn checksum(header: &[u8], index: &[u8], trailer: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(index);
    hasher.update(bytes::prefix(trailer, CHECKSUM));
    hasher.finalize()
}

/// The last 32 bytes of a container: where its index is. With the index not yet there, no more is
/// known than that it is within the container.
///
/// To read one vCPU from a file: read the last [`Trailer::BYTES`], then [`Trailer::index`] and the
/// first [`Index::HEADER_BYTES`], then [`Index::find`]. [`Container`](super::Container) does it for
/// bytes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    bytes: [u8; TRAILER_BYTES],
    index_at: u64,
    count: u32,
}

impl Trailer {
    /// Its size.
    pub const BYTES: usize = TRAILER_BYTES;

    /// Reads the last bytes of a container of `container_bytes`.
    ///
    /// # Errors
    ///
    /// They are not those of a container of that length.
    pub fn parse(
        bytes: &[u8; TRAILER_BYTES],
        container_bytes: u64,
    ) -> Result<Self, ContainerError> {
        let end: [u8; 8] = bytes::array(bytes, END);
        if end != END_MAGIC {
            return Err(ContainerError::End { actual: end });
        }
        let stated_bytes = bytes::u64_at(bytes, TOTAL_BYTES);
        if stated_bytes != container_bytes {
            return Err(ContainerError::Length {
                stated_bytes,
                actual_bytes: container_bytes,
            });
        }
        let (index_at, count) = (bytes::u64_at(bytes, 0), bytes::u32_at(bytes, COUNT));
        let trailer = Self {
            bytes: *bytes,
            index_at,
            count,
        };
        let end = u128::from(index_at)
            .saturating_add(trailer.index_bytes().into())
            .saturating_add(Self::BYTES_U64.into());
        let begins_within = index_at >= Index::HEADER_BYTES_U64;
        if count > MAX_VCPUS || !begins_within || end != u128::from(container_bytes) {
            return Err(ContainerError::IndexPlace {
                offset: index_at,
                count,
                container_bytes,
            });
        }
        Ok(trailer)
    }

    /// Where the index is in the container: at most 16 bytes for each of
    /// [`MAX_VCPUS`](super::MAX_VCPUS).
    #[must_use]
    pub const fn index(&self) -> Range<u64> {
        self.index_at..self.index_at.saturating_add(self.index_bytes())
    }

    /// How many vCPUs it says that there are.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    const BYTES_U64: u64 = TRAILER_BYTES as u64;

    const fn index_bytes(&self) -> u64 {
        (self.count as u64).saturating_mul(ENTRY_BYTES as u64)
    }
}

/// One vCPU in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its identifier.
    pub vcpu: u32,
    /// Where its encoded state is in the container, in bytes.
    pub range: Range<u64>,
    /// The checksum at the end of its encoded state.
    pub checksum: u32,
}

/// The index of a container, whose checksum is right and whose entries ascend. It borrows the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Index<'a> {
    entries: &'a [[u8; ENTRY_BYTES]],
    end: u64,
}

impl<'a> Index<'a> {
    /// Bytes at the beginning of a container that belong to no vCPU.
    pub const HEADER_BYTES: usize = HEADER_BYTES;
    const HEADER_BYTES_U64: u64 = HEADER_BYTES as u64;

    /// Reads the bytes of [`Trailer::index`]. `header` are the first bytes of the container.
    ///
    /// # Errors
    ///
    /// A bit of these, or of the trailer, is not as it was written; or it was written by something
    /// else.
    pub fn parse(
        trailer: &Trailer,
        header: &[u8; HEADER_BYTES],
        index: &'a [u8],
    ) -> Result<Self, ContainerError> {
        let magic: [u8; 8] = bytes::array(header, 0);
        if magic != CONTAINER_MAGIC {
            return Err(ContainerError::Magic { actual: magic });
        }
        let version = bytes::u16_at(header, VERSION);
        if version != CONTAINER_VERSION {
            return Err(ContainerError::Version {
                version,
                supported: CONTAINER_VERSION,
            });
        }
        let stored = bytes::u32_at(&trailer.bytes, CHECKSUM);
        let computed = checksum(header, index, &trailer.bytes);
        if stored != computed {
            return Err(ContainerError::Checksum { stored, computed });
        }
        if *header != self::header() {
            return Err(ContainerError::UnknownFlags {
                flags: bytes::array(header, FLAGS),
            });
        }
        let (entries, rest) = index.as_chunks();
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        if count != trailer.count || !rest.is_empty() {
            return Err(ContainerError::IndexLength {
                stated_entries: trailer.count,
                actual_bytes: index.len(),
            });
        }
        let index = Self {
            entries,
            end: trailer.index_at,
        };
        index.check_order()?;
        Ok(index)
    }

    /// The states lie one after the other, from the header to the index, and their vCPUs ascend.
    fn check_order(&self) -> Result<(), ContainerError> {
        let mut expected = Self::HEADER_BYTES_U64;
        let mut previous = None;
        for (position, Entry { vcpu, range, .. }) in self.entries().enumerate() {
            let follows = previous.is_none_or(|previous| previous < vcpu);
            let starts = position != 0 || range.start == expected;
            if !follows || !starts || range.is_empty() || range.start < expected {
                return Err(ContainerError::EntryOrder {
                    position,
                    vcpu,
                    start: range.start,
                    end: range.end,
                });
            }
            expected = range.end;
            previous = Some(vcpu);
        }
        if self.entries.is_empty() && self.end != expected {
            return Err(ContainerError::Unclaimed {
                bytes: self.end.saturating_sub(expected),
            });
        }
        Ok(())
    }

    /// How many vCPUs there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries, by ascending vCPU.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + use<'a> {
        let index = *self;
        (0..self.entries.len()).filter_map(move |position| index.entry(position))
    }

    /// The entry of that vCPU. It takes a binary search.
    #[must_use]
    pub fn find(&self, vcpu: u32) -> Option<Entry> {
        let vcpu_of = |entry: &[u8; ENTRY_BYTES]| bytes::u32_at(entry, ENTRY_VCPU);
        let position = self.entries.binary_search_by_key(&vcpu, vcpu_of).ok()?;
        self.entry(position)
    }

    fn entry(&self, position: usize) -> Option<Entry> {
        let entry = self.entries.get(position)?;
        let next = self.entries.get(position.saturating_add(1));
        let end = next.map_or(self.end, |next| bytes::u64_at(next, 0));
        Some(Entry {
            vcpu: bytes::u32_at(entry, ENTRY_VCPU),
            range: bytes::u64_at(entry, 0)..end,
            checksum: bytes::u32_at(entry, ENTRY_CHECKSUM),
        })
    }
}

/// Bytes that are not a container, or one whose index cannot be believed. The states in it may be
/// whole nevertheless: each can be decoded alone, and
/// [`encoded_bytes`](super::encoded_bytes) says where the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// There are fewer bytes than a container without vCPUs has.
    #[error("there are {actual_bytes} bytes; a container has at least {required_bytes}")]
    TooShort {
        /// Header and trailer.
        required_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// It does not begin as a container does.
    #[error("no container begins with the bytes {actual:02x?}")]
    Magic {
        /// The first eight.
        actual: [u8; 8],
    },
    /// It does not end as a container does: it was cut off, or is not finished.
    #[error("no container ends with the bytes {actual:02x?}")]
    End {
        /// The last eight.
        actual: [u8; 8],
    },
    /// The version is not one that is read here.
    #[error("the container has version {version}; this reader knows version {supported}")]
    Version {
        /// Bytes 8 and 9.
        version: u16,
        /// [`CONTAINER_VERSION`].
        supported: u16,
    },
    /// A flag has no meaning in this version.
    #[error(
        "bytes 10 to 15 of the container are {flags:02x?}; version {CONTAINER_VERSION} has 0 there"
    )]
    UnknownFlags {
        /// Those bytes.
        flags: [u8; 6],
    },
    /// The length is not the one that the trailer says.
    #[error("the container says that it has {stated_bytes} bytes, but there are {actual_bytes}")]
    Length {
        /// By the trailer.
        stated_bytes: u64,
        /// What is there.
        actual_bytes: u64,
    },
    /// The index does not end where the trailer begins, or there are too many vCPUs.
    #[error(
        "an index of {count} vCPUs at byte {offset} does not end 32 bytes before the end of \
         {container_bytes} bytes, or has more than {MAX_VCPUS}"
    )]
    IndexPlace {
        /// Where it would begin.
        offset: u64,
        /// How many entries it would have.
        count: u32,
        /// The length of the container.
        container_bytes: u64,
    },
    /// The bytes given as index are not as many as the trailer says.
    #[error(
        "the index has {stated_entries} entries of 16 bytes, but there are {actual_bytes} bytes"
    )]
    IndexLength {
        /// By the trailer.
        stated_entries: u32,
        /// What is there.
        actual_bytes: usize,
    },
    /// At least one bit of header, index or trailer is not as it was written.
    #[error(
        "the index is damaged: its checksum is {stored:#010x}, that of its bytes {computed:#010x}"
    )]
    Checksum {
        /// By the trailer.
        stored: u32,
        /// CRC-32 of header, index and trailer.
        computed: u32,
    },
    /// vCPUs do not ascend, or their states do not follow each other.
    #[error("entry {position} of the index (vCPU {vcpu}, bytes {start} to {end}) is out of order")]
    EntryOrder {
        /// The first entry that is not in order.
        position: usize,
        /// Its vCPU.
        vcpu: u32,
        /// Where its state begins.
        start: u64,
        /// Where the next begins, or the index.
        end: u64,
    },
    /// There are bytes of no vCPU.
    #[error("{bytes} bytes before the index belong to no vCPU")]
    Unclaimed {
        /// How many.
        bytes: u64,
    },
}
