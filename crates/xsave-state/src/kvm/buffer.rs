//! The bytes that KVM copies into and out of.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use kvm_bindings::{Msrs, kvm_msr_entry};

use super::size::XsaveSize;
use super::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use crate::bytes;
use crate::feature::XFeatures;
use crate::header::XSTATE_BV;
use crate::image::Image;
use crate::legacy::{MXCSR, XMM};

/// A buffer that every vCPU of this process can be captured into and restored from.
///
/// Allocate one per thread and keep it: [`capture`](super::capture) and
/// [`restore`](super::restore) never allocate.
pub struct XsaveBuffer {
    /// Exactly `size.bytes()` long, always: the ioctls rely on it.
    area: Vec<u8>,
    size: XsaveSize,
    /// IA32_XFD and IA32_XFD_ERR, in this order, for KVM_GET_MSRS and KVM_SET_MSRS.
    pub(super) xfd_and_err: Msrs,
    /// IA32_XFD, for KVM_SET_MSRS.
    pub(super) xfd_alone: Msrs,
}

impl XsaveBuffer {
    /// Allocates it.
    #[must_use]
    pub fn new(size: XsaveSize) -> Self {
        let msrs = |indices: &[u32]| {
            let entry = |&index: &u32| kvm_msr_entry {
                index,
                ..Default::default()
            };
            let entries: Vec<_> = indices.iter().map(entry).collect();
            // KVM_MAX_MSR_ENTRIES is 256.
            Msrs::from_entries(&entries).expect("two MSRs are within the limit of the list")
        };
        Self {
            area: vec![0; size.bytes()],
            size,
            xfd_and_err: msrs(&[MSR_IA32_XFD, MSR_IA32_XFD_ERR]),
            xfd_alone: msrs(&[MSR_IA32_XFD]),
        }
    }

    /// Its length in bytes, with the proof.
    #[must_use]
    pub const fn size(&self) -> XsaveSize {
        self.size
    }

    pub(super) fn area(&self) -> &[u8] {
        &self.area
    }

    pub(super) fn area_mut(&mut self) -> &mut [u8] {
        &mut self.area
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

    /// Takes over `image`, as far as there is room, with zeros behind it.
    ///
    /// KVM_SET_XSAVE copies into the area that the kernel keeps. Where that has the compacted format,
    /// the processor loads MXCSR with SSE alone, not with AVX as from the standard format: SSE is
    /// then in use too, with its initial value.
    pub(super) fn fill_with(&mut self, image: &Image<'_>) {
        let area = image.as_bytes();
        let len = area.len().min(self.area.len());
        let (head, tail) = self.area.split_at_mut(len);
        head.copy_from_slice(bytes::prefix(area, len));
        tail.fill(0);
        // Where nothing loads it, it means nothing, but KVM checks it with x87.
        self.set_mxcsr(image.mxcsr());
        let in_use = image.xstate_bv_with_mxcsr();
        if in_use != image.xstate_bv() {
            bytes::fill(&mut self.area, XMM, 0);
            self.set_xstate_bv(in_use);
        }
    }
}

impl fmt::Debug for XsaveBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XsaveBuffer")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}
