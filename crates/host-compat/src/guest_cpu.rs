//! The CPU of a guest that runs on every host of a fleet: what a template for a VMM is made of.

use std::collections::BTreeMap;

use cpuid_amx::amx::Amx;
use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::features::FeatureSet;
use cpuid_amx::{Bits, CpuidTable, Entry, Policy, Register, Table};
use thiserror::Error;

use crate::baseline::{Leaf, Shared, is_vendor};
use crate::compat::{self, Guest, Verdict};
use crate::host::Host;
use crate::msrs::FeatureMsrs;

/// What every host of a fleet can give to a guest.
///
/// ```
/// use cpuid_amx::{CpuidTable, Policy, Table};
/// use host_compat::{Fleet, Guest, Host, Verdict, compat};
///
/// let with_amx: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let mut without = with_amx.clone();
/// Policy::hide_amx().apply(&mut without)?;
/// let hosts = [Host::from_cpuid("new", with_amx), Host::from_cpuid("old", without)];
///
/// let mut fleet = Fleet::new();
/// for host in &hosts {
///     fleet.add(host)?;
/// }
/// let cpu = fleet.guest_cpu()?;
/// assert_eq!(cpu.cpuid().leaf(0xd, 0)[0], 0x2e7);
/// for host in &hosts {
///     let compatibility = compat::check(Guest::new(cpu.cpuid()), host);
///     assert_eq!(compatibility.verdict(), Verdict::Runs);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestCpu {
    pub(crate) cpuid: Table,
    pub(crate) vendor: String,
    /// CPUID.1H:EAX of one of the hosts, the smallest.
    pub(crate) signature: u32,
    /// What all hosts have of IA32_ARCH_CAPABILITIES; `None` where it is not known of some host.
    pub(crate) arch_capabilities: Option<u64>,
    pub(crate) leaves: BTreeMap<(u32, u32), Leaf>,
}

impl GuestCpu {
    pub(crate) fn new(shared: &Shared, features: &FeatureSet) -> Result<Self, NoGuestCpu> {
        let vendors = shared.vendors();
        let vendor = match &vendors[..] {
            [vendor] if is_vendor(vendor) => vendor,
            _ => return Err(NoGuestCpu::Vendors { vendors }),
        };
        let mut cpuid = Table::new();
        for (&(leaf, subleaf), found) in &shared.leaves {
            set(&mut cpuid, leaf, subleaf, found.value.unwrap_or_default());
        }
        let letters = vendor_registers(vendor);
        set(&mut cpuid, 0, 0, letters);
        set(&mut cpuid, 1, 0, [shared.signature, 0, 0, 0]);
        for entry in features.to_table().entries() {
            let subleaf = entry.subleaf.unwrap_or(0);
            let mut value = entry.value;
            // The largest leaf and sub-leaf are known already; all else is XSAVE's and AMX's.
            if let ((0, _) | (7, 0), [eax, ..]) = ((entry.leaf, subleaf), &mut value) {
                *eax = 0;
            }
            set(&mut cpuid, entry.leaf, subleaf, value);
        }
        // Features whose components are not shared go with them; to expose all that there is never fails.
        let _ = Policy::expose_all().apply(&mut cpuid);
        let mut contradictions = coherence::check(&cpuid);
        contradictions.retain(|contradiction| !contradiction.is_recomputed_by_kvm());
        if !contradictions.is_empty() {
            return Err(NoGuestCpu::NotWhole { contradictions });
        }
        Ok(Self {
            cpuid,
            vendor: vendor.clone(),
            signature: shared.signature,
            arch_capabilities: shared
                .arch_capabilities
                .filter(|_| !shared.arch_capabilities_unknown),
            leaves: shared.leaves.clone(),
        })
    }

    /// Returns what all hosts have in common as CPUID: vendor, signature, features, XSAVE and AMX.
    /// Topology, caches and the name of the processor are not in it.
    #[must_use]
    pub const fn cpuid(&self) -> &Table {
        &self.cpuid
    }

