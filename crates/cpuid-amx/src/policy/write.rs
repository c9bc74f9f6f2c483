//! Writes a set of features into a table: all of it, or nothing.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::fmt;

use xsave_state::{ComponentId, Layout, XFeatures};

use crate::amx::{LEAF_7, LEAF_TILES, LEAF_TMUL, LEAF_XSAVE};
use crate::bits::Register;
use crate::coherence::{is_compacted_size, standard_sizes};
use crate::features::{FeatureSet, XsaveFeatures, dependents};
use crate::table::{CpuidTable, Entry, Table, TableFull, has_subleaves};

/// One register that a policy changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Change {
    /// The leaf.
    pub leaf: u32,
    /// The sub-leaf, 0 in leaves without.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
    /// What it was.
    pub old: u32,
    /// What it is.
    pub new: u32,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leaf,
            subleaf,
            register,
            old,
            new,
        } = self;
        write!(f, "leaf {leaf:#x} ")?;
        if has_subleaves(*leaf) {
            write!(f, "sub-leaf {subleaf:#x} ")?;
        }
        write!(f, "{register}: {old:#x} becomes {new:#x}")
    }
}

/// A leaf and sub-leaf as it was and as it will be.
#[derive(Clone, Copy, Debug)]
struct Rewritten {
    leaf: u32,
    subleaf: u32,
    old: [u32; 4],
    new: [u32; 4],
}

/// What has to be written.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    rewritten: Vec<Rewritten>,
    /// Leaves whose entries become one for each sub-leaf, also where no value changes.
    mixed: BTreeSet<u32>,
}

impl Plan {
    /// `mixed` are leaves with entries that hide others: see [`coherence`](crate::coherence).
    pub(super) fn new(table: &Table, features: &FeatureSet, mixed: BTreeSet<u32>) -> Self {
        let mut places: Vec<(u32, u32)> = [(1, 0), (LEAF_7, 0), (LEAF_7, 1)].into();
        places.extend((0..u32::from(ComponentId::COUNT)).map(|subleaf| (LEAF_XSAVE, subleaf)));
        let known = features.palettes.len().max(1);
        for leaf in [LEAF_TILES, LEAF_TMUL] {
            places.extend((0..=known).filter_map(|n| Some((leaf, u32::try_from(n).ok()?))));
            let there = table.entries().filter(|entry| entry.leaf == leaf);
            places.extend(there.filter_map(|entry| Some((leaf, entry.subleaf?))));
        }
        places.extend(dependents().map(|(_, leaf, subleaf, _)| (leaf, subleaf)));
        places.sort_unstable();
        places.dedup();

        let components = features.user() | features.supervisor();
        let rewritten = places.into_iter().map(|(leaf, subleaf)| {
            let old = table.leaf(leaf, subleaf);
            let mut new = registers(features, leaf, subleaf, old);
            for (needs, at, below, bits) in dependents() {
                if (at, below) == (leaf, subleaf) && !components.contains(needs) {
                    for (register, bits) in new.iter_mut().zip(bits) {
                        *register &= !bits;
                    }
                }
            }
            Rewritten {
                leaf,
                subleaf,
                old,
                new,
            }
        });
        let rewritten: Vec<Rewritten> = rewritten.collect();
        let is_changed = |r: &&Rewritten| r.old != r.new;
        let mut anew: BTreeSet<u32> = rewritten
            .iter()
            .filter(is_changed)
            .map(|r| r.leaf)
            .collect();
        anew.extend(&mixed);
        // The entry for every sub-leaf of a leaf that changes goes, and what it said of those that
        // stay has to be said anew.
        let stays = |r: &&Rewritten| {
            let found = table.find_leaf(r.leaf, r.subleaf);
            r.new != [0; 4]
                && has_subleaves(r.leaf)
                && found.is_some_and(|found| found.subleaf.is_none())
                && anew.contains(&r.leaf)
        };
        let written = rewritten.iter().filter(|r| is_changed(r) || stays(r));
        Self {
            rewritten: written.copied().collect(),
            mixed,
        }
    }

    /// Nothing can fail once something visible has changed: sub-leaves that are missing are added
    /// first, and taken away again where there is no room for all.
    pub(super) fn apply(&self, table: &mut impl CpuidTable) -> Result<(), TableFull> {
        let mut leaves: BTreeSet<u32> = self.rewritten.iter().map(|r| r.leaf).collect();
        leaves.extend(&self.mixed);
        leaves.retain(|leaf| has_subleaves(*leaf));
        // An entry for every sub-leaf of a leaf that has sub-leaves becomes one for each.
        let is_split = |entry: &Entry| entry.subleaf.is_none() && leaves.contains(&entry.leaf);
        let hidden = hidden(table, &leaves);
        let wanted: Vec<Entry> = self.rewritten.iter().map(Rewritten::entry).collect();
        let same = |a: &Entry, b: &Entry| a.leaf == b.leaf && a.subleaf == b.subleaf;
        let missing: Vec<Entry> = wanted
            .iter()
            .filter(|wanted| {
                // What is not there reads as zeros.
                if wanted.value == [0; 4] {
                    return false;
                }
                let found = table.find_leaf(wanted.leaf, wanted.subleaf.unwrap_or(0));
                let answered = found.is_some_and(|found| !is_split(&found));
                !answered && !table.entries().any(|entry| same(&entry, wanted))
            })
            .copied()
            .collect();
        for (pushed, entry) in missing.iter().enumerate() {
            if let Err(full) = table.push_entry(*entry) {
                let pushed = missing.get(..pushed).unwrap_or_default();
                table.retain_leaves(|entry| !pushed.iter().any(|p| same(p, &entry)));
                return Err(full);
            }
        }

        let wanted: BTreeMap<(u32, u32), [u32; 4]> = self
            .rewritten
            .iter()
            .map(|r| ((r.leaf, r.subleaf), r.new))
            .collect();
        let mut seen: BTreeMap<(u32, Option<u32>), [u32; 4]> = BTreeMap::new();
        table.update_entries(|entry| {
            if is_split(&entry) {
                return None;
            }
            let leaf = entry.leaf;
            let wanted = match entry.subleaf {
                Some(subleaf) => wanted.get(&(leaf, subleaf)),
                None => wanted
                    .range((leaf, 0)..=(leaf, u32::MAX))
                    .map(|(_, value)| value)
                    .next(),
            };
            let value = match wanted {
                Some(wanted) => *wanted,
                None if entry.subleaf.is_some_and(|s| hidden.contains(&(leaf, s))) => return None,
                None => entry.value,
            };
            // Nobody sees the second.
            let first = *seen.entry((leaf, entry.subleaf)).or_insert(value);
            (first == value).then_some(value)
        });
        Ok(())
    }

