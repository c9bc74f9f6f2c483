//! What is to be done with a vCPU.

use core::fmt;

use thiserror::Error;
use xsave_state::xcr0::Xcr0Error;
use xsave_state::{Layout, XFeatures};

/// What is to be done after an [`Event`](super::Event).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum Action {
    /// The vCPU may run. Where a write was waiting, or has just come, perform it first.
    Complete,
    /// The same, and no write of the registers needs to be intercepted any more: the guest has state
    /// for every feature that IA32_XFD can disable.
    PassThrough,
    /// Raise #GP at the guest's instruction, which has no other effect. Then the vCPU may run.
    InjectGp(Fault),
    /// Ask the VMM for state, and do not run the vCPU before it has answered with
    /// [`Grant`](super::Event::Grant), [`Deny`](super::Event::Deny) or
    /// [`Fail`](super::Event::Fail). The answer may come later and from elsewhere.
    Grow(Growth),
    /// Do not run the vCPU: the question stands. [`Retry`](super::Event::Retry) asks it again.
    Hold,
}

/// The state that a guest is about to need: which features, and how large they are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Growth {
    features: XFeatures,
    bytes: usize,
    area_bytes: usize,
}

impl Growth {
    pub(super) fn new(layout: &Layout, features: XFeatures, granted: XFeatures) -> Self {
        let sizes = features
            .components()
            .filter_map(|id| layout.component(id))
            .map(|component| component.size());
        let always = layout.user() - layout.xfd();
        Self {
            features,
            // `Layout` holds that all components together are at most 64 KiB.
            bytes: sizes.fold(0, usize::saturating_add),
            area_bytes: layout.standard_size_of(always | granted | features),
        }
    }

    /// The features that have no state yet, all of them at once.
    #[must_use]
    pub const fn features(&self) -> XFeatures {
        self.features
    }

    /// Their sizes together in bytes, CPUID.(EAX=0DH,ECX=n):EAX.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of a standard-format area with room for them, for what was granted before, and for all
    /// that IA32_XFD cannot disable.
    #[must_use]
    pub const fn area_bytes(&self) -> usize {
        self.area_bytes
    }
}

impl fmt::Debug for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Growth({self})")
    }
}

impl fmt::Display for Growth {
    /// `XTILEDATA (0x40000), 8192 bytes, in an area of 11008 bytes`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            features,
            bytes,
            area_bytes,
        } = self;
        write!(
            f,
            "{features}, {bytes} bytes, in an area of {area_bytes} bytes"
        )
    }
}

/// Why a write raises #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// IA32_XFD has bits that are reserved for this guest (SDM Vol. 1 §13.14).
    #[error("IA32_XFD is {xfd}; only {supported} can be disabled")]
    ReservedXfd {
        /// The value.
        xfd: XFeatures,
        /// What the guest's CPUID lets it disable.
        supported: XFeatures,
    },
    /// XCR0 cannot have this value.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
    /// The VMM denied the growth.
    #[error("the VMM denied state for {features}")]
    Denied {
        /// What the guest was about to use.
        features: XFeatures,
    },
}
