//! Tables of real processors, and tables that no processor has.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::path::{Path, PathBuf};

use cpuid_amx::{CpuidTable, Entry, Table};
use proptest::prelude::*;

/// The dumps that xsave-state has; each says where its numbers come from.
pub(crate) const FIXTURES: [&str; 13] = [
    "alder-lake-client",
    "amd-zen2-rome",
    "amd-zen4-genoa",
    "emerald-rapids-kvm-supported",
    "emerald-rapids-vm-without-tile-leaves",
    "granite-rapids",
    "haswell-client",
    "ice-lake-server",
    "sapphire-rapids",
    "sapphire-rapids-emulated-guest",
    "sapphire-rapids-guest",
    "sapphire-rapids-guest-without-amx",
    "skylake-client",
];

pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../xsave-state/tests/fixtures/cpuid")
        .join(format!("{name}.txt"))
}

pub(crate) fn fixture(name: &str) -> Table {
    std::fs::read_to_string(path(name))
        .unwrap()
        .parse()
        .unwrap()
}

/// Granite Rapids with all that Diamond Rapids is announced to have, and CPUID.1EH.1 for it.
pub(crate) fn diamond_rapids() -> Table {
    let mut table = fixture("granite-rapids");
    let [eax, ebx, ecx, edx] = table.leaf(7, 1);
    table.set_leaf(7, 1, [eax, ebx, ecx, edx | 1 << 8]).unwrap();
    table.set_leaf(0x1e, 0, [1, 0x4010, 0, 0]).unwrap();
    table.set_leaf(0x1e, 1, [0x1df, 0, 0, 0]).unwrap();
    table
}

/// Entries as a VMM might have them: those of a real table with some bits changed, some twice, some
/// gone, some for every sub-leaf.
pub(crate) fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let base = (0..=FIXTURES.len()).prop_map(|index| match FIXTURES.get(index) {
        Some(name) => fixture(name),
        None => diamond_rapids(),
    });
    (base, prop::collection::vec(change(), 0..8)).prop_map(|(table, changes)| {
        let mut entries: Vec<Entry> = table.entries().collect();
        for change in changes {
            change.make(&mut entries);
        }
        entries
    })
}

#[derive(Clone, Debug)]
enum Damage {
    Flip {
        register: usize,
        bits: u32,
    },
    Set {
        register: usize,
        value: u32,
    },
    Remove,
    Repeat {
        bits: u32,
    },
    ForEverySubleaf,
    Move {
        subleaf: u32,
    },
    Insert {
        leaf: u32,
        subleaf: Option<u32>,
        value: [u32; 4],
    },
}

#[derive(Clone, Debug)]
struct RandomChange {
    at: prop::sample::Index,
    what: Damage,
}

fn change() -> impl Strategy<Value = RandomChange> {
    let value = prop_oneof![any::<u32>(), 0..64u32, Just(0), Just(u32::MAX)];
    let leaf = prop::sample::select(vec![0u32, 1, 7, 0xd, 0x1d, 0x1e, 0x8000_0000]);
    let what = prop_oneof![
        (0..4usize, 0..32u32).prop_map(|(register, bit)| Damage::Flip {
            register,
            bits: 1 << bit
        }),
        (0..4usize, value.clone()).prop_map(|(register, value)| Damage::Set { register, value }),
        Just(Damage::Remove),
        prop_oneof![Just(0), any::<u32>()].prop_map(|bits| Damage::Repeat { bits }),
        Just(Damage::ForEverySubleaf),
        (0..65u32).prop_map(|subleaf| Damage::Move { subleaf }),
        (
            leaf,
            prop::option::of(0..20u32),
            prop::array::uniform4(value)
        )
            .prop_map(|(leaf, subleaf, value)| Damage::Insert {
                leaf,
                subleaf,
                value
            }),
    ];
    (any::<prop::sample::Index>(), what).prop_map(|(at, what)| RandomChange { at, what })
}

impl RandomChange {
    fn make(self, entries: &mut Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let at = self.at.index(entries.len());
        match self.what {
            Damage::Flip { register, bits } => entries[at].value[register] ^= bits,
            Damage::Set { register, value } => entries[at].value[register] = value,
            Damage::Remove => drop(entries.remove(at)),
            Damage::Repeat { bits } => {
                let mut entry = entries[at];
                entry.value[0] ^= bits;
                entries.push(entry);
            }
            Damage::ForEverySubleaf => entries[at].subleaf = None,
            Damage::Move { subleaf } => entries[at].subleaf = Some(subleaf),
            Damage::Insert {
                leaf,
                subleaf,
                value,
            } => entries.insert(
                at,
                Entry {
                    leaf,
                    subleaf,
                    value,
                },
            ),
        }
    }
}

/// A table with room for so many entries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bounded {
    pub(crate) entries: Vec<Entry>,
    pub(crate) limit: usize,
}

impl CpuidTable for Bounded {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.entries.entries()
    }

    fn update_entries(&mut self, change: impl FnMut(Entry) -> Option<[u32; 4]>) {
        self.entries.update_entries(change);
    }

    fn push_entry(&mut self, entry: Entry) -> Result<(), cpuid_amx::TableFull> {
        if self.entries.len() >= self.limit {
            return Err(cpuid_amx::TableFull { limit: self.limit });
        }
        self.entries.push_entry(entry)
    }
}
