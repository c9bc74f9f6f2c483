//! Puts the state of a snapshot into a new VM.
//!
//! In this order: permission (when the [`Host`] was probed), VM, all vCPUs, each with its CPUID, then the frequency
//! of their TSCs; then for one after the other special registers, the extended state with XFD and XCR0 (its order is xsave-state's),
//! the local APIC, other MSRs (of which the TSC deadline starts the APIC's timer), the rest; at last
//! interrupt controllers, timer and clock.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno;
use xsave_state::kvm::{self, XsaveBuffer};

use crate::capture::{MSRS_AT_ONCE, is_extended_state, read_msrs};
use crate::fit::Unfit;
use crate::host::Host;
use crate::memory::MemoryError;
use crate::platform::PlatformError;
use crate::registers::Msr;
use crate::snapshot::{Snapshot, VcpuState};
use crate::vm::{Vcpu, Vm, VmError};

/// The time-stamp counter (SDM Vol. 4).
const MSR_IA32_TSC: u32 = 0x10;

impl Vm {
    /// A new VM in the state of `snapshot`. No vCPU is touched unless the snapshot
    /// [fits](Snapshot::fit) this host.
    ///
    /// # Errors
    ///
    /// The reasons why it does not fit, or the step that failed. Then there is no VM.
    pub fn restore(host: &Host, snapshot: &Snapshot) -> Result<Self, RestoreError> {
        snapshot.fit(host)?;
        let memory_bytes = snapshot.memory.memory_bytes();
        let mut vm = match snapshot.platform {
            Some(_) => Self::with_platform(host, memory_bytes)?,
            None => Self::new(host, memory_bytes)?,
        };
        snapshot.memory.write(&vm.memory)?;
        vm.restore_into(host, snapshot)?;
        Ok(vm)
    }

    /// Gives a VM without vCPUs those of `snapshot`, and its platform the state. The memory is its own.
    pub(crate) fn restore_into(
        &mut self,
        host: &Host,
        snapshot: &Snapshot,
    ) -> Result<(), RestoreError> {
        // All vCPUs before any state: KVM keeps the TSCs of a VM together, and a new vCPU counts as a
        // write of 0.
        for (index, state) in (0..).zip(&snapshot.vcpus) {
            let cpuid = cpuid(state).ok_or(RestoreError::CpuidEntries {
                vcpu: index,
                entries: state.cpuid.len(),
            })?;
            self.add_vcpu(host, index, &cpuid)?;
        }
        let first = self.vcpus.first().zip(snapshot.vcpus.first());
        let Some((first, state)) = first else {
            return Ok(());
        };
        // Before their TSCs are set, of which KVM otherwise thinks in ticks of this host.
        for (index, vcpu) in (0..).zip(&self.vcpus).filter(|_| host.scales_tsc()) {
            scale_tsc(&vcpu.fd, snapshot.tsc_khz)
                .map_err(|cause| RestoreError::Vcpu { vcpu: index, cause })?;
        }
        set_tsc_apart(&first.fd, &state.msrs)
            .map_err(|cause| RestoreError::Vcpu { vcpu: 0, cause })?;
        for (index, (vcpu, state)) in (0..).zip(self.vcpus.iter_mut().zip(&snapshot.vcpus)) {
            restore_vcpu(vcpu, state, &mut self.buffer)
                .map_err(|cause| RestoreError::Vcpu { vcpu: index, cause })?;
        }
        if let Some(platform) = &snapshot.platform {
            platform.restore(&self.fd)?;
        }
        Ok(())
    }
}

fn cpuid(state: &VcpuState) -> Option<CpuId> {
    let entries: Vec<kvm_cpuid_entry2> = state.cpuid.iter().copied().map(Into::into).collect();
    CpuId::from_entries(&entries).ok()
}

fn restore_vcpu(
    vcpu: &mut Vcpu,
    state: &VcpuState,
    buffer: &mut XsaveBuffer,
) -> Result<(), VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    let Vcpu { fd, layout } = vcpu;
    fd.set_sregs(&state.special.into())
        .map_err(failed("KVM_SET_SREGS"))?;
    kvm::restore(fd, &state.extended, layout, buffer)?;
    if let Some(lapic) = &state.lapic {
        let lapic = kvm_lapic_state {
            regs: lapic.map(u8::cast_signed),
        };
        fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    }
    write_msrs(fd, &state.msrs)?;
    fd.set_regs(&state.general.into())
        .map_err(failed("KVM_SET_REGS"))?;
    fd.set_debug_regs(&state.debug.into())
        .map_err(failed("KVM_SET_DEBUGREGS"))?;
    fd.set_vcpu_events(&state.events.into())
        .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state.into())
        .map_err(failed("KVM_SET_MP_STATE"))
}

