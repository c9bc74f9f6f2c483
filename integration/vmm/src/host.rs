//! What this host's KVM can do.

use std::ffi::CString;
use std::fs;

use crate::capture::read_msrs;
use amx_guest::Kind;
use cpuid_amx::kvm::SetCpuidError;
use cpuid_amx::{AmxFeatures, CpuidTable, GuestPermission, PermissionError, Policy, PolicyError};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use nix::errno::Errno;
use thiserror::Error;
use vmm_sys_util::errno;
use xsave_state::kvm::{HostArea, HostAreaError};
use xsave_state::{Layout, LayoutError, XFeatures};

/// KVM's device file.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// KVM_CAP_SYS_ATTRIBUTES (include/uapi/linux/kvm.h).
const CAP_SYS_ATTRIBUTES: nix::libc::c_ulong = 209;
/// KVM_GET_API_VERSION, since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// /dev/kvm, and what was found out about it. Probing asks for the permission to give AMX to
/// guests, where the host has AMX: that must come before the first vCPU.
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
    guest_cpuid: CpuId,
    permission: Result<GuestPermission, PermissionError>,
    description: host_compat::Host,
    layout: Layout,
    area: HostArea,
    msr_indices: Vec<u32>,
    tsc_khz: Option<u32>,
    scales_tsc: bool,
}

/// A capability of KVM that this project uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Its name without KVM_CAP_.
    pub name: &'static str,
    /// What KVM_CHECK_EXTENSION says: 0 where it is missing.
    pub value: i32,
}

impl Host {
    /// Opens /dev/kvm and asks it everything.
    ///
    /// # Errors
    ///
    /// There is no usable /dev/kvm, or it says something impossible.
    pub fn probe() -> Result<Self, HostError> {
        Self::probe_at(KVM_DEVICE)
    }

