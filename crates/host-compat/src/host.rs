//! A description of a host: everything on which guests with AMX depend, as data.
//!
//! `host_compat::probe` (feature `kvm`) describes the machine that is here. A description is a versioned document for self-describing formats, in JSON that of
//! docs/host.schema.json: what one machine says of itself another can read, put into a
//! [baseline](crate::baseline) or hold against a guest ([compat](crate::compat)).

use thiserror::Error;
use xsave_state::XFeatures;

use crate::kernel::{Fix, Kernel, State};
use crate::msrs::FeatureMsrs;
use cpuid_amx::amx::AmxFeatures;
use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::features::FeatureSet;
use cpuid_amx::permission::PermissionError;
use cpuid_amx::policy::Policy;
use cpuid_amx::table::{CpuidTable, Table};

mod capabilities;
mod document;
mod obstacle;
mod processor;

pub use crate::document::{MAX_ENTRIES, MAX_TEXT_BYTES};
pub use capabilities::Capabilities;
pub use document::{FORMAT, VERSION};
pub use obstacle::Obstacle;
pub use processor::Processor;

/// A host.
///
/// ```
/// use cpuid_amx::{Amx, CpuidTable, Table};
/// use host_compat::Host;
///
/// // From a dump of CPUID; `host_compat::probe` describes the machine that is here, in full.
/// let cpuid: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let host = Host::from_cpuid("node-17", cpuid);
/// assert_eq!(host.obstacles(), []);
///
/// let table = host.guest_cpuid().ok_or("no KVM")?;
/// let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
/// assert_eq!(amx.usable(), Ok(()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// What its operators call it: the host name, if nobody says otherwise.
    pub name: String,
    /// The processor.
    pub processor: Processor,
    /// The kernel; `None` where it is not known.
    pub kernel: Option<Kernel>,
    /// What the kernel supports, ARCH_GET_XCOMP_SUPP: it has [`XFeatures::XTILEDATA`] where
    /// processes can use AMX. `None` where the kernel gives no answer (before 5.16).
    pub components: Option<XFeatures>,
    /// What became of the request to give tile data to guests.
    pub permission: Permission,
    /// What KVM can do, or why there is none.
    pub kvm: Result<KvmFacts, NoKvm>,
    /// Fields and names of a newer description that this version does not know.
    pub unknown: Vec<String>,
}

/// What is known about KVM on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvmFacts {
    /// KVM_CHECK_EXTENSION; `None` where nobody asked.
    pub capabilities: Option<Capabilities>,
    /// KVM_X86_XCOMP_GUEST_SUPP: the components that guests can have, permission aside. `None` on
    /// kernels before 5.17.
    pub guest_components: Option<XFeatures>,
    /// KVM_GET_SUPPORTED_CPUID, asked after the permission was requested.
    pub cpuid: Table,
    /// What a vCPU has that was given `cpuid`, where KVM made something else of it: some kinds of
    /// KVM take CPUID from the processor, whatever a VMM asks for. `None`: the same.
    pub rewritten: Option<Table>,
    /// MSRs that say what the processor can do, as KVM gives them to guests.
    pub feature_msrs: FeatureMsrs,
    /// The frequency of a vCPU's TSC; `None` where it is not known.
    pub tsc: Option<Tsc>,
}

/// The time stamp counter of a vCPU that was not told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tsc {
    /// KVM_GET_TSC_KHZ, in kHz.
    pub khz: u32,
    /// Whether KVM can give a vCPU another frequency: KVM_CAP_TSC_CONTROL.
    pub scales: bool,
}

/// What became of the request to give tile data to guests, ARCH_REQ_XCOMP_GUEST_PERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Nobody asked: the description comes from a dump.
    NotAsked,
    /// It was granted: all components that the process could expose then.
    Granted(XFeatures),
    /// It was refused.
    Refused(PermissionError),
}