/// Gives the TSC the frequency that the guest knows, where KVM can.
fn scale_tsc(fd: &VcpuFd, tsc_khz: Option<u32>) -> Result<(), VcpuCause> {
    match tsc_khz {
        Some(khz) if fd.get_tsc_khz().ok() != Some(khz) => {
            let failed = |error| VcpuCause::Ioctl {
                ioctl: "KVM_SET_TSC_KHZ",
                error,
            };
            fd.set_tsc_khz(khz).map_err(failed)
        }
        _ => Ok(()),
    }
}

/// Takes the TSC of a new VM far away from where `msrs` will put it.
///
/// KVM takes a value within a second of what the TSC would be anyway for an attempt to bring a vCPU in line
/// with the others (arch/x86/kvm/x86.c, kvm_synchronize_tsc). For all vCPUs but the first that is right: theirs
/// were read one after the other and are to be the same. But where the guest is younger than a second, older
/// kernels (6.1 does, 6.12 does not) find the first one in line with the new vCPU, which began at 0, and
/// the guest's time steps back. With a detour nothing is in line.
fn set_tsc_apart(fd: &VcpuFd, msrs: &[Msr]) -> Result<(), VcpuCause> {
    let tsc = msrs.iter().find(|msr| msr.index == MSR_IA32_TSC);
    let apart = tsc.map(|tsc| Msr {
        data: tsc.data.wrapping_add(1 << 62),
        ..*tsc
    });
    set_msrs(fd, apart.into_iter())
}

/// Writes those of `msrs` that have to be written.
fn write_msrs(fd: &VcpuFd, msrs: &[Msr]) -> Result<(), VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    let indices: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
    let present = read_msrs(fd, &indices).map_err(failed("KVM_GET_MSRS"))?;
    set_msrs(fd, to_write(msrs, &present))
}

fn set_msrs(fd: &VcpuFd, msrs: impl Iterator<Item = Msr>) -> Result<(), VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    let msrs: Vec<kvm_msr_entry> = msrs.map(Into::into).collect();
    for chunk in msrs.chunks(MSRS_AT_ONCE) {
        let Ok(list) = Msrs::from_entries(chunk) else {
            let error = errno::Error::new(nix::libc::E2BIG);
            return Err(failed("KVM_SET_MSRS")(error));
        };
        let written = fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(refused) = chunk.get(written) {
            return Err(VcpuCause::Msr {
                index: refused.index,
                value: refused.data,
            });
        }
    }
    Ok(())
}

/// Those of `msrs` that a new vCPU, which has `present`, is to get. Not
/// - what it has already: some can be read and not written;
/// - what is 0 and KVM here does not know. Each version of KVM lists MSRs of features that no guest has to
///   have (Hyper-V's, say): a guest whose CPUID lacks the feature has not written them. Newer
///   KVM takes such a write for none by itself (arch/x86/kvm/x86.c, kvm_do_msr_access). A value is refused.
fn to_write<'a>(msrs: &'a [Msr], present: &'a [Msr]) -> impl Iterator<Item = Msr> + 'a {
    let is_unknown = |index| present.iter().all(|present| present.index != index);
    msrs.iter().copied().filter(move |msr| {
        !is_extended_state(msr.index)
            && !present.contains(msr)
            && (msr.data != 0 || !is_unknown(msr.index))
    })
}

/// A snapshot could not be put into a new VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It cannot go on here.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// No VM, or no vCPU.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The state of the VM was refused.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Guest memory could not be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More than KVM_SET_CPUID2 takes.
    #[error("vCPU {vcpu} has {entries} CPUID entries")]
    CpuidEntries {
        /// The vCPU.
        vcpu: u8,
        /// How many.
        entries: usize,
    },
    /// One vCPU's state was refused.
    #[error("vCPU {vcpu}: {cause}")]
    Vcpu {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        #[source]
        cause: VcpuCause,
    },
}

