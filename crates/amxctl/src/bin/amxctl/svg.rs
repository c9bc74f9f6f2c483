//! A picture of one vCPU's area: a map of its 64-byte lines, and the tiles.

use std::path::Path;

use amxctl::Subject;
use anyhow::Context;
use svg::Document;
use svg::node::element::{Group, Rectangle, Text};
use xsave_state::format::EXTENDED_OFFSET;

use crate::tiles::{self, Tile};

const WIDTH: usize = 880;
const MARGIN: usize = 32;
/// The map: bytes of a line, lines of a row, and how large a line is drawn.
const LINE_BYTES: usize = 64;
const PER_ROW: usize = 16;
const CELL: usize = 28;
/// The tiles: how large a byte is drawn.
const BYTE_WIDTH: usize = 6;
const BYTE_HEIGHT: usize = 9;
/// Tiles beside each other.
const TILE_COLUMNS: usize = 2;
const LEGEND_ROW: usize = 22;

const INK: &str = "#1f2933";
const FAINT: &str = "#7b8794";
const PAPER: &str = "#f5f7fa";
/// One for each component, told apart by people who do not tell red from green.
const COLORS: [&str; 10] = [
    "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#997700", "#44bb99",
    "#ee8866", "#5566aa",
];

/// A part of the area with a name.
struct Region {
    name: String,
    start: usize,
    end: usize,
    color: &'static str,
    in_use: bool,
}

pub(crate) fn write(path: &Path, subject: &Subject, file: &str) -> anyhow::Result<()> {
    svg::save(path, &document(subject, file)).with_context(|| path.display().to_string())
}

fn document(subject: &Subject, file: &str) -> Document {
    let area = &subject.area;
    let regions = regions(subject);
    let all_tiles = tiles::tiles(subject);
    let (zero, tiles): (Vec<_>, Vec<_>) = all_tiles.iter().partition(|tile| tile.is_zero());
    let rows = area.len().div_ceil(LINE_BYTES).div_ceil(PER_ROW);

    let map_top = plus(MARGIN, 70);
    let map_bottom = plus(map_top, times(rows, CELL));
    let legend_bottom = plus(map_top, times(plus(regions.len(), 1), LEGEND_ROW));
    let tiles_top = plus(map_bottom.max(legend_bottom), 56);
    let tile_height = tile_height(&tiles);
    let tile_rows = tiles.len().div_ceil(TILE_COLUMNS);
    let height = if all_tiles.is_empty() {
        plus(map_bottom.max(legend_bottom), MARGIN)
    } else {
        plus(plus(tiles_top, times(tile_rows, tile_height)), MARGIN)
    };

    let mut document = Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("font-family", "'DejaVu Sans', 'Segoe UI', Helvetica, sans-serif")
        .add(rectangle(0, 0, WIDTH, height, "#ffffff"))
        .add(text(MARGIN, 44, 18, INK, &format!("Extended state of {}", subject.owner)).set("font-weight", "bold"))
        .add(text(MARGIN, 64, 12, FAINT, &subtitle(subject, file)))
        .add(text(
            MARGIN,
            plus(MARGIN, 58),
            11,
            FAINT,
            "A cell is 64 bytes, a row 1 KiB; the fuller the colour, the more of its bytes are not zero",
        ));
    document = document.add(map(area, &regions, map_top));
    document = document.add(legend(&regions, map_top));
    if !all_tiles.is_empty() {
        let heading = if zero.is_empty() {
            "Tiles: a byte is a cell; blank is 0".to_owned()
        } else {
            let numbers: Vec<String> = zero.iter().map(|tile| tile.number.to_string()).collect();
            format!(
                "Tiles: a byte is a cell; all zero are {}",
                numbers.join(", ")
            )
        };
        document = document
            .add(text(
                MARGIN,
                tiles_top.saturating_sub(18),
                12,
                FAINT,
                &heading,
            ))
            .add(scale(tiles_top.saturating_sub(30)));
        for (index, tile) in tiles.iter().enumerate() {
            let (column, row) = (index % TILE_COLUMNS, index / TILE_COLUMNS);
            let left = plus(
                MARGIN,
                times(column, plus(times(tile.row_bytes, BYTE_WIDTH), 24)),
            );
            let top = plus(tiles_top, times(row, tile_height));
            document = document.add(picture(tile, left, top));
        }
    }
    document
}

