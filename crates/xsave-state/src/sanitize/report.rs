//! What was changed: each change by name, with the value before and the value after.

use alloc::vec::Vec;
use core::fmt;

use crate::feature::XFeatures;
use crate::tile::{TILECFG_BYTES, TileConfigError};

bitflags::bitflags! {
    /// Kinds of state that can be lost. A [`Policy`](super::Policy) allows them by name.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Losses: u32 {
        /// Content of components that the target does not have: [`Change::Unsupported`].
        const UNSUPPORTED = 1 << 0;
        /// Content of components that IA32_XFD disables: [`Change::Disabled`]. Software may not
        /// rely on it, and Linux does not keep it (SDM Vol. 1 §13.14).
        const DISABLED = 1 << 1;
        /// A tile configuration that LDTILECFG would refuse: [`Change::TileConfig`].
        const TILE_CONFIG = 1 << 2;
        /// MXCSR bits that the target does not have: [`Change::Mxcsr`].
        const MXCSR = 1 << 3;
        /// XCR0 bits that the target does not have, or not in that combination: [`Change::Xcr0`].
        const XCR0 = 1 << 4;
        /// IA32_XFD and IA32_XFD_ERR bits that the target does not have: [`Change::Xfd`],
        /// [`Change::XfdErr`].
        const XFD = 1 << 5;
    }
}

impl fmt::Display for Losses {
    /// Names joined by ` | `. No bit: `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        bitflags::parser::to_writer(self, f)
    }
}

/// One thing that is not as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// The area had the compacted format. Loses nothing.
    Compacted {
        /// XCOMP_BV without bit 63; now it is 0.
        xcomp_bv: XFeatures,
    },
    /// XCOMP_BV was neither 0 nor had bit 63. XRSTOR raises #GP, KVM_SET_XSAVE gives EINVAL. Loses
    /// nothing.
    XcompBv {
        /// Bytes 520 to 527; now they are 0.
        was: u64,
    },
    /// Reserved bytes of the legacy region or of the header were not zero. Loses nothing.
    Reserved {
        /// Offset of the first: 416 to 463, or 528 to 575.
        offset: usize,
        /// What was there; now it is 0.
        was: u8,
        /// How many bytes of that region were not zero.
        nonzero_bytes: usize,
    },
    /// The area was shorter than the layout's, but everything in use was there. Loses nothing.
    Extended {
        /// What was there.
        actual_bytes: usize,
        /// By the layout.
        required_bytes: usize,
    },
    /// XSTATE_BV had components that the guest did not have where it ran: see
    /// [`Foreign::with_guest`](super::Foreign::with_guest). Loses nothing.
    OverReported {
        /// XSTATE_BV before.
        was: XFeatures,
        /// XSTATE_BV after.
        now: XFeatures,
        /// What the guest had.
        guest: XFeatures,
    },
    /// XSTATE_BV had components that the target does not have. [`Losses::UNSUPPORTED`] if any had
    /// content.
    Unsupported {
        /// XSTATE_BV before.
        was: XFeatures,
        /// XSTATE_BV after.
        now: XFeatures,
        /// What the target has.
        supported: XFeatures,
        /// Those dropped that had another value than the initial one, or of which that is not known
        /// because the layout has no place for them.
        with_content: XFeatures,
    },
    /// XSTATE_BV had components that IA32_XFD disables: a host that loads them gets #NM.
    /// [`Losses::DISABLED`] if any had content, as tile data.
    Disabled {
        /// XSTATE_BV before.
        was: XFeatures,
        /// XSTATE_BV after.
        now: XFeatures,
        /// IA32_XFD.
        xfd: XFeatures,
        /// Those dropped that had another value than the initial one.
        with_content: XFeatures,
    },
    /// TILECFG was one that LDTILECFG refuses; now it is initial. XRSTOR does the same without a
    /// fault. [`Losses::TILE_CONFIG`].
    TileConfig {
        /// Component 17 before.
        was: [u8; TILECFG_BYTES],
        /// The rule that it broke.
        rule: TileConfigError,
    },
    /// MXCSR had bits that the target does not have: XRSTOR raises #GP. [`Losses::MXCSR`] if it is
    /// loaded.
    Mxcsr {
        /// Bytes 24 to 27 before.
        was: u32,
        /// After.
        now: u32,
        /// The bits that may be set.
        mask: u32,
        /// Whether a component with which MXCSR is loaded was in use.
        loaded: bool,
    },
    /// Components that were in use with their initial value no longer are. Loses nothing.
    Released {
        /// XSTATE_BV before.
        was: XFeatures,
        /// XSTATE_BV after.
        now: XFeatures,
    },
    /// XCR0 had bits that the target does not have, or a combination that XSETBV does not take.
    /// [`Losses::XCR0`].
    Xcr0 {
        /// Before.
        was: XFeatures,
        /// After.
        now: XFeatures,
        /// What the target has.
        supported: XFeatures,
    },
    /// IA32_XFD had bits that the target cannot disable. [`Losses::XFD`].
    Xfd {
        /// Before.
        was: XFeatures,
        /// After.
        now: XFeatures,
        /// What the target can disable.
        supported: XFeatures,
    },
    /// IA32_XFD_ERR had bits that the target cannot disable. [`Losses::XFD`].
    XfdErr {
        /// Before.
        was: XFeatures,
        /// After.
        now: XFeatures,
        /// What the target can disable.
        supported: XFeatures,
    },
}

