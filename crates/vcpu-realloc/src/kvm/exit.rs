//! A vCPU's exit as KVM_RUN leaves it in memory: what it is, whether it still waits, and how it ends.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{KVM_EXIT_X86_WRMSR, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use xsave_state::kvm::MSR_IA32_XFD;

pub(super) const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
/// How many exits one instruction may take to be completed. REP OUTSB takes one per chunk, and REP MOVS
/// from where no memory is takes one for each element, up to 1024 of them before KVM looks at
/// `immediate_exit` (arch/x86/kvm/emulate.c, `x86_emulate_insn`).
const MAX_COMPLETIONS: u32 = 4096;

/// A bit of `flags` that KVM has no meaning for. Every KVM_RUN sets `flags` anew
/// (`kvm_arch_vcpu_ioctl_run`): where the bit is gone, the vCPU has been run since.
const WAITS: u16 = 1 << 15;

/// What the next KVM_RUN does with the guest's WRMSR.
#[derive(Clone, Copy)]
pub(super) enum Completion {
    /// It is done: go behind it.
    Skip = 0,
    /// Raise #GP at it.
    Fault = 1,
}

pub(super) fn set_error(vcpu: &mut VcpuFd, completion: Completion) {
    vcpu.get_kvm_run().__bindgen_anon_1.msr.error = completion as u8;
}

/// Whether the vCPU has left for a WRMSR of IA32_XFD with this value.
#[allow(unsafe_code)]
pub(super) fn is_write_of_xfd(vcpu: &mut VcpuFd, value: u64) -> bool {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_X86_WRMSR {
        return false;
    }
    // SAFETY: The union lies in the page that KVM shares with this process, all bytes of which are
    // initialised, and the fields of `msr` are integers, which any bytes are.
    let msr = unsafe { run.__bindgen_anon_1.msr };
    (msr.index, msr.data) == (MSR_IA32_XFD, value)
}

/// Until the write is done, running the vCPU must not skip it, and is noticed.
pub(super) fn hold(vcpu: &mut VcpuFd) {
    set_error(vcpu, Completion::Fault);
    vcpu.get_kvm_run().flags |= WAITS;
}

/// Whether a write that was held still waits: the vCPU has not been run.
pub(super) fn is_held(vcpu: &mut VcpuFd) -> bool {
    vcpu.get_kvm_run().flags & WAITS != 0
}

/// The write is done, or faults: the next KVM_RUN goes on.
pub(super) fn release(vcpu: &mut VcpuFd, completion: Completion) {
    set_error(vcpu, completion);
    vcpu.get_kvm_run().flags &= !WAITS;
}

/// What tells a vCPU from another one of this process for as long as it lives: where KVM shares its
/// page.
pub(super) fn place(vcpu: &mut VcpuFd) -> usize {
    core::ptr::from_mut(vcpu.get_kvm_run()).addr()
}

/// `immediate_exit`, set while this lives: KVM_RUN completes what is pending and does not enter the
/// guest.
///
/// A VMM that stops a vCPU sets it to 1 at any time, also from a signal handler or another thread. So a
/// bit of its own is set and cleared here, and what somebody else has set stays.
pub(super) struct ImmediateExit {
    byte: NonNull<u8>,
    was_there: bool,
}

const OURS: u8 = 1 << 1;

impl ImmediateExit {
    pub(super) fn set(vcpu: &mut VcpuFd) -> Self {
        let run: &mut kvm_run = vcpu.get_kvm_run();
        let mut new = Self {
            byte: NonNull::from(&mut run.immediate_exit),
            was_there: false,
        };
        new.was_there = new.atomic().fetch_or(OURS, Ordering::SeqCst) & OURS != 0;
        new
    }

    #[allow(unsafe_code)]
    fn atomic(&self) -> &AtomicU8 {
        // SAFETY: The byte is in the page that KVM shares with this process, which is mapped for as long as
        // the `VcpuFd` lives. Nobody but this module has an `ImmediateExit`, and none outlives the
        // function that borrows the `VcpuFd` and makes it. A `u8` is aligned. Others write the byte by the
        // kernel's contract while KVM_RUN runs, so it is not read or written in any other way here.
        unsafe { AtomicU8::from_ptr(self.byte.as_ptr()) }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        if !self.was_there {
            self.atomic().fetch_and(!OURS, Ordering::SeqCst);
        }
    }
}

/// Completes what a vCPU's last exit left pending, without running the guest: before its state is read.
///
/// KVM takes over the result of a port or memory access, and goes behind the instruction, when KVM_RUN is
/// called next. One instruction can leave more than once: those exits go to `handle`, which does what the
/// VMM does after KVM_RUN. `immediate_exit` is afterwards as somebody else has set it.
///
/// A write of IA32_XFD that waits is not completed by this: [`rewind`](super::ExitHandler::rewind) or
/// [`resume`](super::ExitHandler::resume) it first.
///
/// ```no_run
/// # use kvm_ioctls::{VcpuExit, VcpuFd};
/// # fn demo(mut vcpu: VcpuFd) -> Result<(), Box<dyn std::error::Error>> {
/// vcpu_realloc::kvm::complete(&mut vcpu, |exit| match exit {
///     VcpuExit::IoOut(_port, _data) => Ok(()), // to the device
///     exit => Err(std::io::Error::other(format!("{exit:?}"))),
/// })?;
/// let _registers = vcpu.get_regs()?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// KVM_RUN failed, `handle` did, or a write of IA32_XFD waits.
pub fn complete<E>(
    vcpu: &mut VcpuFd,
    mut handle: impl FnMut(VcpuExit<'_>) -> Result<(), E>,
) -> Result<(), CompleteError<E>> {
    if is_held(vcpu) {
        return Err(CompleteError::Waiting);
    }
    let _immediate = ImmediateExit::set(vcpu);
    for _ in 0..MAX_COMPLETIONS {
        match vcpu.run() {
            Ok(VcpuExit::Intr) => return Ok(()),
            Ok(exit) => handle(exit).map_err(CompleteError::Vmm)?,
            Err(errno) if matches!(errno.errno(), EINTR | EAGAIN) => return Ok(()),
            Err(errno) => return Err(CompleteError::Run(errno)),
        }
    }
    Err(CompleteError::Endless {
        exits: MAX_COMPLETIONS,
    })
}

/// A vCPU's last exit could not be completed.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompleteError<E> {
    /// The VMM could not handle a further exit of the same instruction: its own error.
    #[error(transparent)]
    Vmm(E),
    /// KVM_RUN failed.
    #[error("KVM_RUN, to complete the exit: {0}")]
    Run(Errno),
    /// A write of IA32_XFD waits for the VMM's answer.
    #[error("a write of IA32_XFD waits: rewind the vCPU first, or resume it")]
    Waiting,
    /// One instruction has left too often.
    #[error("one instruction has left {exits} times and is not complete")]
    Endless {
        /// How often.
        exits: u32,
    },
}
