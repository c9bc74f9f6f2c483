//! What a guest is to see of AMX: one decision, carried through all leaves.
//!
//! AMX is in leaf 7 (two sub-leaves), 0DH (the bitmap, XFD, two components, three sizes), 1DH and 1EH
//! (two sub-leaves). A [`Policy`] changes all of them or none, and what it makes has no
//! [contradiction](crate::coherence): features that lack what they need go with it, sizes are
//! computed anew where they are wrong.

use alloc::vec::Vec;

use thiserror::Error;
use xsave_state::XFeatures;

use crate::amx::{Amx, AmxFeatures, Unusable};
use crate::coherence::{self, Contradiction};
use crate::features::{Feature, FeatureSet};
use crate::table::{CpuidTable, Table, TableFull};

mod level;
mod write;

pub use level::{Level, UnknownLevel};
pub use write::Change;

/// What a guest is to see.
///
/// It starts from a table that a host can carry, KVM's supported one, and never adds to it.
///
/// ```
/// use cpuid_amx::{Amx, AmxFeatures, CpuidTable, Level, Policy, Table, coherence};
///
/// let supported: Table = cpuid_amx::dump::EXAMPLE.parse()?;
///
/// let mut table = supported.clone();
/// for change in Policy::hide_amx().apply(&mut table)? {
///     println!("{change}"); // leaf 0x7 sub-leaf 0x0 EDX: 0xbfc04410 becomes 0xbc004410
/// }
/// assert_eq!(table.leaf(0xd, 0), [0x2e7, 2696, 2696, 0]);
/// assert_eq!(coherence::check(&table), []);
///
/// // Bit by bit, or as a processor has it.
/// let mut table = supported.clone();
/// Policy::exactly(AmxFeatures::TILE | AmxFeatures::INT8).apply(&mut table)?;
/// Policy::level(Level::SapphireRapids).apply(&mut table).expect_err("BF16 is hidden");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    what: What,
    permitted: Option<XFeatures>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    NoAmx,
    Everything,
    Amx(AmxFeatures),
    Features(FeatureSet),
}

impl Policy {
    /// No AMX, whatever the host has: the leaves of a processor without it.
    #[must_use]
    pub const fn hide_amx() -> Self {
        Self::new(What::NoAmx)
    }

    /// All that the table has and that does not contradict itself. What is left of a table that was
    /// asked for before the permission, or of one without 1DH, has no AMX.
    #[must_use]
    pub const fn expose_all() -> Self {
        Self::new(What::Everything)
    }

    /// These features of AMX and no other. None is [`hide_amx`](Self::hide_amx).
    #[must_use]
    pub const fn exactly(features: AmxFeatures) -> Self {
        Self::new(What::Amx(features))
    }

    /// The AMX features of a class of processors.
    #[must_use]
    pub const fn level(level: Level) -> Self {
        Self::exactly(level.features())
    }

    /// These features of XSAVE and AMX and no other, each at its place: those that a fleet shares, so
    /// that a guest finds the same on every host.
    #[must_use]
    pub fn features(features: &FeatureSet) -> Self {
        Self::new(What::Features(features.clone()))
    }

    /// The same within what this process may expose, `GuestPermission::granted`, or nothing where
    /// the permission was refused: without [`XFeatures::XTILEDATA`] no AMX is exposed.
    ///
    /// KVM's supported CPUID is filtered by the permission already, if it was asked for behind the
    /// request. A table from elsewhere is not.
    #[must_use]
    pub const fn permitted(mut self, granted: XFeatures) -> Self {
        self.permitted = Some(granted);
        self
    }

    const fn new(what: What) -> Self {
        Self {
            what,
            permitted: None,
        }
    }

    /// Makes a table say so.
    ///
    /// Everything else in the table stays as it is, except features that need a component which is
    /// taken out (AVX-512's without its components), and entries that nobody sees behind others.
    /// Sizes for the components that are enabled (EBX of 0DH) stay if some legal XCR0 makes them.
    ///
    /// # Return value
    ///
    /// Every register that it changed. To apply the same policy again changes nothing.
    ///
    /// # Errors
    ///
    /// See [`PolicyError`]; the table is as before.
    pub fn apply(&self, table: &mut impl CpuidTable) -> Result<Vec<Change>, PolicyError> {
        let features = self.choose(table)?;
        // As it will be, without the entries that nobody sees.
        let mut result: Table = table.entries().collect();
        let mixed = coherence::mixed_leaves(table);
        let plan = write::Plan::new(&result, &features, mixed);
        plan.apply(&mut result)?;
        let contradictions = coherence::check(&result);
        if !contradictions.is_empty() {
            return Err(PolicyError::Incoherent { contradictions });
        }
        plan.apply(table)?;
        Ok(plan.into_changes())
    }

