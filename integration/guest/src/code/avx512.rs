//! The AVX-512 body: ZMM0 to ZMM31 and k0 to k7 are all state, none is scratch.

use super::control::{body, convert, load_control, mix_control, pause, store_control};
use crate::area;

/// `zmm[a] = (zmm[a] + zmm[b]) <<< rotation`, by 64-bit lanes.
#[rustfmt::skip]
macro_rules! add {
    ($a:literal, $b:literal, $rotation:literal) => {
        concat!(
            "vpaddq zmm", $a, ", zmm", $a, ", zmm", $b, "\n",
            "vprolq zmm", $a, ", zmm", $a, ", ", $rotation, "\n",
        )
    };
}

/// `zmm[a] += zmm[b]` in the bytes that opmask `k` selects.
#[rustfmt::skip]
macro_rules! masked {
    ($a:literal, $b:literal, $k:literal) => {
        concat!(
            "vpaddb zmm", $a, " {{k", $k, "}}, zmm", $a, ", zmm", $b, "\n",
        )
    };
}

/// `k[a] = ((k[a] <<< rotation) + accumulator) + k[b]`.
#[rustfmt::skip]
macro_rules! opmask {
    ($a:literal, $b:literal, $rotation:literal) => {
        concat!(
            "kmovq rdx, k", $a, "\n",
            "rol rdx, ", $rotation, "\n",
            "add rdx, r8\n",
            "kmovq k", $a, ", rdx\n",
            "kaddq k", $a, ", k", $a, ", k", $b, "\n",
        )
    };
}

/// Loads or stores one vector register.
#[rustfmt::skip]
macro_rules! load {
    ($a:literal) => {
        concat!("vmovdqu64 zmm", $a, ", [rdi + {IN} + 64 * ", $a, "]\n")
    };
}
#[rustfmt::skip]
macro_rules! store {
    ($a:literal) => {
        concat!("vmovdqu64 [rdi + {OUT} + 64 * ", $a, "], zmm", $a, "\n")
    };
}
#[rustfmt::skip]
macro_rules! load_opmask {
    ($a:literal) => {
        concat!("kmovq k", $a, ", [rdi + {IN_OPMASK} + 8 * ", $a, "]\n")
    };
}
#[rustfmt::skip]
macro_rules! store_opmask {
    ($a:literal) => {
        concat!("kmovq [rdi + {OUT_OPMASK} + 8 * ", $a, "], k", $a, "\n")
    };
}

#[rustfmt::skip]
body!(
    "amx_guest_avx512", "amx_guest_avx512_end",
    [
        load_control!(),
        load!(0), load!(1), load!(2), load!(3), load!(4), load!(5), load!(6), load!(7),
        load!(8), load!(9), load!(10), load!(11), load!(12), load!(13), load!(14), load!(15),
        load!(16), load!(17), load!(18), load!(19), load!(20), load!(21), load!(22), load!(23),
        load!(24), load!(25), load!(26), load!(27), load!(28), load!(29), load!(30), load!(31),
        load_opmask!(0), load_opmask!(1), load_opmask!(2), load_opmask!(3),
        load_opmask!(4), load_opmask!(5), load_opmask!(6), load_opmask!(7),
        ".balign 16, 0x90",
        "2:",
        mix_control!(),
        "vmovq rax, xmm0",
        convert!(),
        "kmovq rdx, k0",
        "xor r8, rdx",
        opmask!(0, 1, 3), opmask!(1, 2, 8), opmask!(2, 3, 13), opmask!(3, 4, 18),
        opmask!(4, 5, 23), opmask!(5, 6, 28), opmask!(6, 7, 33), opmask!(7, 0, 38),
        "mov [rdi + {TMP}], r8",
        "vpaddq zmm0, zmm0, qword ptr [rdi + {TMP}]{{1to8}}",
        add!(0, 1, 6), add!(1, 2, 17), add!(2, 3, 28), add!(3, 4, 39),
        add!(4, 5, 50), add!(5, 6, 61), add!(6, 7, 9), add!(7, 8, 20),
        add!(8, 9, 31), add!(9, 10, 42), add!(10, 11, 53), add!(11, 12, 1),
        add!(12, 13, 12), add!(13, 14, 23), add!(14, 15, 34), add!(15, 16, 45),
        add!(16, 17, 56), add!(17, 18, 4), add!(18, 19, 15), add!(19, 20, 26),
        add!(20, 21, 37), add!(21, 22, 48), add!(22, 23, 59), add!(23, 24, 7),
        add!(24, 25, 18), add!(25, 26, 29), add!(26, 27, 40), add!(27, 28, 51),
        add!(28, 29, 62), add!(29, 30, 10), add!(30, 31, 21), add!(31, 0, 32),
        masked!(3, 13, 1), masked!(7, 17, 2), masked!(11, 21, 3), masked!(15, 25, 4),
        masked!(19, 29, 5), masked!(23, 1, 6), masked!(27, 5, 7),
        "valignq zmm9, zmm9, zmm9, 3",
        pause!(),
        "dec rcx",
        "jnz 2b",
        store!(0), store!(1), store!(2), store!(3), store!(4), store!(5), store!(6), store!(7),
        store!(8), store!(9), store!(10), store!(11), store!(12), store!(13), store!(14), store!(15),
        store!(16), store!(17), store!(18), store!(19), store!(20), store!(21), store!(22), store!(23),
        store!(24), store!(25), store!(26), store!(27), store!(28), store!(29), store!(30), store!(31),
        store_opmask!(0), store_opmask!(1), store_opmask!(2), store_opmask!(3),
        store_opmask!(4), store_opmask!(5), store_opmask!(6), store_opmask!(7),
        store_control!(),
    ],
    IN_OPMASK = area::IN_OPMASK,
    OUT_OPMASK = area::OUT_OPMASK,
);
