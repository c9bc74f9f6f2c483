//! The CPL0 stub: XSETBV, IRETQ to the body at CPL3, and the exceptions that end the body.
//!
//! It uses only what KVM's instruction emulator knows, because some hosts run CPL0 through it.

use core::arch::global_asm;

use crate::area;

/// Offset of the first exception entry from the start of the stub.
pub const VECTORS_OFFSET: usize = 0x100;
/// Bytes from one exception entry to the next.
pub const VECTOR_BYTES: usize = 16;

global_asm!(
    ".pushsection .rodata.amx_guest_stub,\"a\"",
    ".balign 64",
    ".global amx_guest_stub",
    "amx_guest_stub:",
    // RDI: the area; RSP: the kernel stack.
    "xor ecx, ecx",
    "mov eax, [rdi + {XCR0}]",
    "mov edx, [rdi + {XCR0} + 4]",
    "xsetbv",
    "push {USER_SS}",
    "push 0",
    "push 2",
    "push {USER_CS}",
    "push qword ptr [rdi + {ENTRY}]",
    "iretq",
    // One entry for each exception: its number, then the common part.
    ".balign 16",
    ".org amx_guest_stub + {VECTORS}",
    ".set amx_guest_vector, 0",
    ".rept 32",
    ".balign {VECTOR_BYTES}",
    "mov eax, offset amx_guest_vector",
    "jmp 2f",
    ".set amx_guest_vector, amx_guest_vector + 1",
    ".endr",
    "2:",
    "cmp eax, 7",
    "je 7f",
    // UD2 at the end of a body, with its result stored: print the message.
    "cmp eax, 6",
    "jne 5f",
    "cmp dword ptr [rdi + {DONE}], 1",
    "jne 5f",
    "mov edx, {SERIAL}",
    "lea rsi, [rdi + {MESSAGE}]",
    "3:",
    "mov al, [rsi]",
    "test al, al",
    "jz 4f",
    "out dx, al",
    "add rsi, 1",
    "jmp 3b",
    "4:",
    "hlt",
    "jmp 4b",
    // Anything else is not meant to happen: say which.
    "5:",
    "mov edx, {FAULT}",
    "out dx, eax",
    "jmp 4b",
    // #NM of the XFD payload: say so in its midst, keep what the registers say, and clear both.
    "7:",
    "cmp dword ptr [rdi + {EXPECTS_NM}], 1",
    "jne 5b",
    "mov edx, {DOORBELL}",
    "mov eax, 2",
    "out dx, eax",
    "mov ecx, 0x1c5",
    "rdmsr",
    "mov [rdi + {OUT_XFD_ERR}], eax",
    "mov ecx, 0x1c4",
    "rdmsr",
    "mov [rdi + {OUT_XFD}], eax",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x1c5",
    "wrmsr",
    "iretq",
    ".global amx_guest_stub_end",
    "amx_guest_stub_end:",
    ".popsection",
    XCR0 = const area::XCR0,
    ENTRY = const area::ENTRY,
    DONE = const area::DONE,
    MESSAGE = const area::MESSAGE,
    SERIAL = const area::SERIAL_PORT,
    FAULT = const area::FAULT_PORT,
    EXPECTS_NM = const area::EXPECTS_NM,
    DOORBELL = const area::DOORBELL_PORT,
    OUT_XFD_ERR = const area::OUT_XFD_ERR,
    OUT_XFD = const area::OUT_XFD,
    USER_SS = const crate::machine::USER_DATA,
    USER_CS = const crate::machine::USER_CODE,
    VECTORS = const VECTORS_OFFSET,
    VECTOR_BYTES = const VECTOR_BYTES,
);
