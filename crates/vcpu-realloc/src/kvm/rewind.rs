//! A vCPU out of an exit that is not to be completed.

use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use super::driver::{Completion, set_error};

const EINTR: i32 = 4;

/// Puts a vCPU that has left at a WRMSR back in front of it.
///
/// KVM keeps the end of the instruction for the next KVM_RUN, and offers two: behind it, or #GP. So
/// it is completed, without running the guest, and the general registers are put back, which also
/// drops the debug exception that KVM raises behind an instruction of a guest that steps
/// (arch/x86/kvm/x86.c, `complete_fast_msr_access`, `__set_regs`).
pub(super) fn rewind(vcpu: &mut VcpuFd) -> Result<(), RewindError> {
    let before = vcpu.get_regs().map_err(RewindError::GetRegisters)?;
    set_error(vcpu, Completion::Skip);
    vcpu.set_kvm_immediate_exit(1);
    let completed = match vcpu.run() {
        Err(errno) if errno.errno() == EINTR => Ok(()),
        Err(errno) => {
            // KVM fails before it completes an exit, so the write waits as before.
            set_error(vcpu, Completion::Fault);
            Err(RewindError::Run(errno))
        }
        Ok(VcpuExit::Intr) => Ok(()),
        Ok(_) => Err(RewindError::Left),
    };
    vcpu.set_kvm_immediate_exit(0);
    completed?;
    vcpu.set_regs(&before).map_err(RewindError::SetRegisters)
}

/// A vCPU could not be put back in front of its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RewindError {
    /// KVM_GET_REGS failed. The write still waits: rewind again, or resume it.
    #[error("KVM_GET_REGS, to put the vCPU back in front of its instruction: {0}")]
    GetRegisters(Errno),
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
}
