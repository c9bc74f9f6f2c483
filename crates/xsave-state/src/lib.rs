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

mod bytes;
pub mod format;

// Names.
pub mod feature;
pub mod xcr0;
pub use feature::{ComponentId, XFeatures};

// Places.
pub mod layout;
pub use layout::{Component, Layout, LayoutError, Palette, PaletteError};

// Areas.
pub mod area;
pub use area::{
    CompactedError, Header, HeaderError, Image, ImageError, Legacy, LegacyError, TileConfig,
    TileConfigError, TileData, TileShape,
};

// One vCPU's state.
pub mod registers;
pub mod state;
pub use registers::{Registers, RegistersError};
pub use state::{ExtendedState, StateError};

// Whether a state fits, and how it is made to fit.
pub mod fit;
pub mod sanitize;
pub use fit::{Losses, Misfit, RelocateError, Relocated};
pub use sanitize::{SanitizeError, Sanitized, UntrustedArea};

// In and out.
#[cfg(feature = "arbitrary")]
mod arbitrary;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
pub mod wire;
