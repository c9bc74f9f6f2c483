//! Why a guest does not run on a host as it is, and what was not compared.

use std::fmt;

use cpuid_amx::features::{ComponentShape, Feature};
use cpuid_amx::{Bits, PermissionError};
use thiserror::Error;
use xsave_state::{LayoutError, Misfit, RelocateError};

use crate::host::NoKvm;
use crate::restrict::RestrictError;

/// How far the guest relies on something that the host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Usage {
    /// The guest has not started.
    NotStarted,
    /// It runs, and has not enabled the component that this needs.
    NotEnabled,
    /// It runs, and has enabled it.
    Enabled,
    /// It runs, and has state in the component that this needs, which XCR0 does not enable now.
    InUse,
    /// It runs, and needs to enable nothing for it: it has seen it in CPUID when it started.
    Seen,
    /// It runs, and the register that would tell, IA32_XSS or XCR0, is not known.
    NotKnown,
}

impl Usage {
    /// Whether it can be hidden from the guest without taking away what the guest may use.
    #[must_use]
    pub const fn can_be_hidden(self) -> bool {
        matches!(self, Self::NotStarted | Self::NotEnabled)
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotStarted => "",
            Self::NotEnabled => "; it has not enabled it",
            Self::Enabled => "; it has enabled it and may use it at any moment",
            Self::InUse => "; it has state in it",
            Self::Seen => "; it has seen it when it started, and may rely on it",
            Self::NotKnown => "; it may have enabled it: what it has enabled is not known",
        })
    }
}

/// Why a guest does not run on a host as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Reason {
    /// There is no KVM.
    #[error("{0}")]
    NoKvm(NoKvm),
    /// The processor is another company's.
    #[error("the guest's processor is from {guest}, the host's from {host}")]
    Vendor {
        /// What the guest sees.
        guest: String,
        /// What the host's guests see.
        host: String,
    },
    /// The guest sees XTILEDATA, and the host has refused the permission for it.
    #[error("the guest has XTILEDATA{usage}: {error}")]
    Permission {
        /// The refusal.
        error: PermissionError,
        /// Whether the guest relies on it.
        usage: Usage,
    },
    /// The host lacks a feature of XSAVE or AMX.
    #[error("the guest sees {feature}, which the host lacks{usage}")]
    Feature {
        /// The feature.
        feature: Feature,
        /// Whether the guest relies on it.
        usage: Usage,
    },
    /// The host lacks a component of the guest's CPUID.
    #[error("the guest sees {sees}, which the host lacks{usage}")]
    Component {
        /// As the guest sees it.
        sees: ComponentShape,
        /// Whether the guest relies on it.
        usage: Usage,
    },
    /// The host has a component at another place, with another size, or of another kind.
    #[error("the guest sees {sees}, and the host has {has}{usage}")]
    Elsewhere {
        /// As the guest sees it.
        sees: ComponentShape,
        /// As the host has it.
        has: ComponentShape,
        /// Whether the guest relies on it.
        usage: Usage,
    },
    /// The host lacks other features of the guest's CPUID.
    #[error("the guest sees {bits}, which the host lacks{usage}")]
    Bits {
        /// Those that are missing.
        bits: Bits,
        /// Whether the guest relies on them.
        usage: Usage,
    },
    /// A number is smaller at the host: address bits, performance counters, a version.
    #[error(
        "the guest sees CPUID.{:X}H.{}:{}{} = {guest}, and the host has {host}{usage}",
        place.leaf, place.subleaf, place.register, Range(place.mask)
    )]
    Number {
        /// Where it is.
        place: Bits,
        /// What the guest sees.
        guest: u32,
        /// What the host's guests see.
        host: u32,
        /// Whether the guest relies on it.
        usage: Usage,
    },
    /// A feature MSR says more than the host's.
    #[error(
        "the guest sees {name} = {guest:#x}, and the host has {host:#x}, without {missing:#x}{usage}"
    )]
    FeatureMsr {
        /// The MSR's name.
        name: &'static str,
        /// The guest's value.
        guest: u64,
        /// The host's.
        host: u64,
        /// The bits that the host lacks.
        missing: u64,
        /// Whether the guest relies on them.
        usage: Usage,
    },
    /// The guest's time would go faster or slower from then on.
    #[error(
        "the guest's TSC has {guest_khz} kHz, and the host's {host_khz} kHz, which its KVM cannot scale"
    )]
    Tsc {
        /// The guest's.
        guest_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// The area of a vCPU is not the host's.
    #[error("vCPU {vcpu}: {misfit}")]
    Misfit {
        /// The vCPU.
        vcpu: u32,
        /// How.
        misfit: Misfit,
    },
    /// The host cannot hold something that a vCPU has.
    #[error("vCPU {vcpu}: {loss}")]
    Loss {
        /// The vCPU.
        vcpu: u32,
        /// What.
        loss: Misfit,
    },
    /// The state of a vCPU cannot be moved. Not known to be possible.
    #[error("vCPU {vcpu}: {error}")]
    State {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        error: RelocateError,
    },
    /// The host has no area for extended state.
    #[error("the host has no area for extended state: {0}")]
    Layout(LayoutError),
    /// What would be left after hiding contradicts itself. Not known to be possible.
    #[error("what is left after hiding is not whole: {0}")]
    NotWhole(RestrictError),
}

impl Reason {
    /// How far the guest relies on it; `None` where that is no question.
    #[must_use]
    pub const fn usage(&self) -> Option<Usage> {
        match self {
            Self::Permission { usage, .. }
            | Self::Feature { usage, .. }
            | Self::Component { usage, .. }
            | Self::Elsewhere { usage, .. }
            | Self::Bits { usage, .. }
            | Self::Number { usage, .. }
            | Self::FeatureMsr { usage, .. } => Some(*usage),
            _ => None,
        }
    }
}

/// The bits of a number, as the manuals write them.
struct Range(u32);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let high = 31_u32.saturating_sub(self.0.leading_zeros());
        write!(f, "[{high}:{}]", self.0.trailing_zeros())
    }
}

/// What was not compared, because one side does not know it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotCompared {
    /// The guest's CPUID: no feature was compared but the places of its components.
    #[error("the features that the guest sees: its CPUID is not known")]
    GuestCpuid,
    /// All of the host: its description could not be made.
    #[error("the host: {0}")]
    Host(NoKvm),
    /// An MSR of the guest.
    #[error("{0}: the guest's value is not known")]
    GuestMsr(&'static str),
    /// An MSR of the host.
    #[error("{0}: the host's description does not have it")]
    HostMsr(&'static str),
    /// A leaf of the host, of which there is only a dump of CPUID without it.
    #[error("CPUID.{0:X}H: the host's dump does not have it")]
    HostLeaf(u32),
    /// The frequency of the guest's TSC.
    #[error("the frequency of the TSC: the guest's is not known")]
    GuestTsc,
    /// That of the host.
    #[error("the frequency of the TSC: the host's description does not have it")]
    HostTsc,
    /// A field of the host's description that this version does not know.
    #[error("{0}: a field of the host's description that this version does not know")]
    Unknown(String),
}

impl NotCompared {
    /// Whether nothing can be said without it.
    #[must_use]
    pub const fn decides(&self) -> bool {
        matches!(self, Self::GuestCpuid | Self::Host(_))
    }
}