/// Why there is no KVM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum NoKvm {
    /// There is no /dev/kvm.
    #[error(
        "there is no /dev/kvm: load kvm_intel or kvm_amd, or enable (nested) virtualization in the \
         firmware or in the hypervisor below"
    )]
    NoDevice,
    /// It may not be opened.
    #[error("/dev/kvm may not be opened: run this as a member of its group, which is usually kvm")]
    NoAccess,
    /// It is not KVM.
    #[error("/dev/kvm is not KVM: KVM_GET_API_VERSION gives {version}, and KVM 12")]
    NotKvm {
        /// What KVM_GET_API_VERSION gave.
        version: i32,
    },
    /// A call failed.
    #[error("{call} failed with errno {errno}")]
    Failed {
        /// The call.
        call: String,
        /// The number.
        errno: i32,
    },
}

impl Host {
    /// A host of which nothing is known but a name and its CPUID: KVM's supported one, or that of
    /// the processor itself where KVM's is not at hand.
    pub fn from_cpuid(name: impl Into<String>, mut cpuid: Table) -> Self {
        forget_the_logical_processor(&mut cpuid);
        Self {
            name: name.into(),
            processor: Processor::from_cpuid(|leaf, subleaf| cpuid.leaf(leaf, subleaf)),
            kernel: None,
            components: None,
            permission: Permission::NotAsked,
            kvm: Ok(KvmFacts {
                cpuid,
                ..KvmFacts::default()
            }),
            unknown: Vec::new(),
        }
    }

    /// The CPUID that a guest gets here when it gets all that KVM supports: that of a vCPU where KVM
    /// rewrites it, else the supported one. `None` without KVM.
    #[must_use]
    pub fn guest_cpuid(&self) -> Option<&Table> {
        let kvm = self.kvm.as_ref().ok()?;
        Some(kvm.rewritten.as_ref().unwrap_or(&kvm.cpuid))
    }

    /// The same without what contradicts itself: features whose components are missing, and AMX where
    /// the permission was refused.
    #[must_use]
    pub(crate) fn coherent_cpuid(&self) -> Option<Table> {
        let mut table = self.guest_cpuid()?.clone();
        // To expose all that there is never fails.
        let _ = self.policy().apply(&mut table).ok()?;
        Some(table)
    }

    /// Whether a leaf that is not in the CPUID of this host reads as zeros. A description has all that
    /// is not zero; a dump can have less than there is.
    pub(crate) fn tells_leaf(&self, leaf: u32) -> bool {
        let is_dump = |kvm: &KvmFacts| kvm.capabilities.is_none();
        let is_dump =
            self.permission == Permission::NotAsked && self.kvm.as_ref().is_ok_and(is_dump);
        let mut entries = self.guest_cpuid().into_iter().flat_map(CpuidTable::entries);
        !is_dump || entries.any(|entry| entry.leaf == leaf)
    }

    fn policy(&self) -> Policy {
        let everything = Policy::expose_all();
        match self.permission {
            Permission::NotAsked => everything,
            Permission::Granted(granted) => everything.permitted(granted),
            Permission::Refused(_) => everything.permitted(XFeatures::empty()),
        }
    }

    /// What a guest can be given here: all that KVM supports and the permission allows, as far as it
    /// does not contradict itself. Nothing without KVM.
    #[must_use]
    pub fn guest_features(&self) -> FeatureSet {
        let Some(table) = self.guest_cpuid() else {
            return FeatureSet::default();
        };
        // To expose all that there is never fails.
        self.policy().choose(table).unwrap_or_default()
    }

    /// Everything that keeps guests from using AMX here, from the processor upwards; none where
    /// they can. Each says what to do.
    #[must_use]
    pub fn obstacles(&self) -> Vec<Obstacle> {
        obstacle::find(self)
    }

    /// Each known fix, and whether this host's kernel has it; none where the kernel is not known.
    ///
    /// A kernel that is older than a defect, and has AMX all the same, has it from backports: its
    /// version says nothing then, and the state is [`State::Unknown`].
    pub fn fixes(&self) -> impl Iterator<Item = (&'static Fix, State)> {
        let guests = self.kvm.as_ref().ok().and_then(|kvm| kvm.guest_components);
        let granted = match self.permission {
            Permission::Granted(granted) => Some(granted),
            Permission::NotAsked | Permission::Refused(_) => None,
        };
        let masks = [self.components, guests, granted];
        let in_kernel = masks.into_iter().flatten();
        let has_amx = self.has_amx() || in_kernel.collect::<XFeatures>().intersects(XFeatures::AMX);
        let fixes = self.kernel.iter().flat_map(Kernel::fixes);
        fixes.map(move |(fix, state)| match state {
            State::NotAffected if has_amx => (fix, State::Unknown),
            state => (fix, state),
        })
    }

