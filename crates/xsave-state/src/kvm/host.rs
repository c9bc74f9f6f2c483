//! The area that KVM copies on this host: its size, with proof, and its layout.

use thiserror::Error;

use super::compaction;
use crate::feature::XFeatures;
use crate::format::MXCSR_MASK;
use crate::layout::{Layout, LayoutError, MAX_AREA_BYTES};

/// KVM_GET_XSAVE copies this many bytes, and KVM_GET_XSAVE2 no fewer.
const MINIMUM_BYTES: usize = 4096;
const XSAVE: u32 = 0xd;

/// The area that KVM copies for vCPUs of this process: how many bytes at most, and where each
/// component lies.
///
/// KVM_GET_XSAVE2 and KVM_SET_XSAVE copy as many bytes as the vCPU's own area has, and know nothing
/// of the caller's buffer. That number grows with the guest permissions of the process
/// (ARCH_REQ_XCOMP_GUEST_PERM) and with the vCPU's CPUID, but never beyond KVM_CAP_XSAVE2 **once a
/// vCPU exists**, because creating the first one locks the permissions
/// (arch/x86/kernel/fpu/core.c, `fpu_alloc_guest_fpstate`). So `HostArea::query` requires a vCPU:
///
#[cfg_attr(feature = "kvm-ioctls", doc = "```compile_fail,E0061")]
#[cfg_attr(not(feature = "kvm-ioctls"), doc = "```ignore")]
/// # fn demo(vm: &kvm_ioctls::VmFd) {
/// // Before the first vCPU the answer could still change.
/// let host = xsave_state::kvm::HostArea::query(vm);
/// # }
/// ```
///
/// ```compile_fail,E0451
/// # fn demo(other: xsave_state::kvm::HostArea) {
/// // Nobody can claim a size.
/// let host = xsave_state::kvm::HostArea { bytes: 65_536, ..other };
/// # }
/// ```
///
/// The layout is the processor's CPUID.0DH, limited to XCR0 of the host, with its palettes and its
/// MXCSR mask: KVM knows no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostArea {
    bytes: usize,
    has_xsave2: bool,
    is_compacted: bool,
    layout: Layout,
}

impl HostArea {
    /// Takes what KVM_CHECK_EXTENSION of KVM_CAP_XSAVE2 returned; 0 on kernels before 5.17, which
    /// have no dynamic components and copy 4,096 bytes.
    ///
    /// # Safety
    ///
    /// A VM of this process was asked, and the process had created a vCPU before.
    ///
    /// # Errors
    ///
    /// See [`HostAreaError`].
    #[allow(unsafe_code)]
    pub unsafe fn from_capability(xsave2: i32) -> Result<Self, HostAreaError> {
        let layout = host_layout().map_err(HostAreaError::Layout)?;
        Self::new(xsave2, layout, compaction::is_compacted())
    }

    pub(super) fn new(
        xsave2: i32,
        layout: Layout,
        is_compacted: bool,
    ) -> Result<Self, HostAreaError> {
        let bytes = usize::try_from(xsave2)
            .ok()
            .filter(|&bytes| bytes <= MAX_AREA_BYTES)
            .ok_or(HostAreaError::Size {
                reported_bytes: xsave2,
                limit_bytes: MAX_AREA_BYTES,
            })?;
        Ok(Self {
            bytes: bytes.max(MINIMUM_BYTES),
            has_xsave2: bytes != 0,
            is_compacted,
            layout,
        })
    }

    /// Returns the bytes that KVM copies at most, 4,096 or more.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns where KVM reads and writes each component.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) const fn has_xsave2(&self) -> bool {
        self.has_xsave2
    }

    /// Returns true when the kernel keeps areas in the compacted format.
    pub(super) const fn is_compacted(&self) -> bool {
        self.is_compacted
    }
}