    /// The features that the guest is to see, without changing anything.
    ///
    /// # Errors
    ///
    /// The table does not have them.
    pub fn choose(&self, table: &impl CpuidTable) -> Result<FeatureSet, PolicyError> {
        let cpuid = |leaf, subleaf| table.leaf(leaf, subleaf);
        let mut available = FeatureSet::from_cpuid(cpuid).closed();
        let permitted = self
            .permitted
            .is_none_or(|granted| granted.contains(XFeatures::XTILEDATA));
        if !permitted {
            available = available.without_amx();
        }
        match &self.what {
            What::NoAmx => Ok(available.without_amx()),
            What::Everything => Ok(available),
            What::Amx(wanted) if wanted.is_empty() => Ok(available.without_amx()),
            What::Amx(wanted) => {
                let wanted = *wanted;
                if !wanted.contains(AmxFeatures::TILE) {
                    return Err(PolicyError::WithoutTile { wanted });
                }
                if !permitted {
                    return Err(PolicyError::NotPermitted {
                        wanted,
                        granted: self.permitted.unwrap_or_default(),
                    });
                }
                if let Err(reason) = Amx::from_cpuid(cpuid).usable() {
                    return Err(PolicyError::Unusable { wanted, reason });
                }
                let missing = wanted.difference(available.amx);
                if !missing.is_empty() {
                    return Err(PolicyError::Missing {
                        wanted,
                        missing,
                        available: available.amx,
                    });
                }
                available.amx = wanted;
                Ok(available.closed())
            }
            What::Features(wanted) => {
                let missing: Vec<Feature> = wanted
                    .iter()
                    .filter(|feature| !available.supports(feature))
                    .collect();
                if !missing.is_empty() {
                    return Err(PolicyError::MissingFeatures { missing });
                }
                let mut features = wanted.clone();
                features.has_1eh_1 &= available.has_1eh_1;
                Ok(features.closed())
            }
        }
    }
}

/// Why a table does not become what a policy wants.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Every feature of AMX needs AMX-TILE.
    #[error("{wanted} need AMX-TILE, which is not among them")]
    WithoutTile {
        /// What the policy wants.
        wanted: AmxFeatures,
    },
    /// The permission is not there.
    #[error(
        "{wanted} need the permission for XTILEDATA, and granted are {granted}: request it before \
         the first vCPU"
    )]
    NotPermitted {
        /// What the policy wants.
        wanted: AmxFeatures,
        /// What was granted.
        granted: XFeatures,
    },
    /// No AMX can be used with this table.
    #[error("{wanted} cannot be exposed: {reason}")]
    Unusable {
        /// What the policy wants.
        wanted: AmxFeatures,
        /// Why not.
        reason: Unusable,
    },
    /// The table has AMX, but not all of it, or not without contradiction.
    #[error("{wanted} cannot be exposed: this host has {available}, without {missing}")]
    Missing {
        /// What the policy wants.
        wanted: AmxFeatures,
        /// What of it is missing.
        missing: AmxFeatures,
        /// What there is.
        available: AmxFeatures,
    },
    /// The table does not have features of a set, or has them elsewhere.
    #[error("this host lacks {}", List(missing))]
    MissingFeatures {
        /// All that is missing.
        missing: Vec<Feature>,
    },
    /// The table has no room for a sub-leaf that it has to have.
    #[error(transparent)]
    Full(#[from] TableFull),
    /// The result would contradict itself. Not known to be possible; checked because the guest
    /// depends on it.
    #[error("the table would contradict itself: {}", List(contradictions))]
    Incoherent {
        /// All of it.
        contradictions: Vec<Contradiction>,
    },
}

struct List<'a, T>(&'a [T]);

impl<T: core::fmt::Display> core::fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut separator = "";
        for item in self.0 {
            write!(f, "{separator}{item}")?;
            separator = "; ";
        }
        Ok(())
    }
}
