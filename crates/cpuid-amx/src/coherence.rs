//! Every way in which the leaves of a table can contradict each other.
//!
//! A guest believes each leaf on its own: one part of it looks for AMX in leaf 7, another sizes its
//! buffers by 0DH, a third configures tiles by 1DH. Tables come apart because KVM filters only 0DH
//! by permission, because VMMs clear bits in leaf 7 and leave the rest, and because hosts which are
//! guests themselves get such tables from below.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use xsave_state::{Layout, XFeatures, xcr0};

use crate::amx::{
    self, AmxFeatures, LEAF_7, LEAF_TILES, LEAF_TMUL, LEAF_XSAVE, Leaves, TmulLimits,
};
use crate::bits::{Bits, Register};
use crate::features::dependents;
use crate::table::{CpuidTable, Entry};

mod contradiction;
mod sizes;

pub use contradiction::Contradiction;
pub(crate) use sizes::{is_compacted_size, standard_sizes};

const XSAVEC: u32 = 1 << 1;
const XSAVES: u32 = 1 << 3;
const XFD: u32 = 1 << 4;

/// Finds every contradiction in a table. None: the table is coherent.
///
/// ```
/// use cpuid_amx::{Contradiction, CpuidTable, Table, coherence};
///
/// let mut table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// assert_eq!(coherence::check(&table), []);
///
/// // Hide AMX as it is often done: in leaf 7 only.
/// let [eax, ebx, ecx, edx] = table.leaf(7, 0);
/// table.set_leaf(7, 0, [eax, ebx, ecx, edx & !(1 << 22 | 1 << 24 | 1 << 25)])?;
/// for contradiction in coherence::check(&table) {
///     println!("{contradiction}");
/// }
/// assert_eq!(coherence::check(&table).len(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn check(table: &impl CpuidTable) -> Vec<Contradiction> {
    // What comes from the form of the table is the cause of what follows.
    let mut found = unflagged(table);
    let mixed: BTreeSet<u32> = mixed_leaves(table);
    duplicates(table, &mixed, &mut found);
    found.extend(check_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)));
    found
}

/// The same for CPUID that is not a table: `cpuid(leaf, subleaf)` gives `[eax, ebx, ecx, edx]`, and
/// zeros for what is not there. No input makes it panic.
///
/// The CPUID instruction of Intel processors gives the highest basic leaf for what is above it: ask
/// for zeros there.
#[must_use]
pub fn check_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Vec<Contradiction> {
    let leaves = Leaves::read(&mut cpuid);
    let mut found = Vec::new();
    xsave(&leaves, &mut cpuid, &mut found);
    components(&leaves, &mut found);
    dependent_features(&leaves, &mut cpuid, &mut found);
    levels(&leaves, &mut found);
    tiles(&leaves, &mut cpuid, &mut found);
    found
}

