//! Reads all state of a stopped VM.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno;
use xsave_state::ExtendedState;
use xsave_state::kvm::{self, MSR_IA32_XFD, MSR_IA32_XFD_ERR, VcpuLayout, XsaveBuffer};

use crate::host::Host;
use crate::linux::devices::Devices;
use crate::memory::{MemoryError, Pages};
use crate::platform::{Platform, PlatformError};
use crate::registers::{CpuidEntry, Msr};
use crate::snapshot::{AtStop, Snapshot, VcpuState};
use crate::vm::{Vcpu, Vm};

/// As many as KVM_GET_MSRS and KVM_SET_MSRS take: fewer than MAX_IO_MSRS, which is 256
/// (arch/x86/kvm/x86.c, msr_io).
pub(crate) const MSRS_AT_ONCE: usize = 255;

impl Vm {
    /// Reads everything that another process needs to go on with a bare guest.
    ///
    /// # Errors
    ///
    /// The step that failed. The VM is as it was.
    pub fn capture(&mut self, host: &Host) -> Result<Snapshot, CaptureError> {
        Ok(Snapshot {
            vcpus: self.capture_vcpus(host, false)?,
            memory: Pages::read(&self.memory, self.memory_bytes)?,
            tsc_khz: self.tsc_khz(),
            platform: None,
        })
    }

    /// The same of a Linux guest with its devices.
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture).
    pub fn capture_linux(
        &mut self,
        host: &Host,
        devices: &Devices,
    ) -> Result<Snapshot, CaptureError> {
        Ok(Snapshot {
            vcpus: self.capture_vcpus(host, true)?,
            platform: Some(Platform::capture(&self.fd, devices.state())?),
            memory: Pages::read(&self.memory, self.memory_bytes)?,
            tsc_khz: self.tsc_khz(),
        })
    }

    /// What is live in each vCPU. It costs less than a capture.
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture).
    pub fn at_stop(&mut self, host: &Host) -> Result<Vec<AtStop>, CaptureError> {
        let vcpus = self.capture_vcpus(host, false)?;
        Ok(vcpus.iter().map(AtStop::of).collect())
    }

    pub(crate) fn capture_vcpus(
        &mut self,
        host: &Host,
        with_lapic: bool,
    ) -> Result<Vec<VcpuState>, CaptureError> {
        if self.vcpus.is_empty() {
            return Err(CaptureError::NoVcpu);
        }
        (0..)
            .zip(&mut self.vcpus)
            .map(|(index, vcpu)| {
                capture_vcpu(vcpu, host.msr_indices(), &mut self.buffer, with_lapic)
                    .map_err(|cause| CaptureError::Vcpu { vcpu: index, cause })
            })
            .collect()
    }
}

fn capture_vcpu(
    vcpu: &mut Vcpu,
    msr_indices: &[u32],
    buffer: &mut XsaveBuffer,
    with_lapic: bool,
) -> Result<VcpuState, VcpuCause> {
    let failed = |ioctl| move |error| VcpuCause::Ioctl { ioctl, error };
    let Vcpu { fd, layout } = vcpu;
    // KVM_GET_MP_STATE first: it makes KVM take in events that are still on their way.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let cpuid = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_CPUID2"))?;
    let extended = capture_extended(fd, layout, buffer)?;
    let lapic = if with_lapic {
        // Tells the guest, should it go on here, that it was stopped, so that its watchdogs stay calm. It
        // may have no kvmclock yet, or none at all.
        let _ = fd.kvmclock_ctrl();
        let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        Some(Box::new(lapic.regs.map(i8::cast_unsigned)))
    } else {
        None
    };
    Ok(VcpuState {
        lapic,
        cpuid: cpuid
            .as_slice()
            .iter()
            .copied()
            .map(CpuidEntry::from)
            .collect(),
        extended,
        general: fd.get_regs().map_err(failed("KVM_GET_REGS"))?.into(),
        special: fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?.into(),
        debug: fd
            .get_debug_regs()
            .map_err(failed("KVM_GET_DEBUGREGS"))?
            .into(),
        events: fd
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?
            .into(),
        mp_state: mp_state.into(),
        msrs: read_msrs(fd, msr_indices).map_err(failed("KVM_GET_MSRS"))?,
    })
}

/// The extended state. The vCPU can run on afterwards.
fn capture_extended(
    fd: &mut VcpuFd,
    layout: &VcpuLayout,
    buffer: &mut XsaveBuffer,
) -> Result<ExtendedState<'static>, VcpuCause> {
    // What old kernels report beyond the guest's components is not the guest's: left out.
    let captured = kvm::capture(fd, layout, buffer)?;
    if captured.pkru_unknown {
        return Err(VcpuCause::PkruUnknown);
    }
    let disabled = captured.disabled;
    let state = captured.state.into_owned();
    if !disabled.is_empty() {
        // An old kernel has kept tiles that IA32_XFD disables. With them, the next KVM_RUN takes the host down.
        kvm::restore(fd, &state, layout, buffer).map_err(VcpuCause::Disabled)?;
    }
    Ok(state)
}

/// All of `indices` that can be read, without those that belong to the extended state.
pub(crate) fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, errno::Error> {
    let wanted: Vec<kvm_msr_entry> = indices
        .iter()
        .filter(|index| !is_extended_state(**index))
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while let Some((_, after_first)) = rest.split_first() {
        let chunk = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
        let Ok(mut msrs) = Msrs::from_entries(chunk) else {
            return Err(errno::Error::new(nix::libc::E2BIG));
        };
        // KVM stops at the first that it cannot read, and says how many it has read.
        let read = fd.get_msrs(&mut msrs)?;
        values.extend(msrs.as_slice().iter().take(read).copied().map(Msr::from));
        rest = if read == chunk.len() {
            rest.get(read..).unwrap_or_default()
        } else {
            rest.get(read.saturating_add(1)..).unwrap_or(after_first)
        };
    }
    Ok(values)
}

