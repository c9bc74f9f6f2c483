//! The core crates in a program that has neither std nor libc: with an allocator, a panic handler
//! and an entry point of its own. A crate that used std would bring a second panic handler, and this
//! would not build.
//!
//! It exits with 0 when what it does with each crate gave the right values.
#![no_std]
#![no_main]

extern crate alloc;
/// The control of `.ci/no-std`: with this it must not build.
#[cfg(with_std)]
extern crate std;

use core::alloc::{GlobalAlloc, Layout as Memory};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

use cpuid_amx::{CpuidTable, Table, coherence};
use vcpu_realloc::{Action, Event, Gate, SavedGrant};
use xsave_state::sanitize::sanitize;
use xsave_state::{
    ComponentId, ExtendedState, Image, Layout, Losses, Registers, UntrustedArea, XFeatures,
};

/// What each crate is asked. `None`: the answer was wrong.
fn use_all() -> Option<()> {
    let table: Table = cpuid_amx::dump::EXAMPLE.parse().ok()?;
    require(coherence::check(&table).is_empty())?;
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).ok()?;
    require(layout.standard_size() == 11_008)?;

    let mut area = Image::initial(&layout).as_bytes().to_vec();
    area.get_mut(512..520)?
        .copy_from_slice(&0x40006u64.to_le_bytes());
    *area.get_mut(576)? = 1;
    *area.get_mut(2816)? = 1;
    let registers = Registers::RESET
        .with_xcr0(layout.user())
        .with_xfd(XFeatures::XTILEDATA);
    let image = Image::parse(&area, &layout).ok()?;
    require(Image::from_compacted(&image.to_compacted(), &layout).ok()? == image)?;
    require(ExtendedState::new(image, registers).is_err())?;
    let untrusted = UntrustedArea::new(&area, registers);
    let state = sanitize(&untrusted, &layout, Losses::DISABLED).ok()?.state;
    require(state.image().xstate_bv() == XFeatures::SSE | XFeatures::AVX)?;
    let moved = state.relocate(&layout, Losses::empty()).ok()?.state;
    require(*moved.image().component(ComponentId::AVX)?.first()? == 1)?;

    let mut gate = Gate::new(&layout);
    let amx = Event::WriteXcr0(registers.xcr0);
    let Action::Grow(growth) = gate.on(amx) else {
        return None;
    };
    require(growth.bytes() == 8192)?;
    let grant = SavedGrant::of(growth.features()).to_bytes();
    let grant = SavedGrant::from_bytes(&grant, layout.xfd()).ok()?;
    require(grant.has_been())?;
    require(gate.on(Event::Grant(growth.features())) == Action::PassThrough)
}

fn require(condition: bool) -> Option<()> {
    condition.then_some(())
}

// The kernel starts a program with the stack pointer at a multiple of 16, and with no return
// address; a function expects to have been called.
global_asm!(
    ".global _start",
    "_start:",
    "xor ebp, ebp",
    "call {start}",
    "ud2",
    start = sym start,
);

extern "C" fn start() -> ! {
    exit(match use_all() {
        Some(()) => 0,
        None => 1,
    })
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(101)
}

fn exit(status: i32) -> ! {
    const EXIT_GROUP: u32 = 231;
    // SAFETY: the system call ends the process; nothing comes after it.
    unsafe {
        asm!("syscall", in("eax") EXIT_GROUP, in("edi") status, options(noreturn));
    }
}

/// Gives memory from a fixed piece and takes none back: the program is short.
struct Bump {
    memory: UnsafeCell<[u8; BYTES]>,
    used: AtomicUsize,
}

const BYTES: usize = 4 << 20;

// SAFETY: `memory` is only reached through what `alloc` gives out, and `used` sees to it that no two
// of these overlap.
unsafe impl Sync for Bump {}

#[global_allocator]
static ALLOCATOR: Bump = Bump {
    memory: UnsafeCell::new([0; BYTES]),
    used: AtomicUsize::new(0),
};

// SAFETY: each piece is within `memory`, aligned as asked for, and given out once: `used` only grows.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        let Some(most) = memory.size().checked_add(memory.align()) else {
            return core::ptr::null_mut();
        };
        let start = self.used.fetch_add(most, Ordering::Relaxed);
        match start.checked_add(most) {
            Some(end) if end <= BYTES => {}
            _ => return core::ptr::null_mut(),
        }
        // SAFETY: `start` is below BYTES, so the result is within `memory`.
        let start = unsafe { self.memory.get().cast::<u8>().add(start) };
        // SAFETY: the padding is below `align`, and `size + align` bytes follow `start`.
        unsafe { start.add(start.align_offset(memory.align())) }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Memory) {}
}

/// What the compiler calls and libc would have.
mod memory;

// The unwinder's entries are named by the precompiled `core` and `alloc`, and never called, because
// panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(102)
}
