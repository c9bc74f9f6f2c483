//! What a signal handler finds while tiles are live, and what it can do to it.
#![allow(unsafe_code, reason = "signal frames are read and changed")]

use std::arch::asm;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::component::{TILEDATA, TILEDATA_BIT};
use crate::cpuid::Layout;
use crate::trap;

/// FP_XSTATE_MAGIC1 and FP_XSTATE_MAGIC2 (arch/x86/include/uapi/asm/sigcontext.h).
pub const MAGIC: [u32; 2] = [0x4650_5853, 0x4650_5845];
/// Bytes that are enough for any frame's area.
const ROOM: usize = 64 << 10;

/// What the handler does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Deed {
    /// Looks only.
    Look,
    /// Releases the tiles: its own, not those of what it interrupts.
    Release,
    /// Flips the bits of the first byte of tile 0 in the frame.
    Flip,
    /// Clears XSTATE_BV\[18\] in the frame.
    Clear,
}

/// What the handler saw.
#[derive(Debug)]
pub struct Frame {
    /// The XSAVE area of the frame, with the second magic number behind it.
    pub area: Vec<u8>,
    /// Where it was.
    pub address: u64,
    /// XGETBV with ECX = 1 at the start of the handler.
    pub xinuse: u64,
}

static COPY: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static SIZE: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static XINUSE: AtomicU64 = AtomicU64::new(0);
static DEED: AtomicU32 = AtomicU32::new(0);
static TILES_AT: AtomicUsize = AtomicUsize::new(0);

/// Handles SIGTRAP while `interrupted` runs, and gives what the handler saw. One at a time.
pub fn watch(deed: Deed, on_alternate_stack: bool, interrupted: impl FnOnce()) -> Frame {
    let mut area = vec![0; ROOM];
    COPY.store(area.as_mut_ptr(), Ordering::SeqCst);
    SIZE.store(0, Ordering::SeqCst);
    DEED.store(deed as u32, Ordering::SeqCst);
    let place = Layout::here().place(TILEDATA).unwrap();
    TILES_AT.store(place.offset, Ordering::SeqCst);
    if on_alternate_stack {
        trap::set_handler_on_stack(libc::SIGTRAP, on_trap);
    } else {
        trap::set_handler(libc::SIGTRAP, on_trap);
    }
    interrupted();
    COPY.store(std::ptr::null_mut(), Ordering::SeqCst);
    area.truncate(SIZE.load(Ordering::SeqCst));
    Frame {
        area,
        address: ADDRESS.load(Ordering::SeqCst),
        xinuse: XINUSE.load(Ordering::SeqCst),
    }
}

extern "C" fn on_trap(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    XINUSE.store(xgetbv_1(), Ordering::SeqCst);
    // SAFETY: The third argument of an SA_SIGINFO handler is the interrupted context.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let area = context.uc_mcontext.fpregs.cast::<u8>();
    ADDRESS.store(area as u64, Ordering::SeqCst);
    let copy = COPY.load(Ordering::SeqCst);
    if area.is_null() || copy.is_null() {
        return;
    }
    // SAFETY: `fpregs` points to an area of 512 bytes at least.
    let description = unsafe { area.add(464) }.cast::<[u32; 12]>();
    // SAFETY: The kernel describes what is behind the area in its bytes 464 to 511, of which 480 to 483
    // are the size; they are 48 bytes within the 512.
    let words = unsafe { description.read_unaligned() };
    let size = if words[0] == MAGIC[0] {
        words[4] as usize + 4
    } else {
        512
    };
    if size > ROOM {
        return;
    }
    // SAFETY: The frame has so many bytes, by its own description; `copy` has `ROOM`, and is not the frame.
    unsafe { std::ptr::copy_nonoverlapping(area, copy, size) };
    SIZE.store(size, Ordering::SeqCst);
    let deed = DEED.load(Ordering::SeqCst);
    if deed == Deed::Release as u32 {
        // SAFETY: TILERELEASE exists where tiles do; the handler has none that it needs.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    } else if deed == Deed::Flip as u32 {
        let at = TILES_AT.load(Ordering::SeqCst);
        if at < size {
            // SAFETY: The byte is in the frame, by the check.
            let byte = unsafe { area.add(at) };
            // SAFETY: The frame is this handler's to change, and nothing else refers to it.
            let byte = unsafe { &mut *byte };
            *byte = !*byte;
        }
    } else if deed == Deed::Clear as u32 && size > 576 {
        // SAFETY: The header is in the frame, by the check.
        let header = unsafe { area.add(512) }.cast::<u64>();
        // SAFETY: As above; the kernel aligns the area to 64 bytes.
        unsafe { *header &= !TILEDATA_BIT };
    }
}

fn xgetbv_1() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: XGETBV with ECX = 1 exists where XSAVEC does, and so where tiles do.
    unsafe {
        asm!("xgetbv", in("ecx") 1, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Gives this thread an alternate signal stack of so many bytes, for good; the errno if the kernel refuses.
///
/// # Errors
///
/// The errno.
pub fn alternate_stack(bytes: usize) -> Result<std::ops::Range<u64>, i32> {
    let stack = vec![0_u8; bytes].leak();
    let range = stack.as_ptr_range();
    let description = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: bytes,
    };
    // SAFETY: The stack is leaked, so that it lives as long as the process and is nobody else's.
    let result = unsafe { libc::sigaltstack(&raw const description, std::ptr::null_mut()) };
    if result == 0 {
        Ok(range.start as u64..range.end as u64)
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}
