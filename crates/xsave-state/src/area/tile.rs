//! AMX tile configuration and tile data, components 17 and 18.
//!
//! What a valid TILECFG is follows from the palettes of CPUID.1DH and from the operation section of
//! LDTILECFG (SDM Vol. 2, LDTILECFG; Vol. 1 §18.2).

use core::fmt;

use thiserror::Error;

use crate::bytes;
use crate::format::{MAX_TILES, TILECFG_BYTES};
use crate::layout::Palette;

const RESERVED: core::ops::Range<usize> = 2..16;
const COLSB: core::ops::Range<usize> = 16..48;
const ROWS: core::ops::Range<usize> = 48..64;

/// Rows and bytes per row of one tile. Both are 0 for a tile that is not configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TileShape {
    /// Rows, TILECFG.rows.
    pub rows: u8,
    /// Bytes of each row, TILECFG.colsb.
    pub row_bytes: u16,
}

impl fmt::Display for TileShape {
    /// `16 x 64`: rows, then bytes of a row.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.rows, self.row_bytes)
    }
}

/// A tile configuration that LDTILECFG accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileConfig {
    palette: Palette,
    start_row: u8,
    shapes: [TileShape; MAX_TILES],
}

impl TileConfig {
    /// Checks 64 bytes as LDTILECFG does. `None` is the initial state, palette 0: LDTILECFG does
    /// not look at the other bytes then.
    ///
    /// # Errors
    ///
    /// The rule for which LDTILECFG would raise #GP.
    ///
    /// ```
    /// use xsave_state::{Palette, TileConfig, TileConfigError};
    ///
    /// let palette = Palette::ONE;
    /// let mut bytes = [0; 64];
    /// bytes[0] = 1; // palette
    /// bytes[16] = 64; // colsb of tile 0
    /// bytes[48] = 16; // rows of tile 0
    /// let config = TileConfig::parse(&bytes, &[palette])?.unwrap();
    /// assert_eq!(config.shapes()[0].to_string(), "16 x 64");
    ///
    /// bytes[48] = 17;
    /// assert!(matches!(
    ///     TileConfig::parse(&bytes, &[palette]),
    ///     Err(TileConfigError::Rows { tile: 0, rows: 17, limit: 16 })
    /// ));
    /// # Ok::<(), TileConfigError>(())
    /// ```
    pub fn parse(
        bytes: &[u8; TILECFG_BYTES],
        palettes: &[Palette],
    ) -> Result<Option<Self>, TileConfigError> {
        let [palette, start_row, ..] = *bytes;
        if palette == 0 {
            return Ok(None);
        }
        let Some(palette) = palettes.iter().find(|p| p.id() == palette).copied() else {
            return Err(match palettes.iter().map(|p| p.id()).max() {
                Some(max_palette) => TileConfigError::Palette {
                    palette,
                    max_palette,
                },
                None => TileConfigError::NoPalettes { palette },
            });
        };
        if let Some(offset) = bytes::first_nonzero(bytes, RESERVED) {
            return Err(reserved(bytes, offset));
        }

        let mut shapes = [TileShape::default(); MAX_TILES];
        let columns = bytes::range(bytes, COLSB).chunks_exact(2);
        let rows = bytes::range(bytes, ROWS);
        for (tile, ((shape, colsb), &rows)) in shapes.iter_mut().zip(columns).zip(rows).enumerate()
        {
            let row_bytes = bytes::u16_at(colsb, 0);
            if tile >= usize::from(palette.tiles()) {
                if row_bytes != 0 {
                    let offset = COLSB.start.saturating_add(tile.saturating_mul(2));
                    return Err(reserved(bytes, offset));
                }
                if rows != 0 {
                    return Err(reserved(bytes, ROWS.start.saturating_add(tile)));
                }
                continue;
            }
            if row_bytes > palette.row_bytes() {
                return Err(TileConfigError::RowBytes {
                    tile,
                    row_bytes,
                    limit_bytes: palette.row_bytes(),
                });
            }
            if u16::from(rows) > palette.rows() {
                return Err(TileConfigError::Rows {
                    tile,
                    rows,
                    limit: palette.rows(),
                });
            }
            if (rows == 0) != (row_bytes == 0) {
                return Err(TileConfigError::HalfConfigured {
                    tile,
                    rows,
                    row_bytes,
                });
            }
            *shape = TileShape { rows, row_bytes };
        }
        Ok(Some(Self {
            palette,
            start_row,
            shapes,
        }))
    }

