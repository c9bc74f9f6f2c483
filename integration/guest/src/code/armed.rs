//! The XFD payload: arms IA32_XFD, uses a tile, and handles the #NM of that at CPL0.
//!
//! It says at the doorbell when XFD is armed, and again in the middle of its #NM handler, which is in
//! the stub. So a VMM can stop it at either.

use core::arch::global_asm;

use crate::area;

global_asm!(
    ".pushsection .rodata.amx_guest_armed,\"a\"",
    ".balign 64",
    ".global amx_guest_armed",
    "amx_guest_armed:",
    "xor ecx, ecx",
    "mov eax, [rdi + {XCR0}]",
    "mov edx, [rdi + {XCR0} + 4]",
    "xsetbv",
    // IA32_XFD = 1 << 18
    "mov ecx, 0x1c4",
    "mov eax, 0x40000",
    "xor edx, edx",
    "wrmsr",
    "mov edx, {DOORBELL}",
    "mov eax, 1",
    "out dx, eax",
    // Not disabled: component 17 has no XFD.
    "ldtilecfg [rdi + {IN_TILECFG}]",
    "mov esi, 64",
    // #NM; again after the handler.
    "tileloadd tmm0, [rdi + rsi*1 + {IN}]",
    "tilestored [rdi + rsi*1 + {OUT}], tmm0",
    "mov qword ptr [rdi + {DONE}], 1",
    "4:",
    "hlt",
    "jmp 4b",
    ".global amx_guest_armed_end",
    "amx_guest_armed_end:",
    ".popsection",
    XCR0 = const area::XCR0,
    DONE = const area::DONE,
    IN_TILECFG = const area::IN_TILECFG,
    IN = const area::IN_VECTORS,
    OUT = const area::OUT_VECTORS,
    DOORBELL = const area::DOORBELL_PORT,
);
