//! Which values XCR0 can have (SDM Vol. 1 §13.3; Vol. 2, XSETBV).

use thiserror::Error;

use crate::feature::XFeatures;

/// Components that XCR0 has together or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Group {
    /// These.
    pub together: XFeatures,
    /// What else it must have where it has them.
    pub needs: XFeatures,
}

impl Group {
    const fn new(together: XFeatures, needs: XFeatures) -> Self {
        Self { together, needs }
    }

    /// Whether `xcr0` has none of it, or all and what it needs.
    #[must_use]
    pub const fn is_whole_in(&self, xcr0: XFeatures) -> bool {
        !xcr0.intersects(self.together) || xcr0.contains(self.together.union(self.needs))
    }
}

/// All rules between components (SDM Vol. 1 §13.3): a value is legal where it has x87, nothing that
/// is not supported, and each of these whole. What a group needs comes before it.
///
/// ```
/// use xsave_state::{XFeatures, xcr0};
///
/// let legal = |xcr0| xcr0::GROUPS.iter().all(|group| group.is_whole_in(xcr0));
/// assert!(legal(XFeatures::from_bits_retain(0x602e7)));
/// assert!(!legal(XFeatures::from_bits_retain(0x600e3))); // AVX-512 without AVX
/// ```
pub const GROUPS: [Group; 4] = [
    Group::new(XFeatures::AVX, XFeatures::SSE),
    Group::new(XFeatures::MPX, XFeatures::empty()),
    Group::new(XFeatures::AVX512, XFeatures::AVX),
    Group::new(XFeatures::AMX, XFeatures::empty()),
];

/// Checks a value for XCR0 as XSETBV does: `supported` is CPUID.(EAX=0DH,ECX=0):EDX:EAX, see
/// [`Layout::user`](crate::Layout::user). KVM checks the same for a guest's XSETBV and in
/// KVM_SET_XCRS (arch/x86/kvm/x86.c, `__kvm_set_xcr`).
///
/// # Errors
///
/// The rule for which XSETBV raises #GP and KVM_SET_XCRS gives EINVAL.
///
/// ```
/// use xsave_state::XFeatures;
/// use xsave_state::xcr0::{self, Xcr0Error};
///
/// let supported = XFeatures::from_bits_retain(0x602e7);
/// assert_eq!(xcr0::check(XFeatures::from_bits_retain(0x60007), supported), Ok(()));
/// assert!(matches!(
///     xcr0::check(XFeatures::from_bits_retain(0x20007), supported),
///     Err(Xcr0Error::AmxSplit { .. })
/// ));
/// ```
#[inline]
pub fn check(xcr0: XFeatures, supported: XFeatures) -> Result<(), Xcr0Error> {
    let unsupported = xcr0 - supported;
    if !unsupported.is_empty() {
        return Err(Xcr0Error::Unsupported {
            xcr0,
            supported,
            unsupported,
        });
    }
    if !xcr0.contains(XFeatures::X87) {
        return Err(Xcr0Error::WithoutX87 { xcr0 });
    }
    if xcr0.contains(XFeatures::AVX) && !xcr0.contains(XFeatures::SSE) {
        return Err(Xcr0Error::AvxWithoutSse { xcr0 });
    }
    if split(xcr0, XFeatures::MPX) {
        return Err(Xcr0Error::MpxSplit { xcr0 });
    }
    if split(xcr0, XFeatures::AVX512) {
        return Err(Xcr0Error::Avx512Split { xcr0 });
    }
    if xcr0.intersects(XFeatures::AVX512) && !xcr0.contains(XFeatures::AVX) {
        return Err(Xcr0Error::Avx512WithoutAvx { xcr0 });
    }
    if split(xcr0, XFeatures::AMX) {
        return Err(Xcr0Error::AmxSplit { xcr0 });
    }
    Ok(())
}

/// The largest legal value within both: what is not supported is taken out, and with it what cannot
/// be without it. x87 is always there.
///
/// ```
/// use xsave_state::{XFeatures, xcr0};
///
/// let without_amx_data = XFeatures::from_bits_retain(0x202e7);
/// let largest = xcr0::largest_within(XFeatures::from_bits_retain(0x602e7), without_amx_data);
/// assert_eq!(largest.bits(), 0x2e7);
/// ```
#[must_use]
pub fn largest_within(xcr0: XFeatures, supported: XFeatures) -> XFeatures {
    let mut largest = (xcr0 & supported) | XFeatures::X87;
    for group in GROUPS {
        if !group.is_whole_in(largest) {
            largest -= group.together;
        }
    }
    largest
}

/// Some, but not all, of `together`.
fn split(xcr0: XFeatures, together: XFeatures) -> bool {
    xcr0.intersects(together) && !xcr0.contains(together)
}