    /// Checks the same as [`parse`](Self::parse), without reading the shapes.
    #[inline]
    pub(crate) fn check(
        bytes: &[u8; TILECFG_BYTES],
        palettes: &[Palette],
    ) -> Result<(), TileConfigError> {
        let [id, ..] = *bytes;
        let palette = palettes.iter().find(|palette| palette.id() == id);
        if id == 0 || palette.is_some_and(|palette| accepts(palette, bytes)) {
            return Ok(());
        }
        Self::parse(bytes, palettes).map(drop)
    }

    /// Returns the palette that is selected.
    #[must_use]
    pub const fn palette(&self) -> &Palette {
        &self.palette
    }

    /// Returns TILECFG.start_row: the row at which an interrupted tile load or store goes on.
    #[must_use]
    pub const fn start_row(&self) -> u8 {
        self.start_row
    }

    /// Returns the shape of each tile of the palette, by number.
    #[must_use]
    pub fn shapes(&self) -> &[TileShape] {
        bytes::prefix(&self.shapes, usize::from(self.palette.tiles()))
    }
}

/// Returns true when LDTILECFG accepts `bytes` with this palette. It compares all tiles at once and
/// without a branch, so that the compiler makes vector code of it.
fn accepts(palette: &Palette, bytes: &[u8; TILECFG_BYTES]) -> bool {
    let mut columns = [0; MAX_TILES];
    for (column, &colsb) in columns
        .iter_mut()
        .zip(bytes::range(bytes, COLSB).as_chunks().0)
    {
        *column = u16::from_le_bytes(colsb);
    }
    let rows = bytes::array::<MAX_TILES>(bytes, ROWS.start).map(u16::from);
    let mut bad = 0;
    for ((tile, columns), rows) in (0..).zip(columns).zip(rows) {
        let there = if tile < palette.tiles() { u16::MAX } else { 0 };
        bad |= columns.saturating_sub(palette.row_bytes() & there)
            | rows.saturating_sub(palette.rows() & there)
            | (u16::from(columns == 0) ^ u16::from(rows == 0));
    }
    let reserved = bytes::array::<{ RESERVED.end - RESERVED.start }>(bytes, RESERVED.start);
    bad == 0 && reserved == [0; RESERVED.end - RESERVED.start]
}

fn reserved(bytes: &[u8], offset: usize) -> TileConfigError {
    // `colsb` entries are two bytes: name the one that is not zero.
    let offset = bytes::first_nonzero(bytes, offset..bytes.len()).unwrap_or(offset);
    TileConfigError::Reserved {
        offset,
        value: bytes::u8_at(bytes, offset),
    }
}