    /// Returns what all hosts have in common of MSRs, as far as it is known of all.
    #[must_use]
    pub fn feature_msrs(&self) -> FeatureMsrs {
        FeatureMsrs {
            arch_capabilities: self.arch_capabilities,
            perf_capabilities: None,
        }
    }

    pub(crate) fn has_amx(&self) -> bool {
        let amx = Amx::from_cpuid(|leaf, subleaf| self.cpuid.leaf(leaf, subleaf));
        amx.usable().is_ok()
    }

    /// Whether CPUID names IA32_ARCH_CAPABILITIES.
    pub(crate) fn sees_arch_capabilities(&self) -> bool {
        let [.., edx] = self.cpuid.leaf(7, 0);
        edx & 1 << 29 != 0
    }

    /// Bits that say what features there are, by register.
    pub(crate) fn bits(&self) -> impl Iterator<Item = Bits> + '_ {
        self.leaves.keys().flat_map(|&(leaf, subleaf)| {
            let values = self.cpuid.leaf(leaf, subleaf);
            let registers = Register::ALL.into_iter().zip(values);
            registers.map(move |(register, mask)| Bits {
                leaf,
                subleaf,
                register,
                mask,
            })
        })
    }

    /// The same CPU where only this host is to give it.
    ///
    /// # Errors
    ///
    /// The host cannot give it.
    pub fn on(&self, host: &Host) -> Result<Self, NotOnHost> {
        let guest = Guest::new(&self.cpuid).feature_msrs(self.feature_msrs());
        let found = compat::check(guest, host);
        let reasons = found.reasons.iter().map(ToString::to_string).collect();
        let own = Shared::of(host).filter(|_| found.verdict() == Verdict::Runs);
        let own = own.ok_or(NotOnHost {
            host: host.name.clone(),
            reasons,
        })?;
        Ok(Self {
            leaves: own.leaves,
            ..self.clone()
        })
    }
}

/// Adds bits to a leaf.
fn set(table: &mut Table, leaf: u32, subleaf: u32, value: [u32; 4]) {
    let mut all = table.leaf(leaf, subleaf);
    for (register, value) in all.iter_mut().zip(value) {
        *register |= value;
    }
    table.retain_leaves(|entry| !entry.answers(leaf, subleaf));
    let subleaf = cpuid_amx::table::has_subleaves(leaf).then_some(subleaf);
    let entry = Entry {
        leaf,
        subleaf,
        value: all,
    };
    if all != [0; 4] {
        // A sorted table has room for everything.
        let _ = table.push_entry(entry);
    }
}

/// The twelve letters of leaf 0 in its registers.
fn vendor_registers(vendor: &str) -> [u32; 4] {
    let mut letters = vendor.bytes().chain(std::iter::repeat(0));
    let mut register = || u32::from_le_bytes(std::array::from_fn(|_| letters.next().unwrap_or(0)));
    let (ebx, edx, ecx) = (register(), register(), register());
    [0, ebx, ecx, edx]
}

/// No guest runs on every host of a fleet.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NoGuestCpu {
    /// No host is described.
    #[error("no host of the fleet is described: KVM or the permission could not be asked")]
    NoHosts,
    /// Processors of different vendors.
    #[error(
        "no guest runs on processors of {}: make a baseline for each vendor",
        vendors.join(" and of ")
    )]
    Vendors {
        /// The first of them.
        vendors: Vec<String>,
    },
    /// What the hosts have in common contradicts itself.
    #[error("what the hosts have in common contradicts itself: {}", contradictions.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NotWhole {
        /// Every contradiction.
        contradictions: Vec<Contradiction>,
    },
}

/// A host cannot give this CPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{host} cannot give this CPU to a guest: {}", if reasons.is_empty() { "too little is known of it".to_owned() } else { reasons.join("; ") })]
pub struct NotOnHost {
    /// Its name.
    pub host: String,
    /// Every reason.
    pub reasons: Vec<String>,
}
