//! XRSTOR and XRSTORS (SDM vol. 1, 13.8 and 13.12; vol. 2, the operation of each).

use crate::component::{AVX, SSE};
use crate::pattern::MXCSR_RESET;

/// What the header of an area says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which components are in it and not initial.
    pub xstate_bv: u64,
    /// Bit 63 and the components that have a place, or 0 for the standard format.
    pub xcomp_bv: u64,
}

impl Header {
    /// Whether it is of the compacted format.
    #[must_use]
    pub fn is_compacted(self) -> bool {
        self.xcomp_bv >> 63 != 0
    }
}

/// What becomes of each component. The others stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Loaded from the area.
    pub restored: u64,
    /// Set to the initial configuration.
    pub initialized: u64,
    /// The new MXCSR.
    pub mxcsr: Mxcsr,
}

/// Where MXCSR comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mxcsr {
    /// It stays as it is.
    Kept,
    /// Bytes 24 to 27 of the area.
    Loaded,
    /// 1F80H.
    Reset,
}

impl Mxcsr {
    /// Its value, from the old one and the one in the area.
    #[must_use]
    pub fn value(self, old: u32, area: u32) -> u32 {
        match self {
            Self::Kept => old,
            Self::Loaded => area,
            Self::Reset => MXCSR_RESET,
        }
    }
}

/// Why nothing happens at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// #GP.
    GeneralProtection,
    /// #NM because of IA32_XFD, with the value of IA32_XFD_ERR (13.14).
    NotAvailable {
        /// The components that were to be loaded and are disabled.
        xfd_err: u64,
    },
}

/// XRSTOR, or XRSTORS with `supervisor`, of an area whose reserved bytes are zero and whose MXCSR is
/// valid. `enabled` is XCR0, or XCR0 | IA32_XSS for XRSTORS.
///
/// # Errors
///
/// The exception.
pub fn restore(
    supervisor: bool,
    enabled: u64,
    requested: u64,
    xfd: u64,
    header: Header,
) -> Result<Effect, Refusal> {
    let rfbm = enabled & requested;
    let compacted = header.is_compacted();
    let format = if compacted {
        header.xcomp_bv & !(1 << 63)
    } else {
        if supervisor || header.xcomp_bv != 0 {
            return Err(Refusal::GeneralProtection);
        }
        enabled
    };
    if format & !enabled != 0 || header.xstate_bv & !format != 0 {
        return Err(Refusal::GeneralProtection);
    }
    let restored = rfbm & header.xstate_bv;
    let initialized = rfbm & !header.xstate_bv;
    if restored & xfd != 0 {
        return Err(Refusal::NotAvailable {
            xfd_err: restored & xfd,
        });
    }
    let mxcsr = if compacted {
        match (restored >> SSE & 1 != 0, initialized >> SSE & 1 != 0) {
            (true, _) => Mxcsr::Loaded,
            (_, true) => Mxcsr::Reset,
            _ => Mxcsr::Kept,
        }
    } else if rfbm & (1 << SSE | 1 << AVX) != 0 {
        Mxcsr::Loaded
    } else {
        Mxcsr::Kept
    };
    Ok(Effect {
        restored,
        initialized,
        mxcsr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPACTED: u64 = 1 << 63;

    #[test]
    fn what_is_not_requested_stays() {
        let header = Header {
            xstate_bv: 0b1000,
            xcomp_bv: COMPACTED | 0b1000,
        };
        let effect = restore(false, 0b1111, 0b0110, 0, header).unwrap();
        assert_eq!((effect.restored, effect.initialized), (0, 0b0110));
        assert_eq!(effect.mxcsr, Mxcsr::Reset);
    }

    #[test]
    fn the_forms_refuse_what_the_other_one_takes() {
        let standard = Header {
            xstate_bv: 0b100,
            xcomp_bv: 0,
        };
        assert!(restore(false, 0b111, !0, 0, standard).is_ok());
        assert_eq!(
            restore(true, 0b111, !0, 0, standard),
            Err(Refusal::GeneralProtection)
        );
        assert_eq!(
            restore(false, 0b111, !0, 0b100, standard),
            Err(Refusal::NotAvailable { xfd_err: 0b100 })
        );
    }
}
