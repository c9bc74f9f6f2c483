//! What all hosts of a fleet have in common beside XSAVE and AMX, without which a guest's CPU is not
//! whole: vendor, features bit by bit, and IA32_ARCH_CAPABILITIES.
//!
//! Values only ever become less: whatever the order and the shape of merges, the result is the same, and
//! a host that is counted twice makes no difference.

use std::collections::BTreeMap;

use cpuid_amx::CpuidTable;

use super::Smallest;
use crate::host::Host;
use crate::registers;

/// What all described hosts have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// More than one: no guest runs on all.
    pub(super) vendors: Smallest<MAX_VENDORS>,
    /// The smallest CPUID.1H:EAX: family, model and stepping.
    pub(crate) signature: u32,
    /// Of the hosts whose value is known.
    pub(crate) arch_capabilities: Option<u64>,
    /// Whether the value is not known of some host.
    pub(crate) arch_capabilities_unknown: bool,
    pub(crate) leaves: BTreeMap<(u32, u32), Leaf>,
}

pub(super) const MAX_VENDORS: usize = 2;
/// Stands for processors that do not say who made them.
const NO_VENDOR: &str = "an unknown vendor";

/// A leaf and sub-leaf on all hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Its features; `None` where no host tells.
    pub(crate) value: Option<[u32; 4]>,
    /// Some host has it.
    pub(crate) somewhere: bool,
    /// Each host has it: KVM reports the leaf, and it is not all zeros.
    pub(crate) everywhere: bool,
    /// Some host does not tell: its CPUID comes from a dump without this leaf.
    pub(crate) untold: bool,
}

/// Whether a text is one that CPUID.0H spells; it goes into the command lines of other tools.
pub(crate) fn is_vendor(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b" !.".contains(&byte);
    text.len() == 12 && text.bytes().all(is_letter)
}

/// The leaves that are looked at: those with features, and those of XSAVE and AMX.
pub(super) fn places() -> impl Iterator<Item = (u32, u32)> {
    let components = (0..=19).map(|component| (0xd, component));
    let tiles = [(0x1d, 0), (0x1d, 1), (0x1e, 0), (0x1e, 1)];
    registers::places().chain(components).chain(tiles)
}

impl Shared {
    pub(crate) fn vendors(&self) -> Vec<String> {
        self.vendors.clone().into_names()
    }

    /// Of one host; `None` where it is not known what it can give.
    pub(crate) fn of(host: &Host) -> Option<Self> {
        if !host.is_described() {
            return None;
        }
        let (kvm, raw, coherent) = (
            host.kvm.as_ref().ok()?,
            host.guest_cpuid()?,
            host.coherent_cpuid()?,
        );
        let leaves = places().map(|(leaf, subleaf)| {
            let told = host.tells_leaf(leaf);
            let has = raw.leaf(leaf, subleaf) != [0; 4];
            let features = registers::features(leaf, subleaf, coherent.leaf(leaf, subleaf));
            let found = Leaf {
                value: told.then_some(features),
                somewhere: has,
                everywhere: has,
                untold: !told,
            };
            ((leaf, subleaf), found)
        });
        let mut vendors = Smallest::default();
        let vendor = registers::vendor(raw);
        vendors.insert(if is_vendor(&vendor) {
            &vendor
        } else {
            NO_VENDOR
        });
        Some(Self {
            vendors,
            signature: raw.leaf(1, 0)[0],
            arch_capabilities: kvm.feature_msrs.arch_capabilities,
            arch_capabilities_unknown: kvm.feature_msrs.arch_capabilities.is_none(),
            leaves: leaves.collect(),
        })
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.vendors.extend(other.vendors);
        self.signature = self.signature.min(other.signature);
        self.arch_capabilities = match (self.arch_capabilities, other.arch_capabilities) {
            (Some(ours), Some(theirs)) => Some(crate::msrs::shared_arch_capabilities(ours, theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        self.arch_capabilities_unknown |= other.arch_capabilities_unknown;
        for (place, theirs) in other.leaves {
            let ours = self.leaves.entry(place).or_default();
            let (leaf, subleaf) = place;
            ours.value = match (ours.value, theirs.value) {
                (Some(a), Some(b)) => Some(registers::shared(leaf, subleaf, a, b)),
                (a, b) => a.or(b),
            };
            ours.somewhere |= theirs.somewhere;
            ours.everywhere &= theirs.everywhere;
            ours.untold |= theirs.untold;
        }
    }
}
