//! The values that XCR0 can have (SDM Vol. 1 §13.3; Vol. 2, XSETBV).

use core::fmt;

use thiserror::Error;

use crate::feature::XFeatures;

/// Components that XCR0 enables together or not at all, and what they require.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rule {
    /// The components that are set together.
    pub together: XFeatures,
    /// Components that must be set as well.
    pub requires: XFeatures,
}

impl Rule {
    const fn new(together: XFeatures, requires: XFeatures) -> Self {
        Self { together, requires }
    }

    /// Returns true when `xcr0` has none of these components, or all of them and what they require.
    #[must_use]
    pub const fn holds_in(&self, xcr0: XFeatures) -> bool {
        !xcr0.intersects(self.together) || xcr0.contains(self.together.union(self.requires))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for id in self.together.components() {
            write!(f, "{separator}{id}")?;
            separator = ", ";
        }
        let alone = self.together.components().count() == 1;
        if !alone {
            f.write_str(" must be set together or not at all")?;
        }
        for id in self.requires.components() {
            let verb = if alone { " requires" } else { ", and require" };
            write!(f, "{verb} {id}")?;
        }
        Ok(())
    }
}

/// All rules between components (SDM Vol. 1 §13.3).
///
/// A value is legal when it has x87 and nothing unsupported, and each rule holds: [`check`]. The rule
/// of a required component comes before those that require it, so that [`largest_within`] needs one
/// pass.
pub const RULES: [Rule; 4] = [
    Rule::new(XFeatures::AVX, XFeatures::SSE),
    Rule::new(XFeatures::MPX, XFeatures::empty()),
    Rule::new(XFeatures::AVX512, XFeatures::AVX),
    Rule::new(XFeatures::AMX, XFeatures::empty()),
];

/// Checks a value for XCR0 as XSETBV does. `supported` is CPUID.(EAX=0DH,ECX=0):EDX:EAX, see
/// [`Layout::user`](crate::Layout::user). KVM applies the same rules to a guest's XSETBV and to
/// KVM_SET_XCRS (arch/x86/kvm/x86.c, `__kvm_set_xcr`).
///
/// # Errors
///
/// The rule for which XSETBV raises #GP and KVM_SET_XCRS fails with EINVAL.
///
/// ```
/// use xsave_state::XFeatures;
/// use xsave_state::xcr0::{self, Xcr0Error};
///
/// let supported = XFeatures::from_bits_retain(0x602e7);
/// assert_eq!(xcr0::check(XFeatures::from_bits_retain(0x60007), supported), Ok(()));
///
/// let split = xcr0::check(XFeatures::from_bits_retain(0x20007), supported).unwrap_err();
/// assert_eq!(
///     split.to_string(),
///     "XCR0 is x87 | SSE | AVX | XTILECFG (0x20007); XTILECFG, XTILEDATA must be set together or \
///      not at all"
/// );
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
    for rule in RULES {
        if !rule.holds_in(xcr0) {
            return Err(Xcr0Error::Rule { xcr0, rule });
        }
    }
    Ok(())
}

/// Returns the largest legal value within both arguments: unsupported components are removed, and
/// with them every component that requires one of them. x87 is always set.
///
/// ```
/// use xsave_state::{XFeatures, xcr0};
///
/// let without_tile_data = XFeatures::from_bits_retain(0x202e7);
/// let largest = xcr0::largest_within(XFeatures::from_bits_retain(0x602e7), without_tile_data);
/// assert_eq!(largest.bits(), 0x2e7);
/// ```
#[must_use]
pub fn largest_within(xcr0: XFeatures, supported: XFeatures) -> XFeatures {
    let mut largest = (xcr0 & supported) | XFeatures::X87;
    for rule in RULES {
        if !rule.holds_in(largest) {
            largest -= rule.together;
        }
    }
    largest
}

/// Errors from checking a value for XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Xcr0Error {
    /// The value has components that CPUID.0DH does not list for XCR0.
    #[error("XCR0 is {xcr0}; it has {unsupported}, but only {supported} is supported")]
    Unsupported {
        /// The value.
        xcr0: XFeatures,
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        supported: XFeatures,
        /// The components that are not supported.
        unsupported: XFeatures,
    },
    /// Bit 0 is clear.
    #[error("XCR0 is {xcr0}; x87 (bit 0) must be set")]
    WithoutX87 {
        /// The value.
        xcr0: XFeatures,
    },
    /// A rule between components is broken.
    #[error("XCR0 is {xcr0}; {rule}")]
    Rule {
        /// The value.
        xcr0: XFeatures,
        /// The rule.
        rule: Rule,
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
                let mut groups = RULES.iter().map(|rule| rule.together);
                let group = groups.find(|group| group.contains(id.bit()));
                let more = largest | (group.unwrap_or(id.bit()) & xcr0);
                assert!(check(more, supported).is_err(), "{bits:#x}: {more}");
            }
        }
    }

    /// Values for which a live KVM gives EINVAL, with the reason that each error gives.
    #[test]
    fn every_rule_is_named() {
        let text = |bits| verdict(bits).unwrap_err().to_string();
        for (bits, reason) in [
            (0, "x87 (bit 0) must be set"),
            (2, "x87 (bit 0) must be set"),
            (5, "AVX requires SSE"),
            (0xb, "BNDREGS, BNDCSR must be set together or not at all"),
            (0x13, "BNDREGS, BNDCSR must be set together or not at all"),
            (0x27, "opmask, ZMM_Hi256, Hi16_ZMM must be set together"),
            (0x67, "opmask, ZMM_Hi256, Hi16_ZMM must be set together"),
            (0xe3, "and require AVX"),
            (0x2_0007, "XTILECFG, XTILEDATA must be set together"),
            (0x4_0007, "XTILECFG, XTILEDATA must be set together"),
            (1 << 63 | 1, "it has bit 63"),
            (0x107, "it has PT (0x100)"),
        ] {
            assert!(text(bits).contains(reason), "{bits:#x}: {}", text(bits));
        }
    }
}
