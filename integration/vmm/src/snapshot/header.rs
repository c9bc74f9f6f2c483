//! The first 64 bytes of a snapshot file.
//!
//! | bytes | |
//! |---|---|
//! | 0..8 | magic |
//! | 8..12 | version |
//! | 12..16 | bytes of the header |
//! | 16..24 | bytes of the state of vCPUs and devices |
//! | 24..32 | bytes of guest memory |
//! | 32..36 | pages in the file |
//! | 36..40 | bytes of a page |
//! | 40..44 | CRC-32 of everything behind the header |
//! | 44..60 | zero |
//! | 60..64 | CRC-32 of bytes 0..60 |
//!
//! All little-endian.

use thiserror::Error;

use crate::memory::{MAX_MEMORY_BYTES, PAGE_BYTES};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// The first eight bytes: a transfer as text would change them.
pub const MAGIC: [u8; 8] = *b"\x89VMMAMX\n";
/// The version that this program writes, and the only one that it reads.
pub const VERSION: u32 = 4;
/// The most bytes that the state of vCPUs and devices may have.
pub const MAX_STATE_BYTES: u64 = 16 << 20;

const PAGE: u32 = 4096;
const _: () = assert!(PAGE as usize == PAGE_BYTES);
const CHECKED: usize = 60;

/// What the header says about the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) state_bytes: usize,
    pub(super) memory_bytes: u64,
    pub(super) pages: usize,
    pub(super) body_checksum: u32,
}

impl Header {
    /// Bytes of the page numbers.
    pub(super) fn numbers_bytes(&self) -> usize {
        self.pages.saturating_mul(size_of::<u32>())
    }

    /// Bytes of the whole file. The limits of the parts are far below overflow.
    pub(super) fn file_bytes(&self) -> usize {
        HEADER_BYTES
            .saturating_add(self.state_bytes)
            .saturating_add(self.numbers_bytes())
            .saturating_add(self.pages.saturating_mul(PAGE_BYTES))
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(64u32.to_le_bytes());
        bytes.extend((self.state_bytes as u64).to_le_bytes());
        bytes.extend(self.memory_bytes.to_le_bytes());
        bytes.extend(u32::try_from(self.pages).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(PAGE.to_le_bytes());
        bytes.extend(self.body_checksum.to_le_bytes());
        bytes.resize(CHECKED, 0);
        let checksum = crc32fast::hash(&bytes);
        bytes.extend(checksum.to_le_bytes());
        bytes
    }

    /// Reads the header of `file` and checks its length.
    pub(super) fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let header = file
            .first_chunk::<HEADER_BYTES>()
            .ok_or(HeaderError::TooShort {
                required_bytes: HEADER_BYTES,
                actual_bytes: file.len(),
            })?;
        let mut rest = Fields(header);
        let magic = rest.take::<8>();
        if magic != MAGIC {
            return Err(HeaderError::Magic { found: magic });
        }
        let version = rest.u32();
        if version != VERSION {
            return Err(HeaderError::Version {
                found: version,
                known: VERSION,
            });
        }
        let (checked, _) = header.split_at(CHECKED);
        let computed = crc32fast::hash(checked);
        let header_bytes = rest.u32();
        let state_bytes = rest.u64();
        let memory_bytes = rest.u64();
        let pages = rest.u32();
        let page_bytes = rest.u32();
        let body_checksum = rest.u32();
        let reserved = rest.take::<16>();
        let stored = rest.u32();
        if stored != computed {
            return Err(HeaderError::Checksum { stored, computed });
        }

        if header_bytes as usize != HEADER_BYTES {
            return Err(HeaderError::HeaderBytes {
                found: header_bytes,
            });
        }
        if page_bytes != PAGE {
            return Err(HeaderError::PageBytes { found: page_bytes });
        }
        if reserved != [0; 16] {
            return Err(HeaderError::Reserved);
        }
        if memory_bytes == 0 || memory_bytes > MAX_MEMORY_BYTES || memory_bytes % 4096 != 0 {
            return Err(HeaderError::MemoryBytes {
                found: memory_bytes,
                limit_bytes: MAX_MEMORY_BYTES,
            });
        }
        if u64::from(pages) > memory_bytes / 4096 {
            return Err(HeaderError::Pages {
                found: pages,
                memory_bytes,
            });
        }
        let state_bytes = usize::try_from(state_bytes)
            .ok()
            .filter(|_| state_bytes <= MAX_STATE_BYTES)
            .ok_or(HeaderError::StateBytes {
                found: state_bytes,
                limit_bytes: MAX_STATE_BYTES,
            })?;
        let header = Self {
            state_bytes,
            memory_bytes,
            pages: pages as usize,
            body_checksum,
        };
        let expected_bytes = header.file_bytes();
        if file.len() != expected_bytes {
            return Err(HeaderError::Length {
                expected_bytes,
                actual_bytes: file.len(),
            });
        }
        Ok(header)
    }
}

/// Reads little-endian fields one after the other; zeros at the end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// A file's header is not valid, or does not describe the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It ends within the header.
    #[error("the file has {actual_bytes} bytes; the header alone has {required_bytes}")]
    TooShort {
        /// [`HEADER_BYTES`].
        required_bytes: usize,
        /// The file's.
        actual_bytes: usize,
    },
    /// It is another kind of file.
    #[error("the file is not a snapshot: it begins with {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Another version wrote it.
    #[error("the file has format version {found}; this program reads version {known}")]
    Version {
        /// The file's.
        found: u32,
        /// [`VERSION`].
        known: u32,
    },
    /// The header was changed.
    #[error("the header's checksum is {computed:#010x}, and {stored:#010x} is stored")]
    Checksum {
        /// In the file.
        stored: u32,
        /// Of what is there.
        computed: u32,
    },
    /// The header has another length.
    #[error("the header says that it has {found} bytes; it has 64")]
    HeaderBytes {
        /// The file's.
        found: u32,
    },
    /// Pages have another size.
    #[error("pages of {found} bytes; they have 4096")]
    PageBytes {
        /// The file's.
        found: u32,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the header are not zero")]
    Reserved,
    /// The guest has no memory, too much, or a part of a page.
    #[error("{found} bytes of guest memory: whole pages, and at most {limit_bytes} bytes")]
    MemoryBytes {
        /// The file's.
        found: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// More pages than the guest's memory has.
    #[error("{found} pages of a guest memory of {memory_bytes} bytes")]
    Pages {
        /// The file's.
        found: u32,
        /// Of the guest's memory.
        memory_bytes: u64,
    },
    /// The state is longer than any can be.
    #[error("{found} bytes of state of vCPUs and devices; the limit is {limit_bytes}")]
    StateBytes {
        /// The file's.
        found: u64,
        /// [`MAX_STATE_BYTES`].
        limit_bytes: u64,
    },
    /// It was cut off, or something was appended.
    #[error("the file has {actual_bytes} bytes; by its header it has {expected_bytes}")]
    Length {
        /// By the header.
        expected_bytes: usize,
        /// The file's.
        actual_bytes: usize,
    },
}
