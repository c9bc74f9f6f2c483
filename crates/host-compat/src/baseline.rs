//! What a fleet of hosts shares, which hosts take what away, and what it would gain without them.
//!
//! A guest that is to move freely may have only what every host has, at the same place: a component
//! that lies elsewhere on one host is not shared. A [`Fleet`] is a tally of the kinds of hosts that
//! there are; the [`Baseline`] follows from it. Tallies can be made in parts, anywhere, and
//! [merged](Fleet::merge) in any order and shape. With the feature `serde` a part is a document.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use crate::guest_cpu::{GuestCpu, NoGuestCpu};
use crate::host::{Host, Obstacle};
use cpuid_amx::features::{Feature, FeatureSet};
use cpuid_amx::policy::Policy;
use cpuid_amx::table::{CpuidTable, Table};

mod analysis;
mod document;
mod lines;
mod shared;

pub use document::{FORMAT, VERSION};
pub use lines::{LineError, Lines};
pub(crate) use shared::{Leaf, Shared, is_vendor};

/// A fleet can have so many kinds of hosts: processors, kernels and settings that give guests
/// different features. What a tally needs of memory is bounded by it, not by the number of hosts.
pub const MAX_KINDS: usize = 4096;
/// So many names of hosts are kept of each kind, the first in alphabetical order.
pub const MAX_NAMES: usize = 8;
/// So many names of processors are kept of each kind.
pub const MAX_PROCESSORS: usize = 4;
/// So many losses are described one by one, those that the fewest hosts took first.
pub const MAX_LOSSES: usize = 256;

/// A tally of hosts by what guests can be given there.
///
/// ```
/// use cpuid_amx::{Policy, Table};
/// use host_compat::{Fleet, Host};
///
/// let with_amx: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let mut without = with_amx.clone();
/// Policy::hide_amx().apply(&mut without)?;
///
/// let mut here = Fleet::new();
/// here.add(&Host::from_cpuid("node-1", with_amx.clone()))?;
/// let mut there = Fleet::new();
/// there.add(&Host::from_cpuid("node-2", without))?;
/// there.add(&Host::from_cpuid("node-3", with_amx.clone()))?;
/// here.merge(there)?;
///
/// let baseline = here.baseline();
/// assert_eq!(baseline.features.amx.to_string(), "none");
/// let tile = baseline.losses.iter().find(|loss| loss.feature.to_string() == "AMX-TILE");
/// assert_eq!(tile.unwrap().missing_on.names, ["node-2"]);
/// assert_eq!(baseline.gains[0].without.hosts, 1);
///
/// // The same for the guests of every host.
/// let mut guest = with_amx.clone();
/// baseline.policy().apply(&mut guest)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    kinds: BTreeMap<Kind, Tally>,
    /// `None` without a described host.
    shared: Option<Shared>,
}

/// What a host can give to guests, as the registers that say it, and why AMX is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    registers: Table,
    obstacle: Option<ObstacleKind>,
    /// Whether the registers are what guests can be given there.
    described: bool,
}

impl Kind {
    fn of(host: &Host) -> Self {
        Self {
            registers: host.guest_features().to_table(),
            obstacle: host.obstacles().first().map(ObstacleKind::from),
            described: host.is_described(),
        }
    }

    fn features(&self) -> FeatureSet {
        FeatureSet::from_cpuid(|leaf, subleaf| self.registers.leaf(leaf, subleaf))
    }
}

/// The hosts of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    hosts: u64,
    names: Smallest<MAX_NAMES>,
    processors: Smallest<MAX_PROCESSORS>,
    kernels: Smallest<MAX_PROCESSORS>,
}

impl Tally {
    fn add(&mut self, host: &Host) {
        self.hosts = self.hosts.saturating_add(1);
        self.names.insert(&host.name);
        self.processors.insert(&host.processor.name);
        if let Some(kernel) = &host.kernel {
            self.kernels.insert(&kernel.release);
        }
    }

