//! What KVM made of a table: entries as they were asked for and as the guest sees them.

use alloc::vec::Vec;
use core::fmt;

use kvm_bindings::CpuId;

use crate::table::{CpuidTable, Entry, Table};

/// Where what the vCPU has differs from what was asked for.
pub(super) fn rewrites(requested: &CpuId, effective: &CpuId) -> Vec<Rewrite> {
    // Without the entries that nobody sees, which KVM keeps.
    let requested: Table = requested.entries().collect();
    let effective: Table = effective.entries().collect();
    let place = |entry: &Entry| (entry.leaf, entry.subleaf);
    let find = |table: &Table, wanted: &Entry| {
        table
            .entries()
            .find(|entry| place(entry) == place(wanted))
            .map(|entry| entry.value)
    };
    let changed = requested.entries().filter_map(|entry| {
        let now = find(&effective, &entry);
        (now != Some(entry.value)).then_some(Rewrite {
            leaf: entry.leaf,
            subleaf: entry.subleaf,
            requested: Some(entry.value),
            effective: now,
        })
    });
    let added = effective
        .entries()
        .filter(|entry| find(&requested, entry).is_none())
        .map(|entry| Rewrite {
            leaf: entry.leaf,
            subleaf: entry.subleaf,
            requested: None,
            effective: Some(entry.value),
        });
    changed.chain(added).collect()
}

/// One entry as it was asked for and as the vCPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The leaf.
    pub leaf: u32,
    /// The sub-leaf; `None` where the entry answers for every sub-leaf.
    pub subleaf: Option<u32>,
    /// `[eax, ebx, ecx, edx]` asked for; `None`: the entry was not in the table.
    pub requested: Option<[u32; 4]>,
    /// `[eax, ebx, ecx, edx]` that the guest sees; `None`: the entry is gone.
    pub effective: Option<[u32; 4]>,
}

impl Rewrite {
    /// Whether only bits differ that KVM sets from the state of the vCPU (arch/x86/kvm/cpuid.c,
    /// `kvm_update_cpuid_runtime` and `kvm_vcpu_after_set_cpuid`): OSXSAVE, OSPKE, APIC, MONITOR,
    /// the sizes of 0DH for the current XCR0 and IA32_XSS, the XFRM of SGX, and PV_UNHALT.
    #[must_use]
    pub fn is_runtime(&self) -> bool {
        let (Some(requested), Some(effective)) = (self.requested, self.effective) else {
            return false;
        };
        let runtime = match (self.leaf, self.subleaf.unwrap_or(0)) {
            (0x1, _) => [0, 0, 1 << 27 | 1 << 3, 1 << 9],
            (0x7, 0) => [0, 0, 1 << 4, 0],
            (0xd, 0 | 1) => [0, u32::MAX, 0, 0],
            (0x12, 1) => [0, 0, u32::MAX, u32::MAX],
            (0x4000_0001, _) => [1 << 7, 0, 0, 0],
            _ => [0; 4],
        };
        requested
            .into_iter()
            .zip(effective)
            .zip(runtime)
            .all(|((asked, got), runtime)| (asked ^ got) & !runtime == 0)
    }
}

impl fmt::Display for Rewrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leaf {:#x}", self.leaf)?;
        if let Some(subleaf) = self.subleaf {
            write!(f, " sub-leaf {subleaf:#x}")?;
        }
        match self.requested {
            Some(value) => write!(f, ": asked for {value:x?}")?,
            None => write!(f, ": not asked for")?,
        }
        match self.effective {
            Some(value) => write!(f, ", the guest sees {value:x?}"),
            None => write!(f, ", the guest does not see it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runtime_bits_are_runtime() {
        let differing = |leaf, subleaf, register: usize, bits: u32| {
            let mut effective = [0; 4];
            effective[register] = bits;
            Rewrite {
                leaf,
                subleaf,
                requested: Some([0; 4]),
                effective: Some(effective),
            }
            .is_runtime()
        };
        assert!(differing(1, None, 2, 1 << 27));
        assert!(differing(1, None, 2, 1 << 3));
        assert!(!differing(1, None, 2, 1 << 26));
        assert!(differing(1, None, 3, 1 << 9));
        assert!(differing(7, Some(0), 2, 1 << 4));
        assert!(!differing(7, Some(1), 2, 1 << 4));
        assert!(!differing(7, Some(0), 3, 1 << 24));
        assert!(differing(0xd, Some(0), 1, u32::MAX));
        assert!(differing(0xd, Some(1), 1, u32::MAX));
        assert!(!differing(0xd, Some(2), 1, 1));
        assert!(!differing(0xd, Some(0), 0, 1 << 18));
        assert!(differing(0x12, Some(1), 2, u32::MAX));
        assert!(!differing(0x12, Some(1), 0, 1));
        assert!(differing(0x4000_0001, None, 0, 1 << 7));
        assert!(!differing(0x4000_0001, None, 0, 1 << 6));
    }
}
