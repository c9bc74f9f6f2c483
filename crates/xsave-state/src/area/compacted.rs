//! Converts images from and to the compacted format of XSAVEC and XSAVES (SDM Vol. 1 §13.4.3).

use alloc::vec::Vec;

use thiserror::Error;

use super::header::Header;
use super::image::{Image, ImageError, blank, require_length};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{COMPACTED, MXCSR, XCOMP_BV, XMM, XSTATE_BV};
use crate::layout::Layout;

impl Image<'_> {
    /// Reads an area of the compacted format, as XSAVEC and XSAVES write it
    /// (SDM Vol. 1 §13.4.3).
    ///
    /// Supervisor components may have a place in it, but must be initial: an image has none.
    ///
    /// # Errors
    ///
    /// The first broken rule of XRSTOR or XRSTORS, or of [`parse`](Self::parse).
    pub fn from_compacted(area: &[u8], layout: &Layout) -> Result<Image<'static>, CompactedError> {
        let minimum = layout.compacted_size(XFeatures::empty());
        require_length(area, minimum)?;
        let header = Header::parse(area).map_err(ImageError::from)?;
        if !header.is_compacted() {
            return Err(CompactedError::Standard {
                xcomp_bv: header.xcomp_bv,
            });
        }
        let placed = XFeatures::from_bits_retain(header.xcomp_bv & !COMPACTED);
        let known = layout.user() | layout.supervisor();
        if !known.contains(placed) {
            return Err(CompactedError::Unsupported {
                xcomp_bv: placed,
                supported: known,
                unsupported: placed - known,
            });
        }
        let xstate_bv = header.xstate_bv;
        if !placed.contains(xstate_bv) {
            return Err(CompactedError::WithoutPlace {
                xstate_bv,
                xcomp_bv: placed,
                without_place: xstate_bv - placed,
            });
        }
        if xstate_bv.intersects(layout.supervisor()) {
            return Err(CompactedError::Supervisor {
                supervisor: xstate_bv & layout.supervisor(),
            });
        }
        require_length(area, layout.compacted_size(placed))?;

        let mut standard = blank(layout.standard_size());
        let x87 = xstate_bv.contains(XFeatures::X87);
        let sse = xstate_bv.contains(XFeatures::SSE);
        if x87 {
            bytes::copy(area, 0..MXCSR, &mut standard, 0);
            bytes::copy(area, 32..XMM.start, &mut standard, 32);
        }
        if sse {
            bytes::copy(area, MXCSR..32, &mut standard, MXCSR);
            bytes::copy(area, XMM, &mut standard, XMM.start);
        }
        for (component, range) in layout.compacted(placed) {
            if let Some(offset) = component.offset()
                && xstate_bv.contains(component.id().bit())
            {
                bytes::copy(area, range, &mut standard, offset);
            }
        }
        bytes::write(&mut standard, XSTATE_BV, &xstate_bv.bits().to_le_bytes());
        Ok(Self::from_vec(standard, layout)?)
    }

    /// Writes the state in the compacted format: XCOMP_BV has the components in use, and SSE with them
    /// where MXCSR is not initial, because this format keeps MXCSR with SSE alone
    /// (SDM Vol. 1 §13.10).
    #[must_use]
    pub fn to_compacted(&self) -> Vec<u8> {
        let xstate_bv = self.xstate_bv_with_mxcsr();
        let mut compacted = blank(self.layout().compacted_size(xstate_bv));
        if xstate_bv.contains(XFeatures::X87) {
            bytes::copy(self.as_bytes(), 0..MXCSR, &mut compacted, 0);
            bytes::copy(self.as_bytes(), 32..XMM.start, &mut compacted, 32);
        }
        if xstate_bv.contains(XFeatures::SSE) {
            bytes::copy(self.as_bytes(), MXCSR..32, &mut compacted, MXCSR);
        }
        if let Some(xmm) = self.component(ComponentId::SSE) {
            bytes::write(&mut compacted, XMM.start, xmm);
        }
        for (component, range) in self.layout().compacted(xstate_bv) {
            if let Some(content) = self.component(component.id()) {
                bytes::write(&mut compacted, range.start, content);
            }
        }
        bytes::write(&mut compacted, XSTATE_BV, &xstate_bv.bits().to_le_bytes());
        let xcomp_bv = xstate_bv.bits() | COMPACTED;
        bytes::write(&mut compacted, XCOMP_BV, &xcomp_bv.to_le_bytes());
        compacted
    }
}

/// Errors from reading a compacted-format area of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompactedError {
    /// Bit 63 of XCOMP_BV is clear.
    #[error("XCOMP_BV is {xcomp_bv:#x}: bit 63 is clear, so the area has the standard format")]
    Standard {
        /// Bytes 520 to 527.
        xcomp_bv: u64,
    },
    /// XCOMP_BV has components that the layout does not have.
    #[error("XCOMP_BV is {xcomp_bv}; it has {unsupported}, but only {supported} is supported")]
    Unsupported {
        /// Bytes 520 to 527 without bit 63.
        xcomp_bv: XFeatures,
        /// User and supervisor components of the layout.
        supported: XFeatures,
        /// The components that are not supported.
        unsupported: XFeatures,
    },
    /// A component in use has no place in the area.
    #[error("XSTATE_BV is {xstate_bv}, but XCOMP_BV ({xcomp_bv}) has no place for {without_place}")]
    WithoutPlace {
        /// Bytes 512 to 519.
        xstate_bv: XFeatures,
        /// Bytes 520 to 527 without bit 63.
        xcomp_bv: XFeatures,
        /// The components without a place.
        without_place: XFeatures,
    },
    /// A supervisor component is in use, which the standard format cannot hold.
    #[error(
        "{supervisor} is in use, but the standard format of KVM has no place for supervisor components"
    )]
    Supervisor {
        /// The components in use.
        supervisor: XFeatures,
    },
    /// A rule of both formats is broken.
    #[error(transparent)]
    Image(#[from] ImageError),
}
