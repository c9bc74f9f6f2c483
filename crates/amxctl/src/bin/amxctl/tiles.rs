//! Tiles as pictures in the terminal: two rows of a tile to a line, by half blocks.

use std::fmt::Write;

use amxctl::{Subject, parts};
use console::style;
use xsave_state::{ComponentId, Palette, TileConfig, XFeatures};

use crate::screen;

/// Left of a picture.
const INDENT: usize = 4;

/// A tile with its configured shape and its bytes.
pub(crate) struct Tile<'a> {
    pub(crate) number: usize,
    /// Rows and bytes of a row, as they are configured; `None`: not configured.
    pub(crate) shape: Option<(usize, usize)>,
    pub(crate) row_bytes: usize,
    pub(crate) bytes: &'a [u8],
}

impl Tile<'_> {
    pub(crate) fn is_zero(&self) -> bool {
        self.bytes.iter().all(|&byte| byte == 0)
    }

    pub(crate) fn nonzero_bytes(&self) -> usize {
        self.bytes.iter().filter(|&&byte| byte != 0).count()
    }

    fn shape(&self) -> String {
        match self.shape {
            Some((0, _)) | None => "not configured".to_owned(),
            Some((rows, row_bytes)) => format!("{rows} x {row_bytes}"),
        }
    }
}

/// The configuration, where there is a valid one in use.
pub(crate) fn config(subject: &Subject) -> Option<TileConfig> {
    if !subject.xstate_bv().contains(XFeatures::XTILECFG) {
        return None;
    }
    let content = subject.component(ComponentId::XTILECFG).first_chunk()?;
    TileConfig::parse(content, subject.layout.value.palettes())
        .ok()
        .flatten()
}

/// The tiles, where they are in use and their palette is known.
pub(crate) fn tiles(subject: &Subject) -> Vec<Tile<'_>> {
    if !subject.xstate_bv().contains(XFeatures::XTILEDATA) {
        return Vec::new();
    }
    let Some(palette) = parts::palette(subject) else {
        return Vec::new();
    };
    let config = config(subject);
    let bytes = subject.component(ComponentId::XTILEDATA);
    bytes
        .chunks_exact(usize::from(palette.tile_bytes()))
        .take(usize::from(palette.tiles()))
        .enumerate()
        .map(|(number, bytes)| Tile {
            number,
            shape: config
                .as_ref()
                .and_then(|config| config.shapes().get(number))
                .map(|shape| (usize::from(shape.rows), usize::from(shape.row_bytes))),
            row_bytes: usize::from(palette.row_bytes()),
            bytes,
        })
        .collect()
}

/// What is configured, and a picture of each tile that is not zero.
pub(crate) fn text(subject: &Subject) -> String {
    let mut text = String::new();
    let config = config(subject);
    let tiles = tiles(subject);
    if config.is_none() && tiles.is_empty() {
        return text;
    }
    let _ = writeln!(text, "\n  {}", screen::title("Tiles"));
    match &config {
        Some(config) => {
            let _ = writeln!(
                text,
                "  TILECFG: palette {}, start row {}; {}",
                config.palette().id(),
                config.start_row(),
                shapes(config)
            );
        }
        None => {
            let _ = writeln!(text, "  TILECFG: initial, nothing is configured");
        }
    }
    let palette: Option<Palette> = parts::palette(subject);
    if tiles.is_empty() {
        let _ = writeln!(text, "  XTILEDATA: initial, all tiles are zero");
    } else if let Some(palette) = palette.filter(|_| !tiles.iter().all(Tile::is_zero)) {
        let colors = if console::colors_enabled() {
            "dark is 1, light is 255"
        } else {
            "blank is 0"
        };
        let said = format!(
            "A picture has {} rows of {} bytes; {colors}.",
            palette.rows(),
            palette.row_bytes()
        );
        let _ = writeln!(text, "  {}", screen::dim(said));
    }
    for group in grouped(&tiles) {
        match group {
            [first, .., last] => {
                let _ = writeln!(text, "  tmm{} to tmm{}: zero", first.number, last.number);
            }
            [tile] if tile.is_zero() => {
                let _ = writeln!(text, "  tmm{}  {}: zero", tile.number, tile.shape());
            }
            [tile] => {
                let _ = writeln!(
                    text,
                    "  tmm{}  {}, {} of {} bytes are not zero",
                    tile.number,
                    tile.shape(),
                    screen::grouped(tile.nonzero_bytes() as u64),
                    screen::grouped(tile.bytes.len() as u64)
                );
                text.push_str(&picture(tile));
            }
            [] => {}
        }
    }
    text
}

