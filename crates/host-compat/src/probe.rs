//! Describes the machine that is here.

use std::ffi::CString;
use std::fs;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

use crate::host::{
    Capabilities, Host, KvmFacts, NoKvm, Permission, Processor, Tsc, forget_the_logical_processor,
};
#[expect(unsafe_code, reason = "an ioctl that no safe library wraps")]
mod attribute;

pub use attribute::xcomp_guest_supp;

use crate::kernel::Kernel;
use crate::msrs::{self, FeatureMsrs};
use cpuid_amx::kvm::set_cpuid;
use cpuid_amx::permission::{self, GuestPermission};
use cpuid_amx::table::{CpuidTable, Table};

/// KVM_GET_API_VERSION, since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// Describes this machine, as this process sees it.
///
/// It needs no root, but a /dev/kvm that may be opened: without, the description says why, and the
/// rest is there. It **requests the permission to give tile data to guests, and creates a vCPU,
/// which locks it** if it was refused: do it in a process of its own, or before anything else.
///
/// ```
/// let host = host_compat::probe();
/// println!("{}: {}", host.name, host.processor.name);
/// for obstacle in host.obstacles() {
///     println!("no AMX for guests: {obstacle}");
/// }
/// ```
#[must_use]
pub fn probe() -> Host {
    probe_at("/dev/kvm")
}

/// As [`probe`], with another device file.
#[must_use]
pub fn probe_at(device: &str) -> Host {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let line = |path: &str| read(path).trim().to_string();
    let components = permission::supported().ok();
    // Before the first vCPU, which locks it, and before KVM_GET_SUPPORTED_CPUID, which KVM filters
    // by it.
    let request = GuestPermission::request();
    let release = line("/proc/sys/kernel/osrelease");
    let signature = line("/proc/version_signature");
    Host {
        name: line("/proc/sys/kernel/hostname"),
        processor: Processor::from_cpuinfo(&read("/proc/cpuinfo")),
        kernel: (!release.is_empty()).then(|| {
            Kernel::from_names(
                &release,
                &line("/proc/sys/kernel/version"),
                (!signature.is_empty()).then_some(&*signature),
            )
        }),
        components,
        permission: match &request {
            Ok(granted) => Permission::Granted(granted.granted()),
            Err(error) => Permission::Refused(*error),
        },
        kvm: facts(device, request.as_ref().ok()),
        unknown: Vec::new(),
    }
}

fn facts(device: &str, permission: Option<&GuestPermission>) -> Result<KvmFacts, NoKvm> {
    let path = CString::new(device).map_err(|_| NoKvm::NoDevice)?;
    let kvm = Kvm::new_with_path(path).map_err(open_error)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(NoKvm::NotKvm { version });
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| failed("KVM_GET_SUPPORTED_CPUID", error))?;
    let vm = kvm
        .create_vm()
        .map_err(|error| failed("KVM_CREATE_VM", error))?;
    let vcpu = vm
        .create_vcpu(0)
        .map_err(|error| failed("KVM_CREATE_VCPU", error))?;
    // A table that KVM refuses, or that a policy has to make coherent first, is for the reader of
    // the description to find.
    let rewritten = match set_cpuid(&vcpu, &cpuid, permission) {
        Ok(set) if set.unexpected().next().is_some() => Some(
            vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| failed("KVM_GET_CPUID2", error))?,
        ),
        _ => None,
    };
    Ok(KvmFacts {
        // After the vCPU: from then on XSAVE2 does not change any more.
        capabilities: Some(capabilities(&kvm)),
        guest_components: xcomp_guest_supp(&kvm),
        cpuid: described(&cpuid),
        rewritten: rewritten.as_ref().map(described),
        feature_msrs: feature_msrs(&kvm),
        tsc: vcpu.get_tsc_khz().ok().map(|khz| Tsc {
            khz,
            scales: kvm.check_extension(Cap::TscControl),
        }),
    })
}

/// Each alone: KVM stops at the first that it does not know.
fn feature_msrs(kvm: &Kvm) -> FeatureMsrs {
    let mut found = FeatureMsrs::default();
    for index in [msrs::ARCH_CAPABILITIES, msrs::PERF_CAPABILITIES] {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let Ok(mut list) = Msrs::from_entries(&[entry]) else {
            continue;
        };
        if kvm.get_msrs(&mut list).is_ok_and(|count| count == 1)
            && let [entry] = list.as_slice()
        {
            found.set(index, entry.data);
        }
    }
    found
}

fn described(cpuid: &CpuId) -> Table {
    let mut table = cpuid.entries().collect();
    forget_the_logical_processor(&mut table);
    table
}

fn capabilities(kvm: &Kvm) -> Capabilities {
    let ask = |cap| u32::try_from(kvm.check_extension_int(cap)).unwrap_or(0);
    Capabilities {
        xsave: ask(Cap::Xsave),
        xsave2: ask(Cap::Xsave2),
        xcrs: ask(Cap::Xcrs),
        x86_user_space_msr: ask(Cap::X86UserSpaceMsr),
        x86_msr_filter: ask(Cap::X86MsrFilter),
        sys_attributes: u32::try_from(kvm.check_extension_raw(attribute::CAP_SYS_ATTRIBUTES))
            .unwrap_or(0),
        immediate_exit: ask(Cap::ImmediateExit),
    }
}

fn open_error(error: errno::Error) -> NoKvm {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => NoKvm::NoDevice,
        libc::EACCES | libc::EPERM => NoKvm::NoAccess,
        _ => failed("open of /dev/kvm", error),
    }
}

fn failed(call: &str, error: errno::Error) -> NoKvm {
    NoKvm::Failed {
        call: String::from(call),
        errno: error.errno(),
    }
}
