//! CPUID tables: leaves with and without sub-leaves, whatever type holds them.
//!
//! Every VMM has a type of its own for the CPUID of a guest: KVM's `CpuId`, a vector of entries, a
//! map. [`CpuidTable`] is what this crate needs of such a type. A vector needs [`CpuidEntry`] for
//! its elements only.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use thiserror::Error;

/// One entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The leaf: EAX when CPUID is executed.
    pub leaf: u32,
    /// The sub-leaf: ECX when CPUID is executed. `None` answers for every ECX
    /// (KVM_CPUID_FLAG_SIGNIFCANT_INDEX is clear).
    pub subleaf: Option<u32>,
    /// `[eax, ebx, ecx, edx]`.
    pub value: [u32; 4],
}

impl Entry {
    /// Whether this entry answers for that leaf and sub-leaf.
    ///
    /// ```
    /// use cpuid_amx::Entry;
    ///
    /// let entry = Entry { leaf: 1, subleaf: None, value: [0; 4] };
    /// assert!(entry.answers(1, 7));
    /// assert!(!Entry { subleaf: Some(0), ..entry }.answers(1, 7));
    /// ```
    #[must_use]
    pub fn answers(&self, leaf: u32, subleaf: u32) -> bool {
        self.leaf == leaf && self.subleaf.is_none_or(|own| own == subleaf)
    }

    fn same_place(&self, other: &Self) -> bool {
        self.leaf == other.leaf && self.subleaf == other.subleaf
    }
}

/// Whether CPUID looks at ECX for this leaf: the leaves for which KVM sets
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX (arch/x86/kvm/cpuid.c, `cpuid_function_is_indexed`), and those
/// that came later (SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E).
#[must_use]
pub const fn has_subleaves(leaf: u32) -> bool {
    matches!(
        leaf,
        0x4 | 0x7
            | 0xb
            | 0xd
            | 0xf
            | 0x10
            | 0x12
            | 0x14
            | 0x17
            | 0x18
            | 0x1b
            | 0x1d
            | 0x1e
            | 0x1f
            | 0x20
            | 0x23
            | 0x24
            | 0x8000_001d
            | 0x8000_0020
            | 0x8000_0026
    )
}

/// A type that holds the CPUID of a guest or of a host.
///
/// What is not there reads as zeros, also above the highest leaf. Where several entries answer for
/// a sub-leaf, the first in the order of [`entries`](Self::entries) does, as in KVM
/// (arch/x86/kvm/cpuid.c, `cpuid_entry2_find`).
pub trait CpuidTable {
    /// All entries. Where several answer for the same sub-leaf, the one that counts comes first.
    fn entries(&self) -> impl Iterator<Item = Entry>;

    /// Calls `change` with each entry, in the order of [`entries`](Self::entries): `Some` is the
    /// entry's new value, `None` removes it.
    fn update_entries(&mut self, change: impl FnMut(Entry) -> Option<[u32; 4]>);

    /// Adds an entry for a place (leaf and [`Entry::subleaf`]) that has none, behind all others or,
    /// in a sorted table, at its place.
    ///
    /// # Errors
    ///
    /// There is no room; the table is as before.
    fn push_entry(&mut self, entry: Entry) -> Result<(), TableFull>;

    /// The entry that answers for a leaf and sub-leaf.
    fn find_leaf(&self, leaf: u32, subleaf: u32) -> Option<Entry> {
        self.entries().find(|entry| entry.answers(leaf, subleaf))
    }

