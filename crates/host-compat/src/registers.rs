//! The features of a processor other than XSAVE's and AMX's, register by register of CPUID: what a guest
//! lacks on another host, and what two hosts have in common.
//!
//! Of XSAVE and AMX, `cpuid-amx` knows what belongs together. Here are the other features, which a host
//! has or has not bit by bit. What says how a processor is made (its model, its caches, its name) stays
//! that of the host where the guest boots, also after a move.

use cpuid_amx::{Bits, CpuidTable, Entry, Register as Name, TableFull};

/// What a register of a feature leaf says.
#[derive(Clone, Copy)]
enum Register {
    /// A bit for each feature; here are those that a guest would miss.
    Features(u32),
    /// The same for all, but these bits say that something is missing that old processors had, so what is
    /// in common has each that any has.
    Lacks(u32),
    /// Numbers, up to which a guest may go.
    Numbers(&'static [Number]),
    /// It says nothing that a guest relies on, or another module looks after it.
    Own,
}

/// A number within a register.
#[derive(Clone, Copy)]
struct Number {
    low: u32,
    bits: u32,
    /// A guest would miss what is beyond the host's.
    is_missed: bool,
}

impl Number {
    const fn of(low: u32, bits: u32) -> Self {
        let is_missed = true;
        Self {
            low,
            bits,
            is_missed,
        }
    }

    /// One that only says which leaves there are, or that KVM has not always told.
    const fn kept(low: u32, bits: u32) -> Self {
        let is_missed = false;
        Self {
            low,
            bits,
            is_missed,
        }
    }

    fn mask(self) -> u32 {
        let all = u32::MAX.checked_shr(32_u32.saturating_sub(self.bits));
        all.unwrap_or(0).checked_shl(self.low).unwrap_or(0)
    }

