//! The table types of other VMMs as they would plug in: types that look like theirs, and the few
//! lines that make tables of them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use cpuid_amx::{CpuidEntry, CpuidTable, Entry, Table, TableFull, coherence, dump};
use xsave_state::{Layout, XFeatures};

/// Like the entries of Cloud Hypervisor: a plain copy of KVM's, in a vector.
mod cloud_hypervisor {
    use super::*;

    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub(super) struct CpuIdEntry {
        pub(super) function: u32,
        pub(super) index: u32,
        pub(super) flags: u32,
        pub(super) eax: u32,
        pub(super) ebx: u32,
        pub(super) ecx: u32,
        pub(super) edx: u32,
    }

    pub(super) const CPUID_FLAG_VALID_INDEX: u32 = 1;

    impl CpuidEntry for CpuIdEntry {
        fn to_entry(&self) -> Entry {
            let indexed = self.flags & CPUID_FLAG_VALID_INDEX != 0;
            let value = [self.eax, self.ebx, self.ecx, self.edx];
            Entry {
                leaf: self.function,
                subleaf: indexed.then_some(self.index),
                value,
            }
        }
        fn from_entry(
            Entry {
                leaf: function,
                subleaf,
                value: [eax, ebx, ecx, edx],
            }: Entry,
        ) -> Self {
            let (index, flags) = subleaf.map_or((0, 0), |index| (index, CPUID_FLAG_VALID_INDEX));
            Self {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
            }
        }
        fn set_value(&mut self, value: [u32; 4]) {
            [self.eax, self.ebx, self.ecx, self.edx] = value;
        }
    }
}

/// Like the map of Firecracker: keys of leaf and sub-leaf, flags in the value.
mod firecracker {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(super) struct CpuidKey {
        pub(super) leaf: u32,
        pub(super) subleaf: u32,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(super) struct CpuidRegisters {
        pub(super) eax: u32,
        pub(super) ebx: u32,
        pub(super) ecx: u32,
        pub(super) edx: u32,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(super) struct CpuidEntry {
        pub(super) significant_index: bool,
        pub(super) result: CpuidRegisters,
    }

    #[derive(Clone, Debug, Default, PartialEq)]
    pub(super) struct Cpuid(pub(super) BTreeMap<CpuidKey, CpuidEntry>);

    fn entry(
        key: &CpuidKey,
        CpuidEntry {
            significant_index,
            result: r,
        }: &CpuidEntry,
    ) -> Entry {
        let subleaf = significant_index.then_some(key.subleaf);
        Entry {
            leaf: key.leaf,
            subleaf,
            value: [r.eax, r.ebx, r.ecx, r.edx],
        }
    }

    impl CpuidTable for Cpuid {
        fn entries(&self) -> impl Iterator<Item = Entry> {
            self.0.iter().map(|(key, value)| entry(key, value))
        }
        fn update_entries(&mut self, mut change: impl FnMut(Entry) -> Option<[u32; 4]>) {
            self.0.retain(|key, value| {
                let Some([eax, ebx, ecx, edx]) = change(entry(key, value)) else {
                    return false;
                };
                value.result = CpuidRegisters { eax, ebx, ecx, edx };
                true
            });
        }
        fn push_entry(&mut self, new: Entry) -> Result<(), TableFull> {
            let [eax, ebx, ecx, edx] = new.value;
            let result = CpuidRegisters { eax, ebx, ecx, edx };
            let key = CpuidKey {
                leaf: new.leaf,
                subleaf: new.subleaf.unwrap_or(0),
            };
            self.0.insert(
                key,
                CpuidEntry {
                    significant_index: new.subleaf.is_some(),
                    result,
                },
            );
            Ok(())
        }
    }
}

/// What a VMM does with a table, whatever its type.
fn hide_amx_in_leaf_7(table: &mut impl CpuidTable) {
    let [eax, ebx, ecx, edx] = table.leaf(7, 0);
    let bits = 1 << 22 | 1 << 24 | 1 << 25;
    table.set_leaf(7, 0, [eax, ebx, ecx, edx & !bits]).unwrap();
}

fn filled<T: CpuidTable + Default>() -> T {
    let example: Table = dump::EXAMPLE.parse().unwrap();
    let mut table = T::default();
    for entry in example.entries() {
        table.push_entry(entry).unwrap();
    }
    table
}

fn exercise<T: CpuidTable + Default>() -> T {
    let mut table: T = filled();
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).unwrap();
    assert_eq!(layout.standard_size(), 11008);
    assert_eq!(layout.xfd(), XFeatures::XTILEDATA);
    assert_eq!(coherence::check(&table), []);
    // Leaf 1 has no sub-leaves, 0DH has.
    assert_eq!(table.leaf(1, 3), table.leaf(1, 0));
    assert_eq!(table.leaf(0xd, 3), [0; 4]);

    hide_amx_in_leaf_7(&mut table);
    assert_eq!(coherence::check(&table).len(), 3);
    table.retain_leaves(|entry| !matches!(entry.leaf, 0x1d | 0x1e));
    assert_eq!(coherence::check(&table).len(), 1);
    table.set_leaf(0x1d, 1, [1, 2, 3, 4]).unwrap();
    assert_eq!(table.leaf(0x1d, 1), [1, 2, 3, 4]);
    assert_eq!(table.leaf(0x1d, 0), [0; 4]);
    table
}

#[test]
fn a_vector_of_entries() {
    let table: Vec<cloud_hypervisor::CpuIdEntry> = exercise();
    let leaf_1d = table.last().unwrap();
    assert_eq!(
        (leaf_1d.function, leaf_1d.index, leaf_1d.flags),
        (0x1d, 1, 1)
    );
}

#[test]
fn a_map_of_leaves() {
    let table: firecracker::Cpuid = exercise();
    let key = firecracker::CpuidKey {
        leaf: 0x1d,
        subleaf: 1,
    };
    assert!(table.0[&key].significant_index);
}

#[test]
fn the_table_of_this_crate() {
    let table: Table = exercise();
    assert_eq!(table.entries().count(), table.len());
}
