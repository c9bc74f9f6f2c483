//! Code that is written and then run, again and again.
#![allow(unsafe_code, reason = "bytes are run as code")]

use crate::arena::{Arena, Piece};

/// Writes a function to `at` bytes into the piece that returns `value`, and calls it.
pub fn write_and_call(arena: &mut Arena, piece: Piece, at: usize, value: u32) -> u32 {
    // MOV EAX, imm32; RET.
    let [a, b, c, d] = value.to_le_bytes();
    arena.bytes_mut(piece)[at..][..6].copy_from_slice(&[0xb8, a, b, c, d, 0xc3]);
    let address = (usize::try_from(piece.address()).unwrap() + at) as *const ();
    // SAFETY: A pointer to a function of this type is an address of code.
    let function =
        unsafe { std::mem::transmute::<*const (), extern "sysv64" fn() -> u32>(address) };
    // The bytes there, within an arena and so executable, are a function of that type, which touches no
    // memory: the call is sound whichever value it returns.
    function()
}