    fn find(self, register: u32) -> u32 {
        (register & self.mask()).checked_shr(self.low).unwrap_or(0)
    }
}

use Register::{Features, Lacks, Numbers, Own};

const ALL: Register = Features(u32::MAX);
/// Features whose loss no guest notices: KVM implements whatever it reports, or another module compares
/// them.
const KVM: Register = Features(0);
/// The largest leaf or sub-leaf.
const LARGEST: Register = Numbers(&[Number::kept(0, 32)]);

/// Leaves with features (SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E;
/// Documentation/virt/kvm/x86/cpuid.rst): leaf, sub-leaf, and what EAX, EBX, ECX and EDX say.
const LEAVES: [(u32, u32, [Register; 4]); 15] = [
    (0x0, 0, [LARGEST, Own, Own, Own]),
    // MONITOR, TSC-deadline, OSXSAVE and hypervisor; APIC and HTT: they follow from other registers or
    // the number of vCPUs, or are KVM's own.
    (
        0x1,
        0,
        [
            Own,
            Own,
            Features(!(1 << 3 | 1 << 24 | 1 << 27 | 1 << 31)),
            Features(!(1 << 9 | 1 << 28)),
        ],
    ),
    (0x6, 0, [KVM, Own, KVM, Own]),
    // FDP_EXCPTN_ONLY, and FCS and FDS deprecated. OSPKE, and MAWAU, which is a number. AMX-BF16,
    // AMX-TILE and AMX-INT8.
    (
        0x7,
        0,
        [
            LARGEST,
            Lacks(1 << 6 | 1 << 13),
            Features(!(1 << 4 | 0x1f << 17)),
            Features(!(1 << 22 | 1 << 24 | 1 << 25)),
        ],
    ),
    // AMX-FP16; AMX-COMPLEX.
    (
        0x7,
        1,
        [Features(!(1 << 21)), ALL, ALL, Features(!(1 << 8))],
    ),
    (0x7, 2, [Own, Own, Own, ALL]),
    // Performance monitoring: its version, counters, their width, and how many bits of EBX count; the
    // events that are missing; fixed counters, as bits and as a number, and their width.
    (
        0xa,
        0,
        [
            Numbers(&[
                Number::of(0, 8),
                Number::of(8, 8),
                Number::of(16, 8),
                Number::kept(24, 8),
            ]),
            Lacks(0xff),
            ALL,
            Numbers(&[Number::of(0, 5), Number::of(5, 8)]),
        ],
    ),
    // The version of AVX10.
    (0x24, 0, [Own, Numbers(&[Number::of(0, 8)]), Own, Own]),
    (0x4000_0000, 0, [LARGEST, Own, Own, Own]),
    // KVM's own: clocks, asynchronous page faults, ...
    (0x4000_0001, 0, [ALL, Own, Own, Own]),
    (0x8000_0000, 0, [LARGEST, Own, Own, Own]),
    // CmpLegacy; APIC.
    (
        0x8000_0001,
        0,
        [Own, Own, Features(!(1 << 1)), Features(!(1 << 9))],
    ),
    // The invariant TSC, among others.
    (0x8000_0007, 0, [Own, Own, Own, ALL]),
    // Physical and linear address bits, and those of guests.
    (
        0x8000_0008,
        0,
        [
            Numbers(&[Number::of(0, 8), Number::of(8, 8), Number::kept(16, 8)]),
            ALL,
            Own,
            Own,
        ],
    ),
    (0x8000_0021, 0, [ALL, Own, Own, Own]),
];

/// The leaves with features, each with its sub-leaf.
pub(crate) fn places() -> impl Iterator<Item = (u32, u32)> {
    LEAVES.into_iter().map(|(leaf, subleaf, _)| (leaf, subleaf))
}

fn says(leaf: u32, subleaf: u32) -> [Register; 4] {
    let found = LEAVES
        .into_iter()
        .find(|(own, below, _)| (*own, *below) == (leaf, subleaf));
    found.map_or([Own; 4], |(.., registers)| registers)
}

/// What a leaf says of features, without what belongs to the one host or to another module.
pub(crate) fn features(leaf: u32, subleaf: u32, value: [u32; 4]) -> [u32; 4] {
    let mut features = value;
    for (register, says) in features.iter_mut().zip(says(leaf, subleaf)) {
        *register &= match says {
            Features(mask) => mask,
            Lacks(_) => u32::MAX,
            Numbers(numbers) => all(numbers),
            Own => 0,
        };
    }
    features
}

/// The bits of a register that each stand for a feature.
pub(crate) fn plain(leaf: u32, subleaf: u32, register: Name, value: u32) -> u32 {
    let found = Name::ALL.into_iter().zip(says(leaf, subleaf));
    let mut found = found.filter(|(own, _)| *own == register);
    match found.next() {
        Some((_, Features(mask))) => value & mask,
        Some((_, Lacks(inverted))) => value & !inverted,
        _ => 0,
    }
}

/// What two hosts have in common of a leaf's features.
pub(crate) fn shared(leaf: u32, subleaf: u32, ours: [u32; 4], theirs: [u32; 4]) -> [u32; 4] {
    let mut shared = ours;
    let both = shared.iter_mut().zip(theirs).zip(says(leaf, subleaf));
    for ((ours, theirs), says) in both {
        *ours = in_common(says, *ours, theirs);
    }
    shared
}

/// Bits of a register that are given a value; the others stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forced {
    pub(crate) mask: u32,
    pub(crate) value: u32,
}

/// What makes `target` of any host's leaf that has at least these features: bits for a feature stay or
/// are cleared, and none is set that a host might lack.
pub(crate) fn forced(leaf: u32, subleaf: u32, target: [u32; 4]) -> [Forced; 4] {
    let mut forced = [Forced::default(); 4];
    let each = forced.iter_mut().zip(target).zip(says(leaf, subleaf));
    for ((forced, target), says) in each {
        let (mask, value) = match says {
            Features(mask) => (mask & !target, 0),
            Lacks(inverted) => (!inverted & !target | inverted & target, inverted & target),
            Numbers(numbers) => (all(numbers), all(numbers) & target),
            Own => (0, 0),
        };
        *forced = Forced { mask, value };
    }
    forced
}

fn all(numbers: &[Number]) -> u32 {
    numbers.iter().fold(0, |all, number| all | number.mask())
}

/// Leaves that are there for one feature, and go where a host lacks them: SGX, PT, Key Locker, AVX10.
const WHOLE: [u32; 4] = [0x12, 0x14, 0x19, 0x24];

/// What a guest sees and a host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Features.
    Bits(Bits),
    /// A number that is smaller there.
    Number {
        /// Where it is.
        place: Bits,
        /// What the guest sees.
        guest: u32,
        /// What the host's guests see.
        host: u32,
    },
}

