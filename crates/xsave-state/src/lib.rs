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

extern crate alloc;
#[cfg(feature = "kvm")]
extern crate std;

#[cfg(feature = "arbitrary")]
mod arbitrary;
mod bytes;
pub mod feature;
pub mod header;
pub mod image;
mod initial;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod relayout;
pub mod sanitize;
pub mod state;
pub mod tile;
pub mod wire;
pub mod xcr0;

pub use feature::{ComponentId, XFeatures};
pub use image::{CompactedError, Image, ImageError};
pub use layout::{Component, ComponentKind, Layout, LayoutError, Misfit};
pub use legacy::Legacy;
pub use state::{ExtendedState, Registers, StateError};
pub use tile::{TileConfig, TileData};