/// 0DH itself: places, groups and sizes.
fn xsave(
    leaves: &Leaves,
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
    found: &mut Vec<Contradiction>,
) {
    let user = leaves.user();
    let max_leaf = leaves.max_leaf;
    let is_there = max_leaf >= LEAF_XSAVE && !user.is_empty();
    match (leaves.has_xsave(), is_there) {
        (true, true) => {}
        (true, false) => found.push(Contradiction::XsaveWithoutComponents { max_leaf }),
        (false, true) => found.push(Contradiction::Xsave { user }),
        // A processor without XSAVE needs no 0DH.
        (false, false) => {}
    }
    if !is_there {
        return;
    }
    // Those of AMX have names of their own, and without SSE there is no layout.
    let named = [XFeatures::AMX, XFeatures::AVX];
    let rules = xcr0::RULES.into_iter();
    for rule in rules.filter(|rule| !named.contains(&rule.together)) {
        if !rule.holds_in(user) {
            let required = rule.together | rule.requires;
            found.push(Contradiction::Group {
                present: user & required,
                required,
            });
        }
    }
    let [features, reported_compacted, ..] = leaves.xsave_1;
    let supervisor = leaves.supervisor();
    if features & XSAVES == 0 && !supervisor.is_empty() {
        found.push(Contradiction::SupervisorWithoutXsaves { supervisor });
    }

    // What 0DH says is checked without XSAVE too, which has been said.
    let with_xsave = |leaf, subleaf| match leaf {
        1 => [0, 0, amx::XSAVE_BIT, 0],
        _ => cpuid(leaf, subleaf),
    };
    let layout = match Layout::from_cpuid(with_xsave) {
        Ok(layout) => layout,
        Err(error) => {
            found.push(Contradiction::Layout(error));
            return;
        }
    };
    let [_, enabled, size, _] = leaves.xsave_0;
    let (enabled, size) = (bytes(enabled), bytes(size));
    if size != layout.standard_size() {
        found.push(Contradiction::AreaSize {
            reported_bytes: size,
            computed_bytes: layout.standard_size(),
        });
    }
    if !standard_sizes(&layout).any(|possible| possible == enabled) {
        found.push(Contradiction::EnabledSize {
            reported_bytes: enabled,
            all_bytes: layout.standard_size(),
        });
    }
    let all = if features & XSAVES != 0 {
        user | supervisor
    } else {
        user
    };
    let compacted = bytes(reported_compacted);
    let possible = if features & (XSAVEC | XSAVES) == 0 {
        compacted == 0
    } else {
        is_compacted_size(&layout, all, compacted)
    };
    if !possible {
        found.push(Contradiction::CompactedSize {
            reported_bytes: compacted,
            all_bytes: if features & (XSAVEC | XSAVES) == 0 {
                0
            } else {
                layout.compacted_size(all)
            },
        });
    }
}

/// Leaf 7 against the components of 0DH.
fn components(leaves: &Leaves, found: &mut Vec<Contradiction>) {
    let features = leaves.in_leaf_7();
    let user = leaves.user();
    let has_tile = features.contains(AmxFeatures::TILE);
    let [xsave_features, ..] = leaves.xsave_1;
    let xfd = xsave_features & XFD != 0;

    let all_features = features | leaves.enumerated_1e();
    if !has_tile && !all_features.is_empty() {
        found.push(Contradiction::FeaturesWithoutTile {
            features: all_features,
        });
    }
    if !has_tile && user.intersects(XFeatures::AMX) {
        found.push(Contradiction::ComponentsWithoutTile { user });
    }
    if has_tile && !user.contains(XFeatures::XTILEDATA) && xfd {
        found.push(Contradiction::BeforePermission { features, user });
    } else if has_tile && !user.intersects(XFeatures::AMX) {
        found.push(Contradiction::ComponentsMissing { features, user });
    }
    let before_permission = has_tile && xfd;
    match (
        user.contains(XFeatures::XTILECFG),
        user.contains(XFeatures::XTILEDATA),
    ) {
        // Said already, with its reason: kernels before 6.4 leave XTILECFG there.
        (true, false) if before_permission => {}
        (true, false) => found.push(Contradiction::TileDataMissing { user }),
        (false, true) => found.push(Contradiction::TileConfigMissing { user }),
        _ => {}
    }
    if has_tile
        && leaves.enumerated_1e().contains(AmxFeatures::AVX512)
        && !user.contains(XFeatures::AVX512)
    {
        found.push(Contradiction::WithoutAvx512 { user });
    }
    if user.contains(XFeatures::XTILEDATA) {
        let [_, _, ecx, _] = leaves.tile_data;
        let component = ecx & 1 << 2 != 0;
        if !(xfd && component) {
            found.push(Contradiction::Xfd { xfd, component });
        }
    }
}

