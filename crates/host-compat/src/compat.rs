//! Whether a guest can go on, or start, on another host: every reason why not, and what would help.
//!
//! What counts is what the guest can rely on. It has read CPUID, and lays out its own XSAVE areas by
//! it. What it has enabled in XCR0 it may use at any moment. What it has not enabled, it does not
//! use: that a host lacks it keeps nobody from going there, once it is hidden.

use std::fmt;

use thiserror::Error;
use xsave_state::relayout::{Allowed, Loss, RelayoutError, relayout};
use xsave_state::{ExtendedState, Layout, LayoutError, Misfit, XFeatures};

use crate::host::{Host, NoKvm, Permission};
use cpuid_amx::features::{ComponentShape, Feature, FeatureSet};
use cpuid_amx::permission::PermissionError;
use cpuid_amx::table::CpuidTable;

/// A guest: what it sees, and what its vCPUs have in their registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guest<'a> {
    features: Option<&'a FeatureSet>,
    states: &'a [ExtendedState<'a>],
}

impl<'a> Guest<'a> {
    /// A guest that has not started, and sees these features: those of its own CPUID, as
    /// [`FeatureSet::from_cpuid`] reads it.
    #[must_use]
    pub const fn new(features: &'a FeatureSet) -> Self {
        Self {
            features: Some(features),
            states: &[],
        }
    }

    /// A guest of which only the states of its vCPUs are known, not its CPUID: the AMX features that
    /// it sees are then not compared.
    #[must_use]
    pub const fn from_states(states: &'a [ExtendedState<'a>]) -> Self {
        Self {
            features: None,
            states,
        }
    }

    /// The guest has started, and these are the states of its vCPUs.
    #[must_use]
    pub const fn running(mut self, states: &'a [ExtendedState<'a>]) -> Self {
        self.states = states;
        self
    }

    /// What the guest can use without asking anybody: enabled in XCR0 by some vCPU, or in use. `None`
    /// before it has started.
    fn active(&self) -> Option<XFeatures> {
        let states = self.states.iter();
        let active = |state: &ExtendedState<'_>| state.registers().xcr0 | state.image().xstate_bv();
        (!self.states.is_empty()).then(|| states.map(active).collect())
    }
}

/// Compares a guest with a host.
///
/// ```
/// use host_compat::compat::{self, Guest, Verdict};
/// use cpuid_amx::{CpuidTable, FeatureSet, Policy, Table};
/// use host_compat::Host;
/// use xsave_state::{ExtendedState, Layout};
///
/// let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let sees = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
///
/// let mut older = table.clone();
/// Policy::hide_amx().apply(&mut older)?;
/// let older = Host::from_cpuid("older", older);
///
/// // It has AMX in its CPUID. After reset it has not enabled it: hidden, it can go there.
/// let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))?;
/// let states = [ExtendedState::reset(&layout)];
/// let compatibility = compat::check(Guest::new(&sees).running(&states), &older);
/// assert_eq!(compatibility.verdict(), Verdict::RunsAfter { relayout: false, hide: true });
/// for reason in &compatibility.reasons {
///     println!("{reason}");
/// }
/// let mut guest = table.clone();
/// Policy::features(&compatibility.shared).apply(&mut guest)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn check(guest: Guest<'_>, host: &Host) -> Compatibility {
    let there = host.guest_features();
    let mut reasons = Vec::new();
    if let Err(error) = &host.kvm {
        reasons.push(Reason::NoKvm(error.clone()));
    }
    let active = guest.active();
    if let Some(sees) = guest.features {
        let exposed = sees.user().contains(XFeatures::XTILEDATA);
        if let Permission::Refused(error) = host.permission
            && exposed
        {
            reasons.push(Reason::Permission {
                error,
                active: is_active(active, XFeatures::AMX),
            });
        }
        let lacking = sees.iter().filter(|feature| !there.supports(feature));
        reasons.extend(lacking.map(|feature| lacks(feature, &there, active)));
    }
    match layout(&there, host) {
        Ok(target) => {
            for (vcpu, state) in (0..).zip(guest.states) {
                states(vcpu, state, &target, &mut reasons);
            }
        }
        Err(error) if host.kvm.is_ok() && !guest.states.is_empty() => {
            reasons.push(Reason::Layout(error));
        }
        Err(_) => {}
    }
    let shared = guest.features.map_or_else(FeatureSet::default, |sees| {
        sees.intersection(&there).closed()
    });
    Compatibility { reasons, shared }
}

/// A feature of the guest's CPUID that the host does not have as the guest sees it.
fn lacks(feature: Feature, there: &FeatureSet, active: Option<XFeatures>) -> Reason {
    match feature {
        Feature::Component(sees) => {
            // IA32_XSS is not part of the states: a guest that runs may have enabled all of it.
            let active = if sees.supervisor {
                active.is_some()
            } else {
                is_active(active, sees.id.bit())
            };
            match there.components.get(&sees.id) {
                None => Reason::Component { sees, active },
                Some(has) => Reason::Elsewhere {
                    sees,
                    has: *has,
                    active,
                },
            }
        }
        // The instructions that a kernel chose when it started.
        _ if feature.needs() == XFeatures::LEGACY => Reason::Feature {
            feature,
            active: active.is_some(),
        },
        _ => Reason::Feature {
            feature,
            active: is_active(active, feature.needs()),
        },
    }
}

fn is_active(active: Option<XFeatures>, components: XFeatures) -> bool {
    active.is_some_and(|active| active.intersects(components))
}

