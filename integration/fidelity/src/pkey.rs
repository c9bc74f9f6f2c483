//! Protection keys of this process.
#![allow(unsafe_code, reason = "system calls and WRPKRU")]

use std::arch::asm;
use std::ffi::c_long;

use crate::arena::Piece;

/// PKEY_DISABLE_ACCESS.
pub const DISABLE_ACCESS: u32 = 1;
/// PKEY_DISABLE_WRITE.
pub const DISABLE_WRITE: u32 = 2;

/// A key of this process. It is never freed.
#[derive(Clone, Copy, Debug)]
pub struct Key(u32);

impl Key {
    /// A new key; `None` where the processor or the kernel has none.
    #[must_use]
    pub fn new() -> Option<Self> {
        // SAFETY: pkey_alloc takes two numbers and touches no memory.
        let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0 as c_long, 0 as c_long) };
        u32::try_from(key).ok().map(Self)
    }

    /// Puts the pages of a piece under this key.
    pub fn protect(self, pages: Piece) {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: The pages are of an arena and stay readable and writable; the key only adds what
        // `restrict` asks for, and its callers touch the pages through system calls alone meanwhile.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pkey_mprotect,
                pages.address(),
                4096_u64,
                protection,
                self.0,
            )
        };
        assert_eq!(result, 0, "pkey_mprotect");
    }

    /// Sets what this thread must not do with pages of this key.
    pub fn restrict(self, rights: u32) {
        let shift = 2 * self.0;
        let before: u32;
        // SAFETY: RDPKRU with ECX = 0 reads a register; there are protection keys, or there were no key.
        unsafe {
            asm!("rdpkru", in("ecx") 0, out("eax") before, out("edx") _, options(nomem, nostack))
        };
        let pkru = before & !(3 << shift) | rights << shift;
        // SAFETY: Only the rights of this key change, under which no memory of Rust's is.
        unsafe { asm!("wrpkru", in("eax") pkru, in("ecx") 0, in("edx") 0, options(nostack)) };
    }
}

/// A system call that reads (write(2)) or writes (read(2)) memory of this process: a byte through a pipe.
/// Gives the errno if the kernel could not.
///
/// # Errors
///
/// The errno.
pub fn kernel_access(at: Piece, write: bool) -> Result<(), i32> {
    let mut ends = [0; 2];
    // SAFETY: pipe writes two numbers to the array.
    let result = unsafe { libc::pipe(ends.as_mut_ptr()) };
    assert_eq!(result, 0, "pipe");
    let byte = 7_u8;
    let address = usize::try_from(at.address()).unwrap() as *mut libc::c_void;
    let result = if write {
        // SAFETY: One byte is read from `byte`.
        let sent = unsafe { libc::write(ends[1], (&raw const byte).cast(), 1) };
        assert_eq!(sent, 1, "write");
        // SAFETY: The kernel writes one byte of an arena, to which nothing refers now, or fails.
        unsafe { libc::read(ends[0], address, 1) }
    } else {
        // SAFETY: The kernel reads one byte of an arena, or fails.
        unsafe { libc::write(ends[1], address, 1) }
    };
    let outcome = if result == 1 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    };
    for end in ends {
        // SAFETY: The descriptors were opened above and are used no more.
        unsafe { libc::close(end) };
    }
    outcome
}
