//! The bodies of the fuzz targets: functions of bytes that panic when a property does not hold.
//!
//! `fuzz/` runs them under libFuzzer; `tests/corpus.rs` replays the corpora that it left, with a
//! stable compiler and without libFuzzer.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a panic is how a target reports"
)]

pub mod area;
pub mod checker;
mod compacted_parse;
mod cpuid_table;
pub mod encoded;
mod gate;
mod image_parse;
pub mod input;
mod layout_from_cpuid;
pub mod layouts;
mod relocate;
mod sanitize;
pub mod states;
mod wire_decode;
mod wire_states;

pub use compacted_parse::compacted_parse;
pub use cpuid_table::cpuid_table;
pub use gate::gate;
pub use image_parse::image_parse;
pub use layout_from_cpuid::layout_from_cpuid;
pub use relocate::relocate;
pub use sanitize::sanitize;
pub use wire_decode::wire_decode;
pub use wire_states::wire_states;

/// Takes one input; panics when a property does not hold.
pub type Target = fn(&[u8]);

/// Every target by name: `fuzz/fuzz_targets/NAME.rs` runs it, `fuzz/corpus/NAME/` is its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("compacted_parse", compacted_parse),
    ("cpuid_table", cpuid_table),
    ("gate", gate),
    ("image_parse", image_parse),
    ("layout_from_cpuid", layout_from_cpuid),
    ("relocate", relocate),
    ("sanitize", sanitize),
    ("wire_decode", wire_decode),
    ("wire_states", wire_states),
];
