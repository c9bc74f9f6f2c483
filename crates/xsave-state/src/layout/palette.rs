//! Tile palettes: how many tiles there are and how large each is, from CPUID.1DH.

use thiserror::Error;

use crate::bytes;
use crate::format::MAX_TILES;

/// One palette of CPUID.1DH: how many tiles there are, and how large each can be.
///
/// Palette 0 is the initial state, with no tiles, and has no description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Palette {
    id: u8,
    total_bytes: u16,
    tile_bytes: u16,
    row_bytes: u16,
    tiles: u16,
    rows: u16,
}

impl Palette {
    /// Palette 1, the only one that processors have today: 8 tiles of 16 rows of 64 bytes.
    pub const ONE: Self = Self {
        id: 1,
        total_bytes: 8192,
        tile_bytes: 1024,
        row_bytes: 64,
        tiles: 8,
        rows: 16,
    };

    /// Reads sub-leaf `id` of CPUID.1DH, given as `[eax, ebx, ecx, edx]`.
    ///
    /// # Errors
    ///
    /// The numbers contradict each other, or there are more tiles than TILECFG can describe.
    ///
    /// ```
    /// use xsave_state::Palette;
    ///
    /// // CPUID.(EAX=1DH,ECX=1) of Sapphire Rapids
    /// let palette = Palette::from_leaf(1, [0x0400_2000, 0x0008_0040, 0x10, 0])?;
    /// assert_eq!(palette, Palette::ONE);
    /// # Ok::<(), xsave_state::PaletteError>(())
    /// ```
    pub fn from_leaf(id: u8, [eax, ebx, ecx, _]: [u32; 4]) -> Result<Self, PaletteError> {
        let palette = Self {
            id,
            total_bytes: bytes::low_half(eax),
            tile_bytes: bytes::high_half(eax),
            row_bytes: bytes::low_half(ebx),
            tiles: bytes::high_half(ebx),
            rows: bytes::low_half(ecx),
        };
        if palette.tiles == 0 || usize::from(palette.tiles) > MAX_TILES {
            return Err(PaletteError::Tiles {
                palette: id,
                tiles: palette.tiles,
            });
        }
        let tile_bytes = u32::from(palette.row_bytes).saturating_mul(u32::from(palette.rows));
        if tile_bytes == 0 || tile_bytes != u32::from(palette.tile_bytes) {
            return Err(PaletteError::TileBytes {
                palette: id,
                reported_bytes: palette.tile_bytes,
                row_bytes: palette.row_bytes,
                rows: palette.rows,
            });
        }
        let total = tile_bytes.saturating_mul(u32::from(palette.tiles));
        if total != u32::from(palette.total_bytes) {
            return Err(PaletteError::TotalBytes {
                palette: id,
                reported_bytes: palette.total_bytes,
                computed_bytes: total,
            });
        }
        Ok(palette)
    }

    /// Returns its number: the sub-leaf of CPUID.1DH, and byte 0 of a TILECFG that selects it.
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    /// Returns the bytes of all tiles together, CPUID.(EAX=1DH,ECX=id):EAX\[15:0\].
    #[must_use]
    pub const fn total_bytes(&self) -> u16 {
        self.total_bytes
    }

    /// Returns the bytes of one tile, CPUID.(EAX=1DH,ECX=id):EAX\[31:16\].
    #[must_use]
    pub const fn tile_bytes(&self) -> u16 {
        self.tile_bytes
    }

    /// Returns the bytes of one row, CPUID.(EAX=1DH,ECX=id):EBX\[15:0\].
    #[must_use]
    pub const fn row_bytes(&self) -> u16 {
        self.row_bytes
    }

    /// Returns the number of tiles (`max_names`), CPUID.(EAX=1DH,ECX=id):EBX\[31:16\]; 1 to 16.
    #[must_use]
    pub const fn tiles(&self) -> u16 {
        self.tiles
    }

    /// Returns the rows of a tile, CPUID.(EAX=1DH,ECX=id):ECX\[15:0\].
    #[must_use]
    pub const fn rows(&self) -> u16 {
        self.rows
    }
}

/// Errors from reading a palette that cannot exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PaletteError {
    /// The number of tiles is 0, or more than TILECFG has room for.
    #[error("palette {palette} has {tiles} tiles; TILECFG describes 1 to {MAX_TILES}")]
    Tiles {
        /// The palette.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=palette):EBX\[31:16\].
        tiles: u16,
    },
    /// Bytes per tile is not bytes per row times rows, or is 0.
    #[error(
        "palette {palette} has {reported_bytes} bytes per tile, but {rows} rows of {row_bytes} bytes"
    )]
    TileBytes {
        /// The palette.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=palette):EAX\[31:16\].
        reported_bytes: u16,
        /// CPUID.(EAX=1DH,ECX=palette):EBX\[15:0\].
        row_bytes: u16,
        /// CPUID.(EAX=1DH,ECX=palette):ECX\[15:0\].
        rows: u16,
    },
    /// The total is not the number of tiles times bytes per tile.
    #[error(
        "palette {palette} has {reported_bytes} bytes in all, but its tiles make {computed_bytes}"
    )]
    TotalBytes {
        /// The palette.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=palette):EAX\[15:0\].
        reported_bytes: u16,
        /// Tiles times bytes per tile.
        computed_bytes: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn palette_of_sapphire_rapids() {
        let palette = Palette::from_leaf(1, [0x0400_2000, 0x0008_0040, 0x10, 0]).unwrap();
        assert_eq!(palette, Palette::ONE);
        assert_eq!(palette.id(), 1);
        assert_eq!(palette.total_bytes(), 8192);
        assert_eq!(palette.tile_bytes(), 1024);
        assert_eq!(palette.row_bytes(), 64);
        assert_eq!(palette.tiles(), 8);
        assert_eq!(palette.rows(), 16);
    }

    #[test]
    fn palettes_that_cannot_exist_are_named() {
        assert_eq!(
            Palette::from_leaf(1, [0x0400_4400, 0x0011_0040, 0x10, 0]),
            Err(PaletteError::Tiles {
                palette: 1,
                tiles: 17
            })
        );
        assert_eq!(
            Palette::from_leaf(1, [0; 4]),
            Err(PaletteError::Tiles {
                palette: 1,
                tiles: 0
            })
        );
        assert_eq!(
            Palette::from_leaf(1, [0x0400_2000, 0x0008_0040, 0x11, 0]),
            Err(PaletteError::TileBytes {
                palette: 1,
                reported_bytes: 1024,
                row_bytes: 64,
                rows: 17
            })
        );
        assert_eq!(
            Palette::from_leaf(1, [0x0400_1c00, 0x0008_0040, 0x10, 0]),
            Err(PaletteError::TotalBytes {
                palette: 1,
                reported_bytes: 7168,
                computed_bytes: 8192
            })
        );
    }
}