    /// As [`probe`](Self::probe), with another device file.
    ///
    /// # Errors
    ///
    /// As [`probe`](Self::probe).
    pub fn probe_at(path: &str) -> Result<Self, HostError> {
        let failed = |error| HostError::from_open(path, error);
        let name = CString::new(path).map_err(|_| failed(errno::Error::new(nix::libc::ENOENT)))?;
        let kvm = Kvm::new_with_path(name).map_err(failed)?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION {
            return Err(HostError::NotKvm {
                path: path.to_owned(),
                version,
            });
        }
        // Before the first vCPU, which locks it, and before KVM_GET_SUPPORTED_CPUID, which KVM
        // filters by it.
        let permission = GuestPermission::request();
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HostError::Cpuid)?;
        hide_shadow_stacks(&mut cpuid);
        let amx = AmxFeatures::from_cpuid(|leaf, subleaf| CpuidTable::leaf(&cpuid, leaf, subleaf));
        if permission.is_err() && !amx.is_empty() {
            // KVM takes it out of 0DH alone.
            Policy::hide_amx().apply(&mut cpuid)?;
        }
        let vm = kvm.create_vm().map_err(HostError::Create)?;
        let vcpu = vm.create_vcpu(0).map_err(HostError::Create)?;
        // What KVM makes of it is in the description.
        let _ = cpuid_amx::kvm::set_cpuid(&vcpu, &cpuid, permission.as_ref().ok())?;
        let guest_cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(HostError::Create)?;
        let layout = Layout::from_kvm_cpuid(guest_cpuid.as_slice())?;
        let area = HostArea::query(&vm, &vcpu)?;
        let listed = kvm.get_msr_index_list().map_err(HostError::MsrList)?;
        let mut msr_indices = listed.as_slice().to_vec();
        let others = unlisted_msrs().filter(|index| !msr_indices.contains(index));
        let others = read_msrs(&vcpu, &others.collect::<Vec<u32>>()).map_err(HostError::Create)?;
        msr_indices.extend(others.iter().map(|msr| msr.index));
        Ok(Self {
            scales_tsc: kvm.check_extension(Cap::TscControl),
            kvm,
            cpuid,
            guest_cpuid,
            permission,
            description: host_compat::probe_at(path),
            layout,
            area,
            msr_indices,
            tsc_khz: vcpu.get_tsc_khz().ok(),
        })
    }

    /// The open /dev/kvm.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The CPUID that new guests get: what KVM supports, without shadow stacks, and without AMX where
    /// there is no permission.
    #[must_use]
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// What KVM makes of that for a vCPU.
    #[must_use]
    pub fn guest_cpuid(&self) -> &CpuId {
        &self.guest_cpuid
    }

    /// What cpuid-amx says of this host: what a guest is compared with.
    #[must_use]
    pub fn description(&self) -> &host_compat::Host {
        &self.description
    }

    /// Whether KVM gives a vCPU other features than it was given. Some kinds of KVM take them from
    /// the processor.
    #[must_use]
    pub fn rewrites_cpuid(&self) -> bool {
        let kvm = self.description.kvm.as_ref();
        kvm.is_ok_and(|facts| facts.rewritten.is_some())
    }

    /// The permission to give AMX to guests, or why there is none.
    ///
    /// # Errors
    ///
    /// On a host without AMX [`PermissionError::NotSupported`].
    pub fn permission(&self) -> Result<&GuestPermission, PermissionError> {
        self.permission.as_ref().map_err(|error| *error)
    }

    /// Where the components of a vCPU with this CPUID lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// KVM_X86_XCOMP_GUEST_SUPP: what guests may have, permission aside. `None` on kernels before
    /// 5.17.
    #[must_use]
    pub fn guest_supported(&self) -> Option<XFeatures> {
        self.description.kvm.as_ref().ok()?.guest_components
    }

    /// The MSRs that a vCPU has: KVM_GET_MSR_INDEX_LIST, and those that it leaves out although they have
    /// state, memory types and machine checks.
    #[must_use]
    pub fn msr_indices(&self) -> &[u32] {
        &self.msr_indices
    }

    /// How many vCPUs a VM can have: KVM_CAP_MAX_VCPUS.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    /// The frequency of a vCPU's TSC in kHz; `None` where KVM does not know it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    /// Whether a vCPU's TSC can have another frequency: KVM_CAP_TSC_CONTROL.
    #[must_use]
    pub fn scales_tsc(&self) -> bool {
        self.scales_tsc
    }

    /// KVM_CAP_XSAVE2 in bytes, with the permission as it is.
    #[must_use]
    pub fn xsave_size(&self) -> usize {
        self.area.bytes()
    }

    /// The area that KVM copies for vCPUs of this process.
    pub(crate) fn area(&self) -> &HostArea {
        &self.area
    }

    /// The capabilities that matter here.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        [
            ("XSAVE2", Cap::Xsave2),
            ("XCRS", Cap::Xcrs),
            ("X86_USER_SPACE_MSR", Cap::X86UserSpaceMsr),
            ("X86_MSR_FILTER", Cap::X86MsrFilter),
            ("IMMEDIATE_EXIT", Cap::ImmediateExit),
        ]
        .into_iter()
        .map(|(name, cap)| (name, self.kvm.check_extension_int(cap)))
        .chain([(
            "SYS_ATTRIBUTES",
            self.kvm.check_extension_raw(CAP_SYS_ATTRIBUTES),
        )])
        .map(|(name, value)| Capability { name, value })
        .collect()
    }

    /// The payload with the most state that guests can run here.
    #[must_use]
    pub fn best_kind(&self) -> Option<Kind> {
        let xcr0 = self.layout.user().bits();
        Kind::ALL.into_iter().find(|kind| {
            kind.runs_with(xcr0, |leaf, subleaf| {
                find(self.guest_cpuid.as_slice(), leaf, subleaf)
            })
        })
    }
}

/// MSRs that a guest writes and KVM_GET_MSR_INDEX_LIST does not name: the memory type range registers and
/// the machine check banks (SDM Vol. 4, table 2-2; arch/x86/kvm/mtrr.c, arch/x86/kvm/x86.c,
/// set_msr_mce), as many as KVM has of them.
fn unlisted_msrs() -> impl Iterator<Item = u32> {
    // IA32_MTRR_DEF_TYPE; the fixed ranges; base and mask of the variable ones.
    let memory = [0x2ff, 0x250, 0x258, 0x259]
        .into_iter()
        .chain(0x268..=0x26f)
        .chain(0x200..=0x20f);
    // IA32_MCG_STATUS, IA32_MCG_CTL; four for each of 32 banks.
    memory.chain([0x17a, 0x17b]).chain(0x400..0x480)
}

