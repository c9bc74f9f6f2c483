//! What the host and a vCPU share, by offset from the vCPU's area.
//!
//! The payloads have the area's address in RDI. All values are little-endian.

/// Bytes of one vCPU's area.
pub const AREA_BYTES: usize = 0x8000;

/// u64: the XCR0 that the guest enables.
pub const XCR0: usize = 0x00;
/// u64: how many rounds to compute.
pub const ROUNDS: usize = 0x08;
/// u64: the accumulator at the start.
pub const ACC: usize = 0x10;
/// u64: how many PAUSE instructions a round (or a step of the tile payload) waits, at least 1. Time
/// goes by with everything in registers, at no cost for the model.
pub const PAUSES: usize = 0x18;
/// u64: rows of each tile.
pub const ROWS: usize = 0x20;
/// u64: address of the body that runs at CPL3.
pub const ENTRY: usize = 0x28;
/// u64: 1 when the body has stored its result.
pub const DONE: usize = 0x30;
/// u64: 1 where #NM is expected, with the XFD payload's handler for it.
pub const EXPECTS_NM: usize = 0x38;
/// 64 bytes for values on their way between registers.
pub const TMP: usize = 0x40;
/// 32 bytes: the byte shuffle of the AVX2 and SSE payloads.
pub const SHUFFLE: usize = 0x80;
/// A line for the serial port, ended by a zero byte.
pub const MESSAGE: usize = 0xc0;
/// Bytes of [`MESSAGE`] with the zero byte.
pub const MESSAGE_BYTES: usize = 0x40;

/// u32: MXCSR at the start.
pub const IN_MXCSR: usize = 0x100;
/// u16: the x87 control word at the start.
pub const IN_FCW: usize = 0x104;
/// Eight u64: what is pushed on the x87 stack.
pub const IN_X87: usize = 0x140;
/// Eight u64: the opmasks at the start.
pub const IN_OPMASK: usize = 0x180;
/// 64 bytes: TILECFG.
pub const IN_TILECFG: usize = 0x1c0;

/// u64: the accumulator at the end.
pub const OUT_ACC: usize = 0x200;
/// u32: MXCSR at the end.
pub const OUT_MXCSR: usize = 0x208;
/// u16: the x87 control word at the end.
pub const OUT_FCW: usize = 0x20c;
/// u16: the x87 status word at the end, before the stack is popped.
pub const OUT_FSW: usize = 0x20e;
/// Eight u64: the x87 stack from the top.
pub const OUT_X87: usize = 0x240;
/// Eight u64: the opmasks at the end.
pub const OUT_OPMASK: usize = 0x280;
/// 64 bytes: TILECFG at the end.
pub const OUT_TILECFG: usize = 0x2c0;

/// u32: IA32_XFD_ERR as the handler of #NM found it.
pub const OUT_XFD_ERR: usize = 0x300;
/// u32: IA32_XFD as the handler of #NM found it.
pub const OUT_XFD: usize = 0x304;

/// u64: OUTs of the counting payload.
pub const OUT_OUTS: usize = 0x308;
/// u64: INs of the counting payload.
pub const OUT_INS: usize = 0x310;
/// u64: answers that were not what the counting payload expected.
pub const OUT_WRONG: usize = 0x318;

/// 160 bytes for what the payload with the kernel's cases has found: XCR0, how often #NM came;
/// CPUID.0DH.0, 0DH.17, 0DH.18, 1DH.0 and 1DH.1; IA32_XFD at the start and in the next VM; CR0, IA32_XFD_ERR
/// and IA32_XFD at #NM, and the last two in the next VM.
pub const NOTES: usize = 0x320;

/// Seventeen rows of 64 bytes through which tiles are moved.
pub const SCRATCH: usize = 0x400;
/// Vector registers, 64 bytes each, or tiles, 1024 bytes each, at the start.
pub const IN_VECTORS: usize = 0x1000;
/// The same at the end.
pub const OUT_VECTORS: usize = 0x3000;

/// The serial port (COM1) to which a vCPU writes its message when it is done.
pub const SERIAL_PORT: u16 = 0x3f8;
/// A vCPU writes the vector of an exception here that no payload raises on purpose.
pub const FAULT_PORT: u16 = 0x510;
/// The XFD payload writes 1 here when XFD is armed, and 2 in its #NM handler; the payload with the kernel's
/// cases the number of each stage, four bytes.
pub const DOORBELL_PORT: u16 = 0x518;
/// The counting payload writes 0, 1, 2, ... here, four bytes each, and reads the same numbers.
pub const COUNT_PORT: u16 = 0x520;
/// The counting payload writes its message here with one REP OUTSB after every count, and reads sixteen
/// bytes with one REP INSB.
pub const STRING_PORT: u16 = 0x524;
