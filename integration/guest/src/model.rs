//! The payloads' computation without SIMD: what their registers hold at the end.
//!
//! Written from the description of the rounds, one model per body. They share nothing with the
//! assembly but the inputs.

#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "arrays of fixed size, indexed modulo that size"
)]

mod control;
mod narrow;
mod tiles;
mod wide;

pub use control::Control;
pub use narrow::Narrow;
pub use tiles::Tiles;
pub use wide::Wide;
