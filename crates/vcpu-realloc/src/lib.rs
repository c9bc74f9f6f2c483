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
#![doc = include_str!("../README.md")]

extern crate alloc;
#[cfg(feature = "kvm")]
extern crate std;

pub mod fpswitch;
pub mod gate;
pub mod grant;
pub mod growth;
#[cfg(feature = "kvm")]
pub mod kvm;

pub use gate::{Action, Event, Fault, Gate, Growth};
pub use grant::{SavedGrant, SavedGrantError};
pub use growth::{Answer, Grow, Request, Scope};