/// What the host gives to guests, and its MXCSR mask.
fn layout(there: &FeatureSet, host: &Host) -> Result<Layout, LayoutError> {
    let registers = there.to_table();
    Layout::from_cpuid(|leaf, subleaf| {
        if leaf < 0x4000_0000 {
            registers.leaf(leaf, subleaf)
        } else {
            let table = host.guest_cpuid();
            table.map_or([0; 4], |table| table.leaf(leaf, subleaf))
        }
    })
}

fn states(vcpu: u32, state: &ExtendedState<'_>, target: &Layout, reasons: &mut Vec<Reason>) {
    match relayout(state, target, Allowed::NOTHING) {
        Ok(_) => {
            let in_use = state.image().xstate_bv();
            let misfits = state.layout().misfits(target, in_use);
            reasons.extend(misfits.map(|misfit| Reason::Misfit { vcpu, misfit }));
        }
        Err(RelayoutError::Lossy { losses }) => {
            reasons.extend(losses.into_iter().map(|loss| Reason::Loss { vcpu, loss }));
        }
        Err(error) => reasons.push(Reason::State { vcpu, error }),
    }
}

/// What comes of the comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compatibility {
    /// Every reason why the guest does not run there as it is.
    pub reasons: Vec<Reason>,
    /// What the guest can see there: the features of its CPUID that the host has too. It is what a
    /// [policy](cpuid_amx::Policy::features) hides the rest with.
    pub shared: FeatureSet,
}

impl Compatibility {
    /// Whether the guest runs there, and what has to be done for it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let mut verdict = Verdict::Runs;
        for reason in &self.reasons {
            verdict = match (verdict, reason.remedy()) {
                (Verdict::No, _) | (_, None) => Verdict::No,
                (Verdict::Runs, Some(remedy)) => Verdict::RunsAfter {
                    relayout: remedy == Remedy::Relayout,
                    hide: remedy == Remedy::Hide,
                },
                (Verdict::RunsAfter { relayout, hide }, Some(remedy)) => Verdict::RunsAfter {
                    relayout: relayout || remedy == Remedy::Relayout,
                    hide: hide || remedy == Remedy::Hide,
                },
            };
        }
        verdict
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
    /// It does not: something that it has, or may use at any moment, is not there.
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
            Self::No => "does not run",
        })
    }
}

/// What would help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remedy {
    /// To move the states into the host's layout ([`xsave_state::relayout`]). Nothing is lost, but
    /// the guest does not notice: where it uses the standard format itself, with places that it has
    /// read from CPUID before, these are wrong from then on. The compacted format, which Linux uses
    /// for its own areas, does not depend on them.
    Relayout,
    /// To hide the feature from the guest's CPUID, [`Policy::features`](cpuid_amx::Policy::features) with
    /// [`Compatibility::shared`]: the guest has not started, or has not enabled what it belongs to.
    /// A KVM that [rewrites](crate::host::KvmFacts::rewritten) CPUID hides nothing.
    Hide,
}

/// Why a guest does not run on a host as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Reason {
    /// There is no KVM.
    #[error(transparent)]
    NoKvm(NoKvm),
    /// The guest sees XTILEDATA, and the host has refused the permission for it.
    #[error("the guest has XTILEDATA{}: {error}", Use(*active))]
    Permission {
        /// The refusal.
        error: PermissionError,
        /// Whether the guest may use it at any moment.
        active: bool,
    },
    /// The host lacks a feature of the guest's CPUID.
    #[error("the guest sees {feature}, which the host lacks{}", Use(*active))]
    Feature {
        /// The feature.
        feature: Feature,
        /// Whether the guest may use it at any moment.
        active: bool,
    },
    /// The host lacks a component of the guest's CPUID.
    #[error("the guest sees {sees}, which the host lacks{}", Use(*active))]
    Component {
        /// As the guest sees it.
        sees: ComponentShape,
        /// Whether the guest may use it at any moment.
        active: bool,
    },
    /// The host has a component at another place, with another size, or of another kind.
    #[error("the guest sees {sees}, and the host has {has}{}", Use(*active))]
    Elsewhere {
        /// As the guest sees it.
        sees: ComponentShape,
        /// As the host has it.
        has: ComponentShape,
        /// Whether the guest may use it at any moment.
        active: bool,
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
        loss: Loss,
    },
    /// The state of a vCPU cannot be moved. Not known to be possible.
    #[error("vCPU {vcpu}: {error}")]
    State {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        error: RelayoutError,
    },
    /// The host has no area for extended state.
    #[error("the host has no place for extended state: {0}")]
    Layout(LayoutError),
}

impl Reason {
    /// What would help; `None`: nothing does.
    #[must_use]
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Permission { active, .. }
            | Self::Feature { active, .. }
            | Self::Component { active, .. } => (!active).then_some(Remedy::Hide),
            Self::Elsewhere { active: false, .. } => Some(Remedy::Hide),
            Self::Elsewhere { sees, has, .. } => {
                let moved = ComponentShape {
                    offset: has.offset,
                    ..*sees
                };
                (moved == *has).then_some(Remedy::Relayout)
            }
            Self::Misfit { .. } => Some(Remedy::Relayout),
            Self::NoKvm(_) | Self::Loss { .. } | Self::State { .. } | Self::Layout(_) => None,
        }
    }
}

struct Use(bool);

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 {
            "; it has enabled it and may use it at any moment"
        } else {
            "; it does not use it, and it can be hidden"
        })
    }
}
