//! The counting payload: every count leaves the guest in each way that has to be completed.
//!
//! Per count one OUT and one IN of four bytes, one REP OUTSB and one REP INSB of sixteen, and one store
//! and one load of eight bytes that lie across two pages without memory, which KVM reports as two exits
//! each. The guest counts its OUTs and INs. Whoever answers counts too and gives the count (sixteen
//! times its lowest byte for REP INSB), so an answer that was lost or came twice is another one than the
//! guest expects: it counts those that are wrong.

use core::arch::global_asm;

use crate::{area, machine};

global_asm!(
    ".pushsection .rodata.amx_guest_counter,\"a\"",
    ".balign 64",
    ".global amx_guest_counter",
    "amx_guest_counter:",
    "cld",
    "mov r8, [rdi + {ROUNDS}]",
    "mov r9, rdi",
    // The count, OUTs, INs, wrong answers.
    "xor ebx, ebx",
    "xor r10d, r10d",
    "xor r11d, r11d",
    "xor r12d, r12d",
    "2:",
    "mov edx, {COUNT_PORT}",
    "mov eax, ebx",
    "out dx, eax",
    "add r10, 1",
    "in eax, dx",
    "add r11, 1",
    "cmp eax, ebx",
    "je 3f",
    "add r12, 1",
    "3:",
    "mov edx, {STRING_PORT}",
    "lea rsi, [r9 + {MESSAGE}]",
    "mov ecx, 16",
    "rep outsb",
    "lea rdi, [r9 + {TMP}]",
    "mov ecx, 16",
    "rep insb",
    // Sixteen times the lowest byte of the count.
    "movzx eax, bl",
    "mov rcx, 0x0101010101010101",
    "imul rax, rcx",
    "cmp rax, [r9 + {TMP}]",
    "jne 5f",
    "cmp rax, [r9 + {TMP} + 8]",
    "je 6f",
    "5:",
    "add r12, 1",
    "6:",
    "mov eax, {MMIO}",
    "mov [rax], rbx",
    "mov rcx, [rax]",
    "cmp rcx, rbx",
    "je 7f",
    "add r12, 1",
    "7:",
    "add ebx, 1",
    "cmp rbx, r8",
    "jne 2b",
    "mov [r9 + {OUTS}], r10",
    "mov [r9 + {INS}], r11",
    "mov [r9 + {WRONG}], r12",
    "4:",
    "hlt",
    "jmp 4b",
    ".global amx_guest_counter_end",
    "amx_guest_counter_end:",
    ".popsection",
    ROUNDS = const area::ROUNDS,
    MESSAGE = const area::MESSAGE,
    TMP = const area::TMP,
    OUTS = const area::OUT_OUTS,
    INS = const area::OUT_INS,
    WRONG = const area::OUT_WRONG,
    COUNT_PORT = const area::COUNT_PORT,
    STRING_PORT = const area::STRING_PORT,
    MMIO = const machine::MMIO + 0x1000 - 4,
);
