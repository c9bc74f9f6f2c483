//! A vCPU out of an exit that is not to be completed.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::exit::{Completion, EINTR, ImmediateExit, hold, release};

/// Puts a vCPU that has left at a WRMSR back in front of it.
///
/// KVM keeps the end of the instruction for the next KVM_RUN, and offers two: behind it, or #GP. So
/// it is completed, without running the guest, and what that changed is put back
/// (arch/x86/kvm/x86.c, `complete_fast_msr_access`, `kvm_skip_emulated_instruction`): the general
/// registers, which also drops the debug exception that KVM raises behind an instruction of a guest that
/// steps; and the interrupt shadow of an STI or MOV SS in front of the WRMSR.
pub(super) fn rewind(vcpu: &mut VcpuFd) -> Result<(), RewindError> {
    let before = vcpu.get_regs().map_err(RewindError::GetRegisters)?;
    let events = vcpu.get_vcpu_events().map_err(RewindError::GetEvents)?;
    complete(vcpu)?;
    vcpu.set_regs(&before).map_err(RewindError::SetRegisters)?;
    if events.interrupt.shadow != 0 {
        put_shadow(vcpu, events.interrupt.shadow).map_err(RewindError::SetEvents)?;
    }
    Ok(())
}

fn complete(vcpu: &mut VcpuFd) -> Result<(), RewindError> {
    release(vcpu, Completion::Skip);
    let failed = {
        let _immediate = ImmediateExit::set(vcpu);
        match vcpu.run() {
            // A VMM that debugs its guest gets KVM_EXIT_DEBUG behind the instruction.
            Ok(VcpuExit::Intr | VcpuExit::Debug(_)) => return Ok(()),
            Ok(_) => return Err(RewindError::Left),
            Err(errno) if errno.errno() == EINTR => return Ok(()),
            Err(errno) => errno,
        }
    };
    // KVM fails before it completes an exit, so the write waits as before.
    hold(vcpu);
    Err(RewindError::Run(failed))
}

fn put_shadow(vcpu: &VcpuFd, shadow: u8) -> Result<(), Errno> {
    let mut events = vcpu.get_vcpu_events()?;
    events.interrupt.shadow = shadow;
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    // Others may raise these at any time: what was just read of them is not written.
    events.flags &= !(KVM_VCPUEVENT_VALID_NMI_PENDING
        | KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | KVM_VCPUEVENT_VALID_SMM);
    vcpu.set_vcpu_events(&events)
}

/// A vCPU could not be put back in front of its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RewindError {
    /// KVM_GET_REGS failed. The write still waits: rewind again, or resume it.
    #[error("KVM_GET_REGS, to put the vCPU back in front of its instruction: {0}")]
    GetRegisters(Errno),
    /// KVM_GET_VCPU_EVENTS failed. The write still waits: rewind again, or resume it.
    #[error("KVM_GET_VCPU_EVENTS, to put the vCPU back in front of its instruction: {0}")]
    GetEvents(Errno),
    /// KVM_RUN with `immediate_exit` failed. The write still waits: rewind again, or resume it.
    #[error("KVM_RUN, to complete the exit: {0}")]
    Run(Errno),
    /// KVM_RUN with `immediate_exit` left for another reason: discard the vCPU.
    #[error("KVM_RUN left for another reason before the exit was complete: discard the vCPU")]
    Left,
    /// KVM_SET_REGS failed. The vCPU is behind its instruction, which was not performed: discard it.
    #[error(
        "KVM_SET_REGS failed behind an instruction that was not performed: {0}: discard the vCPU"
    )]
    SetRegisters(Errno),
    /// The interrupt shadow could not be put back. The vCPU stands in front of its instruction, and may
    /// take an interrupt there that it did not expect: discard it.
    #[error("KVM_SET_VCPU_EVENTS, to put the interrupt shadow back: {0}: discard the vCPU")]
    SetEvents(Errno),
    /// It is not the vCPU of this handler. Nothing was done.
    #[error("this is not the vCPU of this handler, which is vCPU {vcpu}")]
    AnotherVcpu {
        /// The one of the handler.
        vcpu: u64,
    },
}
