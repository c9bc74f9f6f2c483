//! Memory that this process and a guest see at the same addresses.
#![allow(unsafe_code, reason = "memory is mapped and shared with a guest")]

use std::ptr::NonNull;

/// Alignment, and so the pages that a guest maps it with.
const LARGE_PAGE: usize = 2 << 20;
/// Alignment of every allocation: that of an XSAVE area.
const ALIGNMENT: usize = 64;

/// A piece of zeroed memory, aligned to 2 MiB, that is given out from its start.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    mapping: NonNull<u8>,
    mapping_size: usize,
    size: usize,
    used: usize,
}

/// A part of an arena, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    offset: usize,
    size: usize,
    address: u64,
}

impl Piece {
    /// Its address, here and in the guest.
    #[must_use]
    pub fn address(self) -> u64 {
        self.address
    }

    /// Bytes from the arena's start: the guest's physical address.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.offset as u64
    }
}

impl Arena {
    /// Maps so many 2 MiB pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        let size = pages * LARGE_PAGE;
        let mapping_size = size + LARGE_PAGE;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: A new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let mapping =
            unsafe { libc::mmap(std::ptr::null_mut(), mapping_size, protection, flags, -1, 0) };
        assert_ne!(mapping, libc::MAP_FAILED, "no memory for an arena");
        let mapping = NonNull::new(mapping.cast::<u8>()).unwrap();
        // SAFETY: Less than a large page further is within the mapping, which is one page longer.
        let start = unsafe { mapping.add(mapping.as_ptr().align_offset(LARGE_PAGE)) };
        Self {
            start,
            mapping,
            mapping_size,
            size,
            used: 0,
        }
    }

    /// The next `size` bytes.
    pub fn take(&mut self, size: usize) -> Piece {
        self.take_aligned(size, ALIGNMENT)
    }

    /// The next `size` bytes at a multiple of `alignment`.
    pub fn take_aligned(&mut self, size: usize, alignment: usize) -> Piece {
        let offset = self.used.next_multiple_of(alignment);
        assert!(offset + size <= self.size, "the arena is full");
        self.used = offset + size;
        Piece {
            offset,
            size,
            address: self.address() + offset as u64,
        }
    }

    /// Address of its first byte, here and in a guest.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Bytes of it.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// What is in a piece.
    #[must_use]
    pub fn bytes(&self, piece: Piece) -> &[u8] {
        self.check(piece);
        // SAFETY: The offset is within the mapping, by `check`.
        let start = unsafe { self.start.add(piece.offset) };
        // SAFETY: `size` bytes from there are mapped, readable and initialised (anonymous memory is
        // zero) for as long as `self`. They change only through `bytes_mut` and while a trial or a
        // guest runs, both of which borrow the arena mutably.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), piece.size) }
    }

    /// What is in a piece, to be changed.
    pub fn bytes_mut(&mut self, piece: Piece) -> &mut [u8] {
        self.check(piece);
        // SAFETY: The offset is within the mapping, by `check`.
        let start = unsafe { self.start.add(piece.offset) };
        // SAFETY: As in `bytes`; `self` is borrowed mutably, so that there is no other reference.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), piece.size) }
    }

    fn check(&self, piece: Piece) {
        assert_eq!(
            piece.address,
            self.address() + piece.offset as u64,
            "a piece of another arena"
        );
        assert!(piece.offset + piece.size <= self.used);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: The mapping was made in `new` with this size, and no reference outlives `self`.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_size) };
    }
}