/// Reads the processor's layout. What the host's kernel has not enabled, KVM has for no guest.
fn host_layout() -> Result<Layout, LayoutError> {
    let enabled = host_xcr0();
    let layout = Layout::from_cpuid(|leaf, subleaf| {
        let mut registers = cpuid(leaf, subleaf);
        if (leaf, subleaf) == (XSAVE, 0) {
            let [low, _, _, high] = &mut registers;
            let [a, b, c, d, e, f, g, h] = enabled.bits().to_le_bytes();
            *low &= u32::from_le_bytes([a, b, c, d]);
            *high &= u32::from_le_bytes([e, f, g, h]);
        }
        registers
    })?;
    Ok(layout.with_mxcsr_mask(mxcsr_mask()))
}

#[allow(unsafe_code, unused_unsafe)]
fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: Every x86-64 processor has CPUID, and it touches no memory.
    let result = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Returns XCR0 of the host, or x87 and SSE where it has no XSAVE.
#[allow(unsafe_code)]
fn host_xcr0() -> XFeatures {
    let [_, _, features, _] = cpuid(1, 0);
    // CPUID.01H:ECX.OSXSAVE[27]: the kernel has set CR4.OSXSAVE.
    if features & 1 << 27 == 0 {
        return XFeatures::LEGACY;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV with ECX = 0 reads XCR0 where CR4.OSXSAVE is set, which was just seen
    // (SDM Vol. 2, XGETBV). It writes EAX and EDX alone.
    unsafe {
        core::arch::asm!(
            "xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags)
        );
    }
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

/// Returns MXCSR_MASK of the processor, which is what the kernel checks against
/// (arch/x86/kernel/fpu/init.c, `fpu__init_system_mxcsr`).
#[allow(unsafe_code)]
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    let mut area = Area([0; 512]);
    let pointer = area.0.as_mut_ptr();
    // SAFETY: Every x86-64 processor has FXSAVE. It writes 512 bytes at a multiple of 16, which `Area`
    // is (SDM Vol. 2, FXSAVE).
    unsafe { core::arch::x86_64::_fxsave(pointer) };
    crate::bytes::u32_at(&area.0, MXCSR_MASK)
}

/// Errors from asking how large KVM's area is, and where its components lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HostAreaError {
    /// KVM lacks KVM_CAP_XSAVE: the processor has no XSAVE.
    #[error("KVM lacks KVM_CAP_XSAVE: this processor has no XSAVE")]
    NoXsave,
    /// KVM_CAP_XSAVE2 is negative, or more than any area can have.
    #[error("KVM_CAP_XSAVE2 is {reported_bytes} bytes; at most {limit_bytes} are accepted")]
    Size {
        /// The value from KVM.
        reported_bytes: i32,
        /// [`MAX_AREA_BYTES`].
        limit_bytes: usize,
    },
    /// CPUID of the host describes an area that cannot exist.
    #[error("CPUID of this host: {0}")]
    Layout(LayoutError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_buffer_is_smaller_than_what_the_kernel_copies() {
        for reported in [0, 1, 832, 4095, 4096, 11_008, 65_536] {
            let host = HostArea::new(reported, Layout::legacy(), true).unwrap();
            assert!(host.bytes() >= 4096, "{reported}");
            assert!(host.bytes() >= usize::try_from(reported).unwrap());
            assert_eq!(host.has_xsave2(), reported != 0);
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for reported_bytes in [-1, i32::MIN, 65_537, i32::MAX] {
            assert_eq!(
                HostArea::new(reported_bytes, Layout::legacy(), true),
                Err(HostAreaError::Size {
                    reported_bytes,
                    limit_bytes: 65_536
                })
            );
        }
    }

    #[test]
    fn the_layout_of_this_host_has_what_its_kernel_enabled() {
        let layout = host_layout().unwrap();
        assert_eq!(layout.user(), host_xcr0());
        assert_eq!(layout.mxcsr_mask() & 0xffff, 0xffff);
    }
}
