//! XSAVE areas: their parts, and a whole one that has been checked.

mod compacted;
mod header;
mod image;
pub(crate) mod initial;
mod legacy;
mod tile;

pub use compacted::CompactedError;
pub use header::{Header, HeaderError};
pub use image::{Image, ImageError};
pub use legacy::{Legacy, LegacyError};
pub use tile::{TileConfig, TileConfigError, TileData, TileShape};