fn subtitle(subject: &Subject, file: &str) -> String {
    let name = Path::new(file)
        .file_name()
        .map_or(file.into(), |name| name.to_string_lossy());
    let xfd = match &subject.xfd {
        Some(known) => format!("{:#x}", known.value.bits()),
        None => "not known".to_owned(),
    };
    format!(
        "{name}: {} bytes, XSTATE_BV {:#x}, XCR0 {:#x}, XFD {xfd}",
        subject.area.len(),
        subject.xstate_bv().bits(),
        subject.xcr0.value.bits()
    )
}

/// The components by their place, and the header.
fn regions(subject: &Subject) -> Vec<Region> {
    let mut regions = vec![Region {
        name: "header".to_owned(),
        start: 512,
        end: EXTENDED_OFFSET,
        color: INK,
        in_use: true,
    }];
    let components = subject.layout.value.components();
    for (component, color) in components.zip(COLORS.iter().cycle()) {
        let user = component.offset().is_some();
        let Some(place) = subject.place(component.id()).filter(|_| user) else {
            continue;
        };
        regions.push(Region {
            name: component.id().to_string(),
            start: place.start,
            end: place.end,
            color,
            in_use: subject.xstate_bv().contains(component.id().bit()),
        });
    }
    regions.sort_by_key(|region| region.start);
    regions
}

fn map(area: &[u8], regions: &[Region], top: usize) -> Group {
    let mut group = Group::new();
    let lines = area.len().div_ceil(LINE_BYTES);
    let place = |line: usize| {
        (
            plus(MARGIN, times(line % PER_ROW, CELL)),
            plus(top, times(line / PER_ROW, CELL)),
        )
    };
    for line in 0..lines {
        let (left, top) = place(line);
        group = group.add(rectangle(left, top, CELL - 2, CELL - 2, PAPER));
    }
    for region in regions {
        let mut at = region.start;
        let end = region.end.min(area.len());
        while at < end {
            let line = at / LINE_BYTES;
            let stop = end.min(times(plus(line, 1), LINE_BYTES));
            let bytes = area.get(at..stop).unwrap_or_default();
            let (left, top) = place(line);
            let from = times(at % LINE_BYTES, CELL - 2) / LINE_BYTES;
            let width = times(bytes.len(), CELL - 2).div_ceil(LINE_BYTES);
            group = group.add(
                rectangle(plus(left, from), top, width, CELL - 2, region.color)
                    .set("fill-opacity", opacity(region, bytes)),
            );
            at = stop;
        }
    }
    group
}

/// Initial components are a hint of their colour.
fn opacity(region: &Region, bytes: &[u8]) -> f32 {
    if !region.in_use {
        return 0.12;
    }
    let used = bytes.iter().filter(|&&byte| byte != 0).count();
    if used == 0 {
        return 0.3;
    }
    let used = u16::try_from(used).unwrap_or(u16::MAX);
    let all = u16::try_from(bytes.len().max(1)).unwrap_or(u16::MAX);
    0.55 + 0.45 * f32::from(used) / f32::from(all)
}

fn legend(regions: &[Region], top: usize) -> Group {
    let left = plus(plus(MARGIN, times(PER_ROW, CELL)), 28);
    let columns = [24, 160, 225, 285].map(|x| plus(left, x));
    let [name, place, size, state] = columns;
    let mut group = Group::new();
    let line = |row: usize| plus(plus(top, 12), times(row, LEGEND_ROW));
    for (x, title, anchor) in [
        (name, "component", "start"),
        (place, "offset", "end"),
        (size, "bytes", "end"),
        (state, "state", "start"),
    ] {
        let x = if title == "state" {
            x.saturating_sub(40)
        } else {
            x
        };
        group = group.add(text(x, line(0), 11, FAINT, title).set("text-anchor", anchor));
    }
    for (row, region) in (1..).zip(regions) {
        let y = line(row);
        let ink = if region.in_use { INK } else { FAINT };
        let state_word = match (region.name.as_str(), region.in_use) {
            ("header", _) => "",
            (_, true) => "in use",
            (_, false) => "initial",
        };
        let size_text = region.end.saturating_sub(region.start).to_string();
        group = group
            .add(
                rectangle(left, y.saturating_sub(11), 14, 14, region.color)
                    .set("fill-opacity", if region.in_use { 0.9 } else { 0.2 }),
            )
            .add(text(name, y, 12, ink, &region.name))
            .add(text(place, y, 12, ink, &region.start.to_string()).set("text-anchor", "end"))
            .add(text(size, y, 12, ink, &size_text).set("text-anchor", "end"))
            .add(text(state.saturating_sub(40), y, 12, ink, state_word));
    }
    group
}

