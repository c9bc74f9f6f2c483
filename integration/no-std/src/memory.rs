//! memcpy, memmove, memset, memcmp and bcmp, with the processor's string instructions: loops of Rust
//! would be compiled to calls of these very functions.

use core::arch::asm;

/// # Safety
///
/// As memcpy of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
///
/// As memmove of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: `to` does not start within the source, so the copy upwards reads before it writes.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller vouches for both ranges. `len` is not 0 here, so the last bytes exist; the
    // copy goes downwards, and the direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            options(nostack));
    }
    to
}

/// # Safety
///
/// As memset of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("eax") value,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
///
/// As memcmp of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let order: i32;
    // SAFETY: the caller vouches for both ranges. With `len` 0 nothing is read: RCX is tested first,
    // and the flags, equal by the XOR before, are kept.
    unsafe {
        asm!(
            "xor eax, eax",
            "repe cmpsb",
            "seta al",
            "setb cl",
            "movzx ecx, cl",
            "sub eax, ecx",
            inout("rcx") len => _,
            // CMPSB subtracts what RDI points to from what RSI points to.
            inout("rsi") a => _,
            inout("rdi") b => _,
            out("eax") order,
            options(nostack, readonly),
        );
    }
    order
}

/// # Safety
///
/// As bcmp of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller vouches for both ranges.
    unsafe { memcmp(a, b, len) }
}
