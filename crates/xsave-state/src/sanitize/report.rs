//! Names every change that was made to an untrusted state.

use alloc::vec::Vec;
use core::fmt;

use crate::feature::{ComponentId, XFeatures};
use crate::fit::{List, Losses, Misfit};

/// One change to an untrusted state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// The area had the compacted format. Loses nothing.
    Compacted {
        /// XCOMP_BV without bit 63; now it is 0.
        xcomp_bv: XFeatures,
    },
    /// XCOMP_BV was neither 0 nor had bit 63. XRSTOR raises #GP, KVM_SET_XSAVE fails with EINVAL.
    /// Loses nothing.
    XcompBv {
        /// Bytes 520 to 527; now they are 0.
        was: u64,
    },
    /// XSTATE_BV had bit 63, which is no component: KVM_SET_XSAVE fails with EINVAL. Now it is clear.
    /// Loses nothing.
    Bit63,
    /// Reserved bytes of the legacy region or of the header were not zero. Loses nothing.
    Reserved {
        /// Offset of the first: 416 to 463, or 528 to 575.
        offset: usize,
        /// Its value; now it is 0.
        was: u8,
        /// How many bytes of that region were not zero.
        nonzero_bytes: usize,
    },
    /// The area was shorter than the layout requires, but everything in use was there. Loses
    /// nothing.
    Extended {
        /// The length of the area.
        actual_bytes: usize,
        /// The length that the layout requires.
        required_bytes: usize,
    },
    /// MXCSR had bits that the target lacks, but nothing in use loads it. KVM_SET_XSAVE fails with
    /// EINVAL where x87 is in use. Loses nothing.
    UnusedMxcsr {
        /// Bytes 24 to 27; now they are 0x1f80.
        was: u32,
        /// The bits that may be set.
        mask: u32,
    },
    /// XSTATE_BV had a component that the guest did not have where it ran: see
    /// [`UntrustedArea::of_guest_with`](super::UntrustedArea::of_guest_with). Loses nothing.
    OverReported {
        /// The component; now it is not in use.
        component: ComponentId,
    },
    /// A component that cannot be kept was in use with its initial value. Loses nothing.
    Dropped {
        /// The component; now it is not in use.
        component: ComponentId,
    },
    /// Something did not fit, and is lost.
    Lost(Misfit),
}

impl Change {
    /// Returns the kind of state that the change loses; none for a change that the guest cannot
    /// notice.
    #[must_use]
    pub const fn loss(&self) -> Losses {
        match self {
            Self::Lost(misfit) => misfit.loss(),
            _ => Losses::empty(),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compacted { xcomp_bv } => {
                write!(f, "XCOMP_BV: compacted with {xcomp_bv}, now 0")
            }
            Self::Bit63 => f.write_str("XSTATE_BV: bit 63, which is no component, now 0"),
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
            Self::UnusedMxcsr { was, mask } => write!(
                f,
                "MXCSR: {was:#x}, now initial: nothing in use loads it, and the target supports \
                 only the bits {mask:#x}"
            ),
            Self::OverReported { component } => {
                write!(
                    f,
                    "{component}: no longer in use, because the guest never had it"
                )
            }
            Self::Dropped { component } => {
                write!(f, "{component}: no longer in use; it had its initial value")
            }
            Self::Lost(misfit) => misfit.fmt(f),
        }
    }
}

/// All changes to an untrusted state, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(Vec<Change>);

impl Report {
    /// Returns the changes. None: the state was safe as it was.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.0
    }

    /// Iterates over the changes that lose something.
    pub fn lost(&self) -> impl Iterator<Item = &Misfit> {
        self.0.iter().filter_map(|change| match change {
            Change::Lost(misfit) => Some(misfit),
            _ => None,
        })
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
        List(&self.0).fmt(f)
    }
}