/// Why one vCPU's state was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VcpuCause {
    /// An ioctl failed.
    #[error("{ioctl}: {error}")]
    Ioctl {
        /// Its name.
        ioctl: &'static str,
        /// By the kernel.
        error: errno::Error,
    },
    /// KVM does not accept this value.
    #[error("KVM_SET_MSRS: MSR {index:#x} cannot be {value:#x}")]
    Msr {
        /// The MSR.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The extended state was refused.
    #[error(transparent)]
    Extended(#[from] kvm::RestoreError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msr_that_kvm_does_not_know_is_written_if_it_has_a_value() {
        let msr = |index, data| Msr { index, data };
        let of_the_guest = [
            msr(1, 0),
            msr(2, 5),
            msr(3, 0),
            msr(4, 7),
            msr(5, 8),
            msr(0x1c4, 1),
        ];
        let of_a_new_vcpu = [msr(1, 6), msr(2, 5), msr(4, 0)];
        let written: Vec<Msr> = to_write(&of_the_guest, &of_a_new_vcpu).collect();
        // 2 is there; 3 is unknown, and 0; 5 is unknown and has to be refused by KVM; the last is
        // written with the extended state.
        assert_eq!(written, [msr(1, 0), msr(4, 7), msr(5, 8)]);
    }
}

#[cfg(test)]
mod live_kvm {
    use amx_guest::Workload;
    use xsave_state::XFeatures;
    use xsave_state::kvm::VcpuLayoutError;

    use super::*;
    use crate::host::tests::live;

    fn tsc(vcpu: &mut VcpuState) -> &mut u64 {
        let mut msrs = vcpu.msrs.iter_mut();
        &mut msrs.find(|msr| msr.index == MSR_IA32_TSC).unwrap().data
    }

    /// The time of a vCPU to which nothing was written: about 0, or the host's own.
    fn untouched_tsc(host: &Host) -> u64 {
        let mut vm = Vm::new(host, 1 << 20).unwrap();
        vm.add_vcpu(host, 0, host.cpuid()).unwrap();
        read_msrs(&vm.vcpus[0].fd, &[MSR_IA32_TSC]).unwrap()[0].data
    }

    /// The vCPUs of a VM are read one after the other, and have one time all the same. In the lab, and on a
    /// live KVM that lets a guest have a TSC of its own.
    #[test]
    fn all_vcpus_get_the_time_of_the_first() {
        let Some(host) = live() else { return };
        let kind = host.best_kind().unwrap();
        let workloads = [1, 2].map(|seed| Workload::new(kind, seed, 1000));
        let mut vm = Vm::boot(&host, kind, &workloads).unwrap();
        let mut snapshot = vm.capture(&host).unwrap();
        let hz = u64::from(vm.tsc_khz().unwrap()) * 1000;
        *tsc(&mut snapshot.vcpus[0]) = 1000 * hz;
        // As if half a second lay between the two.
        *tsc(&mut snapshot.vcpus[1]) = 1000 * hz + hz / 2;
        let mut restored = Vm::restore(&host, &snapshot).unwrap();
        let mut after = restored.capture(&host).unwrap();
        let [first, second] = [0, 1].map(|vcpu| *tsc(&mut after.vcpus[vcpu]));
        let untouched = untouched_tsc(&host);
        if untouched > 10 * hz && first.abs_diff(untouched) < hz {
            println!("skipped: guests have this host's own TSC, whatever is written to it");
            return;
        }
        // Neither before that, nor where the detour has led it.
        assert!((1000 * hz..1060 * hz).contains(&first), "{first}");
        assert!(second.abs_diff(first) < hz / 4, "{first}, {second}");
    }

    /// Each vCPU is compared with this host, not the first alone: KVM would keep the component where the host
    /// has it, and the guest would compute with other bytes.
    #[test]
    fn another_vcpu_that_claims_a_component_elsewhere_is_refused() {
        let Some(host) = live() else { return };
        let kind = host.best_kind().unwrap();
        let workloads = [1, 2].map(|seed| Workload::new(kind, seed, 1000));
        let mut vm = Vm::boot(&host, kind, &workloads).unwrap();
        let good = vm.capture(&host).unwrap();
        let extended = host.layout().user() - XFeatures::LEGACY;
        for component in extended.components() {
            let mut hostile = good.clone();
            for entry in &mut hostile.vcpus[1].cpuid {
                match (entry.function, entry.index) {
                    (0xd, 0) => entry.ecx = 30_000,
                    (0xd, n) if n == u32::from(component.number()) => entry.ebx = 20_032,
                    _ => {}
                }
            }
            let read = Snapshot::from_bytes(&hostile.to_bytes()).unwrap();
            let error = Vm::restore(&host, &read).err().unwrap();
            let RestoreError::Vm(VmError::Layout { vcpu: 1, error }) = error else {
                panic!("{component}: {error}");
            };
            let VcpuLayoutError::Place {
                component: of,
                guest: (20_032, _),
                ..
            } = error
            else {
                panic!("{component}: {error}");
            };
            assert_eq!(of, component);
        }
    }
}
