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
//! The extended state of a vCPU as checked data.
//!
//! | module | its one job |
//! |---|---|
//! | [`feature`] | components by number, by name and as bitmaps |
//! | [`layout`] | where each component lies, from CPUID.0DH |
//! | [`header`] | XSTATE_BV, XCOMP_BV |
//! | [`tile`] | AMX tile configuration and tile data |

extern crate alloc;
#[cfg(feature = "kvm")]
extern crate std;

mod bytes;
pub mod feature;
pub mod header;
pub mod layout;
pub mod tile;

pub use feature::{ComponentId, XFeatures};
pub use layout::{Component, ComponentKind, Layout, LayoutError, Misfit};