    fn merge(&mut self, other: Self) {
        self.hosts = self.hosts.saturating_add(other.hosts);
        self.names.extend(other.names);
        self.processors.extend(other.processors);
        self.kernels.extend(other.kernels);
    }
}

/// The first texts in alphabetical order, so many that they do not depend on the order in which they
/// came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Smallest<const LIMIT: usize>(BTreeSet<Box<str>>);

impl<const LIMIT: usize> Smallest<LIMIT> {
    fn insert(&mut self, text: &str) {
        if self.0.len() >= LIMIT && self.0.last().is_some_and(|last| &**last <= text) {
            return;
        }
        if !text.is_empty() && !self.0.contains(text) {
            self.0.insert(text.into());
            if self.0.len() > LIMIT {
                self.0.pop_last();
            }
        }
    }

    fn extend(&mut self, other: Self) {
        for text in other.0 {
            self.insert(&text);
        }
    }

    fn into_names(self) -> Vec<String> {
        self.0.into_iter().map(String::from).collect()
    }
}

/// The first of the [obstacles](Host::obstacles) to AMX on a host, without its numbers.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ObstacleKind {
    /// The processor has no AMX.
    Processor,
    /// Its kernel does not use AMX.
    Kernel,
    /// The permission was refused.
    Permission,
    /// There is no KVM.
    Kvm,
    /// KVM has no AMX for guests.
    Guest,
    /// KVM's CPUID has no AMX that could be used.
    Cpuid,
    /// KVM's CPUID contradicts itself.
    Contradiction,
    /// KVM copies less than CPUID describes.
    Area,
}

impl From<&Obstacle> for ObstacleKind {
    fn from(obstacle: &Obstacle) -> Self {
        match obstacle {
            Obstacle::Processor => Self::Processor,
            Obstacle::Kernel { .. } => Self::Kernel,
            Obstacle::Permission(_) => Self::Permission,
            Obstacle::Kvm(_) => Self::Kvm,
            Obstacle::Guest { .. } => Self::Guest,
            Obstacle::Cpuid(_) => Self::Cpuid,
            Obstacle::Contradiction(_) => Self::Contradiction,
            Obstacle::Area { .. } => Self::Area,
        }
    }
}

impl Fleet {
    /// No hosts yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            kinds: BTreeMap::new(),
            shared: None,
        }
    }

    /// Counts a host.
    ///
    /// # Errors
    ///
    /// It would be of one kind too many; nothing has changed.
    pub fn add(&mut self, host: &Host) -> Result<(), TooManyKinds> {
        let tally = self.tally(Kind::of(host))?;
        tally.add(host);
        self.share(Shared::of(host));
        Ok(())
    }

    /// Counts the hosts of another tally as well. The order and the shape of merges make no
    /// difference.
    ///
    /// # Errors
    ///
    /// There would be too many kinds; nothing has changed.
    pub fn merge(&mut self, other: Self) -> Result<(), TooManyKinds> {
        let new = other
            .kinds
            .keys()
            .filter(|kind| !self.kinds.contains_key(kind));
        let kinds = self.kinds.len().saturating_add(new.count());
        if kinds > MAX_KINDS {
            return Err(TooManyKinds { kinds });
        }
        for (kind, tally) in other.kinds {
            self.kinds.entry(kind).or_default().merge(tally);
        }
        self.share(other.shared);
        Ok(())
    }

    fn share(&mut self, other: Option<Shared>) {
        match (&mut self.shared, other) {
            (Some(shared), Some(other)) => shared.merge(other),
            (shared @ None, other) => *shared = other,
            (Some(_), None) => {}
        }
    }

    /// Returns the CPU of a guest that runs on every described host of the fleet.
    ///
    /// # Errors
    ///
    /// There is none: see [`NoGuestCpu`].
    pub fn guest_cpu(&self) -> Result<GuestCpu, NoGuestCpu> {
        let shared = self.shared.as_ref().ok_or(NoGuestCpu::NoHosts)?;
        GuestCpu::new(shared, &self.baseline().features)
    }

    /// How many hosts there are.
    #[must_use]
    pub fn hosts(&self) -> u64 {
        self.kinds
            .values()
            .fold(0, |sum, tally| sum.saturating_add(tally.hosts))
    }

    /// The kinds of hosts, those with the most hosts first.
    #[must_use]
    pub fn kinds(&self) -> Vec<(Hosts, FeatureSet)> {
        let mut kinds: Vec<(Hosts, FeatureSet)> = self
            .kinds
            .iter()
            .map(|(kind, tally)| (Hosts::of(kind, tally), kind.features()))
            .collect();
        kinds.sort_by_key(|(hosts, _)| std::cmp::Reverse(hosts.hosts));
        kinds
    }

    /// What all of them share, and why it is not more.
    #[must_use]
    pub fn baseline(&self) -> Baseline {
        analysis::baseline(self)
    }

    fn tally(&mut self, kind: Kind) -> Result<&mut Tally, TooManyKinds> {
        let kinds = self.kinds.len();
        if kinds >= MAX_KINDS && !self.kinds.contains_key(&kind) {
            return Err(TooManyKinds {
                kinds: kinds.saturating_add(1),
            });
        }
        Ok(self.kinds.entry(kind).or_default())
    }
}