/// CPUID.(EAX=7,ECX=0):ECX\[7\].
const SHADOW_STACKS: u32 = 1 << 7;

/// The shadow stack pointer of a running guest is no MSR: only KVM_GET_ONE_REG has it
/// (KVM_REG_GUEST_SSP, Linux 6.18), for which kvm-ioctls has no call on x86. A guest without the feature
/// has nothing that could be lost.
fn hide_shadow_stacks(cpuid: &mut CpuId) {
    for entry in cpuid.as_mut_slice() {
        if (entry.function, entry.index) == (7, 0) {
            entry.ecx &= !SHADOW_STACKS;
        }
    }
}

/// The processor's name, as Linux has it.
#[must_use]
pub fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The kernel's release.
#[must_use]
pub fn kernel() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(text.trim().to_owned())
}

fn find(cpuid: &[kvm_bindings::kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> [u32; 4] {
    cpuid
        .iter()
        .find(|entry| {
            let has_subleaves = entry.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!has_subleaves || entry.index == subleaf)
        })
        .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// Nothing can be done on this host.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HostError {
    /// There is no /dev/kvm.
    #[error(
        "there is no {path}: load the kvm_intel or kvm_amd module, or run this where \
         virtualization is enabled"
    )]
    NoKvm {
        /// The device file.
        path: String,
    },
    /// It may not be opened.
    #[error("{path} may not be opened: run this as a member of its group, which is usually kvm")]
    Permission {
        /// The device file.
        path: String,
    },
    /// It cannot be opened for another reason.
    #[error("{path} cannot be opened: {error}")]
    Open {
        /// The device file.
        path: String,
        /// By the kernel.
        error: errno::Error,
    },
    /// It is something else.
    #[error("{path} is not KVM's device: KVM_GET_API_VERSION gives {version}, and KVM 12")]
    NotKvm {
        /// The device file.
        path: String,
        /// What the ioctl gave.
        version: i32,
    },
    /// KVM_GET_SUPPORTED_CPUID failed.
    #[error("KVM_GET_SUPPORTED_CPUID: {0}")]
    Cpuid(#[source] errno::Error),
    /// KVM_GET_MSR_INDEX_LIST failed.
    #[error("KVM_GET_MSR_INDEX_LIST: {0}")]
    MsrList(#[source] errno::Error),
    /// KVM's CPUID describes an area that cannot exist.
    #[error("KVM's supported CPUID: {0}")]
    Layout(#[from] LayoutError),
    /// No VM or no vCPU to ask.
    #[error("a VM to ask for the size of its state: {0}")]
    Create(#[source] errno::Error),
    /// KVM's supported CPUID cannot be made coherent without AMX.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// KVM does not take its own supported CPUID.
    #[error(transparent)]
    SetCpuid(#[from] SetCpuidError),
    /// KVM reports a size that the state cannot have, or the processor a layout.
    #[error(transparent)]
    Area(#[from] HostAreaError),
}

impl HostError {
    fn from_open(path: &str, error: errno::Error) -> Self {
        let path = path.to_owned();
        match Errno::from_raw(error.errno()) {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => Self::NoKvm { path },
            Errno::EACCES | Errno::EPERM => Self::Permission { path },
            _ => Self::Open { path, error },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    /// The host, or `None` with a line that says why not.
    pub(crate) fn live() -> Option<Host> {
        Host::probe()
            .inspect_err(|error| println!("skipped: {error}"))
            .ok()
    }

    #[test]
    fn what_could_not_be_saved_is_not_given_to_guests() {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ecx: u32::MAX,
            ..Default::default()
        };
        let entries = [entry(1, 0), entry(7, 0), entry(7, 1)];
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        hide_shadow_stacks(&mut cpuid);
        let ecx: Vec<u32> = cpuid.as_slice().iter().map(|entry| entry.ecx).collect();
        assert_eq!(ecx, [u32::MAX, !SHADOW_STACKS, u32::MAX]);
    }
}
