//! The bytes that KVM copies from and to.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use super::host::HostArea;
use crate::area::Image;
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{EXTENDED_OFFSET, MXCSR, XMM, XSTATE_BV};
use crate::layout::Layout;

/// A buffer that every vCPU of this process can be captured into and restored from.
///
/// Allocate one per thread and keep it: [`capture`](super::capture) and
/// [`restore`](super::restore) never allocate.
pub struct XsaveBuffer {
    /// Exactly `HostArea::bytes()` long, always: the ioctls rely on it.
    area: Vec<u8>,
    has_xsave2: bool,
    is_compacted: bool,
}

impl XsaveBuffer {
    /// Allocates as many bytes as KVM copies.
    #[must_use]
    pub fn new(host: &HostArea) -> Self {
        Self {
            area: vec![0; host.bytes()],
            has_xsave2: host.has_xsave2(),
            is_compacted: host.is_compacted(),
        }
    }

    /// Returns the bytes, as the last ioctl has left them: [`HostArea::bytes`] in number.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.area
    }

    /// Returns where KVM_GET_XSAVE2 writes, for implementations of [`Vcpu`](super::Vcpu).
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.area.as_mut_ptr()
    }

    /// Returns true when KVM has KVM_GET_XSAVE2 (Linux 5.17 and newer).
    #[must_use]
    pub const fn has_xsave2(&self) -> bool {
        self.has_xsave2
    }

    pub(super) const fn is_compacted(&self) -> bool {
        self.is_compacted
    }

    pub(super) fn xstate_bv(&self) -> XFeatures {
        XFeatures::from_bits_retain(bytes::u64_at(&self.area, XSTATE_BV))
    }

    pub(super) fn set_xstate_bv(&mut self, value: XFeatures) {
        bytes::write(&mut self.area, XSTATE_BV, &value.bits().to_le_bytes());
    }

    pub(super) fn set_mxcsr(&mut self, value: u32) {
        bytes::write(&mut self.area, MXCSR, &value.to_le_bytes());
    }

    #[cfg(test)]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.area
    }

    /// Copies everything that KVM_SET_XSAVE reads of `image`: the legacy region, the header, and the
    /// components in use.
    ///
    /// Components that are not in use become initial in KVM, but for two that it would keep as they
    /// are, and which are written with their initial value:
    ///
    /// - PKRU, which KVM keeps beside the area and sets only where XSTATE_BV has it
    ///   (arch/x86/kernel/fpu/core.c, `fpu_copy_uabi_to_guest_fpstate`);
    /// - MXCSR, where the kernel keeps the area in the standard format: XRSTOR loads it from there
    ///   whatever XSTATE_BV says (SDM Vol. 1 §13.8.1), and KVM takes it over with x87, SSE or AVX
    ///   alone.
    ///
    /// Where the kernel has the compacted format, XRSTORS loads MXCSR with SSE alone, not with AVX:
    /// SSE is in use then, with its initial value, wherever MXCSR is not initial.
    pub(super) fn fill_with(&mut self, image: &Image<'_>, vcpu: &Layout) {
        let from = image.as_bytes();
        bytes::copy(from, 0..EXTENDED_OFFSET, &mut self.area, 0);
        let mut in_use = image.xstate_bv();
        for component in image.components_in_use() {
            if let Some(range) = component.range() {
                let start = range.start;
                bytes::copy(from, range, &mut self.area, start);
            }
        }
        // KVM checks it with x87 even where nothing loads it.
        self.set_mxcsr(image.mxcsr());
        let written = if self.is_compacted {
            image.xstate_bv_with_mxcsr()
        } else {
            in_use | XFeatures::SSE
        };
        if written != in_use {
            bytes::fill(&mut self.area, XMM, 0);
            in_use = written;
        }
        if let Some(pkru) = vcpu.component(ComponentId::PKRU)
            && !in_use.contains(XFeatures::PKRU)
            && let Some(range) = pkru.range()
        {
            bytes::fill(&mut self.area, range, 0);
            in_use |= XFeatures::PKRU;
        }
        self.set_xstate_bv(in_use);
    }
}

impl fmt::Debug for XsaveBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XsaveBuffer")
            .field("bytes", &self.area.len())
            .finish_non_exhaustive()
    }
}