/// What is there, but above the highest leaf or sub-leaf that CPUID names.
fn levels(leaves: &Leaves, found: &mut Vec<Contradiction>) {
    let max_leaf = leaves.max_leaf;
    let features = leaves.in_leaf_7() | leaves.enumerated_1e();
    let needs = [
        (LEAF_7, !features.is_empty()),
        (LEAF_TILES, features.contains(AmxFeatures::TILE)),
        (LEAF_TMUL, features.intersects(AmxFeatures::TMUL)),
    ];
    for (leaf, needed) in needs {
        if needed && leaf > max_leaf {
            found.push(Contradiction::MaxLeaf {
                leaf,
                max_leaf,
                features,
            });
        }
    }
    let [max_7, ..] = leaves.leaf_7_0;
    let [max_1e, ..] = leaves.tmul_0;
    let subleaves = [
        (
            LEAF_7,
            max_7,
            AmxFeatures::from_leaf_7([0; 4], leaves.leaf_7_1),
        ),
        (LEAF_TMUL, max_1e, AmxFeatures::from_leaf_1e(leaves.tmul_1)),
    ];
    for (leaf, max_subleaf, features) in subleaves {
        if max_subleaf < 1 && !features.is_empty() {
            found.push(Contradiction::MaxSubleaf {
                leaf,
                max_subleaf,
                features,
            });
        }
    }
}

/// 1DH and 1EH against leaf 7 and component 18.
fn tiles(
    leaves: &Leaves,
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
    found: &mut Vec<Contradiction>,
) {
    let features = leaves.in_leaf_7() | leaves.enumerated_1e();
    let has_tile = features.contains(AmxFeatures::TILE);
    let [max_palette, ..] = leaves.tiles_0;
    let limits = TmulLimits::from_leaf(leaves.tmul_0);

    if !has_tile {
        if max_palette != 0 {
            found.push(Contradiction::PalettesWithoutTile { max_palette });
        }
        if let Some(limits) = limits {
            found.push(Contradiction::TmulWithoutTile { limits });
        }
    } else if max_palette == 0 && leaves.max_leaf >= LEAF_TILES {
        found.push(Contradiction::NoPalette { features });
    }
    if limits.is_none() && features.intersects(AmxFeatures::TMUL) && leaves.max_leaf >= LEAF_TMUL {
        found.push(Contradiction::NoTmul { features });
    }

    match amx::palettes(&mut *cpuid) {
        Ok(palettes) => {
            let palette_bytes = palettes.iter().map(|p| usize::from(p.total_bytes())).max();
            let [component_bytes, ..] = leaves.tile_data;
            if let Some(palette_bytes) = palette_bytes
                && leaves.user().contains(XFeatures::XTILEDATA)
                // Larger ones are `LayoutError::TileData`.
                && palette_bytes < bytes(component_bytes)
            {
                found.push(Contradiction::PaletteSize {
                    palette_bytes,
                    component_bytes: bytes(component_bytes),
                });
            }
            let rows = palettes.iter().map(|p| p.rows()).max();
            let row_bytes = palettes.iter().map(|p| p.row_bytes()).max();
            if let (Some(limits), Some(rows), Some(row_bytes)) = (limits, rows, row_bytes)
                && (u16::from(limits.maxk) > rows || limits.maxn > row_bytes)
            {
                found.push(Contradiction::TmulBeyondTiles {
                    limits,
                    rows,
                    row_bytes,
                });
            }
        }
        Err(error) => {
            // The layout has said so already where it has looked: with XTILECFG.
            let said =
                |c: &Contradiction| matches!(c, Contradiction::Layout(said) if *said == error);
            if !found.iter().any(said) {
                found.push(Contradiction::Layout(error));
            }
        }
    }

    if leaves.has_tmul_1() {
        let leaf_7 = leaves.in_leaf_7() & AmxFeatures::ALIASED;
        let leaf_1e = leaves.enumerated_1e() & AmxFeatures::ALIASED;
        if leaf_7 != leaf_1e {
            found.push(Contradiction::Aliases { leaf_7, leaf_1e });
        }
    }
}

