//! State components by number, by name and as bitmaps.
//!
//! A state component bitmap is the 64-bit form in which XCR0, IA32_XSS, IA32_XFD, XSTATE_BV and
//! XCOMP_BV name components (SDM Vol. 1 §13.1): bit *i* stands for component *i*.

use core::fmt;

use bitflags::bitflags;

bitflags! {
    /// A state component bitmap (SDM Vol. 1 §13.1): bit *i* stands for component *i*.
    ///
    /// Bits without a name here are kept as they are. What they mean is decided by the
    /// [`Layout`](crate::Layout), never by this list.
    ///
    /// ```
    /// use xsave_state::XFeatures;
    ///
    /// let xcr0 = XFeatures::from_bits_retain(0x602e7);
    /// assert!(xcr0.contains(XFeatures::AMX));
    /// assert_eq!((xcr0 & XFeatures::AMX).to_string(), "XTILECFG | XTILEDATA (0x60000)");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct XFeatures: u64 {
        /// x87 FPU and MMX state, component 0.
        const X87 = 1 << 0;
        /// XMM registers; MXCSR belongs to this component and to [`AVX`](Self::AVX). Component 1.
        const SSE = 1 << 1;
        /// Upper halves of YMM0 to YMM15, component 2.
        const AVX = 1 << 2;
        /// MPX bound registers, component 3.
        const BNDREGS = 1 << 3;
        /// MPX configuration and status, component 4.
        const BNDCSR = 1 << 4;
        /// AVX-512 opmask registers k0 to k7, component 5.
        const OPMASK = 1 << 5;
        /// Upper halves of ZMM0 to ZMM15, component 6.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16 to ZMM31, component 7.
        const HI16_ZMM = 1 << 7;
        /// Intel Processor Trace, component 8 (supervisor).
        const PT = 1 << 8;
        /// Protection-key rights of user pages, component 9.
        const PKRU = 1 << 9;
        /// Process address space identifier, component 10 (supervisor).
        const PASID = 1 << 10;
        /// Control-flow enforcement, user mode, component 11 (supervisor).
        const CET_U = 1 << 11;
        /// Control-flow enforcement, supervisor mode, component 12 (supervisor).
        const CET_S = 1 << 12;
        /// Hardware duty cycling, component 13 (supervisor).
        const HDC = 1 << 13;
        /// User interrupts, component 14 (supervisor).
        const UINTR = 1 << 14;
        /// Last branch records, component 15 (supervisor).
        const LBR = 1 << 15;
        /// Hardware P-states, component 16 (supervisor).
        const HWP = 1 << 16;
        /// AMX tile configuration (TILECFG), component 17.
        const XTILECFG = 1 << 17;
        /// AMX tile data (TMM0 to TMM7), component 18.
        const XTILEDATA = 1 << 18;
        /// Extended general-purpose registers R16 to R31 of APX, component 19.
        const APX = 1 << 19;

        /// Both AMX components: XCR0 has both or neither (SDM Vol. 1 §13.3).
        const AMX = Self::XTILECFG.bits() | Self::XTILEDATA.bits();
        /// The three AVX-512 components: XCR0 has all or none (SDM Vol. 1 §13.3).
        const AVX512 = Self::OPMASK.bits() | Self::ZMM_HI256.bits() | Self::HI16_ZMM.bits();
        /// Both MPX components: XCR0 has both or neither (SDM Vol. 1 §13.3).
        const MPX = Self::BNDREGS.bits() | Self::BNDCSR.bits();
        /// The components of the 512-byte legacy region.
        const LEGACY = Self::X87.bits() | Self::SSE.bits();

        // Every bit is kept: a component that has no name yet is still a component.
        const _ = !0;
    }
}

impl XFeatures {
    /// Iterates over the components in ascending order of their numbers. Bit 63 is no component (in XCOMP_BV it
    /// marks the compacted format, SDM Vol. 1 §13.4.2) and is left out.
    ///
    /// ```
    /// use xsave_state::{ComponentId, XFeatures};
    ///
    /// let ids: Vec<_> = XFeatures::AMX.components().collect();
    /// assert_eq!(ids, [ComponentId::XTILECFG, ComponentId::XTILEDATA]);
    /// ```
    pub fn components(self) -> impl Iterator<Item = ComponentId> {
        let mut rest = self.bits() & ComponentId::BITMAP;
        core::iter::from_fn(move || {
            let number = u8::try_from(rest.trailing_zeros()).ok()?;
            let id = ComponentId::new(number)?;
            rest &= !id.bit().bits();
            Some(id)
        })
    }
}

impl fmt::Display for XFeatures {
    /// Names joined by ` | `, then the bitmap in hexadecimal: `x87 | SSE (0x3)`. No bit: `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        for id in self.components() {
            write!(f, "{separator}{id}")?;
            separator = " | ";
        }
        if self.bits() & !ComponentId::BITMAP != 0 {
            write!(f, "{separator}bit 63")?;
        }
        write!(f, " ({:#x})", self.bits())
    }
}