/// A value that XCR0 cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Xcr0Error {
    /// It has components that CPUID.0DH does not list for XCR0.
    #[error("XCR0 is {xcr0}; {unsupported} of it is not among the supported {supported}")]
    Unsupported {
        /// The value.
        xcr0: XFeatures,
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        supported: XFeatures,
        /// What is too much.
        unsupported: XFeatures,
    },
    /// Bit 0 is always set.
    #[error("XCR0 is {xcr0}; x87 (bit 0) can never be clear")]
    WithoutX87 {
        /// The value.
        xcr0: XFeatures,
    },
    /// AVX needs SSE.
    #[error("XCR0 is {xcr0}; AVX needs SSE")]
    AvxWithoutSse {
        /// The value.
        xcr0: XFeatures,
    },
    /// BNDREGS and BNDCSR are enabled together.
    #[error("XCR0 is {xcr0}; BNDREGS and BNDCSR are set together or not at all")]
    MpxSplit {
        /// The value.
        xcr0: XFeatures,
    },
    /// The three AVX-512 components are enabled together.
    #[error("XCR0 is {xcr0}; opmask, ZMM_Hi256 and Hi16_ZMM are set together or not at all")]
    Avx512Split {
        /// The value.
        xcr0: XFeatures,
    },
    /// AVX-512 needs AVX.
    #[error("XCR0 is {xcr0}; AVX-512 needs AVX")]
    Avx512WithoutAvx {
        /// The value.
        xcr0: XFeatures,
    },
    /// XTILECFG and XTILEDATA are enabled together.
    #[error("XCR0 is {xcr0}; XTILECFG and XTILEDATA are set together or not at all")]
    AmxSplit {
        /// The value.
        xcr0: XFeatures,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(bits: u64) -> Result<(), Xcr0Error> {
        check(
            XFeatures::from_bits_retain(bits),
            XFeatures::from_bits_retain(0x602ff),
        )
    }

    #[test]
    fn legal_combinations() {
        for bits in [1, 3, 7, 0x1b, 0x1f, 0xe7, 0x203, 0x2e7, 0x60001, 0x602ff] {
            assert_eq!(verdict(bits), Ok(()), "{bits:#x}");
        }
    }

    /// The named errors of `check` are the rules of the table.
    #[test]
    fn what_is_legal_has_x87_and_each_group_whole() {
        for bits in (0..0x80000u64).filter(|bits| bits & !0x602ff == 0) {
            let xcr0 = XFeatures::from_bits_retain(bits);
            let whole = GROUPS.iter().all(|group| group.is_whole_in(xcr0));
            let legal = xcr0.contains(XFeatures::X87) && whole;
            assert_eq!(verdict(bits).is_ok(), legal, "{bits:#x}");
        }
    }

    /// Every value within the supported ones is legal or larger than the largest legal one.
    #[test]
    fn the_largest_legal_value() {
        let supported = XFeatures::from_bits_retain(0x602ff);
        for bits in (0..0x80000u64).filter(|bits| bits & !0x602ff == 0) {
            let xcr0 = XFeatures::from_bits_retain(bits);
            let largest = largest_within(xcr0, supported);
            assert_eq!(check(largest, supported), Ok(()));
            if check(xcr0, supported).is_ok() {
                assert_eq!(largest, xcr0);
            }
            assert!((xcr0 | XFeatures::X87).contains(largest));
            // Nothing legal lies between the two.
            for id in (xcr0 - largest).components() {
                let mut groups = GROUPS.iter().map(|group| group.together);
                let group = groups.find(|group| group.contains(id.bit()));
                let more = largest | (group.unwrap_or(id.bit()) & xcr0);
                assert!(check(more, supported).is_err(), "{bits:#x}: {more}");
            }
        }
    }

    /// The values for which a live KVM gives EINVAL are among them.
    #[test]
    fn each_rule_has_its_name() {
        use Xcr0Error::*;
        let rule = |bits| verdict(bits).unwrap_err();
        assert!(matches!(rule(0), WithoutX87 { .. }));
        assert!(matches!(rule(2), WithoutX87 { .. }));
        assert!(matches!(rule(5), AvxWithoutSse { .. }));
        assert!(matches!(rule(0xb), MpxSplit { .. }));
        assert!(matches!(rule(0x13), MpxSplit { .. }));
        assert!(matches!(rule(0x27), Avx512Split { .. }));
        assert!(matches!(rule(0x67), Avx512Split { .. }));
        assert!(matches!(rule(0xe3), Avx512WithoutAvx { .. }));
        assert!(matches!(rule(0x20007), AmxSplit { .. }));
        assert!(matches!(rule(0x40007), AmxSplit { .. }));
        assert!(matches!(rule(1 << 63 | 1), Unsupported { .. }));
        let xcr0 = XFeatures::from_bits_retain(0x107);
        assert_eq!(
            rule(0x107),
            Unsupported {
                xcr0,
                supported: XFeatures::from_bits_retain(0x602ff),
                unsupported: XFeatures::PT
            }
        );
    }
}