impl Change {
    /// What it loses; empty for a change that the guest cannot notice.
    #[must_use]
    pub fn losses(&self) -> Losses {
        match self {
            Self::Compacted { .. }
            | Self::XcompBv { .. }
            | Self::Reserved { .. }
            | Self::Extended { .. }
            | Self::OverReported { .. }
            | Self::Released { .. } => Losses::empty(),
            Self::Unsupported { with_content, .. } if with_content.is_empty() => Losses::empty(),
            Self::Unsupported { .. } => Losses::UNSUPPORTED,
            Self::Disabled { with_content, .. } if with_content.is_empty() => Losses::empty(),
            Self::Disabled { .. } => Losses::DISABLED,
            Self::TileConfig { .. } => Losses::TILE_CONFIG,
            Self::Mxcsr { loaded: false, .. } => Losses::empty(),
            Self::Mxcsr { .. } => Losses::MXCSR,
            Self::Xcr0 { .. } => Losses::XCR0,
            Self::Xfd { .. } | Self::XfdErr { .. } => Losses::XFD,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compacted { xcomp_bv } => {
                write!(f, "XCOMP_BV: compacted with {xcomp_bv}, now 0")
            }
            Self::XcompBv { was } => write!(f, "XCOMP_BV: {was:#x}, now 0"),
            Self::Reserved {
                offset,
                was,
                nonzero_bytes,
            } => write!(
                f,
                "reserved byte {offset}: {was:#04x}, now 0 ({nonzero_bytes} such bytes)"
            ),
            Self::Extended {
                actual_bytes,
                required_bytes,
            } => write!(f, "length: {actual_bytes} bytes, now {required_bytes}"),
            Self::OverReported { was, now, guest } => {
                write!(f, "XSTATE_BV: {was}, now {now}: the guest had only {guest}")
            }
            Self::Unsupported {
                was,
                now,
                supported,
                with_content,
            } => {
                write!(f, "XSTATE_BV: {was}, now {now}: the target has {supported}")?;
                lost(f, *with_content)
            }
            Self::Disabled {
                was,
                now,
                xfd,
                with_content,
            } => {
                write!(
                    f,
                    "XSTATE_BV: {was}, now {now}: IA32_XFD ({xfd}) disables the rest"
                )?;
                lost(f, *with_content)
            }
            Self::TileConfig { rule, .. } => write!(f, "TILECFG: {rule}; now initial"),
            Self::Mxcsr {
                was,
                now,
                mask,
                loaded,
            } => {
                write!(f, "MXCSR: {was:#x}, now {now:#x}: the target has {mask:#x}")?;
                if !loaded {
                    f.write_str(" (nothing loads it)")?;
                }
                Ok(())
            }
            Self::Released { was, now } => write!(
                f,
                "XSTATE_BV: {was}, now {now}: the rest has its initial value"
            ),
            Self::Xcr0 {
                was,
                now,
                supported,
            } => write!(f, "XCR0: {was}, now {now}: the target has {supported}"),
            Self::Xfd {
                was,
                now,
                supported,
            } => write!(f, "IA32_XFD: {was}, now {now}: the target has {supported}"),
            Self::XfdErr {
                was,
                now,
                supported,
            } => write!(
                f,
                "IA32_XFD_ERR: {was}, now {now}: the target has {supported}"
            ),
        }
    }
}

fn lost(f: &mut fmt::Formatter<'_>, with_content: XFeatures) -> fmt::Result {
    if with_content.is_empty() {
        return Ok(());
    }
    write!(f, "; content of {with_content} is lost")
}

/// All changes, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(Vec<Change>);

impl Report {
    /// The changes. None: the state was safe as it was.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.0
    }

    /// What they lose, taken together.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.0
            .iter()
            .fold(Losses::empty(), |all, change| all.union(change.losses()))
    }

    pub(super) fn add(&mut self, change: Change) {
        self.0.push(change);
    }
}

impl fmt::Display for Report {
    /// The changes, joined by `; `. None: `nothing`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let mut separator = "";
        for change in &self.0 {
            write!(f, "{separator}{change}")?;
            separator = "; ";
        }
        Ok(())
    }
}