    /// `[eax, ebx, ecx, edx]` of a leaf and sub-leaf, zeros where it is not there.
    ///
    /// ```
    /// use cpuid_amx::{CpuidTable, Table};
    /// use xsave_state::Layout;
    ///
    /// # let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
    /// let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.find_leaf(leaf, subleaf)
            .map_or([0; 4], |entry| entry.value)
    }

    /// Sets a leaf and sub-leaf, so that [`leaf`](Self::leaf) gives `value`. Other entries for the
    /// same sub-leaf, which nobody would see, are removed.
    ///
    /// An entry that answers for every sub-leaf of a leaf which [has](has_subleaves) sub-leaves
    /// becomes sub-leaf 0 before, where that has no entry of its own: some kernels leave the flag out
    /// where they give zeros.
    ///
    /// # Errors
    ///
    /// There is no room; the table is as before.
    ///
    /// ```
    /// use cpuid_amx::{CpuidTable, Table};
    ///
    /// let mut table = Table::default();
    /// table.set_leaf(0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0])?;
    /// assert_eq!(table.leaf(0x1d, 1), [0x0400_2000, 0x0008_0040, 0x10, 0]);
    /// assert_eq!(table.leaf(0x1d, 0), [0; 4]);
    /// # Ok::<(), cpuid_amx::TableFull>(())
    /// ```
    fn set_leaf(&mut self, leaf: u32, subleaf: u32, value: [u32; 4]) -> Result<(), TableFull> {
        let entry = Entry {
            leaf,
            subleaf: Some(subleaf),
            value,
        };
        match self.find_leaf(leaf, subleaf) {
            None => {
                let indexed = has_subleaves(leaf) || self.entries().any(|e| e.leaf == leaf);
                self.push_entry(Entry {
                    subleaf: indexed.then_some(subleaf),
                    ..entry
                })
            }
            Some(found) => {
                // Where something is removed here, the new entry below has its room: it finds none
                // only when nothing has changed.
                remove_hidden(self, &found);
                if found.subleaf.is_none() && has_subleaves(leaf) {
                    if subleaf != 0 {
                        self.push_entry(entry)?;
                    }
                    self.retain_leaves(|e| !e.same_place(&found));
                    // One of its own can have come before it. The one that is removed leaves room.
                    if self.find_leaf(leaf, 0).is_none() {
                        self.push_entry(Entry {
                            subleaf: Some(0),
                            value: if subleaf == 0 { value } else { found.value },
                            ..entry
                        })?;
                    }
                } else {
                    self.update_entries(|e| {
                        Some(if e.same_place(&found) { value } else { e.value })
                    });
                }
                Ok(())
            }
        }
    }

    /// Removes the entries for which `keep` says no.
    fn retain_leaves(&mut self, mut keep: impl FnMut(Entry) -> bool) {
        self.update_entries(|entry| keep(entry).then_some(entry.value));
    }
}

/// Removes the entries behind `found`, which is what `find_leaf` gives, that answer for nothing but
/// what it answers for.
fn remove_hidden(table: &mut (impl CpuidTable + ?Sized), found: &Entry) {
    let mut behind = false;
    table.retain_leaves(|e| {
        let answered = found.subleaf.is_none() || e.subleaf == found.subleaf;
        let hidden = behind && e.leaf == found.leaf && answered;
        behind |= e.same_place(found);
        !hidden
    });
}

/// A type that holds one entry: a vector of it is a [`CpuidTable`].
pub trait CpuidEntry {
    /// What it holds.
    fn to_entry(&self) -> Entry;

    /// Makes one, with all that an [`Entry`] does not have at its default.
    fn from_entry(entry: Entry) -> Self;

    /// Changes the registers to `[eax, ebx, ecx, edx]` and nothing else.
    fn set_value(&mut self, value: [u32; 4]);
}

impl CpuidEntry for Entry {
    fn to_entry(&self) -> Entry {
        *self
    }

    fn from_entry(entry: Entry) -> Self {
        entry
    }

    fn set_value(&mut self, value: [u32; 4]) {
        self.value = value;
    }
}

impl<E: CpuidEntry> CpuidTable for Vec<E> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.iter().map(CpuidEntry::to_entry)
    }

    fn update_entries(&mut self, mut change: impl FnMut(Entry) -> Option<[u32; 4]>) {
        self.retain_mut(|entry| match change(entry.to_entry()) {
            Some(value) => {
                entry.set_value(value);
                true
            }
            None => false,
        });
    }

    fn push_entry(&mut self, entry: Entry) -> Result<(), TableFull> {
        self.push(E::from_entry(entry));
        Ok(())
    }
}

