//! Guest memory, and which of its pages are worth saving.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// The most memory that this VMM gives to a guest.
pub const MAX_MEMORY_BYTES: u64 = 256 << 20;

/// The pages of a guest's memory that are not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Bytes of memory in all.
    pub(crate) memory_bytes: u64,
    /// Which pages, ascending.
    pub(crate) numbers: Vec<u32>,
    /// Their content, one after the other.
    pub(crate) content: Vec<u8>,
}

impl Pages {
    /// Bytes of guest memory in all, zero pages included.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// How many pages are not zero.
    #[must_use]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether all of memory is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Each page with its number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.numbers
            .iter()
            .copied()
            .zip(self.content.chunks_exact(PAGE_BYTES))
    }

    /// The numbers of the pages that are not zero, whether or not the guest runs.
    pub(crate) fn nonzero(
        memory: &GuestMemoryMmap,
        memory_bytes: u64,
    ) -> Result<Vec<u32>, MemoryError> {
        let mut page = [0; PAGE_BYTES];
        let mut numbers = Vec::new();
        for (number, address) in (0..).zip((0..memory_bytes).step_by(PAGE_BYTES)) {
            // The beginning of most of them says it already.
            let first: u64 = memory.read_obj(GuestAddress(address))?;
            if first == 0 {
                memory.read_slice(&mut page, GuestAddress(address))?;
            }
            if first != 0 || page != [0; PAGE_BYTES] {
                numbers.push(number);
            }
        }
        Ok(numbers)
    }

    /// Reads the memory of a guest that does not run.
    pub(crate) fn read(memory: &GuestMemoryMmap, memory_bytes: u64) -> Result<Self, MemoryError> {
        let mut pages = Self {
            memory_bytes,
            ..Self::default()
        };
        let mut page = [0; PAGE_BYTES];
        for (number, address) in (0..memory_bytes).step_by(PAGE_BYTES).enumerate() {
            memory.read_slice(&mut page, GuestAddress(address))?;
            if page != [0; PAGE_BYTES] {
                let number = u32::try_from(number).map_err(|_| MemoryError::TooLarge {
                    bytes: memory_bytes,
                    limit_bytes: MAX_MEMORY_BYTES,
                })?;
                pages.numbers.push(number);
                pages.content.extend_from_slice(&page);
            }
        }
        Ok(pages)
    }

    /// Writes them to memory that is zero.
    pub(crate) fn write(&self, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
        for (number, content) in self.iter() {
            let address = u64::from(number).saturating_mul(PAGE_BYTES as u64);
            memory.write_slice(content, GuestAddress(address))?;
        }
        Ok(())
    }
}

/// Memory of `bytes` bytes from guest address 0, all zero.
pub(crate) fn allocate(bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let len = usize::try_from(bytes)
        .ok()
        .filter(|_| bytes <= MAX_MEMORY_BYTES)
        .ok_or(MemoryError::TooLarge {
            bytes,
            limit_bytes: MAX_MEMORY_BYTES,
        })?;
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)])
        .map_err(|error| MemoryError::Allocate { bytes, error })
}

/// Where the kernel finds the memory in this process.
pub(crate) fn host_address(memory: &GuestMemoryMmap) -> Result<u64, MemoryError> {
    Ok(memory.get_host_address(GuestAddress(0))?.addr() as u64)
}

/// Guest memory could not be had, read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// More than this VMM gives to a guest.
    #[error("{bytes} bytes of guest memory; the limit is {limit_bytes}")]
    TooLarge {
        /// Asked for.
        bytes: u64,
        /// [`MAX_MEMORY_BYTES`].
        limit_bytes: u64,
    },
    /// There is no such memory.
    #[error("{bytes} bytes of guest memory: {error}")]
    Allocate {
        /// Asked for.
        bytes: u64,
        /// By vm-memory.
        error: vm_memory::mmap::FromRangesError,
    },
    /// An address outside of it.
    #[error("guest memory: {0}")]
    Access(#[from] GuestMemoryError),
}
