//! The cases of the kernel's own test of AMX in KVM (tools/testing/selftests/kvm/x86/amx_test.c), in the
//! order of that test: it says its stage at the doorbell, and goes on in whatever VM it finds itself in.
//!
//! At CPL0, with a handler of #NM of its own. RDI is the area, RSI the stride of a tile.

use core::arch::global_asm;

use crate::{area, machine};

/// Says that a stage is reached.
macro_rules! stage {
    ($number:literal) => {
        concat!("mov edx, {DOORBELL}\nmov eax, ", $number, "\nout dx, eax\n")
    };
}

/// Stores what CPUID says.
macro_rules! cpuid {
    ($leaf:literal, $subleaf:literal, $at:literal) => {
        concat!(
            "mov eax, ",
            $leaf,
            "\nmov ecx, ",
            $subleaf,
            "\ncpuid\n",
            "mov [rdi + {NOTES} + ",
            $at,
            "], eax\nmov [rdi + {NOTES} + ",
            $at,
            " + 4], ebx\n",
            "mov [rdi + {NOTES} + ",
            $at,
            " + 8], ecx\nmov [rdi + {NOTES} + ",
            $at,
            " + 12], edx\n",
        )
    };
}

/// Stores an MSR.
macro_rules! read_msr {
    ($index:literal, $at:literal) => {
        concat!(
            "mov ecx, ",
            $index,
            "\nrdmsr\n",
            "mov [rdi + {NOTES} + ",
            $at,
            "], eax\nmov [rdi + {NOTES} + ",
            $at,
            " + 4], edx\n",
        )
    };
}

/// Writes an MSR.
macro_rules! write_msr {
    ($index:literal, $value:literal) => {
        concat!(
            "mov ecx, ",
            $index,
            "\nmov eax, ",
            $value,
            "\nxor edx, edx\nwrmsr\n"
        )
    };
}

/// XSAVEC of both tile components, over a header that says something else.
macro_rules! save {
    () => {
        concat!(
            "mov rax, -1\n",
            "mov [rdi + {OUT} + 512], rax\n",
            "mov qword ptr [rdi + {OUT} + 520], 0\n",
            "mov eax, 0x60000\nxor edx, edx\n",
            "xsavec64 [rdi + {OUT}]\n",
        )
    };
}

global_asm!(
    ".pushsection .rodata.amx_guest_kernel_cases,\"a\"",
    ".balign 64",
    ".global amx_guest_kernel_cases",
    "amx_guest_kernel_cases:",
    // The gate of #NM: all handlers lie in the first 64 KiB.
    "lea rax, [rip + 7f]",
    "mov ebx, {GATE}",
    "mov [rbx], ax",
    "xor ecx, ecx",
    "mov eax, [rdi + {XCR0}]",
    "mov edx, [rdi + {XCR0} + 4]",
    "xsetbv",
    "xor ecx, ecx",
    "xgetbv",
    "mov [rdi + {NOTES}], eax",
    "mov [rdi + {NOTES} + 4], edx",
    cpuid!(0xd, 0, 16),
    cpuid!(0xd, 17, 32),
    cpuid!(0xd, 18, 48),
    cpuid!(0x1d, 0, 64),
    cpuid!(0x1d, 1, 80),
    read_msr!(0x1c4, 96),
    // Something in every register.
    "mov esi, 64",
    "mov rbp, 0x0505050505050505",
    "mov r8, 0x0808080808080808",
    "mov r9, 0x0909090909090909",
    "mov r10, 0x1010101010101010",
    "mov r11, 0x1111111111111111",
    "mov r12, 0x1212121212121212",
    "mov r13, 0x1313131313131313",
    "mov r14, 0x1414141414141414",
    "mov r15, 0x1515151515151515",
    stage!(1),
    read_msr!(0x1c4, 104),
    "ldtilecfg [rdi + {IN_TILECFG}]",
    stage!(2),
    "tileloadd tmm0, [rdi + rsi*1 + {IN}]",
    stage!(3),
    write_msr!(0x1c4, 0x40000),
    stage!(4),
    write_msr!(0x1c4, 0),
    "ldtilecfg [rdi + {IN_TILECFG}]",
    "tileloadd tmm0, [rdi + rsi*1 + {IN}]",
    "tilerelease",
    save!(),
    stage!(5),
    write_msr!(0x1c4, 0x40000),
    save!(),
    stage!(6),
    "ldtilecfg [rdi + {IN_TILECFG}]",
    // #NM; again after the handler.
    "tileloadd tmm0, [rdi + rsi*1 + {IN}]",
    "tilestored [rdi + rsi*1 + {OUT}], tmm0",
    stage!(9),
    "4:",
    "hlt",
    "jmp 4b",
    "7:",
    "inc qword ptr [rdi + {NOTES} + 8]",
    "mov rax, cr0",
    "mov [rdi + {NOTES} + 112], rax",
    read_msr!(0x1c5, 120),
    read_msr!(0x1c4, 128),
    stage!(7),
    read_msr!(0x1c5, 136),
    read_msr!(0x1c4, 144),
    write_msr!(0x1c5, 0),
    write_msr!(0x1c4, 0),
    stage!(8),
    "iretq",
    ".global amx_guest_kernel_cases_end",
    "amx_guest_kernel_cases_end:",
    ".popsection",
    XCR0 = const area::XCR0,
    NOTES = const area::NOTES,
    IN_TILECFG = const area::IN_TILECFG,
    IN = const area::IN_VECTORS,
    OUT = const area::OUT_VECTORS,
    DOORBELL = const area::DOORBELL_PORT,
    GATE = const machine::DEVICE_NOT_AVAILABLE_GATE,
);
