//! The tile body: TMM0 to TMM7 and TILECFG are all state.
//!
//! All tiles have the same number of rows, and four bytes in a row for each of them, so any three
//! can be multiplied. RSI is the stride, RBX the scratch rows, R10 the offset of the row after the
//! last.

use super::control::{body, convert, load_control, mix_control, pause, store_control};
use crate::area;

/// One step: a product into tile `c`, then tile `moved` through memory with its rows turned by one
/// and the accumulator mixed in, then a wait.
#[rustfmt::skip]
macro_rules! step {
    ($product:literal, $c:literal, $a:literal, $b:literal, $moved:literal) => {
        concat!(
            $product, " tmm", $c, ", tmm", $a, ", tmm", $b, "\n",
            "tilestored [rbx + rsi*1], tmm", $moved, "\n",
            copy!(0), copy!(8), copy!(16), copy!(24), copy!(32), copy!(40), copy!(48), copy!(56),
            "xor [rbx + 64], r8\n",
            mix_control!(),
            "mov rax, [rbx + 72]\n",
            "add r8, rax\n",
            convert!(),
            pause!(),
            "tileloadd tmm", $moved, ", [rbx + rsi*1 + 64]\n",
        )
    };
}

/// Copies eight bytes of the first scratch row behind the last.
#[rustfmt::skip]
macro_rules! copy {
    ($at:literal) => {
        concat!(
            "mov rax, [rbx + ", $at, "]\nmov [rbx + r10 + ", $at, "], rax\n",
        )
    };
}

/// Loads or stores one tile.
#[rustfmt::skip]
macro_rules! load {
    ($a:literal) => {
        concat!(
            "tileloadd tmm", $a, ", [rdi + rsi*1 + {IN} + 1024 * ", $a, "]\n",
        )
    };
}
#[rustfmt::skip]
macro_rules! store {
    ($a:literal) => {
        concat!(
            "tilestored [rdi + rsi*1 + {OUT} + 1024 * ", $a, "], tmm", $a, "\n",
        )
    };
}

#[rustfmt::skip]
body!(
    "amx_guest_amx", "amx_guest_amx_end",
    [
        load_control!(),
        "ldtilecfg [rdi + {IN_TILECFG}]",
        "mov esi, 64",
        "lea rbx, [rdi + {SCRATCH}]",
        "mov r10, [rdi + {ROWS}]",
        "shl r10, 6",
        load!(0), load!(1), load!(2), load!(3), load!(4), load!(5), load!(6), load!(7),
        ".balign 16, 0x90",
        "2:",
        step!("tdpbssd", 0, 1, 2, 4),
        step!("tdpbuud", 1, 2, 3, 5),
        step!("tdpbsud", 2, 3, 4, 6),
        step!("tdpbusd", 3, 4, 5, 7),
        step!("tdpbssd", 4, 5, 6, 0),
        step!("tdpbuud", 5, 6, 7, 1),
        step!("tdpbsud", 6, 7, 0, 2),
        step!("tdpbusd", 7, 0, 1, 3),
        "dec rcx",
        "jnz 2b",
        store!(0), store!(1), store!(2), store!(3), store!(4), store!(5), store!(6), store!(7),
        "sttilecfg [rdi + {OUT_TILECFG}]",
        store_control!(),
    ],
    ROWS = area::ROWS,
    SCRATCH = area::SCRATCH,
    IN_TILECFG = area::IN_TILECFG,
    OUT_TILECFG = area::OUT_TILECFG,
);
