//! Puts the state of a snapshot into a new VM.
//!
//! In this order: permission (when the [`Host`] was probed), VM, vCPU, CPUID, special registers, the
//! extended state with XFD and XCR0 (its order is xsave-state's), the local APIC, other MSRs (of which
//! the TSC deadline starts the APIC's timer), the rest; at last interrupt controllers, timer and clock.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno;
use xsave_state::kvm::{self, XsaveBuffer, XsaveSize, XsaveSizeError};

use crate::capture::{is_extended_state, read_msrs};
use crate::fit::Unfit;
use crate::host::Host;
use crate::memory::MemoryError;
use crate::platform::PlatformError;
use crate::registers::Msr;
use crate::snapshot::{Snapshot, VcpuState};
use crate::vm::{Vm, VmError};

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
        let mut buffer = None;
        for (index, state) in (0..).zip(&snapshot.vcpus) {
            let cpuid = cpuid(state).ok_or(RestoreError::CpuidEntries {
                vcpu: index,
                entries: state.cpuid.len(),
            })?;
            let vcpu = self.add_vcpu(host, index, &cpuid)?;
            let buffer = match &mut buffer {
                Some(buffer) => buffer,
                none => none.insert(XsaveBuffer::new(XsaveSize::query(&self.fd, &vcpu)?)),
            };
            restore_vcpu(&vcpu, state, buffer)
                .map_err(|cause| RestoreError::Vcpu { vcpu: index, cause })?;
            self.vcpus.push(vcpu);
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

fn restore_vcpu(fd: &VcpuFd, state: &VcpuState, buffer: &mut XsaveBuffer) -> Result<(), VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    fd.set_sregs(&state.special.into())
        .map_err(failed("KVM_SET_SREGS"))?;
    kvm::restore(fd, &state.extended, buffer)?;
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

/// Writes those of `msrs` that have to be written.
fn write_msrs(fd: &VcpuFd, msrs: &[Msr]) -> Result<(), VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    let indices: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
    let present = read_msrs(fd, &indices).map_err(failed("KVM_GET_MSRS"))?;
    let changed: Vec<kvm_msr_entry> = to_write(msrs, &present).map(Into::into).collect();
    for chunk in changed.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
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
///   have (Hyper-V's, say): a guest whose CPUID lacks the feature has not written them. KVM itself takes
///   such a write for none, since Linux 6.11 (arch/x86/kvm/x86.c, kvm_do_msr_access). A value is refused.
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
    /// The size of the extended state cannot be.
    #[error(transparent)]
    XsaveSize(#[from] XsaveSizeError),
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
