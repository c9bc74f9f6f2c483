//! One instruction under test: the registers before it, its operands, and all that is seen after it.
//!
//! Nothing of the compiler's runs between setting the registers and reading them back, because it may
//! use any of them. All of it is `trial.asm`.
#![allow(unsafe_code, reason = "machine code is run")]

use std::arch::global_asm;
use std::fmt;

use crate::arena::{Arena, Piece};
use crate::cpuid::cpuid;
use crate::pattern::MXCSR_RESET;
use crate::trap;

global_asm!(
    include_str!("trial.asm"),
    include_str!("selftest.asm"),
    ".pushsection .text.amx_fidelity",
    "amx_fidelity_end:",
    ".popsection"
);

/// In r10 while an instruction is under test: a fault then ends it and puts its own number there.
pub(crate) const UNDER_TEST: u64 = 0x616d_782d_6669_6465;
/// Added to a signal's number, so that it is no exception vector.
const SIGNAL: u64 = 0x100;

macro_rules! instructions {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident,)*) => {
        unsafe extern "sysv64" { $(fn $symbol();)* }

        /// What can be put to the test.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Instruction { $($(#[$doc])* $name,)* }

        impl Instruction {
            fn address(self) -> usize {
                match self { $(Self::$name => $symbol as *const () as usize,)* }
            }
        }
    };
}

instructions! {
    /// NOP.
    Nothing = amx_fidelity_op_nothing,
    /// XSAVE \[operand\].
    Xsave = amx_fidelity_op_xsave,
    /// XSAVEOPT \[operand\].
    Xsaveopt = amx_fidelity_op_xsaveopt,
    /// XSAVEC \[operand\].
    Xsavec = amx_fidelity_op_xsavec,
    /// XSAVES \[operand\]; CPL 0.
    Xsaves = amx_fidelity_op_xsaves,
    /// XRSTOR \[operand\].
    Xrstor = amx_fidelity_op_xrstor,
    /// XRSTORS \[operand\]; CPL 0.
    Xrstors = amx_fidelity_op_xrstors,
    /// LDTILECFG \[operand\].
    Ldtilecfg = amx_fidelity_op_ldtilecfg,
    /// STTILECFG \[operand\].
    Sttilecfg = amx_fidelity_op_sttilecfg,
    /// TILERELEASE.
    Tilerelease = amx_fidelity_op_tilerelease,
    /// TILEZERO tmm0.
    Tilezero0 = amx_fidelity_op_tilezero0,
    /// TILEZERO tmm5.
    Tilezero5 = amx_fidelity_op_tilezero5,
    /// TILELOADD tmm0, \[operand + second\].
    Tileloadd0 = amx_fidelity_op_tileloadd0,
    /// TILELOADD tmm5, \[operand + second\].
    Tileloadd5 = amx_fidelity_op_tileloadd5,
    /// TILELOADDT1 tmm5, \[operand + second\].
    Tileloaddt1 = amx_fidelity_op_tileloaddt1_5,
    /// TILESTORED \[operand + second\], tmm0.
    Tilestored0 = amx_fidelity_op_tilestored0,
    /// TILESTORED \[operand + second\], tmm5.
    Tilestored5 = amx_fidelity_op_tilestored5,
    /// TILELOADD tmm5, \[operand\], with a SIB byte without an index.
    TileloaddNoIndex = amx_fidelity_op_tileloadd5_no_index,
    /// TILESTORED \[operand\], tmm5, with a SIB byte without an index.
    TilestoredNoIndex = amx_fidelity_op_tilestored5_no_index,
    /// TILELOADD tmm5, \[operand\], without a SIB byte.
    TileloaddNoSib = amx_fidelity_op_tileloadd5_no_sib,
    /// TDPBSSD tmm0, tmm1, tmm2.
    Tdpbssd = amx_fidelity_op_tdpbssd,
    /// TDPBSUD tmm0, tmm1, tmm2.
    Tdpbsud = amx_fidelity_op_tdpbsud,
    /// TDPBUSD tmm0, tmm1, tmm2.
    Tdpbusd = amx_fidelity_op_tdpbusd,
    /// TDPBUUD tmm0, tmm1, tmm2.
    Tdpbuud = amx_fidelity_op_tdpbuud,
    /// TDPBF16PS tmm0, tmm1, tmm2.
    Tdpbf16ps = amx_fidelity_op_tdpbf16ps,
    /// TDPFP16PS tmm0, tmm1, tmm2.
    Tdpfp16ps = amx_fidelity_op_tdpfp16ps,
    /// TCMMRLFP16PS tmm0, tmm1, tmm2.
    Tcmmrlfp16ps = amx_fidelity_op_tcmmrlfp16ps,
    /// TCMMIMFP16PS tmm0, tmm1, tmm2.
    Tcmmimfp16ps = amx_fidelity_op_tcmmimfp16ps,
    /// TDPBSSD tmm0, tmm0, tmm2.
    TdpbssdSame = amx_fidelity_op_tdpbssd_same,
    /// FNOP.
    Fnop = amx_fidelity_op_fnop,
    /// VADDPS zmm16, zmm17, zmm18.
    Vaddps = amx_fidelity_op_vaddps,
    /// INT3.
    Breakpoint = amx_fidelity_op_breakpoint,
    /// sched_yield; in a process.
    Yield = amx_fidelity_op_yield,
    /// WRMSR of IA32_XFD, with the requested components as the value; CPL 0.
    WriteXfd = amx_fidelity_op_write_xfd,
    /// WRMSR of IA32_XFD_ERR, with the requested components as the value; CPL 0.
    WriteXfdErr = amx_fidelity_op_write_xfd_err,
}