/// Whether an MSR is saved and restored with the extended state, by xsave-state.
pub(crate) fn is_extended_state(index: u32) -> bool {
    matches!(index, MSR_IA32_XFD | MSR_IA32_XFD_ERR)
}

/// The state of a VM could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// There is nothing to be read.
    #[error("the VM has no vCPU")]
    NoVcpu,
    /// The state of the VM could not be read.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// One vCPU's state could not be read.
    #[error("vCPU {vcpu}: {cause}")]
    Vcpu {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        #[source]
        cause: VcpuCause,
    },
}

/// Why one vCPU's state could not be read.
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
    /// The extended state could not be read, or is not valid.
    #[error(transparent)]
    Extended(#[from] kvm::CaptureError),
    /// KVM does not tell the guest's PKRU.
    #[error(
        "KVM does not tell the guest's PKRU, because that of the vCPU's thread was 0 when the vCPU was \
         stopped: run the vCPU on a thread with another one"
    )]
    PkruUnknown,
    /// Tiles that IA32_XFD disables were in use, and could not be taken out of the vCPU.
    #[error("tiles are in use that IA32_XFD disables, and cannot be taken out: {0}")]
    Disabled(kvm::RestoreError),
}

#[cfg(test)]
mod live_kvm {
    use std::time::Duration;

    use amx_guest::{Kind, Workload};
    use xsave_state::XFeatures;

    use super::*;
    use crate::bus::Console;
    use crate::host::tests::live;
    use crate::run::Ended;

    /// IA32_MTRR_PHYSBASE0, IA32_MTRR_PHYSMASK0, IA32_MTRR_FIX64K_00000, IA32_MTRR_DEF_TYPE, and
    /// IA32_MC0_CTL, with values that a guest may write.
    const UNLISTED: [(u32, u64); 5] = [
        (0x200, 0x8000_0006),
        (0x201, 0xf_8000_0800),
        (0x250, 0x0606_0606_0606_0606),
        (0x2ff, 0xc06),
        (0x400, u64::MAX),
    ];

    /// However long the lists of MSRs become.
    #[test]
    fn any_number_of_msrs_is_read() {
        let Some(host) = live() else { return };
        let kind = host.best_kind().unwrap();
        let vm = Vm::boot(&host, kind, &[Workload::new(kind, 1, 1000)]).unwrap();
        // IA32_TSC, which every vCPU has.
        for count in [254, 255, 256, 257, 600] {
            let read = read_msrs(&vm.vcpus[0].fd, &vec![0x10; count]).unwrap();
            assert_eq!(read.len(), count);
        }
    }

    #[test]
    fn memory_types_and_machine_checks_are_captured_and_arrive() {
        let Some(host) = live() else { return };
        let kind = host.best_kind().unwrap();
        let mut vm = Vm::boot(&host, kind, &[Workload::new(kind, 1, 1000)]).unwrap();
        let mut snapshot = vm.capture(&host).unwrap();
        for (index, value) in UNLISTED {
            let mut msrs = snapshot.vcpus[0].msrs.iter_mut();
            let msr = msrs.find(|msr| msr.index == index);
            msr.unwrap_or_else(|| panic!("{index:#x} is not captured"))
                .data = value;
        }
        let mut restored = Vm::restore(&host, &snapshot).unwrap();
        let after = restored.capture(&host).unwrap();
        for (index, data) in UNLISTED {
            assert!(
                after.vcpus[0].msrs.contains(&Msr { index, data }),
                "{index:#x}"
            );
        }
    }

    /// The host would not survive the next KVM_RUN. On a KVM with AMX.
    #[test]
    fn tiles_that_were_disabled_behind_our_back_are_taken_out() {
        let Some(host) = live() else { return };
        if host.best_kind() != Some(Kind::Tiles) {
            println!("skipped: this KVM has no AMX");
            return;
        }
        let tiles = XFeatures::XTILEDATA;
        let workload = Workload::new(Kind::Tiles, 1, 1 << 30);
        let mut vm = Vm::boot(&host, Kind::Tiles, &[workload]).unwrap();
        loop {
            let ended = vm.run(&Console::default(), Duration::from_millis(1));
            assert_eq!(ended.unwrap(), Ended::Stopped);
            let [stopped] = vm.at_stop(&host).unwrap()[..] else {
                panic!()
            };
            if stopped.in_use & tiles.bits() != 0 {
                break;
            }
        }
        let xfd = kvm_msr_entry {
            index: MSR_IA32_XFD,
            data: tiles.bits(),
            ..Default::default()
        };
        let xfd = Msrs::from_entries(&[xfd]).unwrap();
        assert_eq!(vm.vcpus[0].fd.set_msrs(&xfd), Ok(1));
        let snapshot = vm.capture(&host).unwrap();
        let extended = snapshot.vcpus[0].extended();
        assert_eq!(extended.registers().xfd, tiles);
        assert!(!extended.image().xstate_bv().contains(tiles));
        let Vcpu { fd, layout } = &mut vm.vcpus[0];
        let again = kvm::capture(fd, layout, &mut vm.buffer).unwrap();
        assert!(again.disabled.is_empty());
    }
}