/// Errors from checking a TILECFG for which LDTILECFG would raise #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum TileConfigError {
    /// The palette is not one that CPUID.1DH describes.
    #[error("TILECFG selects palette {palette}; the highest is {max_palette}")]
    Palette {
        /// TILECFG.palette_id, byte 0.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=0):EAX.
        max_palette: u8,
    },
    /// CPUID.1DH describes no palette. Hiding the leaf does not keep a guest from LDTILECFG where the
    /// processor has tiles.
    #[error(
        "TILECFG selects palette {palette}, but this CPUID has no palettes in leaf 1DH: use the \
         layout of a vCPU (kvm::VcpuLayout), which has those of the host"
    )]
    NoPalettes {
        /// TILECFG.palette_id, byte 0.
        palette: u8,
    },
    /// A reserved byte is not zero.
    #[error("byte {offset} of TILECFG is reserved and must be 0, but is {value:#04x}")]
    Reserved {
        /// Offset in the 64 bytes.
        offset: usize,
        /// Its value.
        value: u8,
    },
    /// A row is longer than the palette allows.
    #[error("tile {tile} has rows of {row_bytes} bytes; the palette allows {limit_bytes}")]
    RowBytes {
        /// The tile.
        tile: usize,
        /// TILECFG.colsb of the tile.
        row_bytes: u16,
        /// The most that the palette allows.
        limit_bytes: u16,
    },
    /// A tile has more rows than the palette allows.
    #[error("tile {tile} has {rows} rows; the palette allows {limit}")]
    Rows {
        /// The tile.
        tile: usize,
        /// TILECFG.rows of the tile.
        rows: u8,
        /// The most that the palette allows.
        limit: u16,
    },
    /// Exactly one of rows and bytes per row is zero.
    #[error("tile {tile} has {rows} rows of {row_bytes} bytes: both must be 0, or neither")]
    HalfConfigured {
        /// The tile.
        tile: usize,
        /// TILECFG.rows of the tile.
        rows: u8,
        /// TILECFG.colsb of the tile.
        row_bytes: u16,
    },
}

/// The bytes of component 18 as tiles and rows, by the geometry of a palette.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileData<'a> {
    bytes: &'a [u8],
    palette: Option<Palette>,
}

impl<'a> TileData<'a> {
    pub(crate) fn new(bytes: &'a [u8], palette: Option<Palette>) -> Self {
        Self { bytes, palette }
    }

    /// Returns all bytes of component 18.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the palette whose geometry is used, or `None` where the layout has none: then only
    /// [`bytes`](Self::bytes) can be read.
    #[must_use]
    pub const fn palette(&self) -> Option<&Palette> {
        self.palette.as_ref()
    }

