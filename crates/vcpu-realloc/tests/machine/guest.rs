//! The guest: an interpreter of commands in 64-bit mode, with the exception handlers that a Linux-like
//! kernel has for AMX.
//!
//! #NM: notes IA32_XFD_ERR and clears it, clears IA32_XFD, and goes back to the tile instruction. Where
//! that write faults, the "process" is ended: the guest goes on with the next command.
//! #GP: is counted, and the instruction skipped. All else is told at a port.

use core::arch::global_asm;

/// Bytes of a vCPU's area; RDI points to it.
pub(crate) const AREA_BYTES: usize = 0x6000;
pub(crate) const PC: usize = 0;
pub(crate) const NM_COUNT: usize = 8;
pub(crate) const GP_COUNT: usize = 16;
pub(crate) const XFD_ERR: usize = 24;
pub(crate) const XFD_READ: usize = 32;
pub(crate) const TURNS: usize = 40;
pub(crate) const COMMANDS: usize = 0x100;
pub(crate) const CONFIG: usize = 0x1000;
pub(crate) const IN: usize = 0x1400;
pub(crate) const OUT: usize = 0x3400;
pub(crate) const STACK: usize = 0x6000;

pub(crate) const BELL_PORT: u16 = 0x10;
pub(crate) const VECTOR_PORT: u16 = 0x11;

/// Bytes from one exception's entry to the next.
pub(crate) const ENTRY_BYTES: usize = 16;
/// Behind the entries of all 32.
pub(crate) const START: usize = 32 * ENTRY_BYTES;

/// What the guest can be told to do, with an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// HLT.
    Halt,
    /// WRMSR of IA32_XFD.
    WriteXfd(u64),
    /// XSETBV.
    WriteXcr0(u64),
    /// OUT of a number.
    Bell(u32),
    /// RDMSR of IA32_XFD, to the area.
    ReadXfd,
    /// LDTILECFG, and TILELOADD of eight tiles.
    LoadTiles,
    /// TILESTORED of eight tiles.
    StoreTiles,
    /// So many times: IA32_XFD to 1 << 18, and to 0.
    Toggle(u64),
    /// So many times, as a kernel that switches from a task without AMX to one with and back:
    /// IA32_XFD to 0, so many products of tiles, IA32_XFD to 1 << 18.
    Switch(u32, u32),
    /// The same without the writes of IA32_XFD.
    Compute(u32, u32),
    /// Goes back to the first command.
    Again,
    /// WRMSR of any register.
    WriteMsr(u32, u32),
    /// RDMSR of any register.
    ReadMsr(u32),
    /// Counts a turn.
    Turn,
}

impl Command {
    pub(crate) fn words(self) -> [u64; 2] {
        match self {
            Self::Halt => [0, 0],
            Self::WriteXfd(value) => [1, value],
            Self::WriteXcr0(value) => [2, value],
            Self::Bell(number) => [3, number.into()],
            Self::ReadXfd => [4, 0],
            Self::LoadTiles => [5, 0],
            Self::StoreTiles => [6, 0],
            Self::Toggle(times) => [7, times],
            Self::Switch(times, products) => [8, u64::from(products) << 32 | u64::from(times)],
            Self::Compute(times, products) => [9, u64::from(products) << 32 | u64::from(times)],
            Self::Again => [10, 0],
            Self::WriteMsr(index, value) => [11, u64::from(index) << 32 | u64::from(value)],
            Self::ReadMsr(index) => [12, index.into()],
            Self::Turn => [13, 0],
        }
    }
}