impl Instruction {
    /// The products of tiles that some processor has.
    const PRODUCTS: [Self; 8] = [
        Self::Tdpbssd,
        Self::Tdpbsud,
        Self::Tdpbusd,
        Self::Tdpbuud,
        Self::Tdpbf16ps,
        Self::Tdpfp16ps,
        Self::Tcmmrlfp16ps,
        Self::Tcmmimfp16ps,
    ];

    /// Whether CPUID names this product of tiles, on a processor with AMX-INT8 and AMX-BF16.
    #[must_use]
    pub fn is_here(self) -> bool {
        let [eax, _, _, edx] = cpuid(7, 1);
        match self {
            Self::Tdpfp16ps => eax >> 21 & 1 != 0,
            Self::Tcmmrlfp16ps | Self::Tcmmimfp16ps => edx >> 8 & 1 != 0,
            _ => true,
        }
    }

    /// The products of tiles that this processor has.
    pub fn products() -> impl Iterator<Item = Self> {
        Self::PRODUCTS
            .into_iter()
            .filter(|instruction| instruction.is_here())
    }
}

unsafe extern "sysv64" {
    fn amx_fidelity_code();
    fn amx_fidelity_guest();
    fn amx_fidelity_vectors();
    fn amx_fidelity_end();
    fn amx_fidelity_selftest();
    fn amx_fidelity_sysret();
    fn amx_fidelity_count();
    fn amx_fidelity_run(trials: *mut Trial, count: u64);
}

fn offset_of(address: usize) -> u64 {
    (address - amx_fidelity_code as *const () as usize) as u64
}

/// Offset of a guest's entry in [`code`].
pub(crate) fn guest_entry() -> u64 {
    offset_of(amx_fidelity_guest as *const () as usize)
}

/// Offset of the guest program that does what the kernel's selftest for AMX does.
pub(crate) fn selftest_entry() -> u64 {
    offset_of(amx_fidelity_selftest as *const () as usize)
}

/// Offset of the guest program that goes to CPL 3 by SYSRET.
pub(crate) fn sysret_entry() -> u64 {
    offset_of(amx_fidelity_sysret as *const () as usize)
}

/// Offset of the guest program that counts.
pub(crate) fn count_entry() -> u64 {
    offset_of(amx_fidelity_count as *const () as usize)
}

/// Offset of the handler of an exception in [`code`].
pub(crate) fn exception_entry(vector: u64) -> u64 {
    offset_of(amx_fidelity_vectors as *const () as usize) + 16 * vector
}

/// The machine code of `trial.asm`.
pub(crate) fn code() -> &'static [u8] {
    let start = amx_fidelity_code as *const () as usize;
    let size = amx_fidelity_end as *const () as usize - start;
    // SAFETY: Both symbols are of one section of this program, in that order, which is readable for
    // as long as the program runs and never written.
    unsafe { std::slice::from_raw_parts(start as *const u8, size) }
}

/// How an instruction was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An exception, by its vector, in a guest.
    Vector(u8),
    /// A signal, by its number, in this process.
    Signal(i32),
}

impl Fault {
    /// #UD in a guest.
    pub const UD: Self = Self::Vector(6);
    /// #NM in a guest.
    pub const NM: Self = Self::Vector(7);
    /// #GP in a guest.
    pub const GP: Self = Self::Vector(13);
    /// #UD in this process; the kernel also turns an XFD #NM without permission into it.
    pub const SIGILL: Self = Self::Signal(libc::SIGILL);
    /// #GP or #PF in this process.
    pub const SIGSEGV: Self = Self::Signal(libc::SIGSEGV);
}

pub(crate) fn signal_code(signal: i32) -> u64 {
    SIGNAL + u64::try_from(signal).unwrap_or(0)
}

/// One trial, in the layout that `trial.asm` reads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    instruction: u64,
    load: u64,
    load_xstate_bv: u64,
    operand: u64,
    second: u64,
    rfbm: u64,
    xfd: u64,
    flags: u64,
    result: u64,
    initial: u64,
    fault: u64,
    xfd_err: u64,
    xinuse: u64,
}

const _: () = assert!(size_of::<Trial>() == 104);