    /// Returns all rows of tile `tile`, each at its full length, configured or not. `None` without
    /// such a tile.
    #[must_use]
    pub fn tile(&self, tile: usize) -> Option<&'a [u8]> {
        let palette = self.palette?;
        if tile >= usize::from(palette.tiles()) {
            return None;
        }
        self.bytes
            .chunks_exact(usize::from(palette.tile_bytes()))
            .nth(tile)
    }

    /// Returns row `row` of tile `tile`, at its full length. `None` without such a row.
    #[must_use]
    pub fn row(&self, tile: usize, row: usize) -> Option<&'a [u8]> {
        let palette = self.palette?;
        self.tile(tile)?
            .chunks_exact(usize::from(palette.row_bytes()))
            .nth(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn palette() -> Palette {
        Palette::ONE
    }

    fn full() -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for tile in 0..8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
        }
        bytes
    }

    fn error(change: impl FnOnce(&mut [u8; 64])) -> TileConfigError {
        let mut bytes = full();
        change(&mut bytes);
        TileConfig::parse(&bytes, &[palette()]).unwrap_err()
    }

    #[test]
    fn palette_0_is_initial_whatever_follows() {
        let mut bytes = [0xff; 64];
        bytes[0] = 0;
        assert_eq!(TileConfig::parse(&bytes, &[palette()]), Ok(None));
        assert_eq!(TileConfig::parse(&[0; 64], &[]), Ok(None));
    }

    #[test]
    fn shapes_are_read_by_tile() {
        let mut bytes = full();
        bytes[1] = 3;
        bytes[16 + 2 * 5] = 12;
        bytes[48 + 5] = 3;
        bytes[16 + 2 * 7] = 0;
        bytes[48 + 7] = 0;
        let config = TileConfig::parse(&bytes, &[palette()]).unwrap().unwrap();
        assert_eq!(config.start_row(), 3);
        assert_eq!(config.palette().id(), 1);
        assert_eq!(config.shapes().len(), 8);
        assert_eq!(
            config.shapes()[4],
            TileShape {
                rows: 16,
                row_bytes: 64
            }
        );
        assert_eq!(
            config.shapes()[5],
            TileShape {
                rows: 3,
                row_bytes: 12
            }
        );
        assert_eq!(config.shapes()[7], TileShape::default());
    }

    #[test]
    fn each_fault_of_ldtilecfg_has_its_name() {
        assert_eq!(
            error(|b| b[0] = 2),
            TileConfigError::Palette {
                palette: 2,
                max_palette: 1
            }
        );
        for offset in 2..16 {
            assert_eq!(
                error(|b| b[offset] = 9),
                TileConfigError::Reserved { offset, value: 9 }
            );
        }
        // colsb and rows of tiles that the palette does not have
        for offset in (32..48).chain(56..64) {
            assert_eq!(
                error(|b| b[offset] = 1),
                TileConfigError::Reserved { offset, value: 1 }
            );
        }
        assert_eq!(
            error(|b| b[16 + 2 * 3] = 65),
            TileConfigError::RowBytes {
                tile: 3,
                row_bytes: 65,
                limit_bytes: 64
            }
        );
        assert_eq!(
            error(|b| b[17 + 2 * 3] = 1),
            TileConfigError::RowBytes {
                tile: 3,
                row_bytes: 0x140,
                limit_bytes: 64
            }
        );
        assert_eq!(
            error(|b| b[48 + 7] = 17),
            TileConfigError::Rows {
                tile: 7,
                rows: 17,
                limit: 16
            }
        );
        assert_eq!(
            error(|b| b[48] = 0),
            TileConfigError::HalfConfigured {
                tile: 0,
                rows: 0,
                row_bytes: 64
            }
        );
        assert_eq!(
            error(|b| b[16] = 0),
            TileConfigError::HalfConfigured {
                tile: 0,
                rows: 16,
                row_bytes: 0
            }
        );
    }

    /// The check that knows no shapes, on every value of every byte of configurations with and
    /// without tiles that are not configured.
    #[test]
    fn check_says_what_parse_says() {
        let mut half = full();
        half[16 + 2 * 5..][..2].fill(0);
        half[48 + 5] = 0;
        for sound in [full(), half] {
            for at in 0..64 {
                for value in 0..=255 {
                    let mut bytes = sound;
                    bytes[at] = value;
                    assert_eq!(
                        TileConfig::check(&bytes, &[palette()]),
                        TileConfig::parse(&bytes, &[palette()]).map(drop),
                        "byte {at}: {value}"
                    );
                }
            }
        }
    }

    #[test]
    fn without_palettes_only_the_initial_state_is_valid() {
        assert_eq!(
            TileConfig::parse(&full(), &[]),
            Err(TileConfigError::NoPalettes { palette: 1 })
        );
    }

    #[test]
    fn tiles_and_rows_are_slices_of_component_18() {
        let bytes: Vec<u8> = (0..8192u32).map(|i| (i >> 6) as u8).collect();
        let data = TileData::new(&bytes, Some(palette()));
        assert_eq!(data.bytes().len(), 8192);
        assert_eq!(data.tile(0).unwrap().len(), 1024);
        assert_eq!(data.row(7, 15).unwrap(), [127; 64]);
        assert_eq!(data.row(3, 2).unwrap(), [50; 64]);
        assert_eq!(data.tile(8), None);
        assert_eq!(data.row(0, 16), None);
        assert_eq!(data.palette(), Some(&palette()));

        let unknown = TileData::new(&bytes, None);
        assert_eq!((unknown.tile(0), unknown.row(0, 0)), (None, None));
        assert_eq!(unknown.bytes().len(), 8192);
    }
}