/// Hosts: how many, and some of them by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Hosts {
    /// How many.
    pub hosts: u64,
    /// The first [`MAX_NAMES`] names.
    pub names: Vec<String>,
    /// The first [`MAX_PROCESSORS`] of their processors.
    pub processors: Vec<String>,
    /// So many of their kernels' releases.
    pub kernels: Vec<String>,
    /// What keeps guests from using AMX there, if it is the same on all.
    pub obstacle: Option<ObstacleKind>,
}

impl Hosts {
    fn of(kind: &Kind, tally: &Tally) -> Self {
        Self {
            hosts: tally.hosts,
            names: tally.names.clone().into_names(),
            processors: tally.processors.clone().into_names(),
            kernels: tally.kernels.clone().into_names(),
            obstacle: kind.obstacle,
        }
    }
}

/// What a fleet shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// How many hosts there are.
    pub hosts: u64,
    /// Hosts of which it is not known what they can give to guests: see [`Host::is_described`]. They are
    /// among `hosts`, and nothing else here counts them.
    pub undescribed: Vec<Hosts>,
    /// The largest set that every described host supports and that does not contradict itself. Nothing
    /// where there are none.
    pub features: FeatureSet,
    /// Every feature that some host has and the baseline has not, those that the fewest hosts lack
    /// first.
    pub losses: Vec<Loss>,
    /// Losses beyond [`MAX_LOSSES`].
    pub more_losses: usize,
    /// What the fleet would gain without the hosts of one kind, for each kind without which it
    /// gains: those with the fewest hosts first.
    pub gains: Vec<Gain>,
}

impl Baseline {
    /// Gives guests this baseline, on every host of the fleet.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy::features(&self.features)
    }
}

/// A feature that some hosts have and the fleet does not share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The feature.
    pub feature: Feature,
    /// The hosts that do not support it. None: every host does, but not what it needs in the same
    /// way; see `because`.
    pub missing_on: Hosts,
    /// Whether the kernel makes the difference: other hosts with the same processors support it.
    pub by_kernel: bool,
    /// What it needs, and what hosts have in different ways: one of its components, or a palette.
    pub because: Option<Feature>,
}

/// What the fleet would gain without some hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gain {
    /// The hosts, all of one kind.
    pub without: Hosts,
    /// What the others share that the baseline does not have.
    pub features: Vec<Feature>,
}

/// A fleet has more kinds of hosts than a tally holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{kinds} kinds of hosts are more than a fleet can have: the limit is {MAX_KINDS}")]
pub struct TooManyKinds {
    /// How many there would be.
    pub kinds: usize,
}
