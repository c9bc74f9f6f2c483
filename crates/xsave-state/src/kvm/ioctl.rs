//! The ioctls that capture and restore consist of, each with its proof.

use kvm_bindings::{KVMIO, kvm_cpuid2, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::{Error as Errno, Result};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::buffer::XsaveBuffer;

ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

ioctl_iowr_nr!(KVM_GET_CPUID2, KVMIO, 0x91, kvm_cpuid2);

const E2BIG: i32 = 7;

/// What is asked of a vCPU. Implemented by [`VcpuFd`], and by a simulated vCPU in the tests, where
/// any of these can be made to fail.
pub(super) trait Vcpu {
    /// Whether the kernel keeps the area in the compacted format, where MXCSR has its place with SSE
    /// (arch/x86/kernel/fpu/xstate.c, X86_FEATURE_XCOMPACTED).
    fn keeps_compacted(&self) -> bool;
    /// Whether KVM_SET_CPUID2 has been called.
    fn has_cpuid(&self) -> Result<bool>;
    /// KVM_GET_XSAVE2. Bytes that the kernel does not write are zero afterwards.
    fn read_area(&self, buffer: &mut XsaveBuffer) -> Result<()>;
    /// KVM_SET_XSAVE.
    fn write_area(&self, buffer: &XsaveBuffer) -> Result<()>;
    /// KVM_GET_XCRS; `None` where the list lacks XCR0.
    fn read_xcr0(&self) -> Result<Option<u64>>;
    /// KVM_SET_XCRS.
    fn write_xcr0(&self, value: u64) -> Result<()>;
    /// KVM_GET_MSRS of IA32_XFD and IA32_XFD_ERR; `None` where KVM does not have both.
    fn read_xfd(&self, buffer: &mut XsaveBuffer) -> Result<Option<(u64, u64)>>;
    /// KVM_SET_MSRS of IA32_XFD, and behind it of IA32_XFD_ERR where it is given. Gives how many KVM
    /// has taken: it stops at the first value that it refuses.
    fn write_xfd(&self, buffer: &mut XsaveBuffer, xfd: u64, xfd_err: Option<u64>) -> Result<usize>;
}

impl Vcpu for VcpuFd {
    fn keeps_compacted(&self) -> bool {
        std::is_x86_feature_detected!("xsavec") || std::is_x86_feature_detected!("xsaves")
    }

    #[allow(unsafe_code)]
    fn has_cpuid(&self) -> Result<bool> {
        // With room for no entry KVM says E2BIG if there is one. kvm-ioctls' wrapper would allocate.
        let mut no_entries = kvm_cpuid2::default();
        // SAFETY: The kernel reads and writes the 8 bytes of `no_entries`, which is borrowed mutably
        // for the call. Behind them it would write only entries, of which there are at most
        // `nent` = 0 (arch/x86/kvm/cpuid.c, `kvm_vcpu_ioctl_get_cpuid2`).
        let result = unsafe { ioctl_with_mut_ref(self, KVM_GET_CPUID2(), &mut no_entries) };
        match check(result) {
            Ok(()) => Ok(false),
            Err(error) if error.errno() == E2BIG => Ok(true),
            Err(error) => Err(error),
        }
    }

    #[allow(unsafe_code)]
    fn read_area(&self, buffer: &mut XsaveBuffer) -> Result<()> {
        let request = if buffer.size().has_xsave2() {
            KVM_GET_XSAVE2()
        } else {
            KVM_GET_XSAVE()
        };
        // The kernel writes as many bytes as this vCPU's area has, which can be fewer than another
        // vCPU's: nothing of an earlier capture may stay behind them.
        buffer.area_mut().fill(0);
        let area: *mut kvm_xsave = buffer.area_mut().as_mut_ptr().cast();
        // SAFETY: The kernel writes to `area` and nowhere else: 4,096 bytes for KVM_GET_XSAVE, the
        // `uabi_size` of the vCPU for KVM_GET_XSAVE2 (arch/x86/kvm/x86.c, `kvm_arch_vcpu_ioctl`;
        // copy_to_user, so alignment does not matter). Both are at most `buffer.size()`, which is
        // KVM_CAP_XSAVE2 of this process, asked when a vCPU existed: `uabi_size` comes from the
        // guest permissions, which the first vCPU locked (see `XsaveSize`). `buffer.area` is exactly
        // that long, is initialised, and is borrowed mutably for the call.
        let result = unsafe { ioctl_with_mut_ptr(self, request, area) };
        check(result)
    }

    #[allow(unsafe_code)]
    fn write_area(&self, buffer: &XsaveBuffer) -> Result<()> {
        let area: *const kvm_xsave = buffer.area().as_ptr().cast();
        // SAFETY: The kernel reads the `uabi_size` of the vCPU from `area` (arch/x86/kvm/x86.c,
        // `kvm_arch_vcpu_ioctl`, memdup_user), at least 4,096 bytes, and writes nothing to this
        // process. That is at most `buffer.size()`, as shown in `read_area`, and `buffer.area` is
        // exactly that long and initialised. What the bytes make of the vCPU is guest state: the
        // kernel checks it, and it cannot change this process's memory.
        let result = unsafe { ioctl_with_ptr(self, KVM_SET_XSAVE(), area) };
        check(result)
    }

    fn read_xcr0(&self) -> Result<Option<u64>> {
        let xcrs = self.get_xcrs()?;
        let len = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        let xcr0 = xcrs.xcrs.iter().take(len).find(|entry| entry.xcr == 0);
        Ok(xcr0.map(|entry| entry.value))
    }

    fn write_xcr0(&self, value: u64) -> Result<()> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        let [xcr0, ..] = &mut xcrs.xcrs;
        xcr0.value = value;
        self.set_xcrs(&xcrs)
    }

    fn read_xfd(&self, buffer: &mut XsaveBuffer) -> Result<Option<(u64, u64)>> {
        let read = self.get_msrs(&mut buffer.xfd_and_err)?;
        Ok(match buffer.xfd_and_err.as_slice() {
            [xfd, xfd_err] if read == 2 => Some((xfd.data, xfd_err.data)),
            _ => None,
        })
    }

    fn write_xfd(&self, buffer: &mut XsaveBuffer, xfd: u64, xfd_err: Option<u64>) -> Result<usize> {
        let msrs = if xfd_err.is_some() {
            &mut buffer.xfd_and_err
        } else {
            &mut buffer.xfd_alone
        };
        let values = [Some(xfd), xfd_err].into_iter().flatten();
        for (entry, value) in msrs.as_mut_slice().iter_mut().zip(values) {
            entry.data = value;
        }
        self.set_msrs(msrs)
    }
}

fn check(result: i32) -> Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::last())
    }
}
