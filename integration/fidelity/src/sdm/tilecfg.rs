//! What LDTILECFG takes (SDM vol. 2, LDTILECFG, operation), with the limits from CPUID leaf 1DH.

use crate::cpuid::cpuid;

/// The operand.
pub type Config = [u8; 64];

/// A palette (CPUID leaf 1DH).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Palette {
    /// The highest palette there is.
    pub max_palette: u32,
    /// Tiles.
    pub names: usize,
    /// Bytes per row.
    pub bytes_per_row: u16,
    /// Rows.
    pub rows: u8,
}

impl Palette {
    /// Palette 1 of the processor that this runs on.
    #[must_use]
    pub fn here() -> Self {
        let [max_palette, ..] = cpuid(0x1d, 0);
        let [_, ebx, ecx, _] = cpuid(0x1d, 1);
        Self {
            max_palette,
            names: (ebx >> 16) as usize,
            bytes_per_row: u16::try_from(ebx & 0xffff).unwrap(),
            rows: u8::try_from(ecx & 0xffff).unwrap(),
        }
    }
}

/// The rule that a configuration breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The palette does not exist.
    Palette,
    /// This reserved byte is not zero.
    Reserved(usize),
    /// This tile's rows are too long.
    BytesPerRow(usize),
    /// This tile has too many rows.
    Rows(usize),
    /// This tile has rows of no bytes, or no rows of some bytes.
    Half(usize),
}

/// Whether LDTILECFG loads this; a broken rule is #GP.
///
/// # Errors
///
/// The first rule that it breaks.
pub fn check(config: &Config, palette: Palette) -> Result<(), Broken> {
    let id = config[0];
    if u32::from(id) > palette.max_palette {
        return Err(Broken::Palette);
    }
    if id == 0 {
        return Ok(());
    }
    let used = |i: usize| {
        i < 2 || (16..16 + 2 * palette.names).contains(&i) || (48..48 + palette.names).contains(&i)
    };
    if let Some(i) = (0..64).find(|&i| !used(i) && config[i] != 0) {
        return Err(Broken::Reserved(i));
    }
    for tile in 0..palette.names {
        let columns = u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]);
        let rows = config[48 + tile];
        if columns > palette.bytes_per_row {
            return Err(Broken::BytesPerRow(tile));
        }
        if rows > palette.rows {
            return Err(Broken::Rows(tile));
        }
        if (columns == 0) != (rows == 0) {
            return Err(Broken::Half(tile));
        }
    }
    Ok(())
}

/// What STTILECFG stores after LDTILECFG has loaded `config`: palette 0 is the initial state.
#[must_use]
pub fn stored(config: &Config) -> Config {
    if config[0] == 0 { [0; 64] } else { *config }
}

/// A configuration of palette 1 with these tiles: rows and bytes per row.
#[must_use]
pub fn config(tiles: &[(u8, u8)]) -> Config {
    let mut config = [0; 64];
    config[0] = 1;
    for (i, (rows, columns)) in tiles.iter().enumerate() {
        config[16 + 2 * i] = *columns;
        config[48 + i] = *rows;
    }
    config
}
