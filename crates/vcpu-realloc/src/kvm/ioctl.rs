//! The two ioctls that a vCPU's thread needs of its VM, each with its proof.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVMIO, kvm_enable_cap, kvm_msr_filter};
use kvm_ioctls::{MsrExitReason, VmFd};
use vmm_sys_util::errno::{Error as Errno, Result};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::filter::MsrFilter;

ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iow_nr!(KVM_X86_SET_MSR_FILTER, KVMIO, 0xc6, kvm_msr_filter);

/// A VM as the threads of its vCPUs know it: they have no [`VmFd`] in most VMMs.
///
/// It is another descriptor of the same VM, which its vCPUs keep alive in any case.
#[derive(Debug)]
pub(super) struct VmHandle {
    fd: OwnedFd,
    /// For what cannot be provoked on a real one.
    #[cfg(test)]
    simulated: Option<alloc::sync::Arc<Simulated>>,
}

impl VmHandle {
    #[allow(unsafe_code)]
    pub(super) fn new(vm: &VmFd) -> io::Result<Self> {
        // SAFETY: `vm` owns the descriptor and is borrowed for all of this function; the borrow made
        // here ends with it, because what is kept is a duplicate.
        let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
        Ok(Self {
            fd: fd.try_clone_to_owned()?,
            #[cfg(test)]
            simulated: None,
        })
    }

    #[cfg(test)]
    pub(super) fn simulated(simulated: &alloc::sync::Arc<Simulated>) -> Self {
        Self {
            fd: std::fs::File::open("/dev/null").unwrap().into(),
            simulated: Some(simulated.clone()),
        }
    }

    /// KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR: which MSR accesses leave to the VMM instead of
    /// raising #GP. Replaces what was there.
    #[allow(unsafe_code)]
    pub(super) fn set_exit_reasons(&self, reasons: MsrExitReason) -> Result<()> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [u64::from(reasons.bits()), 0, 0, 0],
            ..Default::default()
        };
        #[cfg(test)]
        if let Some(vm) = &self.simulated {
            return vm.take(alloc::format!("{reasons:?}"));
        }
        // SAFETY: The kernel reads the `kvm_enable_cap` that the reference borrows, which has no
        // pointers in it, and writes nothing to this process (virt/kvm/kvm_main.c,
        // `kvm_vm_ioctl_enable_cap_generic`; arch/x86/kvm/x86.c, `kvm_vm_ioctl_enable_cap`).
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_ENABLE_CAP(), &capability) };
        check(result)
    }

    /// KVM_X86_SET_MSR_FILTER. Replaces what was there.
    #[allow(unsafe_code)]
    pub(super) fn set_filter(&self, filter: &MsrFilter) -> Result<()> {
        let mut raw = kvm_msr_filter {
            flags: filter.default_action() as u32,
            ..Default::default()
        };
        for (raw, range) in raw.ranges.iter_mut().zip(filter.ranges()) {
            raw.flags = range.access().bits();
            raw.base = range.base();
            raw.nmsrs = range.count();
            // The kernel only reads it.
            raw.bitmap = range.bitmap().as_ptr().cast_mut();
        }
        #[cfg(test)]
        if let Some(vm) = &self.simulated {
            return vm.take(alloc::format!("{} ranges", filter.ranges().len()));
        }
        // SAFETY: The kernel reads the `kvm_msr_filter` that the reference borrows, and for each range
        // with `nmsrs` != 0 as many whole longs from its `bitmap` as have that many bits
        // (arch/x86/kvm/x86.c, `kvm_add_msr_filter`). `MsrRange::new` makes every bitmap that long
        // (`next_multiple_of`), nothing shortens one, and `filter` is borrowed until the call is over.
        // It writes nothing to this process.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_X86_SET_MSR_FILTER(), &raw) };
        check(result)
    }
}

fn check(result: i32) -> Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::last())
    }
}

/// A VM that writes down what it is told, and fails at step n.
#[cfg(test)]
#[derive(Debug, Default)]
pub(super) struct Simulated {
    pub log: std::sync::Mutex<alloc::vec::Vec<alloc::string::String>>,
    /// Counts down; the ioctl that meets 1 fails.
    pub fail_at: core::sync::atomic::AtomicUsize,
}

#[cfg(test)]
impl Simulated {
    fn take(&self, what: alloc::string::String) -> Result<()> {
        use core::sync::atomic::Ordering::Relaxed;
        let left = self.fail_at.load(Relaxed);
        self.fail_at.store(left.saturating_sub(1), Relaxed);
        if left == 1 {
            return Err(Errno::new(12));
        }
        self.log.lock().unwrap().push(what);
        Ok(())
    }

    /// What it was told since the last call.
    pub(super) fn told(&self) -> alloc::vec::Vec<alloc::string::String> {
        core::mem::take(&mut *self.log.lock().unwrap())
    }
}