/// How many tiles are configured, and as what.
fn shapes(config: &TileConfig) -> String {
    let shapes = config.shapes();
    let used: Vec<_> = shapes.iter().filter(|shape| shape.rows != 0).collect();
    match used.as_slice() {
        [] => "no tile is configured".to_owned(),
        [first, rest @ ..] if rest.iter().all(|shape| shape == first) => {
            format!("{} of {} tiles are {first}", used.len(), shapes.len())
        }
        _ => (0..)
            .zip(shapes)
            .filter(|(_, shape)| shape.rows != 0)
            .map(|(tile, shape): (usize, _)| format!("tmm{tile} {shape}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// Zero tiles in a row together, all others alone.
fn grouped<'a, 'b>(tiles: &'a [Tile<'b>]) -> impl Iterator<Item = &'a [Tile<'b>]> {
    tiles.chunk_by(|one, next| one.is_zero() && next.is_zero())
}

fn picture(tile: &Tile<'_>) -> String {
    let mut text = String::new();
    let rows: Vec<&[u8]> = tile.bytes.chunks(tile.row_bytes.max(1)).collect();
    // As many columns as there is room for; a column is the largest byte of what it stands for.
    let room = screen::width()
        .saturating_sub(INDENT.saturating_add(2))
        .max(1);
    let per_column = tile.row_bytes.div_ceil(room).max(1);
    for pair in rows.chunks(2) {
        let upper = columns(pair.first().copied().unwrap_or_default(), per_column);
        let lower = columns(pair.get(1).copied().unwrap_or_default(), per_column);
        let mut line = String::new();
        for (&upper, &lower) in upper.iter().zip(&lower) {
            line.push_str(&cell(upper, lower));
        }
        let border = screen::dim('│');
        let _ = writeln!(text, "{:INDENT$}{border}{line}{border}", "");
    }
    text
}

/// The largest byte of each group: a single byte in a tile of zeros is seen.
fn columns(row: &[u8], per_column: usize) -> Vec<u8> {
    row.chunks(per_column)
        .map(|group| group.iter().copied().max().unwrap_or(0))
        .collect()
}

fn cell(upper: u8, lower: u8) -> String {
    if console::colors_enabled() {
        return match (color(upper), color(lower)) {
            (None, None) => " ".to_owned(),
            (Some(upper), None) => style('▀').color256(upper).to_string(),
            (None, Some(lower)) => style('▄').color256(lower).to_string(),
            (Some(upper), Some(lower)) => style('▀').color256(upper).on_color256(lower).to_string(),
        };
    }
    match (upper, lower) {
        (0, 0) => ' ',
        (_, 0) => '▀',
        (0, _) => '▄',
        _ => '█',
    }
    .to_string()
}

/// The nearest of the 216 colours that every terminal with 256 has. Zero has none.
fn color(byte: u8) -> Option<u8> {
    let (red, green, blue) = rgb(byte)?;
    // Six levels: 0, 95, 135, 175, 215 and 255.
    let level = |value: u8| match value {
        0..48 => 0,
        48..115 => 1,
        _ => value.saturating_sub(35) / 40,
    };
    let index = u32::from(level(red))
        .saturating_mul(36)
        .saturating_add(u32::from(level(green)).saturating_mul(6))
        .saturating_add(u32::from(level(blue)))
        .saturating_add(16);
    u8::try_from(index).ok()
}

/// The colour of a byte; zero has none.
pub(crate) fn rgb(byte: u8) -> Option<(u8, u8, u8)> {
    if byte == 0 {
        return None;
    }
    let color = colorous::VIRIDIS.eval_rational(usize::from(byte), 256);
    Some((color.r, color.g, color.b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_but_zero_has_a_colour_of_the_cube() {
        assert_eq!(color(0), None);
        for byte in 1..=255 {
            assert!(color(byte).is_some_and(|index| (16..232).contains(&index)));
        }
        assert_ne!(color(1), color(255));
    }

    #[test]
    fn a_single_byte_in_a_narrow_picture_is_seen() {
        assert_eq!(columns(&[0, 0, 7, 0, 0], 2), [0, 7, 0]);
    }
}
