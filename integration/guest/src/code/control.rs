//! The part of a round that all bodies share: MXCSR, the x87 control word and the x87 stack.
//!
//! R8 is the accumulator; RAX and RDX are free; R12 and R13 hold the masks of [`convert`].

/// Loads MXCSR, the x87 unit, the accumulator and the masks; the number of rounds into RCX.
macro_rules! load_control {
    () => {
        concat!(
            "ldmxcsr [rdi + {IN_MXCSR}]\n",
            "fninit\n",
            "fldcw [rdi + {IN_FCW}]\n",
            "fild qword ptr [rdi + {IN_X87}]\n",
            "fild qword ptr [rdi + {IN_X87} + 8]\n",
            "fild qword ptr [rdi + {IN_X87} + 16]\n",
            "fild qword ptr [rdi + {IN_X87} + 24]\n",
            "fild qword ptr [rdi + {IN_X87} + 32]\n",
            "fild qword ptr [rdi + {IN_X87} + 40]\n",
            "fild qword ptr [rdi + {IN_X87} + 48]\n",
            "fild qword ptr [rdi + {IN_X87} + 56]\n",
            "mov r8, [rdi + {ACC}]\n",
            "mov rcx, [rdi + {ROUNDS}]\n",
            "mov r12, 0x800fffffffffffff\n",
            "mov r13, 0x4270000000000000\n",
        )
    };
}

/// Mixes MXCSR and the x87 control word into the accumulator, steps the rounding control of both,
/// and turns the x87 stack by one.
macro_rules! mix_control {
    () => {
        concat!(
            "stmxcsr [rdi + {TMP}]\n",
            "mov eax, [rdi + {TMP}]\n",
            "rol r8, 13\n",
            "xor r8, rax\n",
            "lea edx, [rax + 0x2000]\n",
            "and edx, 0x6000\n",
            "and eax, 0xffff9fff\n",
            "or eax, edx\n",
            "mov [rdi + {TMP}], eax\n",
            "ldmxcsr [rdi + {TMP}]\n",
            "fnstcw [rdi + {TMP}]\n",
            "movzx eax, word ptr [rdi + {TMP}]\n",
            "rol r8, 7\n",
            "add r8, rax\n",
            "lea edx, [rax + 0x400]\n",
            "and edx, 0xc00\n",
            "and eax, 0xf3ff\n",
            "or eax, edx\n",
            "mov [rdi + {TMP}], ax\n",
            "fldcw [rdi + {TMP}]\n",
            "fincstp\n",
        )
    };
}

/// Makes a double of RAX that has 12 bits behind the point, rounds it to an integer as MXCSR says,
/// and adds that to the accumulator.
macro_rules! convert {
    () => {
        concat!(
            "and rax, r12\n",
            "or rax, r13\n",
            "mov [rdi + {TMP}], rax\n",
            "cvtsd2si rax, qword ptr [rdi + {TMP}]\n",
            "add r8, rax\n",
        )
    };
}

/// Lets time go by.
macro_rules! pause {
    () => {
        concat!(
            "mov r11, [rdi + {PAUSES}]\n",
            "3:\n",
            "pause\n",
            "dec r11\n",
            "jnz 3b\n",
        )
    };
}

/// Stores what [`load_control`] loaded, says that the result is there, and ends the body.
macro_rules! store_control {
    () => {
        concat!(
            "mov [rdi + {OUT_ACC}], r8\n",
            "stmxcsr [rdi + {OUT_MXCSR}]\n",
            "fnstcw [rdi + {OUT_FCW}]\n",
            "fnstsw [rdi + {OUT_FSW}]\n",
            "fistp qword ptr [rdi + {OUT_X87}]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 8]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 16]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 24]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 32]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 40]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 48]\n",
            "fistp qword ptr [rdi + {OUT_X87} + 56]\n",
            "mov dword ptr [rdi + {DONE}], 1\n",
            "ud2\n",
        )
    };
}

/// `global_asm!` with the offsets of the area that the shared parts use.
macro_rules! body {
    ($start:literal, $end:literal, [$($line:expr),* $(,)?] $(, $name:ident = $value:expr)* $(,)?) => {
        core::arch::global_asm!(
            concat!(".pushsection .rodata.", $start, ",\"a\""),
            ".balign 64",
            concat!(".global ", $start),
            concat!($start, ":"),
            $($line,)*
            concat!(".global ", $end),
            concat!($end, ":"),
            ".popsection",
            IN_MXCSR = const crate::area::IN_MXCSR,
            IN_FCW = const crate::area::IN_FCW,
            IN_X87 = const crate::area::IN_X87,
            ACC = const crate::area::ACC,
            ROUNDS = const crate::area::ROUNDS,
            TMP = const crate::area::TMP,
            PAUSES = const crate::area::PAUSES,
            OUT_ACC = const crate::area::OUT_ACC,
            OUT_MXCSR = const crate::area::OUT_MXCSR,
            OUT_FCW = const crate::area::OUT_FCW,
            OUT_FSW = const crate::area::OUT_FSW,
            OUT_X87 = const crate::area::OUT_X87,
            DONE = const crate::area::DONE,
            IN = const crate::area::IN_VECTORS,
            OUT = const crate::area::OUT_VECTORS,
            $($name = const $value,)*
        );
    };
}

pub(super) use {body, convert, load_control, mix_control, pause, store_control};
