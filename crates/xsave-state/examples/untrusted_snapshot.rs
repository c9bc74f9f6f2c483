//! Makes the state of a snapshot safe, as a VMM with a format of its own keeps it: words of `kvm_xsave`,
//! extended control registers and MSRs. Everything that is wrong with it is reported by name.
//!
//!     cargo run -p xsave-state --example untrusted_snapshot
#![allow(
    clippy::indexing_slicing,
    reason = "the bytes are made up here, and have a known length"
)]

use std::error::Error;

use xsave_state::sanitize::sanitize;
use xsave_state::{
    Component, ComponentId, Layout, Losses, Palette, Registers, SanitizeError, UntrustedArea,
};

fn main() -> Result<(), Box<dyn Error>> {
    // A VMM reads it from the guest's CPUID: `Layout::from_cpuid`.
    let layout = Layout::from_parts(
        [
            Component::user(ComponentId::AVX, 576, 256),
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )?;

    // The snapshot: tiles in use (XSTATE_BV bit 18) although IA32_XFD disables them, and an old
    // kernel's PKRU (bit 9) that this guest never had.
    let (mut region, mut extra) = ([0u32; 1024], vec![0u32; 1728]);
    region[128] = 1 << 18 | 1 << 9;
    extra[0] = 42;
    let xcrs = [(0, 0x60007)];
    let msrs = [(0x10, 123_456), (0x1c4, 1 << 18), (0x1c5, 0)];

    let registers = Registers::from_lists(xcrs, msrs, &layout)?;
    let area = UntrustedArea::from_words(&region, &extra, registers).of_guest_with(layout.user());
    match sanitize(&area, &layout, Losses::empty()) {
        Err(error @ SanitizeError::Refused { .. }) => println!("refused: {error}"),
        other => drop(other?),
    }

    // The architecture does not keep state under IA32_XFD, so dropping it may be acceptable.
    let sanitized = sanitize(&area, &layout, Losses::DISABLED)?;
    println!("safe after {} changes:", sanitized.report.changes().len());
    for change in sanitized.report.changes() {
        println!("  {change}");
    }
    println!("in use: {}", sanitized.state.image().xstate_bv());
    Ok(())
}