/// Features of leaves 1, 7, 24H and 80000001H whose components are not there.
fn dependent_features(
    leaves: &Leaves,
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
    found: &mut Vec<Contradiction>,
) {
    let components = if leaves.max_leaf >= LEAF_XSAVE {
        leaves.user() | leaves.supervisor()
    } else {
        XFeatures::empty()
    };
    let [max_extended, ..] = cpuid(0x8000_0000, 0);
    for (needs, leaf, subleaf, bits) in dependents() {
        let highest = if leaf < 0x8000_0000 {
            leaves.max_leaf
        } else {
            max_extended
        };
        let [max_7, ..] = leaves.leaf_7_0;
        let is_beyond = leaf > highest || (leaf == LEAF_7 && subleaf > max_7);
        if is_beyond || components.contains(needs) {
            continue;
        }
        let registers = Register::ALL
            .into_iter()
            .zip(cpuid(leaf, subleaf))
            .zip(bits);
        for ((register, value), bits) in registers {
            let mask = value & bits;
            if mask != 0 {
                found.push(Contradiction::Dependents {
                    features: Bits {
                        leaf,
                        subleaf,
                        register,
                        mask,
                    },
                    missing: needs - components,
                });
            }
        }
    }
}

/// Leaves of XSAVE and AMX with an entry for every sub-leaf beside others of the same leaf: which of
/// them answers depends on their order.
pub(crate) fn mixed_leaves(table: &impl CpuidTable) -> BTreeSet<u32> {
    unflagged(table)
        .into_iter()
        .filter_map(|contradiction| match contradiction {
            Contradiction::Unflagged { leaf, .. } => Some(leaf),
            _ => None,
        })
        .collect()
}

/// Entries that answer for every sub-leaf of a leaf that has several: the flag
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX is missing.
fn unflagged(table: &impl CpuidTable) -> Vec<Contradiction> {
    let mut found = Vec::new();
    for leaf in [LEAF_7, LEAF_XSAVE, LEAF_TILES, LEAF_TMUL] {
        let entries: Vec<_> = table.entries().filter(|entry| entry.leaf == leaf).collect();
        let Some(first) = entries.iter().position(|entry| entry.subleaf.is_none()) else {
            continue;
        };
        let Some((every, behind)) = entries.get(first..).and_then(<[_]>::split_first) else {
            continue;
        };
        let hidden = behind
            .iter()
            .filter(|entry| entry.value != every.value)
            .count();
        // Zeros at the end say nothing.
        let says = first > 0 && every.value != [0; 4];
        if hidden > 0 || says {
            found.push(Contradiction::Unflagged {
                leaf,
                entries: entries.len(),
                hidden,
            });
        }
    }
    found
}

/// Entries that answer for the same sub-leaf with different values: KVM takes the first, a map the
/// last. Once for each place: Linux 6.1 fills the table of KVM_GET_CPUID2 up with zeros for leaf 0.
fn duplicates(table: &impl CpuidTable, mixed: &BTreeSet<u32>, found: &mut Vec<Contradiction>) {
    let mut places: BTreeMap<(u32, Option<u32>), (Entry, bool)> = BTreeMap::new();
    for entry in table.entries() {
        if entry.subleaf.is_none() && mixed.contains(&entry.leaf) {
            continue;
        }
        let place = (entry.leaf, entry.subleaf);
        let (first, said) = places.entry(place).or_insert((entry, false));
        if first.value != entry.value && !*said {
            *said = true;
            found.push(Contradiction::Duplicate {
                leaf: entry.leaf,
                subleaf: entry.subleaf.unwrap_or(0),
                first: first.value,
                second: entry.value,
            });
        }
    }
}

fn bytes(register: u32) -> usize {
    usize::try_from(register).unwrap_or(usize::MAX)
}
