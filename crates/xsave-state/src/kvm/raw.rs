//! The ioctls themselves, on the file descriptor of a vCPU, each with its proof.

use core::ffi::c_int;
use std::os::fd::{AsRawFd, RawFd};
use std::vec;
use std::vec::Vec;

use kvm_bindings::{
    KVMIO, kvm_cpuid_entry2, kvm_cpuid2, kvm_msr_entry, kvm_msrs, kvm_xcrs, kvm_xsave,
};
use libc::Ioctl;

use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::vcpu::Vcpu;

const GET_XSAVE: Ioctl = libc::_IOR::<kvm_xsave>(KVMIO, 0xa4);
const GET_XSAVE2: Ioctl = libc::_IOR::<kvm_xsave>(KVMIO, 0xcf);
const SET_XSAVE: Ioctl = libc::_IOW::<kvm_xsave>(KVMIO, 0xa5);
const GET_XCRS: Ioctl = libc::_IOR::<kvm_xcrs>(KVMIO, 0xa6);
const SET_XCRS: Ioctl = libc::_IOW::<kvm_xcrs>(KVMIO, 0xa7);
const GET_MSRS: Ioctl = libc::_IOWR::<kvm_msrs>(KVMIO, 0x88);
const SET_MSRS: Ioctl = libc::_IOW::<kvm_msrs>(KVMIO, 0x89);
const GET_CPUID2: Ioctl = libc::_IOWR::<kvm_cpuid2>(KVMIO, 0x91);

/// The most entries that KVM gives a vCPU (arch/x86/include/asm/kvm_host.h, KVM_MAX_CPUID_ENTRIES).
const MAX_CPUID_ENTRIES: usize = 256;
const MAX_MSRS: usize = 3;

/// A vCPU by its file descriptor, for VMMs whose KVM crate is not the kvm-ioctls that this crate
/// knows: another version, or another crate.
///
/// ```
/// use xsave_state::kvm::RawVcpu;
/// # struct OwnVcpu(std::fs::File);
/// # impl std::os::fd::AsRawFd for OwnVcpu {
/// #     fn as_raw_fd(&self) -> std::os::fd::RawFd { self.0.as_raw_fd() }
/// # }
///
/// fn ioctls(vcpu: &mut OwnVcpu) -> RawVcpu<'_, OwnVcpu> {
///     // SAFETY: `OwnVcpu` is the only owner of a KVM vCPU of this process.
///     unsafe { RawVcpu::new(vcpu) }
/// }
/// ```
#[derive(Debug)]
pub struct RawVcpu<'a, T: AsRawFd>(&'a mut T);