/// A table for those who have none: sorted, without duplicates.
///
/// ```
/// use cpuid_amx::{CpuidTable, Entry, Table};
///
/// let table: Table = [Entry { leaf: 0, subleaf: None, value: [0x20, 0, 0, 0] }]
///     .into_iter()
///     .collect();
/// assert_eq!(table.leaf(0, 0), [0x20, 0, 0, 0]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table(BTreeMap<Place, [u32; 4]>);

/// Sorts by leaf and sub-leaf; what answers for every sub-leaf comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Place {
    leaf: u32,
    every: bool,
    subleaf: u32,
}

impl Place {
    fn entry(self, value: [u32; 4]) -> Entry {
        Entry {
            leaf: self.leaf,
            subleaf: (!self.every).then_some(self.subleaf),
            value,
        }
    }
}

impl Table {
    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(entry: &Entry) -> Place {
        Place {
            leaf: entry.leaf,
            every: entry.subleaf.is_none(),
            subleaf: entry.subleaf.unwrap_or(0),
        }
    }
}

impl FromIterator<Entry> for Table {
    /// Entries that nobody would see, because an earlier one answers for the same, are left out:
    /// the result answers as a list in that order does.
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        let mut table = BTreeMap::new();
        for entry in entries {
            let every = Entry {
                subleaf: None,
                ..entry
            };
            if !table.contains_key(&Self::place(&every)) {
                table.entry(Self::place(&entry)).or_insert(entry.value);
            }
        }
        Self(table)
    }
}

impl CpuidTable for Table {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.0.iter().map(|(place, &value)| place.entry(value))
    }

    fn update_entries(&mut self, mut change: impl FnMut(Entry) -> Option<[u32; 4]>) {
        self.0
            .retain(|place, value| match change(place.entry(*value)) {
                Some(new) => {
                    *value = new;
                    true
                }
                None => false,
            });
    }

    fn push_entry(&mut self, entry: Entry) -> Result<(), TableFull> {
        self.0.entry(Self::place(&entry)).or_insert(entry.value);
        Ok(())
    }

    fn find_leaf(&self, leaf: u32, subleaf: u32) -> Option<Entry> {
        let every = Place {
            leaf,
            every: true,
            subleaf: 0,
        };
        let own = Place {
            every: false,
            subleaf,
            ..every
        };
        let find = |place: Place| Some(place.entry(*self.0.get(&place)?));
        find(own).or_else(|| find(every))
    }
}