impl Trial {
    /// An instruction with no operands and the registers as they are.
    #[must_use]
    pub fn of(instruction: Instruction) -> Self {
        Self {
            instruction: offset_of(instruction.address()),
            load: 0,
            load_xstate_bv: 0,
            operand: 0,
            second: 0,
            rfbm: 0,
            xfd: 0,
            flags: 0,
            result: 0,
            initial: 0,
            fault: 0,
            xfd_err: 0,
            xinuse: 0,
        }
    }

    /// Loads the registers before: the area in `from`, with this XSTATE_BV.
    #[must_use]
    pub fn starting_from(mut self, from: Piece, xstate_bv: u64) -> Self {
        (self.load, self.load_xstate_bv) = (from.address(), xstate_bv);
        self
    }

    /// The memory operand.
    #[must_use]
    pub fn on(mut self, operand: Piece) -> Self {
        self.operand = operand.address();
        self
    }

    /// The memory operand by its address, and the second operand.
    #[must_use]
    pub fn on_address(mut self, operand: u64, second: u64) -> Self {
        (self.operand, self.second) = (operand, second);
        self
    }

    /// The requested components, in edx:eax.
    #[must_use]
    pub fn requesting(mut self, rfbm: u64) -> Self {
        self.rfbm = rfbm;
        self
    }

    /// IA32_XFD while the instruction runs. Only in a guest.
    #[must_use]
    pub fn with_xfd(mut self, xfd: u64) -> Self {
        self.xfd = xfd;
        self
    }

    /// CR0.TS = 1 while the instruction runs. Only in a guest.
    #[must_use]
    pub fn with_task_switched(mut self) -> Self {
        self.flags |= 2;
        self
    }

    /// Saves all registers afterwards, by XSAVE with IA32_XFD = 0.
    #[must_use]
    pub fn saving_to(mut self, result: Piece) -> Self {
        self.result = result.address();
        self
    }

    /// How the instruction was refused.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        match self.fault {
            UNDER_TEST => None,
            vector if vector < SIGNAL => Some(Fault::Vector(u8::try_from(vector).unwrap())),
            signal => Some(Fault::Signal(i32::try_from(signal - SIGNAL).unwrap())),
        }
    }

    /// IA32_XFD_ERR after the instruction; it was 0 before. In a guest.
    #[must_use]
    pub fn xfd_err(&self) -> u64 {
        self.xfd_err
    }

    /// XGETBV with ECX = 1 after the instruction, with IA32_XFD still as it was for it.
    #[must_use]
    pub fn xinuse(&self) -> u64 {
        self.xinuse
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "in use {:#x}, RFBM {:#x}, XFD {:#x}",
            self.load_xstate_bv, self.rfbm, self.xfd
        )
    }
}

/// Where trials can run.
pub trait Processor {
    /// Whether it runs them at CPL 0.
    fn privileged(&self) -> bool;
    /// Its memory. All that trials name has to be in it.
    fn arena(&mut self) -> &mut Arena;
    /// Runs them, one after the other.
    fn run(&mut self, trials: &mut [Trial]);
}

/// An XSAVE area with the initial state of everything, for after each trial.
pub(crate) fn initial_area(arena: &mut Arena) -> Piece {
    let area = arena.take(AREA);
    arena.bytes_mut(area)[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    area
}

/// Bytes that are enough for any XSAVE area here, and whole pages.
pub const AREA: usize = 12 << 10;

/// This process, at CPL 3.
#[derive(Debug)]
pub struct Here {
    arena: Arena,
    initial: Piece,
}

impl Here {
    /// Catches the signals that instructions under test can cause.
    #[must_use]
    pub fn new() -> Self {
        trap::install();
        let mut arena = Arena::new(4);
        let initial = initial_area(&mut arena);
        Self { arena, initial }
    }
}

impl Default for Here {
    fn default() -> Self {
        Self::new()
    }
}

impl Processor for Here {
    fn privileged(&self) -> bool {
        false
    }

    fn arena(&mut self) -> &mut Arena {
        &mut self.arena
    }

    fn run(&mut self, trials: &mut [Trial]) {
        for trial in &mut *trials {
            assert_eq!((trial.xfd, trial.flags), (0, 0), "only in a guest");
            trial.initial = self.initial.address();
        }
        // SAFETY: `trials` has so many trials, in the layout that the code reads. It reads and writes
        // what they name: pieces of `self.arena`, which is borrowed mutably, or addresses whose
        // faults are caught. All registers that it changes are volatile in this calling convention;
        // MXCSR and the x87 control word, which are not, get back their values after reset, which
        // are those that Rust code runs with.
        unsafe { amx_fidelity_run(trials.as_mut_ptr(), trials.len() as u64) };
    }
}

/// For guests: fills in what trials need at CPL 0.
pub(crate) fn prepare_for_guest(trials: &mut [Trial], initial: Piece) {
    for trial in trials {
        trial.flags |= 1;
        trial.initial = initial.address();
    }
}
