//! Vector registers that keep their values while other processes use them: AVX-512 where the processor has it, else AVX; and PKRU.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

use crate::report::Event;
use crate::worker::{Outcome, Work};

/// Bytes of 32 registers of 64 bytes.
const BYTES: usize = 2048;
/// System calls between load and store.
const CALLS: u64 = 3;

/// The registers' contents, one after the other.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(align(64))]
struct Registers([u8; BYTES]);

/// A process with values in its vector registers.
pub struct Vectors {
    seed: u64,
    /// ZMM and opmask registers, or else YMM.
    wide: bool,
    keys: bool,
}

impl Vectors {
    /// With the widest registers that there are. Says what is missing.
    pub fn start(process: u8) -> Result<Self, &'static str> {
        let wide = is_x86_feature_detected!("avx512f");
        if !wide && !is_x86_feature_detected!("avx") {
            return Err("AVX");
        }
        #[allow(unused_unsafe, reason = "older compilers want it")]
        // SAFETY: Every processor with AVX has CPUID with leaf 7.
        let leaf_7 = unsafe { __cpuid_count(7, 0) };
        Ok(Self {
            seed: u64::from(process) << 56,
            wide,
            // OSPKE.
            keys: leaf_7.ecx & 1 << 4 != 0,
        })
    }

    /// Bytes of a register, and how many of those there are.
    fn shape(&self) -> (usize, usize) {
        if self.wide { (64, 32) } else { (32, 16) }
    }
}

impl Work for Vectors {
    fn round(&mut self, round: u64) -> std::io::Result<Outcome> {
        let mut state = self.seed | round;
        let mut next = || {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        };
        let mut expected = Registers([0; BYTES]);
        for bytes in expected.0.chunks_exact_mut(8) {
            bytes.copy_from_slice(&next().to_le_bytes());
        }
        let mut found = Registers([0; BYTES]);
        let mask = (next() & 0xffff) as u32;
        let mut mask_found = mask;
        // Neither reading nor writing with keys 2 to 15, which no page has.
        let rights = (next() as u32) & 0xffff_fff0;
        if self.keys {
            write_pkru(rights);
        }
        if self.wide {
            mask_found = keep_zmm(&expected, mask, &mut found);
        } else {
            keep_ymm(&expected, &mut found);
        }
        let failed = |what| Ok(Outcome::Wrong(Event::Failed { round, what }));
        if self.keys {
            let found = read_pkru();
            write_pkru(0);
            if found != rights {
                return failed(format!("PKRU is {found:#x}, and not {rights:#x}"));
            }
        }
        if mask_found != mask {
            return failed(format!("k3 is {mask_found:#x}, and not {mask:#x}"));
        }
        let (bytes, count) = self.shape();
        let places = 0..bytes * count;
        let wrong = |at: &usize| found.0[*at] != expected.0[*at];
        Ok(match places.clone().find(wrong) {
            None => Outcome::Right,
            Some(at) => Outcome::Wrong(Event::Failed {
                round,
                what: format!(
                    "vector register {} byte {} is {:#x}, and not {:#x}; {} bytes are wrong",
                    at / bytes,
                    at % bytes,
                    found.0[at],
                    expected.0[at],
                    places.filter(wrong).count()
                ),
            }),
        })
    }
}

macro_rules! each {
    (load zmm $($n:literal)*) => { concat!($("vmovdqu64 zmm", $n, ", [r8 + 64*", $n, "]\n"),*) };
    (store zmm $($n:literal)*) => { concat!($("vmovdqu64 [r9 + 64*", $n, "], zmm", $n, "\n"),*) };
    (load ymm $($n:literal)*) => { concat!($("vmovdqu ymm", $n, ", [r8 + 32*", $n, "]\n"),*) };
    (store ymm $($n:literal)*) => { concat!($("vmovdqu [r9 + 32*", $n, "], ymm", $n, "\n"),*) };
}

/// Loads, gives way R10 times by sched_yield(2), which changes RAX, RCX and R11 only, and stores. A macro, because an assembler text
/// is a literal.
macro_rules! keep {
    ($values:expr, $found:expr, [$($text:expr),* $(,)?], $($more:tt)*) => {
        asm!(
            $($text,)*
            $($more)*
            in("r8") $values.0.as_ptr(),
            in("r9") $found.0.as_mut_ptr(),
            inout("r10") CALLS => _,
            out("rax") _, out("rcx") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        )
    };
}

fn keep_zmm(values: &Registers, mask: u32, found: &mut Registers) -> u32 {
    let mask_found: u32;
    // SAFETY: 2,048 bytes are read at R8 and written at R9, which the areas have. The system call takes no arguments and no memory.
    // The compiler uses ZMM16 and above, and opmask registers, only in functions with AVX-512; the others are named.
    unsafe {
        keep!(
            values,
            found,
            [
                each!(load zmm 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
                "kmovw k3, {mask:e}",
                "2: mov eax, 24",
                "syscall",
                "dec r10",
                "jnz 2b",
                // And for a while without the kernel.
                "mov eax, 3000",
                "3: dec eax",
                "jnz 3b",
                "kmovw {mask:e}, k3",
                each!(store zmm 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
                "vzeroupper",
            ],
            mask = inout(reg) mask => mask_found,
        );
    }
    mask_found
}

fn keep_ymm(values: &Registers, found: &mut Registers) {
    // SAFETY: 512 bytes are read at R8 and written at R9, which the areas have; the rest as in `keep_zmm`.
    unsafe {
        keep!(
            values,
            found,
            [
                each!(load ymm 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
                "2: mov eax, 24",
                "syscall",
                "dec r10",
                "jnz 2b",
                // And for a while without the kernel.
                "mov eax, 3000",
                "3: dec eax",
                "jnz 3b",
                each!(store ymm 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
                "vzeroupper",
            ],
        );
    }
}

fn read_pkru() -> u32 {
    let value: u32;
    // SAFETY: OSPKE is set, and ECX is 0; the instruction changes EAX and EDX only.
    unsafe {
        asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    value
}

fn write_pkru(value: u32) {
    // SAFETY: OSPKE is set, and ECX and EDX are 0. No page of this process has another key than 0, whose rights stay.
    unsafe {
        asm!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0, options(nostack, preserves_flags));
    }
}