global_asm!(
    ".pushsection .rodata.gate_guest,\"a\"",
    ".balign 16",
    ".global gate_guest, gate_guest_end, gate_guest_nm_wrmsr",
    "gate_guest:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    // push vector
    ".byte 0x6a, vector",
    "jmp 20f",
    ".set vector, vector + 1",
    ".endr",
    ".balign 16",
    // Start: RDI is the area, RSP its stack.
    "2:",
    "mov rax, [rdi + {PC}]",
    "inc qword ptr [rdi + {PC}]",
    "shl rax, 4",
    "lea rbx, [rdi + rax + {COMMANDS}]",
    "mov rax, [rbx]",
    "mov r8, [rbx + 8]",
    "cmp eax, 0",
    "je 30f",
    "cmp eax, 1",
    "je 31f",
    "cmp eax, 2",
    "je 32f",
    "cmp eax, 3",
    "je 33f",
    "cmp eax, 4",
    "je 34f",
    "cmp eax, 5",
    "je 35f",
    "cmp eax, 6",
    "je 36f",
    "cmp eax, 7",
    "je 37f",
    "cmp eax, 8",
    "je 38f",
    "cmp eax, 9",
    "je 39f",
    "cmp eax, 11",
    "je 41f",
    "cmp eax, 12",
    "je 42f",
    "cmp eax, 13",
    "je 44f",
    "mov qword ptr [rdi + {PC}], 0",
    "jmp 2b",
    // Halt
    "30:",
    "hlt",
    "jmp 2b",
    // WriteXfd
    "31:",
    "mov ecx, 0x1c4",
    "mov eax, r8d",
    "mov rdx, r8",
    "shr rdx, 32",
    "wrmsr",
    "jmp 2b",
    // WriteXcr0
    "32:",
    "xor ecx, ecx",
    "mov eax, r8d",
    "mov rdx, r8",
    "shr rdx, 32",
    "xsetbv",
    "jmp 2b",
    // Bell
    "33:",
    "mov eax, r8d",
    "out {BELL}, eax",
    "jmp 2b",
    // ReadXfd
    "34:",
    "mov ecx, 0x1c4",
    "rdmsr",
    "mov [rdi + {XFD_READ}], eax",
    "mov [rdi + {XFD_READ} + 4], edx",
    "jmp 2b",
    // LoadTiles
    "35:",
    "ldtilecfg [rdi + {CONFIG}]",
    "mov r9d, 64",
    "tileloadd tmm0, [rdi + r9 + {IN}]",
    "tileloadd tmm1, [rdi + r9 + {IN} + 0x400]",
    "tileloadd tmm2, [rdi + r9 + {IN} + 0x800]",
    "tileloadd tmm3, [rdi + r9 + {IN} + 0xc00]",
    "tileloadd tmm4, [rdi + r9 + {IN} + 0x1000]",
    "tileloadd tmm5, [rdi + r9 + {IN} + 0x1400]",
    "tileloadd tmm6, [rdi + r9 + {IN} + 0x1800]",
    "tileloadd tmm7, [rdi + r9 + {IN} + 0x1c00]",
    "jmp 2b",
    // StoreTiles
    "36:",
    "mov r9d, 64",
    "tilestored [rdi + r9 + {OUT}], tmm0",
    "tilestored [rdi + r9 + {OUT} + 0x400], tmm1",
    "tilestored [rdi + r9 + {OUT} + 0x800], tmm2",
    "tilestored [rdi + r9 + {OUT} + 0xc00], tmm3",
    "tilestored [rdi + r9 + {OUT} + 0x1000], tmm4",
    "tilestored [rdi + r9 + {OUT} + 0x1400], tmm5",
    "tilestored [rdi + r9 + {OUT} + 0x1800], tmm6",
    "tilestored [rdi + r9 + {OUT} + 0x1c00], tmm7",
    "jmp 2b",
    // Toggle
    "37:",
    "mov ecx, 0x1c4",
    "xor edx, edx",
    "mov eax, 0x40000",
    "wrmsr",
    "xor eax, eax",
    "wrmsr",
    "dec r8",
    "jnz 37b",
    "jmp 2b",
    // Switch
    "38:",
    "mov r10, r8",
    "shr r10, 32",
    "mov r8d, r8d",
    "48:",
    "mov ecx, 0x1c4",
    "xor edx, edx",
    "xor eax, eax",
    "wrmsr",
    "call 40f",
    "mov eax, 0x40000",
    "wrmsr",
    "dec r8",
    "jnz 48b",
    "jmp 2b",
    // Compute
    "39:",
    "mov r10, r8",
    "shr r10, 32",
    "mov r8d, r8d",
    "49:",
    "call 40f",
    "dec r8",
    "jnz 49b",
    "jmp 2b",
    // WriteMsr
    "41:",
    "mov eax, r8d",
    "mov rcx, r8",
    "shr rcx, 32",
    "xor edx, edx",
    "wrmsr",
    "jmp 2b",
    // ReadMsr
    "42:",
    "mov ecx, r8d",
    "rdmsr",
    "jmp 2b",
    // Turn
    "44:",
    "inc qword ptr [rdi + {TURNS}]",
    "jmp 2b",
    "40:",
    "ldtilecfg [rdi + {CONFIG}]",
    "mov r9d, 64",
    "tileloadd tmm0, [rdi + r9 + {IN}]",
    "tileloadd tmm1, [rdi + r9 + {IN} + 0x400]",
    "tileloadd tmm2, [rdi + r9 + {IN} + 0x800]",
    "mov r11, r10",
    "43:",
    "tdpbssd tmm0, tmm1, tmm2",
    "dec r11",
    "jnz 43b",
    "tilestored [rdi + r9 + {OUT}], tmm0",
    "tilerelease",
    "ret",
    // Exceptions: the vector is on the stack, above what the processor pushed.
    "20:",
    "cmp qword ptr [rsp], 7",
    "je 27f",
    "cmp qword ptr [rsp], 13",
    "je 23f",
    "pop rax",
    "out {VECTOR}, al",
    "21:",
    "hlt",
    "jmp 21b",
    // #NM
    "27:",
    "add rsp, 8",
    "push rax",
    "push rcx",
    "push rdx",
    "inc qword ptr [rdi + {NM_COUNT}]",
    "mov ecx, 0x1c5",
    "rdmsr",
    "mov [rdi + {XFD_ERR}], eax",
    "mov [rdi + {XFD_ERR} + 4], edx",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "push qword ptr [rdi + {GP_COUNT}]",
    "mov ecx, 0x1c4",
    "gate_guest_nm_wrmsr:",
    "wrmsr",
    "pop rax",
    "cmp rax, [rdi + {GP_COUNT}]",
    "je 28f",
    "lea rax, [rip + 2b]",
    "mov [rsp + 24], rax",
    "28:",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    // #GP, with an error code
    "23:",
    "add rsp, 16",
    "push rax",
    "inc qword ptr [rdi + {GP_COUNT}]",
    "mov rax, [rsp + 8]",
    // RDMSR and WRMSR have two bytes; XSETBV, 0f 01 d1, three.
    "cmp word ptr [rax], 0x010f",
    "jne 24f",
    "inc rax",
    "24:",
    "add rax, 2",
    "mov [rsp + 8], rax",
    "pop rax",
    "iretq",
    "gate_guest_end:",
    ".popsection",
    PC = const PC,
    COMMANDS = const COMMANDS,
    NM_COUNT = const NM_COUNT,
    GP_COUNT = const GP_COUNT,
    XFD_ERR = const XFD_ERR,
    XFD_READ = const XFD_READ,
    TURNS = const TURNS,
    CONFIG = const CONFIG,
    IN = const IN,
    OUT = const OUT,
    BELL = const BELL_PORT,
    VECTOR = const VECTOR_PORT,
);

unsafe extern "C" {
    safe static gate_guest: u8;
    safe static gate_guest_end: u8;
    safe static gate_guest_nm_wrmsr: u8;
}

/// Its bytes. Position-independent.
pub(crate) fn code() -> &'static [u8] {
    let start: *const u8 = &raw const gate_guest;
    let len = (&raw const gate_guest_end).addr() - start.addr();
    // SAFETY: both symbols are of one `global_asm!`, in this order and in one read-only section, so
    // `len` bytes from `start` are initialised, never written, and live as long as the program.
    unsafe { core::slice::from_raw_parts(start, len) }
}

/// Where in it the #NM handler clears IA32_XFD.
pub(crate) fn nm_wrmsr() -> usize {
    (&raw const gate_guest_nm_wrmsr).addr() - (&raw const gate_guest).addr()
}