/// A table has no room for one more entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the CPUID table is full: it has room for {limit} entries")]
pub struct TableFull {
    /// The most entries that it can have.
    pub limit: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: Option<u32>, eax: u32) -> Entry {
        Entry {
            leaf,
            subleaf,
            value: [eax, 0, 0, 0],
        }
    }

    /// The same table as a list in that order, and as the sorted one.
    fn both(entries: &[Entry], check: impl Fn(&dyn Fn(u32, u32) -> u32)) {
        let list = entries.to_vec();
        check(&|leaf, subleaf| list.leaf(leaf, subleaf)[0]);
        let table: Table = entries.iter().copied().collect();
        check(&|leaf, subleaf| table.leaf(leaf, subleaf)[0]);
    }

    #[test]
    fn what_is_missing_is_zero() {
        both(&[entry(7, Some(0), 1)], |eax| {
            assert_eq!(eax(7, 0), 1);
            assert_eq!(eax(7, 1), 0);
            assert_eq!(eax(6, 0), 0);
            assert_eq!(eax(u32::MAX, u32::MAX), 0);
        });
    }

    #[test]
    fn an_entry_without_index_answers_for_every_subleaf() {
        both(&[entry(1, None, 5)], |eax| {
            assert_eq!(eax(1, 0), 5);
            assert_eq!(eax(1, u32::MAX), 5);
        });
    }

    #[test]
    fn the_first_that_answers_counts() {
        both(&[entry(7, Some(0), 1), entry(7, Some(0), 2)], |eax| {
            assert_eq!(eax(7, 0), 1);
        });
        both(&[entry(7, Some(3), 1), entry(7, None, 2)], |eax| {
            assert_eq!(eax(7, 3), 1);
            assert_eq!(eax(7, 4), 2);
        });
        both(&[entry(7, None, 2), entry(7, Some(3), 1)], |eax| {
            assert_eq!(eax(7, 3), 2);
            assert_eq!(eax(7, 4), 2);
        });
    }

    #[test]
    fn setting_replaces_and_removes_what_nobody_sees() {
        let mut list = vec![
            entry(0xd, Some(0), 1),
            entry(0xd, Some(0), 2),
            entry(0xd, Some(1), 3),
        ];
        list.set_leaf(0xd, 0, [9, 8, 7, 6]).unwrap();
        assert_eq!(
            list,
            [
                Entry {
                    value: [9, 8, 7, 6],
                    ..entry(0xd, Some(0), 0)
                },
                entry(0xd, Some(1), 3)
            ]
        );
    }

    #[test]
    fn a_new_leaf_has_an_index_where_the_architecture_or_the_table_says_so() {
        let mut list: Vec<Entry> = vec![entry(0x99, Some(1), 4)];
        list.set_leaf(0x1d, 1, [1, 0, 0, 0]).unwrap();
        list.set_leaf(1, 5, [2, 0, 0, 0]).unwrap();
        list.set_leaf(0x99, 2, [3, 0, 0, 0]).unwrap();
        assert_eq!(
            list,
            [
                entry(0x99, Some(1), 4),
                entry(0x1d, Some(1), 1),
                entry(1, None, 2),
                entry(0x99, Some(2), 3)
            ]
        );
    }

    #[test]
    fn a_leaf_without_index_that_needs_one_gets_it() {
        // Linux 5.10 gives 1DH as one entry of zeros without the flag.
        for (subleaf, at_0, at_1) in [(0, 9, 0), (1, 4, 9)] {
            let mut list = vec![entry(0x1d, None, 4)];
            list.set_leaf(0x1d, subleaf, [9, 0, 0, 0]).unwrap();
            assert_eq!(list.leaf(0x1d, 0)[0], at_0);
            assert_eq!(list.leaf(0x1d, 1)[0], at_1);
            assert!(list.iter().all(|e| e.subleaf.is_some()));

            let mut table: Table = [entry(0x1d, None, 4)].into_iter().collect();
            table.set_leaf(0x1d, subleaf, [9, 0, 0, 0]).unwrap();
            assert_eq!(table.leaf(0x1d, 0)[0], at_0);
            assert_eq!(table.leaf(0x1d, 1)[0], at_1);
        }
        // A leaf that has no sub-leaves keeps its one entry.
        let mut list = vec![entry(1, None, 4)];
        list.set_leaf(1, 3, [9, 0, 0, 0]).unwrap();
        assert_eq!(list, [entry(1, None, 9)]);
    }

    /// Room for two entries.
    #[derive(Debug, PartialEq)]
    struct Small(Vec<Entry>);

    impl CpuidTable for Small {
        fn entries(&self) -> impl Iterator<Item = Entry> {
            self.0.entries()
        }

        fn update_entries(&mut self, change: impl FnMut(Entry) -> Option<[u32; 4]>) {
            self.0.update_entries(change);
        }

        fn push_entry(&mut self, entry: Entry) -> Result<(), TableFull> {
            if self.0.len() >= 2 {
                return Err(TableFull { limit: 2 });
            }
            self.0.push_entry(entry)
        }
    }

    #[test]
    fn a_full_table_stays_as_it_is() {
        let full = || Small(vec![entry(0x1d, None, 4), entry(1, None, 1)]);
        for (leaf, subleaf) in [(0x1d, 1), (2, 0)] {
            let mut small = full();
            assert_eq!(
                small.set_leaf(leaf, subleaf, [9; 4]),
                Err(TableFull { limit: 2 })
            );
            assert_eq!(small, full());
        }
        // What needs no more room works.
        let mut small = full();
        small.set_leaf(0x1d, 0, [9, 0, 0, 0]).unwrap();
        small.set_leaf(1, 0, [8, 0, 0, 0]).unwrap();
        assert_eq!(small.leaf(0x1d, 0)[0], 9);
        assert_eq!(small.leaf(1, 0)[0], 8);
    }

    /// Every list of up to four entries of one leaf: three sub-leaves, and one for all of them.
    fn lists(leaf: u32) -> Vec<Vec<Entry>> {
        let mut lists = vec![Vec::new()];
        for _ in 0..4 {
            let longer = lists.iter().flat_map(|list| {
                [None, Some(0), Some(1), Some(2)].map(|subleaf| {
                    let eax = 1 + u32::try_from(list.len()).unwrap();
                    let mut list = list.clone();
                    list.push(entry(leaf, subleaf, eax));
                    list
                })
            });
            let longer: Vec<_> = longer.collect();
            lists.extend(longer);
        }
        lists
    }

    #[test]
    fn whatever_hides_what_is_set_goes() {
        for (leaf, subleaf) in [(0x1d, 0), (0x1d, 1), (1, 0), (1, 1)] {
            for before in lists(leaf) {
                let mut list = before.clone();
                list.set_leaf(leaf, subleaf, [9, 0, 0, 0]).unwrap();
                assert_eq!(list.leaf(leaf, subleaf)[0], 9, "{before:?}: {list:?}");

                let found = before.find_leaf(leaf, subleaf);
                let every = found.is_some_and(|found| found.subleaf.is_none());
                for other in (0..4).filter(|other| *other != subleaf) {
                    let was = before.find_leaf(leaf, other);
                    let expected = match was {
                        // It has become sub-leaf 0.
                        Some(was) if every && was.subleaf.is_none() && leaf == 0x1d => {
                            if other == 0 { was.value[0] } else { 0 }
                        }
                        Some(was) if every && was.subleaf.is_none() => 9,
                        // A new leaf without sub-leaves.
                        None if before.is_empty() && leaf == 1 => 9,
                        was => was.map_or(0, |was| was.value[0]),
                    };
                    assert_eq!(list.leaf(leaf, other)[0], expected, "{before:?}: {list:?}");
                }
                // What nobody would see has not stayed, and nothing has been added to it.
                for place in 0..3 {
                    let own = |e: &&Entry| e.subleaf == Some(place);
                    let count = |list: &[Entry]| list.iter().filter(own).count();
                    let most = if place == subleaf {
                        1
                    } else {
                        count(&before).max(1)
                    };
                    assert!(count(&list) <= most, "{before:?}: {list:?}");
                }
            }
        }
    }

    #[test]
    fn a_full_table_with_hidden_entries_has_room_or_stays_as_it_is() {
        for (leaf, subleaf) in [(0x1d, 0), (0x1d, 1), (1, 1)] {
            for before in lists(leaf).into_iter().filter(|list| list.len() <= 2) {
                let mut small = Small(before.clone());
                match small.set_leaf(leaf, subleaf, [9, 0, 0, 0]) {
                    Ok(()) => assert_eq!(small.leaf(leaf, subleaf)[0], 9, "{before:?}"),
                    Err(TableFull { .. }) => assert_eq!(small.0, before),
                }
            }
        }
    }

    #[test]
    fn retain_removes() {
        let mut table: Table = [entry(0x1d, Some(0), 1), entry(0x1e, Some(0), 2)]
            .into_iter()
            .collect();
        assert_eq!(table.len(), 2);
        table.retain_leaves(|e| e.leaf != 0x1d);
        assert_eq!(table.leaf(0x1d, 0), [0; 4]);
        assert_eq!(table.leaf(0x1e, 0)[0], 2);
        table.retain_leaves(|_| false);
        assert!(table.is_empty());
    }
}
