//! KVM's own type as a [`CpuidTable`].

use alloc::vec::Vec;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};

use crate::table::{CpuidEntry, CpuidTable, Entry, TableFull};

impl CpuidEntry for kvm_cpuid_entry2 {
    fn to_entry(&self) -> Entry {
        Entry {
            leaf: self.function,
            subleaf: (self.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(self.index),
            value: [self.eax, self.ebx, self.ecx, self.edx],
        }
    }

    fn from_entry(entry: Entry) -> Self {
        let mut new = Self {
            function: entry.leaf,
            ..Self::default()
        };
        if let Some(index) = entry.subleaf {
            new.index = index;
            new.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        }
        new.set_value(entry.value);
        new
    }

    fn set_value(&mut self, value: [u32; 4]) {
        [self.eax, self.ebx, self.ecx, self.edx] = value;
    }
}

impl CpuidTable for CpuId {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.as_slice().iter().map(CpuidEntry::to_entry)
    }

    fn update_entries(&mut self, mut change: impl FnMut(Entry) -> Option<[u32; 4]>) {
        let keep: Vec<bool> = self
            .as_mut_slice()
            .iter_mut()
            .map(|entry| match change(entry.to_entry()) {
                Some(value) => {
                    entry.set_value(value);
                    true
                }
                None => false,
            })
            .collect();
        if !keep.contains(&false) {
            return;
        }
        let mut keep = keep.into_iter();
        self.retain(|_| keep.next().unwrap_or(true));
    }

    fn push_entry(&mut self, entry: Entry) -> Result<(), TableFull> {
        self.push(kvm_cpuid_entry2::from_entry(entry))
            .map_err(|_| TableFull {
                limit: KVM_MAX_CPUID_ENTRIES,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, flags: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax: function << 8 | index,
            ..Default::default()
        }
    }

    #[test]
    fn the_flag_says_whether_the_index_counts() {
        let cpuid = CpuId::from_entries(&[entry(1, 5, 0), entry(7, 1, 1), entry(2, 3, 2)]).unwrap();
        assert_eq!(cpuid.leaf(1, 0)[0], 0x105);
        assert_eq!(cpuid.leaf(7, 1)[0], 0x701);
        assert_eq!(cpuid.leaf(7, 0), [0; 4]);
        assert_eq!(cpuid.leaf(2, 0)[0], 0x203);
    }

    #[test]
    fn changes_keep_flags_and_order() {
        let mut cpuid = CpuId::from_entries(&[
            entry(1, 0, 0),
            entry(7, 0, 1),
            entry(7, 1, 1),
            entry(2, 0, 6),
        ])
        .unwrap();
        cpuid.set_leaf(2, 0, [1, 2, 3, 4]).unwrap();
        cpuid.set_leaf(0xd, 18, [5, 6, 7, 8]).unwrap();
        cpuid.set_leaf(0, 0, [9, 0, 0, 0]).unwrap();
        cpuid.retain_leaves(|e| e.leaf != 7 || e.subleaf == Some(1));
        let fields = |e: &kvm_cpuid_entry2| (e.function, e.index, e.flags, e.to_entry().value);
        let all: Vec<_> = cpuid.as_slice().iter().map(fields).collect();
        assert_eq!(
            all,
            [
                (1, 0, 0, [0x100, 0, 0, 0]),
                (7, 1, 1, [0x701, 0, 0, 0]),
                (2, 0, 6, [1, 2, 3, 4]),
                (0xd, 18, 1, [5, 6, 7, 8]),
                (0, 0, 0, [9, 0, 0, 0]),
            ]
        );
    }

    #[test]
    fn a_full_table_says_so() {
        let entries: Vec<_> = (0..256).map(|index| entry(0xd, index, 1)).collect();
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        assert_eq!(
            cpuid.set_leaf(0xd, 256, [1; 4]),
            Err(TableFull { limit: 256 })
        );
        assert_eq!(cpuid.as_slice(), entries);
        cpuid.set_leaf(0xd, 255, [1; 4]).unwrap();
        assert_eq!(cpuid.leaf(0xd, 255), [1; 4]);
    }
}
