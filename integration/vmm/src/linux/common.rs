//! What a guest sees that may go on on other hosts: of this host's CPUID, what the others have as well.
//!
//! Of XSAVE and AMX, `cpuid-amx` knows what belongs together; here are the other features, which a host
//! has or has not bit by bit. What says how a processor is made (its model, its caches, its name) stays
//! that of the host where the guest boots, also after a move.

use cpuid_amx::{CpuidTable, FeatureSet, Host, Policy};

use super::LinuxError;

/// How a register of a feature leaf is made of those of all hosts.
#[derive(Clone, Copy)]
enum Rule {
    /// A bit says that a feature is there.
    All,
    /// The same, but these bits say that something is missing.
    AllBut(u32),
    /// A number: the smallest.
    Least,
    /// A number in each byte: the smallest.
    LeastBytes,
    /// It says nothing that a guest relies on, or another module looks after it.
    Own,
}

use Rule::{All, AllBut, Least, LeastBytes, Own};

/// Leaves with features (SDM vol. 2A, CPUID; Documentation/virt/kvm/x86/cpuid.rst): sub-leaf, and the rules
/// of EAX, EBX, ECX and EDX.
const RULES: [(u32, u32, [Rule; 4]); 13] = [
    (0x0, 0, [Least, Own, Own, Own]),
    (0x1, 0, [Own, Own, All, All]),
    (0x6, 0, [All, Own, All, Own]),
    // EBX[6], FDP_EXCPTN_ONLY, and EBX[13], FCS and FDS deprecated: what old processors could.
    (0x7, 0, [Least, AllBut(1 << 6 | 1 << 13), All, All]),
    (0x7, 1, [All, All, All, All]),
    (0x7, 2, [Own, Own, Own, All]),
    (0x4000_0000, 0, [Least, Own, Own, Own]),
    (0x4000_0001, 0, [All, Own, Own, Own]),
    (0x8000_0000, 0, [Least, Own, Own, Own]),
    (0x8000_0001, 0, [Own, Own, All, All]),
    (0x8000_0007, 0, [Own, Own, Own, All]),
    // EAX: physical and linear address bits.
    (0x8000_0008, 0, [LeastBytes, All, Own, Own]),
    (0x8000_0021, 0, [All, Own, Own, Own]),
];

/// Leaves that are there for one feature, and go where a host lacks them: SGX, PT, Key Locker, AVX10.
const WHOLE: [u32; 4] = [0x12, 0x14, 0x19, 0x24];

/// CPUID.01H:ECX[5].
const VMX: u32 = 1 << 5;

/// Takes out of `table` what `others` lack. Nested virtualisation goes as well: this VMM does not move its
/// state.
pub(super) fn restrict<T: CpuidTable>(table: &mut T, others: &[Host]) -> Result<(), LinuxError> {
    let mut shared = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).closed();
    for other in others {
        shared = shared.intersection(&other.guest_features()).closed();
    }
    let _ = Policy::features(&shared).apply(table)?;
    for other in others {
        let Some(other) = other.guest_cpuid() else {
            continue;
        };
        for (leaf, subleaf, rules) in RULES {
            let (ours, theirs) = (table.leaf(leaf, subleaf), other.leaf(leaf, subleaf));
            let mut value = ours;
            for ((value, theirs), rule) in value.iter_mut().zip(theirs).zip(rules) {
                *value = join(rule, *value, theirs);
            }
            if value != ours {
                table.set_leaf(leaf, subleaf, value)?;
            }
        }
        table.retain_leaves(|entry| {
            !WHOLE.contains(&entry.leaf) || other.leaf(entry.leaf, 0) != [0; 4]
        });
    }
    let [eax, ebx, ecx, edx] = table.leaf(1, 0);
    if ecx & VMX != 0 {
        table.set_leaf(1, 0, [eax, ebx, ecx & !VMX, edx])?;
    }
    Ok(())
}

fn join(rule: Rule, ours: u32, theirs: u32) -> u32 {
    match rule {
        All => ours & theirs,
        AllBut(missing) => ours & theirs & !missing | (ours | theirs) & missing,
        Least => ours.min(theirs),
        LeastBytes => {
            let (mut bytes, theirs) = (ours.to_le_bytes(), theirs.to_le_bytes());
            for (byte, theirs) in bytes.iter_mut().zip(theirs) {
                *byte = (*byte).min(theirs);
            }
            u32::from_le_bytes(bytes)
        }
        Own => ours,
    }
}

#[cfg(test)]
mod tests {
    use cpuid_amx::{Amx, Table};

    use super::*;

    fn table(changes: &[(u32, u32, [u32; 4])]) -> Table {
        let mut table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        for (leaf, subleaf, value) in changes {
            table.set_leaf(*leaf, *subleaf, *value).unwrap();
        }
        table
    }

    fn restricted(other: &Table) -> Table {
        let mut ours = table(&[]);
        let other = Host::from_cpuid("other", other.clone());
        restrict(&mut ours, &[other]).unwrap();
        ours
    }

    #[test]
    fn a_host_like_this_one_takes_nothing_but_nesting() {
        let mut same = table(&[]);
        let [eax, ebx, ecx, edx] = same.leaf(1, 0);
        same.set_leaf(1, 0, [eax, ebx, ecx & !VMX, edx]).unwrap();
        assert_eq!(restricted(&table(&[])), same);
    }

    #[test]
    fn what_the_other_lacks_is_gone_and_what_it_has_more_does_not_come() {
        let ours = table(&[]);
        let [eax, ebx, ecx, edx] = ours.leaf(7, 0);
        // BMI2 and GFNI are missing there; it can save FCS and FDS; bit 31 of ECX is new.
        let theirs = [
            eax,
            ebx & !(1 << 8 | 1 << 13),
            ecx & !(1 << 8) | 1 << 31,
            edx,
        ];
        let result = restricted(&table(&[(7, 0, theirs)]));
        let expected = [eax, ebx & !(1 << 8), ecx & !(1 << 8), edx];
        assert_eq!(result.leaf(7, 0), expected);
    }

    #[test]
    fn numbers_are_the_smallest() {
        let sizes = |value| table(&[(0x8000_0008, 0, [value, 0, 0, 0])]);
        let mut ours = sizes(0x3934);
        let others = [0x3034, 0x392e].map(|value| Host::from_cpuid("other", sizes(value)));
        restrict(&mut ours, &others).unwrap();
        assert_eq!(ours.leaf(0x8000_0008, 0)[0], 0x302e);
    }

    #[test]
    fn amx_goes_where_one_host_lacks_it() {
        let mut other = table(&[]);
        let _ = Policy::hide_amx().apply(&mut other).unwrap();
        let result = restricted(&other);
        let amx = |table: &Table| Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        assert_eq!(amx(&table(&[])).usable(), Ok(()));
        assert!(amx(&result).usable().is_err());
        assert_eq!(result.leaf(0x1d, 0), [0; 4]);
    }
}
