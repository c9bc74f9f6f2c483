//! The counting payload: every count leaves the guest in each way that has to be completed.
//!
//! Per count one OUT of four bytes, one REP OUTSB of the message, and one store of eight bytes that
//! lies across two pages without memory, which KVM reports as two exits.

use core::arch::global_asm;

use crate::{area, machine};

global_asm!(
    ".pushsection .rodata.amx_guest_counter,\"a\"",
    ".balign 64",
    ".global amx_guest_counter",
    "amx_guest_counter:",
    "cld",
    "mov r8, [rdi + {ROUNDS}]",
    "xor ebx, ebx",
    "2:",
    "mov edx, {COUNT_PORT}",
    "mov eax, ebx",
    "out dx, eax",
    "mov edx, {STRING_PORT}",
    "lea rsi, [rdi + {MESSAGE}]",
    "mov ecx, 16",
    "rep outsb",
    "mov eax, {MMIO}",
    "mov [rax], rbx",
    "add ebx, 1",
    "cmp rbx, r8",
    "jne 2b",
    "4:",
    "hlt",
    "jmp 4b",
    ".global amx_guest_counter_end",
    "amx_guest_counter_end:",
    ".popsection",
    ROUNDS = const area::ROUNDS,
    MESSAGE = const area::MESSAGE,
    COUNT_PORT = const area::COUNT_PORT,
    STRING_PORT = const area::STRING_PORT,
    MMIO = const machine::MMIO + 0x1000 - 4,
);
