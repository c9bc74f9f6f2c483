//! The bodies for hosts without AVX-512: YMM0 to YMM15, or XMM0 to XMM15.

use super::control::{body, convert, load_control, mix_control, pause, store_control};
use crate::area;

/// `ymm[a] = shuffle(ymm[a] + ymm[b])`.
#[rustfmt::skip]
macro_rules! avx2 {
    ($a:literal, $b:literal) => {
        concat!(
            "vpaddq ymm", $a, ", ymm", $a, ", ymm", $b, "\n",
            "vpshufb ymm", $a, ", ymm", $a, ", [rdi + {SHUFFLE}]\n",
        )
    };
}

/// `xmm[a] = shuffle(xmm[a] + xmm[b])`.
#[rustfmt::skip]
macro_rules! sse {
    ($a:literal, $b:literal) => {
        concat!(
            "paddq xmm", $a, ", xmm", $b, "\n",
            "pshufb xmm", $a, ", [rdi + {SHUFFLE}]\n",
        )
    };
}

/// Loads or stores one register with the given instruction.
#[rustfmt::skip]
macro_rules! load {
    ($mov:literal, $register:literal, $a:literal) => {
        concat!($mov, " ", $register, $a, ", [rdi + {IN} + 64 * ", $a, "]\n")
    };
}
#[rustfmt::skip]
macro_rules! store {
    ($mov:literal, $register:literal, $a:literal) => {
        concat!(
            $mov, " [rdi + {OUT} + 64 * ", $a, "], ", $register, $a, "\n",
        )
    };
}

#[rustfmt::skip]
body!(
    "amx_guest_avx2", "amx_guest_avx2_end",
    [
        load_control!(),
        load!("vmovdqu", "ymm", 0), load!("vmovdqu", "ymm", 1), load!("vmovdqu", "ymm", 2),
        load!("vmovdqu", "ymm", 3), load!("vmovdqu", "ymm", 4), load!("vmovdqu", "ymm", 5),
        load!("vmovdqu", "ymm", 6), load!("vmovdqu", "ymm", 7), load!("vmovdqu", "ymm", 8),
        load!("vmovdqu", "ymm", 9), load!("vmovdqu", "ymm", 10), load!("vmovdqu", "ymm", 11),
        load!("vmovdqu", "ymm", 12), load!("vmovdqu", "ymm", 13), load!("vmovdqu", "ymm", 14),
        load!("vmovdqu", "ymm", 15),
        ".balign 16, 0x90",
        "2:",
        mix_control!(),
        "vmovq rax, xmm0",
        convert!(),
        "mov [rdi + {TMP}], r8",
        "mov [rdi + {TMP} + 8], r8",
        "mov [rdi + {TMP} + 16], r8",
        "mov [rdi + {TMP} + 24], r8",
        "vpaddq ymm0, ymm0, [rdi + {TMP}]",
        avx2!(0, 1), avx2!(1, 2), avx2!(2, 3), avx2!(3, 4),
        avx2!(4, 5), avx2!(5, 6), avx2!(6, 7), avx2!(7, 8),
        avx2!(8, 9), avx2!(9, 10), avx2!(10, 11), avx2!(11, 12),
        avx2!(12, 13), avx2!(13, 14), avx2!(14, 15), avx2!(15, 0),
        pause!(),
        "dec rcx",
        "jnz 2b",
        store!("vmovdqu", "ymm", 0), store!("vmovdqu", "ymm", 1), store!("vmovdqu", "ymm", 2),
        store!("vmovdqu", "ymm", 3), store!("vmovdqu", "ymm", 4), store!("vmovdqu", "ymm", 5),
        store!("vmovdqu", "ymm", 6), store!("vmovdqu", "ymm", 7), store!("vmovdqu", "ymm", 8),
        store!("vmovdqu", "ymm", 9), store!("vmovdqu", "ymm", 10), store!("vmovdqu", "ymm", 11),
        store!("vmovdqu", "ymm", 12), store!("vmovdqu", "ymm", 13), store!("vmovdqu", "ymm", 14),
        store!("vmovdqu", "ymm", 15),
        store_control!(),
    ],
    SHUFFLE = area::SHUFFLE,
);

#[rustfmt::skip]
body!(
    "amx_guest_sse", "amx_guest_sse_end",
    [
        load_control!(),
        load!("movdqu", "xmm", 0), load!("movdqu", "xmm", 1), load!("movdqu", "xmm", 2),
        load!("movdqu", "xmm", 3), load!("movdqu", "xmm", 4), load!("movdqu", "xmm", 5),
        load!("movdqu", "xmm", 6), load!("movdqu", "xmm", 7), load!("movdqu", "xmm", 8),
        load!("movdqu", "xmm", 9), load!("movdqu", "xmm", 10), load!("movdqu", "xmm", 11),
        load!("movdqu", "xmm", 12), load!("movdqu", "xmm", 13), load!("movdqu", "xmm", 14),
        load!("movdqu", "xmm", 15),
        ".balign 16, 0x90",
        "2:",
        mix_control!(),
        "movq rax, xmm0",
        convert!(),
        "mov [rdi + {TMP}], r8",
        "mov [rdi + {TMP} + 8], r8",
        "mov [rdi + {TMP} + 16], r8",
        "mov [rdi + {TMP} + 24], r8",
        "paddq xmm0, [rdi + {TMP}]",
        sse!(0, 1), sse!(1, 2), sse!(2, 3), sse!(3, 4),
        sse!(4, 5), sse!(5, 6), sse!(6, 7), sse!(7, 8),
        sse!(8, 9), sse!(9, 10), sse!(10, 11), sse!(11, 12),
        sse!(12, 13), sse!(13, 14), sse!(14, 15), sse!(15, 0),
        pause!(),
        "dec rcx",
        "jnz 2b",
        store!("movdqu", "xmm", 0), store!("movdqu", "xmm", 1), store!("movdqu", "xmm", 2),
        store!("movdqu", "xmm", 3), store!("movdqu", "xmm", 4), store!("movdqu", "xmm", 5),
        store!("movdqu", "xmm", 6), store!("movdqu", "xmm", 7), store!("movdqu", "xmm", 8),
        store!("movdqu", "xmm", 9), store!("movdqu", "xmm", 10), store!("movdqu", "xmm", 11),
        store!("movdqu", "xmm", 12), store!("movdqu", "xmm", 13), store!("movdqu", "xmm", 14),
        store!("movdqu", "xmm", 15),
        store_control!(),
    ],
    SHUFFLE = area::SHUFFLE,
);