/// What the colours of bytes mean.
fn scale(top: usize) -> Group {
    let left = WIDTH.saturating_sub(plus(MARGIN, 256));
    let mut group = Group::new()
        .add(text(left.saturating_sub(12), plus(top, 11), 11, FAINT, "1").set("text-anchor", "end"))
        .add(text(plus(left, 228), plus(top, 11), 11, FAINT, "255"));
    for step in 0..=54usize {
        let byte = u8::try_from(times(step, 254) / 54)
            .unwrap_or(255)
            .saturating_add(1);
        group = group.add(rectangle(
            plus(left.saturating_sub(4), times(step, 4)),
            top,
            4,
            14,
            &color(byte),
        ));
    }
    group
}

fn picture(tile: &Tile<'_>, left: usize, top: usize) -> Group {
    let rows = tile.bytes.chunks(tile.row_bytes.max(1));
    let (width, height) = (
        times(tile.row_bytes, BYTE_WIDTH),
        times(rows.len(), BYTE_HEIGHT),
    );
    let shape = match tile.shape {
        Some((rows, row_bytes)) if rows > 0 => format!("{rows} x {row_bytes}"),
        _ => "not configured".to_owned(),
    };
    let label = format!("tmm{}: {shape}", tile.number);
    let box_top = plus(top, 20);
    let mut group = Group::new()
        .add(text(left, plus(top, 13), 12, INK, &label))
        .add(rectangle(left, box_top, width, height, PAPER));
    for (row, bytes) in rows.enumerate() {
        let mut column = 0;
        // Equal neighbours are one rectangle.
        for run in bytes.chunk_by(|one, next| one == next) {
            if let Some(&byte) = run.first().filter(|&&byte| byte != 0) {
                group = group.add(rectangle(
                    plus(left, times(column, BYTE_WIDTH)),
                    plus(box_top, times(row, BYTE_HEIGHT)),
                    times(run.len(), BYTE_WIDTH),
                    BYTE_HEIGHT,
                    &color(byte),
                ));
            }
            column = plus(column, run.len());
        }
    }
    if let Some((rows, row_bytes)) = tile.shape.filter(|&(rows, _)| rows > 0) {
        let outline = rectangle(
            left,
            box_top,
            times(row_bytes, BYTE_WIDTH),
            times(rows, BYTE_HEIGHT),
            "none",
        );
        group = group.add(outline.set("stroke", FAINT).set("stroke-width", 1));
    }
    group
}

fn tile_height(tiles: &[&Tile<'_>]) -> usize {
    let rows = tiles
        .iter()
        .map(|tile| tile.bytes.chunks(tile.row_bytes.max(1)).len())
        .max();
    plus(times(rows.unwrap_or(0), BYTE_HEIGHT), 44)
}

fn color(byte: u8) -> String {
    match tiles::rgb(byte) {
        Some((red, green, blue)) => format!("#{red:02x}{green:02x}{blue:02x}"),
        None => PAPER.to_owned(),
    }
}

fn rectangle(x: usize, y: usize, width: usize, height: usize, fill: &str) -> Rectangle {
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", width)
        .set("height", height)
        .set("fill", fill)
}

fn text(x: usize, y: usize, size: usize, fill: &str, content: &str) -> Text {
    Text::new(content)
        .set("x", x)
        .set("y", y)
        .set("font-size", size)
        .set("fill", fill)
}

fn plus(one: usize, other: usize) -> usize {
    one.saturating_add(other)
}

fn times(one: usize, other: usize) -> usize {
    one.saturating_mul(other)
}