    /// Whether this describes what guests can be given here: `false` where KVM could not be asked, the
    /// permission could not be requested, or CPUID was read before it.
    #[must_use]
    pub fn is_described(&self) -> bool {
        let Ok(kvm) = &self.kvm else {
            return false;
        };
        let answered = match self.permission {
            Permission::NotAsked | Permission::Granted(_) => true,
            // These are answers: there is no AMX.
            Permission::Refused(error) => matches!(
                error,
                PermissionError::NotSupported { .. } | PermissionError::KernelTooOld
            ),
        };
        let before =
            |found: &Contradiction| matches!(found, Contradiction::BeforePermission { .. });
        answered && !coherence::check(&kvm.cpuid).iter().any(before)
    }

    /// Whether the processor has AMX: as the kernel lists it, or as CPUID does in leaf 7, which KVM
    /// does not filter.
    #[must_use]
    pub fn has_amx(&self) -> bool {
        self.processor.amx.contains(AmxFeatures::TILE)
    }
}

/// Clears what CPUID says of the one logical processor that executed it: the APIC IDs. With it, the
/// same host has another description each time, and no two hosts have the same. Leaves of zeros go
/// too: what is not there reads as zeros.
pub(crate) fn forget_the_logical_processor(table: &mut Table) {
    table.update_entries(|entry| {
        let [eax, ebx, ecx, edx] = entry.value;
        let value = match entry.leaf {
            // The initial APIC ID (SDM Vol. 2, CPUID).
            1 => [eax, ebx & 0x00ff_ffff, ecx, edx],
            // The x2APIC ID.
            0xb | 0x1f | 0x8000_0026 => [eax, ebx, ecx, 0],
            // The extended APIC ID, the compute unit and the node (AMD APM Vol. 3, appendix E).
            0x8000_001e => [0, ebx & !0xff, ecx & !0xff, edx],
            _ => entry.value,
        };
        (value != [0; 4]).then_some(value)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpuid_amx::table::Entry;

    #[test]
    fn the_same_host_has_the_same_description_on_each_of_its_processors() {
        let on = |apic_id: u32| {
            let entry = |leaf, subleaf, value| Entry {
                leaf,
                subleaf,
                value,
            };
            let table: Table = [
                entry(1, None, [0x806f8, apic_id << 24 | 0x10800, 5, 6]),
                entry(0xb, Some(0), [1, 2, 0x100, apic_id]),
                entry(0x1f, Some(1), [1, 2, 0x201, apic_id]),
                entry(0x8000_001e, None, [apic_id, apic_id | 0x100, 0x100, 0]),
                entry(0x8000_0026, Some(0), [0, 0, 0, apic_id]),
                entry(7, Some(0), [2, 3, 4, 5]),
            ]
            .into_iter()
            .collect();
            Host::from_cpuid("a", table)
        };
        assert_eq!(on(0), on(9));
        // The last leaf is all zeros without its IDs.
        assert_eq!(on(0).guest_cpuid().unwrap().len(), 5);
        let table = on(9).guest_cpuid().unwrap().clone();
        assert_eq!(table.leaf(1, 0), [0x806f8, 0x10800, 5, 6]);
        assert_eq!(table.leaf(0xb, 0), [1, 2, 0x100, 0]);
        assert_eq!(table.leaf(7, 0), [2, 3, 4, 5]);
    }

    #[test]
    fn what_a_guest_gets_is_what_kvm_makes_of_it() {
        let table = |eax| -> Table {
            [Entry {
                leaf: 0,
                subleaf: None,
                value: [eax, 0, 0, 0],
            }]
            .into_iter()
            .collect()
        };
        let mut host = Host::from_cpuid("a", table(1));
        assert_eq!(host.guest_cpuid(), Some(&table(1)));
        if let Ok(kvm) = &mut host.kvm {
            kvm.rewritten = Some(table(2));
        }
        assert_eq!(host.guest_cpuid(), Some(&table(2)));
        host.kvm = Err(NoKvm::NoDevice);
        assert_eq!(host.guest_cpuid(), None);
    }
}