impl<'a, T: AsRawFd> RawVcpu<'a, T> {
    /// Takes the owner of a vCPU's file descriptor.
    ///
    /// # Safety
    ///
    /// The file descriptor is that of a KVM vCPU whose VM was created by this process, and whoever
    /// has `vcpu` by `&mut` is the vCPU's only user: see [`Vcpu`].
    #[allow(unsafe_code)]
    pub const unsafe fn new(vcpu: &'a mut T) -> Self {
        Self(vcpu)
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

// The kernel's KVM_GET_MSRS and KVM_SET_MSRS take a header with `nmsrs`, and that many entries behind
// it (arch/x86/kvm/x86.c, `msr_io`).
#[repr(C)]
struct MsrList {
    header: kvm_msrs,
    entries: [kvm_msr_entry; MAX_MSRS],
}

impl MsrList {
    fn new(msrs: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let mut list = Self {
            header: kvm_msrs::default(),
            entries: [kvm_msr_entry::default(); MAX_MSRS],
        };
        let mut count = 0u32;
        for (entry, (index, data)) in list.entries.iter_mut().zip(msrs) {
            (entry.index, entry.data) = (index, data);
            count = count.saturating_add(1);
        }
        list.header.nmsrs = count;
        list
    }
}

// The same of KVM_GET_CPUID2, with `nent` (arch/x86/kvm/cpuid.c, `kvm_vcpu_ioctl_get_cpuid2`).
#[repr(C)]
struct CpuidList {
    header: kvm_cpuid2,
    entries: [kvm_cpuid_entry2; MAX_CPUID_ENTRIES],
}

const _: () = {
    assert!(core::mem::offset_of!(MsrList, entries) == 8 && size_of::<kvm_msr_entry>() == 16);
    assert!(core::mem::offset_of!(CpuidList, entries) == 8 && size_of::<kvm_cpuid_entry2>() == 40);
    // An Ioctl number holds the size of what it copies, bits 16 to 29.
    assert!(GET_XSAVE >> 16 & 0x3fff == 4096);
};

// SAFETY: Every method is one ioctl of the name that the trait gives it, on the file descriptor that
// `RawVcpu::new` was given; its caller promised that this is a KVM vCPU of this process and that
// `&mut T` is its only user. `get_xsave2` and `set_xsave` pass the buffer's own pointer and no other.
#[allow(unsafe_code)]
unsafe impl<T: AsRawFd> Vcpu for RawVcpu<'_, T> {
    fn get_cpuid2(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
        let mut list = vec![CpuidList {
            header: kvm_cpuid2 {
                nent: 256,
                ..Default::default()
            },
            entries: [kvm_cpuid_entry2::default(); MAX_CPUID_ENTRIES],
        }];
        let pointer = list.as_mut_ptr();
        // SAFETY: The kernel reads `nent` and writes it and at most that many entries of 40 bytes from
        // offset 8 on; `CpuidList` has room for 256 there and lives until after the call.
        check(unsafe { libc::ioctl(self.fd(), GET_CPUID2, pointer) })?;
        // Linux 6.1 leaves `nent` as it was: entries that it did not write are zero.
        let entries = list.first().map_or(&[][..], |list| &list.entries[..]);
        let written = |entry: &kvm_cpuid_entry2| *entry != kvm_cpuid_entry2::default();
        let count = entries
            .iter()
            .rposition(written)
            .map_or(0, |last| last.saturating_add(1));
        Ok(entries.iter().take(count).copied().collect())
    }

    fn has_cpuid(&mut self) -> Result<bool, Errno> {
        let mut no_entries = kvm_cpuid2::default();
        let pointer: *mut kvm_cpuid2 = &raw mut no_entries;
        // SAFETY: The kernel reads and writes the 8 bytes of `no_entries`. Behind them it would write
        // only entries, of which there are at most `nent` = 0.
        match check(unsafe { libc::ioctl(self.fd(), GET_CPUID2, pointer) }) {
            Ok(_) => Ok(false),
            Err(errno) if errno.number() == libc::E2BIG => Ok(true),
            Err(errno) => Err(errno),
        }
    }

    fn get_xsave2(&mut self, buffer: &mut XsaveBuffer) -> Result<(), Errno> {
        let request = if buffer.has_xsave2() {
            GET_XSAVE2
        } else {
            GET_XSAVE
        };
        let area = buffer.as_mut_ptr();
        // SAFETY: The kernel writes to `area` and nowhere else: 4,096 bytes for KVM_GET_XSAVE, the
        // `uabi_size` of the vCPU for KVM_GET_XSAVE2 (arch/x86/kvm/x86.c, `kvm_arch_vcpu_ioctl`;
        // copy_to_user, so alignment does not matter). Both are at most `HostArea::bytes()`, which is
        // KVM_CAP_XSAVE2 of this process, asked when a vCPU existed: `uabi_size` comes from the guest
        // permissions, which the first vCPU locked. The buffer is that long, is initialised, and is
        // borrowed mutably for the call.
        check(unsafe { libc::ioctl(self.fd(), request, area) })?;
        Ok(())
    }

    fn set_xsave(&mut self, buffer: &XsaveBuffer) -> Result<(), Errno> {
        let area = buffer.as_bytes().as_ptr();
        // SAFETY: The kernel reads the `uabi_size` of the vCPU from `area` (arch/x86/kvm/x86.c,
        // `kvm_arch_vcpu_ioctl`, memdup_user), at least 4,096 bytes, and writes nothing to this
        // process. That is at most the buffer's length, as shown in `get_xsave2`. What the bytes make
        // of the vCPU is guest state: the kernel checks it, and it cannot change this process's memory.
        check(unsafe { libc::ioctl(self.fd(), SET_XSAVE, area) })?;
        Ok(())
    }

    fn get_xcr0(&mut self) -> Result<Option<u64>, Errno> {
        let mut xcrs = kvm_xcrs::default();
        let pointer: *mut kvm_xcrs = &raw mut xcrs;
        // SAFETY: The kernel writes the whole of `xcrs` and nothing else.
        check(unsafe { libc::ioctl(self.fd(), GET_XCRS, pointer) })?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        let xcr0 = xcrs.xcrs.iter().take(count).find(|entry| entry.xcr == 0);
        Ok(xcr0.map(|entry| entry.value))
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Errno> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        let [xcr0, ..] = &mut xcrs.xcrs;
        xcr0.value = value;
        let pointer: *const kvm_xcrs = &raw const xcrs;
        // SAFETY: The kernel reads the whole of `xcrs` and writes nothing to this process.
        check(unsafe { libc::ioctl(self.fd(), SET_XCRS, pointer) })?;
        Ok(())
    }

    fn get_msrs(&mut self, indices: [u32; 2]) -> Result<Option<[u64; 2]>, Errno> {
        let mut list = MsrList::new(indices.map(|index| (index, 0)));
        let pointer: *mut MsrList = &raw mut list;
        // SAFETY: The kernel reads `nmsrs` entries and writes them back. `MsrList::new` counts only
        // entries that the list has.
        let count = check(unsafe { libc::ioctl(self.fd(), GET_MSRS, pointer) })?;
        let [first, second, ..] = list.entries;
        Ok((count == 2).then_some([first.data, second.data]))
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<usize, Errno> {
        let list = MsrList::new(msrs.iter().copied());
        let pointer: *const MsrList = &raw const list;
        // SAFETY: The kernel reads `nmsrs` entries, as in `get_msrs`, and writes nothing to this
        // process. What it makes of the values is guest state.
        check(unsafe { libc::ioctl(self.fd(), SET_MSRS, pointer) })
    }
}

/// Returns what the ioctl returned, or errno.
fn check(result: c_int) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::last())
}