    pub(super) fn into_changes(self) -> Vec<Change> {
        self.rewritten.iter().flat_map(Rewritten::changes).collect()
    }
}

/// The sub-leaves of these leaves that nobody sees: an entry for every sub-leaf stands before theirs.
fn hidden(table: &impl CpuidTable, leaves: &BTreeSet<u32>) -> BTreeSet<(u32, u32)> {
    let mut covered = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut hidden = BTreeSet::new();
    for entry in table.entries().filter(|entry| leaves.contains(&entry.leaf)) {
        match entry.subleaf {
            None => drop(covered.insert(entry.leaf)),
            Some(subleaf) if !covered.contains(&entry.leaf) => {
                seen.insert((entry.leaf, subleaf));
            }
            Some(subleaf) if !seen.contains(&(entry.leaf, subleaf)) => {
                hidden.insert((entry.leaf, subleaf));
            }
            Some(_) => {}
        }
    }
    hidden
}

impl Rewritten {
    /// In leaves without sub-leaves [`CpuidTable::push_entry`] wants none; they are never missing,
    /// because nothing is added to a table but sub-leaves.
    fn entry(&self) -> Entry {
        Entry {
            leaf: self.leaf,
            subleaf: Some(self.subleaf),
            value: self.new,
        }
    }

    fn changes(&self) -> impl Iterator<Item = Change> {
        let (leaf, subleaf) = (self.leaf, self.subleaf);
        Register::ALL
            .into_iter()
            .zip(self.old.into_iter().zip(self.new))
            .filter(|(_, (old, new))| old != new)
            .map(move |(register, (old, new))| Change {
                leaf,
                subleaf,
                register,
                old,
                new,
            })
    }
}

/// The registers that say what `features` says, and beside it what `old` says.
fn registers(features: &FeatureSet, leaf: u32, subleaf: u32, old: [u32; 4]) -> [u32; 4] {
    let new = features.leaf(leaf, subleaf);
    let mixed = |mask: [u32; 4]| {
        let mut mixed = old;
        for ((register, new), mask) in mixed.iter_mut().zip(new).zip(mask) {
            *register = *register & !mask | new & mask;
        }
        mixed
    };
    match (leaf, subleaf) {
        (1, _) => mixed([0, 0, crate::amx::XSAVE_BIT, 0]),
        (LEAF_7, 0) => mixed([0, 0, 0, 1 << 22 | 1 << 24 | 1 << 25]),
        (LEAF_7, 1) => mixed([1 << 21, 0, 0, 1 << 8]),
        (LEAF_XSAVE, 0) => {
            let [_, enabled, ..] = old;
            let [eax, all, ecx, edx] = new;
            let ebx = if is_enabled_size(features, enabled) {
                enabled
            } else {
                all
            };
            [eax, ebx, ecx, edx]
        }
        (LEAF_XSAVE, 1) => {
            let [eax, enabled, ..] = old;
            let [flags, all, ecx, edx] = new;
            let ebx = if is_enabled_compacted_size(features, enabled) {
                enabled
            } else {
                all
            };
            let known = XsaveFeatures::IN_0DH.bits();
            let reserved = if features.xsave.is_empty() {
                0
            } else {
                eax & !known
            };
            [reserved | flags, ebx, ecx, edx]
        }
        // Reserved bits of a component that stays are not for this crate to judge.
        (LEAF_XSAVE, _) if new != [0; 4] => old,
        (LEAF_XSAVE | LEAF_TILES | LEAF_TMUL, _) => new,
        _ => old,
    }
}

fn layout(features: &FeatureSet) -> Option<Layout> {
    if !features.xsave.contains(XsaveFeatures::XSAVE) {
        return None;
    }
    Layout::from_cpuid(|leaf, subleaf| match leaf {
        0 => [LEAF_XSAVE, 0, 0, 0],
        1 | LEAF_XSAVE => features.leaf(leaf, subleaf),
        _ => [0; 4],
    })
    .ok()
}

fn is_enabled_size(features: &FeatureSet, size: u32) -> bool {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    layout(features).is_some_and(|layout| standard_sizes(&layout).any(|legal| legal == size))
}

fn is_enabled_compacted_size(features: &FeatureSet, size: u32) -> bool {
    let compacted = XsaveFeatures::XSAVEC | XsaveFeatures::XSAVES;
    if !features.xsave.intersects(compacted) {
        return size == 0;
    }
    let all: XFeatures = features.user() | features.supervisor();
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    layout(features).is_some_and(|layout| is_compacted_size(&layout, all, size))
}