impl Missing {
    pub(crate) const fn place(&self) -> &Bits {
        match self {
            Self::Bits(place) | Self::Number { place, .. } => place,
        }
    }
}

/// What a guest that sees `sees` lacks on a host whose guests have `has`: features, and numbers that
/// are smaller there.
pub(crate) fn missing(sees: &impl CpuidTable, has: &impl CpuidTable) -> Vec<Missing> {
    let mut found = Vec::new();
    for (leaf, subleaf, registers) in LEAVES {
        let values = sees.leaf(leaf, subleaf).into_iter();
        let values = values.zip(has.leaf(leaf, subleaf)).zip(registers);
        for (((sees, has), says), register) in values.zip(Name::ALL) {
            let bits = |mask| Bits {
                leaf,
                subleaf,
                register,
                mask,
            };
            let mask = match says {
                Features(missed) => sees & !has & missed,
                Lacks(inverted) => sees & !has & !inverted,
                Numbers(numbers) => {
                    let less = numbers.iter().filter_map(|number| {
                        let (guest, host) = (number.find(sees), number.find(has));
                        (number.is_missed && guest > host).then_some(Missing::Number {
                            place: bits(number.mask()),
                            guest,
                            host,
                        })
                    });
                    found.extend(less);
                    0
                }
                Own => 0,
            };
            if mask != 0 {
                found.push(Missing::Bits(bits(mask)));
            }
        }
    }
    found
}

/// Takes out of `table` what guests of the other host lack.
pub(crate) fn restrict<T: CpuidTable, O: CpuidTable>(
    table: &mut T,
    other: &O,
) -> Result<(), TableFull> {
    for (leaf, subleaf, registers) in LEAVES {
        let (ours, theirs) = (table.leaf(leaf, subleaf), other.leaf(leaf, subleaf));
        let mut value = ours;
        for ((value, theirs), says) in value.iter_mut().zip(theirs).zip(registers) {
            *value = in_common(says, *value, theirs);
        }
        if value != ours {
            table.set_leaf(leaf, subleaf, value)?;
        }
    }
    let is_gone =
        |entry: &Entry| WHOLE.contains(&entry.leaf) && other.leaf(entry.leaf, 0) == [0; 4];
    table.retain_leaves(|entry| entry.value == [0; 4] || !is_gone(&entry));
    Ok(())
}

fn in_common(says: Register, ours: u32, theirs: u32) -> u32 {
    match says {
        Features(_) => ours & theirs,
        Lacks(inverted) => ours & theirs & !inverted | (ours | theirs) & inverted,
        Numbers(numbers) => numbers.iter().fold(ours, |ours, number| {
            let mask = number.mask();
            ours & !mask | (ours & mask).min(theirs & mask)
        }),
        Own => ours,
    }
}

