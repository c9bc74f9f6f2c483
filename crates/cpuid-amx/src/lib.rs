#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]
//!
//! | module | its one job |
//! |---|---|
//! | [`table`] | leaves and sub-leaves, whatever type holds them |
//! | [`dump`] | the same as text |
//! | [`amx`] | features, palettes and TMUL limits |
//! | [`coherence`] | every way in which leaves contradict each other |

extern crate alloc;

pub mod amx;
pub mod coherence;
pub mod dump;
pub mod table;

pub use amx::{Amx, AmxFeatures, TmulLimits, Unusable};
pub use coherence::Contradiction;
pub use table::{CpuidEntry, CpuidTable, Entry, Table, TableFull};
