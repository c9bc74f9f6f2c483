//! Registers, tile rows and fields within a component: what an operator calls the bytes.

use std::ops::Range;

use xsave_state::Palette;
use xsave_state::{Component, ComponentId};

use crate::vcpu::Subject;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// As in `zmm17` or `tmm0 row 3`.
    pub name: String,
    /// Where it is within its component, in bytes.
    pub range: Range<usize>,
}

const BNDREGS: u8 = 3;
const APX: u8 = 19;
const LINE_BYTES: usize = 64;

/// The parts of a component. Bytes that mean nothing (padding, what is reserved, MXCSR in the midst
/// of x87, which belongs to SSE) are in none. A component that is not known here has lines of 64
/// bytes.
#[must_use]
pub fn of(component: &Component, palette: Option<&Palette>) -> Vec<Part> {
    let id = component.id();
    let size = component.size();
    let parts = match id {
        ComponentId::X87 => {
            let mut parts: Vec<Part> = [
                ("fcw", 0..2),
                ("fsw", 2..4),
                ("ftw", 4..5),
                ("fop", 6..8),
                ("fip", 8..16),
                ("fdp", 16..24),
            ]
            .into_iter()
            .map(|(name, range)| Part {
                name: name.to_owned(),
                range,
            })
            .collect();
            parts.extend(rows(32, 8, 16, |n| format!("st{n}")).map(|part| Part {
                // Ten bytes and six of padding.
                range: part.range.start..part.range.end.saturating_sub(6),
                ..part
            }));
            parts
        }
        ComponentId::SSE => rows(0, 16, 16, |n| format!("xmm{n}")).collect(),
        ComponentId::AVX => rows(0, 16, 16, |n| format!("ymm{n}[255:128]")).collect(),
        ComponentId::OPMASK => rows(0, 8, 8, |n| format!("k{n}")).collect(),
        ComponentId::ZMM_HI256 => rows(0, 16, 32, |n| format!("zmm{n}[511:256]")).collect(),
        ComponentId::HI16_ZMM => {
            rows(0, 16, 64, |n| format!("zmm{}", n.saturating_add(16))).collect()
        }
        ComponentId::PKRU => rows(0, 1, 4, |_| "pkru".to_owned()).collect(),
        ComponentId::XTILECFG => tile_config(),
        ComponentId::XTILEDATA => match palette {
            Some(palette) => tile_rows(palette),
            None => lines(size),
        },
        _ => match id.number() {
            BNDREGS => rows(0, 4, 16, |n| format!("bnd{n}")).collect(),
            APX => rows(0, 16, 8, |n| format!("r{}", n.saturating_add(16))).collect(),
            _ => lines(size),
        },
    };
    parts
        .into_iter()
        .filter(|part| part.range.end <= size)
        .collect()
}

/// The palette by which a vCPU's tiles are to be read: that of its configuration, or the lowest.
#[must_use]
pub fn palette(subject: &Subject) -> Option<Palette> {
    let palettes = subject.layout.value.palettes();
    let in_use = subject.xstate_bv().contains(ComponentId::XTILECFG.bit());
    let selected = subject.component(ComponentId::XTILECFG).first().copied();
    palettes
        .iter()
        .find(|palette| in_use && Some(palette.id()) == selected)
        .or(palettes.first())
        .copied()
}

fn rows(
    start: usize,
    count: usize,
    bytes: usize,
    name: impl Fn(usize) -> String,
) -> impl Iterator<Item = Part> {
    (0..count).map(move |n| {
        let at = start.saturating_add(n.saturating_mul(bytes));
        Part {
            name: name(n),
            range: at..at.saturating_add(bytes),
        }
    })
}

fn tile_config() -> Vec<Part> {
    let mut parts: Vec<Part> = [("palette", 0..1), ("start_row", 1..2)]
        .into_iter()
        .map(|(name, range)| Part {
            name: name.to_owned(),
            range,
        })
        .collect();
    parts.extend(rows(16, 16, 2, |n| format!("tmm{n}.colsb")));
    parts.extend(rows(48, 16, 1, |n| format!("tmm{n}.rows")));
    parts
}

fn tile_rows(palette: &Palette) -> Vec<Part> {
    let row_bytes = usize::from(palette.row_bytes());
    let tile_bytes = usize::from(palette.tile_bytes());
    let tiles = 0..usize::from(palette.tiles());
    tiles
        .flat_map(|tile| {
            let start = tile.saturating_mul(tile_bytes);
            rows(start, usize::from(palette.rows()), row_bytes, move |row| {
                format!("tmm{tile} row {row}")
            })
        })
        .collect()
}

fn lines(size: usize) -> Vec<Part> {
    (0..size)
        .step_by(LINE_BYTES)
        .map(|start| {
            let end = start.saturating_add(LINE_BYTES).min(size);
            Part {
                name: format!("bytes {start} to {}", end.saturating_sub(1)),
                range: start..end,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guess;

    #[test]
    fn parts_ascend_and_do_not_overlap() {
        let mut area = vec![0; 11_008];
        area[464..472].copy_from_slice(&0x602ffu64.to_le_bytes());
        let layout = guess::layout(&area).unwrap().layout;
        for component in layout.components() {
            let parts = of(component, layout.palettes().first());
            assert!(!parts.is_empty(), "{}", component.id());
            for pair in parts.windows(2) {
                assert!(pair[0].range.end <= pair[1].range.start, "{pair:?}");
            }
            let covered: usize = parts.iter().map(|part| part.range.len()).sum();
            let meaningless = match component.id() {
                // FTW's reserved byte, MXCSR and its mask, padding of eight registers.
                ComponentId::X87 => 1 + 8 + 8 * 6,
                ComponentId::PKRU => 4,
                ComponentId::XTILECFG => 14,
                _ => 0,
            };
            assert_eq!(
                covered + meaningless,
                component.size(),
                "{}",
                component.id()
            );
        }
    }
}