/// The twelve letters of leaf 0: `GenuineIntel`.
pub(crate) fn vendor(table: &impl CpuidTable) -> String {
    let [_, ebx, ecx, edx] = table.leaf(0, 0);
    let letters = [ebx, edx, ecx].map(u32::to_le_bytes);
    let text = String::from_utf8_lossy(letters.as_flattened());
    text.trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use cpuid_amx::Table;

    use super::*;

    fn table(changes: &[(u32, u32, [u32; 4])]) -> Table {
        let mut table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        for (leaf, subleaf, value) in changes {
            table.set_leaf(*leaf, *subleaf, *value).unwrap();
        }
        table
    }

    fn bits(leaf: u32, register: Name, mask: u32) -> Bits {
        Bits {
            leaf,
            subleaf: 0,
            register,
            mask,
        }
    }

    fn restricted(other: &Table) -> Table {
        let mut ours = table(&[]);
        restrict(&mut ours, other).unwrap();
        ours
    }

    #[test]
    fn a_host_like_this_one_takes_and_lacks_nothing() {
        assert_eq!(restricted(&table(&[])), table(&[]));
        assert_eq!(missing(&table(&[]), &table(&[])), []);
    }

    #[test]
    fn what_the_other_lacks_is_gone_and_what_it_has_more_does_not_come() {
        let [eax, ebx, ecx, edx] = table(&[]).leaf(7, 0);
        // BMI2 and GFNI are missing there; it can save FCS and FDS; bit 31 of ECX is new.
        let theirs = [
            eax,
            ebx & !(1 << 8 | 1 << 13),
            ecx & !(1 << 8) | 1 << 31,
            edx,
        ];
        let theirs = table(&[(7, 0, theirs)]);
        let result = restricted(&theirs);
        let expected = [eax, ebx & !(1 << 8), ecx & !(1 << 8), edx];
        assert_eq!(result.leaf(7, 0), expected);
        // A guest with that misses nothing on either; one with all of ours does there.
        assert_eq!(missing(&result, &theirs), []);
        assert_eq!(missing(&result, &table(&[])), []);
        let cpuid = |register| bits(7, register, 1 << 8);
        assert_eq!(
            missing(&table(&[]), &theirs),
            [cpuid(Name::Ebx), cpuid(Name::Ecx)].map(Missing::Bits)
        );
    }

    /// Whatever two hosts have, a guest with what they have in common misses nothing on any of them.
    #[test]
    fn what_is_in_common_is_missed_on_neither() {
        let mut random = 1_u32;
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random ^ random >> 16
        };
        for _ in 0..200 {
            let [mut ours, mut theirs] = [(); 2].map(|()| {
                let mut table = table(&[]);
                for (leaf, subleaf, _) in LEAVES.into_iter().filter(|(leaf, ..)| *leaf != 0) {
                    table
                        .set_leaf(leaf, subleaf, [(); 4].map(|()| next()))
                        .unwrap();
                }
                table
            });
            let (here, there) = (ours.clone(), theirs.clone());
            assert_ne!(missing(&here, &there), []);
            restrict(&mut ours, &there).unwrap();
            restrict(&mut theirs, &here).unwrap();
            for host in [&here, &there] {
                assert_eq!(missing(&ours, host), []);
                assert_eq!(missing(&theirs, host), []);
            }
        }
    }

    #[test]
    fn numbers_are_the_smallest() {
        let sizes = |value| table(&[(0x8000_0008, 0, [value, 0, 0, 0])]);
        let mut ours = sizes(0x3934);
        for other in [0x3034, 0x392e].map(sizes) {
            restrict(&mut ours, &other).unwrap();
        }
        assert_eq!(ours.leaf(0x8000_0008, 0)[0], 0x302e);
    }

    #[test]
    fn a_guest_may_go_as_far_as_its_numbers() {
        let with = |leaf, value| table(&[(leaf, 0, value)]);
        let sizes = |value| with(0x8000_0008, [value, 0, 0, 0]);
        let reason = |leaf, register, mask, guest, host| Missing::Number {
            place: bits(leaf, register, mask),
            guest,
            host,
        };
        let smaller = reason(0x8000_0008, Name::Eax, 0xff, 52, 46);
        assert_eq!(missing(&sizes(0x3934), &sizes(0x39_392e)), [smaller]);
        assert_eq!(missing(&sizes(0x39_392e), &sizes(0x3934)), []);
        // Eight counters of 48 bits and three fixed ones; an event more is missing there.
        let (many, few) = ([0x0830_0805, 0, 7, 0x603], [0x0830_0402, 1, 3, 0x602]);
        let fewer = [
            reason(0xa, Name::Eax, 0xff, 5, 2),
            reason(0xa, Name::Eax, 0xff00, 8, 4),
            Missing::Bits(bits(0xa, Name::Ecx, 4)),
            reason(0xa, Name::Edx, 0x1f, 3, 2),
        ];
        assert_eq!(missing(&with(0xa, many), &with(0xa, few)), fewer);
        assert_eq!(missing(&with(0xa, few), &with(0xa, many)), []);
    }

    #[test]
    fn a_leaf_for_one_feature_goes_with_it() {
        let mut ours = table(&[(0x14, 0, [1, 0xf, 7, 0]), (0x24, 0, [0, 2, 0, 0])]);
        let other = table(&[(0x24, 0, [0, 1, 0, 0])]);
        restrict(&mut ours, &other).unwrap();
        assert_eq!(ours.leaf(0x14, 0), [0; 4]);
        assert_eq!(ours.leaf(0x24, 0), [0, 1, 0, 0]);
    }

    #[test]
    fn vendors_are_twelve_letters() {
        assert_eq!(vendor(&table(&[])), "GenuineIntel");
        assert_eq!(vendor(&Table::new()), "");
    }
}
