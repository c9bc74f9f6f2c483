//! Whether this is the AMX lab, and what follows for a test that finds something missing.

use std::fmt::Display;
use std::fs;

/// Whether this is the AMX lab (docs/lab.md), where there is one processor and all takes longer.
pub(crate) fn in_lab() -> bool {
    std::env::var_os("AMX_LAB").is_some()
}

/// Says that a test is skipped, and why.
///
/// # Panics
///
/// In the lab, unless it was given a processor without AMX: what its tests ask for is there, so it was lost.
pub(crate) fn skip(why: &dyn Display) {
    assert!(
        !(in_lab() && processor_has_amx()),
        "the lab has this, but now: {why}"
    );
    println!("skipped: {why}");
}

/// By the kernel's word, which has not asked KVM.
fn processor_has_amx() -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").expect("/proc is there");
    text.split_whitespace().any(|flag| flag == "amx_tile")
}
