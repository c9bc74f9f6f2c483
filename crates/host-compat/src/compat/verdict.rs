//! What comes of the comparison.

use std::fmt;

use cpuid_amx::coherence::Contradiction;
use cpuid_amx::features::{ComponentShape, FeatureSet};
use cpuid_amx::{CpuidTable, Table};

use super::reason::{NotCompared, Reason};

/// What comes of the comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compatibility {
    /// Every reason why the guest does not run there as it is.
    pub reasons: Vec<Reason>,
    /// What was not compared.
    pub not_compared: Vec<NotCompared>,
    /// Contradictions in the guest's own CPUID. What contradicts itself was not compared.
    pub contradictions: Vec<Contradiction>,
    /// The guest's CPUID without all that the host lacks, whole and coherent; `None` where nothing can
    /// be hidden there: the guest's CPUID is not known, or this KVM
    /// [rewrites](crate::host::KvmFacts::rewritten) CPUID.
    pub hidden: Option<Table>,
    pub(super) relayout: bool,
}

impl Compatibility {
    /// Whether the guest runs there, and what has to be done for it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let remedies: Option<Vec<Remedy>> =
            self.reasons.iter().map(|one| self.remedy(one)).collect();
        let Some(remedies) = remedies else {
            return Verdict::No;
        };
        if self.not_compared.iter().any(NotCompared::decides) {
            return Verdict::Unknown;
        }
        if remedies.is_empty() {
            return Verdict::Runs;
        }
        Verdict::RunsAfter {
            relayout: remedies.contains(&Remedy::Relayout),
            hide: remedies.contains(&Remedy::Hide),
        }
    }

    /// What would help against one of the reasons; `None`: nothing does.
    #[must_use]
    pub fn remedy(&self, reason: &Reason) -> Option<Remedy> {
        if reason.usage().is_some_and(super::Usage::can_be_hidden) {
            return self.hidden.as_ref().map(|_| Remedy::Hide);
        }
        let moves = match reason {
            Reason::Elsewhere { sees, has, .. } => {
                let moved = ComponentShape {
                    offset: has.offset,
                    ..*sees
                };
                moved == *has
            }
            Reason::Misfit { .. } => true,
            _ => false,
        };
        (moves && self.relayout).then_some(Remedy::Relayout)
    }

    /// The features of XSAVE and AMX that the guest has once the rest is hidden; none where nothing can
    /// be hidden.
    #[must_use]
    pub fn shared(&self) -> FeatureSet {
        self.hidden
            .as_ref()
            .map_or_else(FeatureSet::default, |table| {
                FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
            })
    }
}

/// Whether a guest runs on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// As it is.
    Runs,
    /// After the remedies of its reasons.
    RunsAfter {
        /// See [`Remedy::Relayout`].
        relayout: bool,
        /// See [`Remedy::Hide`].
        hide: bool,
    },
    /// Nothing is known that keeps it from running there, but too little was compared to say yes: see
    /// [`NotCompared::decides`].
    Unknown,
    /// It does not: the host lacks something that it relies on.
    No,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Runs => "runs as it is",
            Self::RunsAfter {
                relayout: true,
                hide: true,
            } => "runs, with its states in another layout and some features hidden",
            Self::RunsAfter { relayout: true, .. } => "runs, with its states in another layout",
            Self::RunsAfter { .. } => "runs, with some features hidden",
            Self::Unknown => "cannot be judged",
            Self::No => "does not run",
        })
    }
}

/// What would help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remedy {
    /// To move the states into the host's layout ([`xsave_state::ExtendedState::relocate`]): see
    /// [`Guest::with_relayout`](super::Guest::with_relayout), without which it is no remedy.
    Relayout,
    /// To give the guest the CPUID of [`Compatibility::hidden`]: it has not started, or has not
    /// enabled what is hidden.
    Hide,
}