/// The number of a state component, 0 to 62.
///
/// ```
/// use xsave_state::ComponentId;
///
/// assert_eq!(ComponentId::XTILEDATA.number(), 18);
/// assert_eq!(ComponentId::XTILEDATA.to_string(), "XTILEDATA");
/// assert_eq!(ComponentId::new(40).unwrap().to_string(), "component 40");
/// assert_eq!(ComponentId::new(63), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComponentId(u8);

impl ComponentId {
    /// One more than the highest number: bit 63 of the bitmaps is not a component.
    pub const COUNT: u8 = 63;
    const BITMAP: u64 = (1 << Self::COUNT) - 1;

    /// x87, component 0.
    pub const X87: Self = Self(0);
    /// SSE, component 1.
    pub const SSE: Self = Self(1);
    /// AVX, component 2.
    pub const AVX: Self = Self(2);
    /// MPX bound registers, component 3.
    pub const BNDREGS: Self = Self(3);
    /// MPX configuration and status, component 4.
    pub const BNDCSR: Self = Self(4);
    /// AVX-512 opmasks, component 5.
    pub const OPMASK: Self = Self(5);
    /// Upper halves of ZMM0 to ZMM15, component 6.
    pub const ZMM_HI256: Self = Self(6);
    /// ZMM16 to ZMM31, component 7.
    pub const HI16_ZMM: Self = Self(7);
    /// Intel Processor Trace, component 8 (supervisor).
    pub const PT: Self = Self(8);
    /// PKRU, component 9.
    pub const PKRU: Self = Self(9);
    /// Process address space identifier, component 10 (supervisor).
    pub const PASID: Self = Self(10);
    /// Control-flow enforcement, user mode, component 11 (supervisor).
    pub const CET_U: Self = Self(11);
    /// Control-flow enforcement, supervisor mode, component 12 (supervisor).
    pub const CET_S: Self = Self(12);
    /// Hardware duty cycling, component 13 (supervisor).
    pub const HDC: Self = Self(13);
    /// User interrupts, component 14 (supervisor).
    pub const UINTR: Self = Self(14);
    /// Last branch records, component 15 (supervisor).
    pub const LBR: Self = Self(15);
    /// Hardware P-states, component 16 (supervisor).
    pub const HWP: Self = Self(16);
    /// AMX tile configuration, component 17.
    pub const XTILECFG: Self = Self(17);
    /// AMX tile data, component 18.
    pub const XTILEDATA: Self = Self(18);
    /// Extended general-purpose registers of APX, component 19.
    pub const APX: Self = Self(19);

    /// Returns the component of that number, or `None` above 62.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Returns its number, 0 to 62: the sub-leaf of CPUID.0DH that describes it.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Returns the bitmap with this component only.
    #[must_use]
    pub const fn bit(self) -> XFeatures {
        // The shift is below 64: `new` and the constants admit 0 to 62 only.
        XFeatures::from_bits_retain(1u64.wrapping_shl(self.0 as u32))
    }

    /// Returns its usual name, or `None` for a number without one.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "x87",
            1 => "SSE",
            2 => "AVX",
            3 => "BNDREGS",
            4 => "BNDCSR",
            5 => "opmask",
            6 => "ZMM_Hi256",
            7 => "Hi16_ZMM",
            8 => "PT",
            9 => "PKRU",
            10 => "PASID",
            11 => "CET_U",
            12 => "CET_S",
            13 => "HDC",
            14 => "UINTR",
            15 => "LBR",
            16 => "HWP",
            17 => "XTILECFG",
            18 => "XTILEDATA",
            19 => "APX",
            _ => return None,
        })
    }
}

impl fmt::Display for ComponentId {
    /// The name, or `component N` where it has none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "component {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_are_kept_and_named_by_number() {
        let features = XFeatures::from_bits_retain(1 << 40 | 1 << 63 | 1);
        assert_eq!(features.bits(), 1 << 40 | 1 << 63 | 1);
        assert_eq!(
            features.to_string(),
            "x87 | component 40 | bit 63 (0x8000010000000001)"
        );
        assert_eq!(XFeatures::empty().to_string(), "none");
    }

    #[test]
    fn components_ascend_and_leave_out_bit_63() {
        let numbers: Vec<u8> = XFeatures::all()
            .components()
            .map(ComponentId::number)
            .collect();
        assert_eq!(numbers, (0..63).collect::<Vec<u8>>());
        assert_eq!(XFeatures::empty().components().count(), 0);
    }

    #[test]
    fn every_component_is_its_own_bit() {
        for number in 0..63 {
            let id = ComponentId::new(number).unwrap();
            assert_eq!(id.bit().bits(), 1 << number);
            assert_eq!(id.bit().components().collect::<Vec<_>>(), [id]);
        }
    }
}
