//! From a tally to a baseline: the intersection of all kinds, and who keeps it from being larger.

use std::collections::{BTreeMap, BTreeSet};

use xsave_state::{ComponentId, XFeatures};

use crate::baseline::{Baseline, Fleet, Gain, Hosts, Kind, Loss, MAX_LOSSES, Tally};
use cpuid_amx::features::{Feature, FeatureSet};

pub(super) fn baseline(fleet: &Fleet) -> Baseline {
    let (kinds, undescribed): (Vec<_>, Vec<_>) =
        fleet.kinds.iter().partition(|(kind, _)| kind.described);
    let sets: Vec<FeatureSet> = kinds.iter().map(|(kind, _)| kind.features()).collect();
    let common = intersection(&sets);
    let features = common.clone().closed();
    let (losses, more_losses) = losses(&kinds, &sets, &common, &features);
    Baseline {
        hosts: fleet.hosts(),
        undescribed: undescribed
            .into_iter()
            .map(|(kind, tally)| Hosts::of(kind, tally))
            .collect(),
        losses,
        more_losses,
        gains: gains(&kinds, &sets, &common, &features),
        features,
    }
}

fn intersection(sets: &[FeatureSet]) -> FeatureSet {
    sets.iter()
        .cloned()
        .reduce(|common, set| common.intersection(&set))
        .unwrap_or_default()
}

/// Every feature that some kind has and the baseline has not.
fn losses(
    kinds: &[(&Kind, &Tally)],
    sets: &[FeatureSet],
    common: &FeatureSet,
    baseline: &FeatureSet,
) -> (Vec<Loss>, usize) {
    // By the number of hosts that have it. Those with limits that are larger than others' serve
    // where the others do.
    let mut counts: BTreeMap<Feature, u64> = BTreeMap::new();
    for (set, (_, tally)) in sets.iter().zip(kinds) {
        for feature in set.iter().filter(|feature| !baseline.supports(feature)) {
            let count = counts.entry(feature).or_default();
            *count = count.saturating_add(tally.hosts);
        }
    }
    let mut lost: Vec<(Feature, u64)> = counts.into_iter().collect();
    lost.sort_by_key(|(feature, hosts)| (std::cmp::Reverse(*hosts), *feature));
    let more = lost.len().saturating_sub(MAX_LOSSES);
    let losses = lost
        .into_iter()
        .take(MAX_LOSSES)
        .map(|(feature, _)| {
            let having = |has: bool| {
                let all = kinds.iter().zip(sets);
                let own = all.filter(move |(_, set)| set.supports(&feature) == has);
                own.map(|(kind, _)| *kind)
            };
            let missing_on = together(having(false));
            let because = if missing_on.hosts == 0 {
                because(&feature, sets, common)
            } else {
                None
            };
            Loss {
                by_kernel: by_kernel(having(false), having(true)),
                feature,
                missing_on,
                because,
            }
        })
        .collect();
    (losses, more)
}

/// Whether hosts with and without something have the same processors, and different kernels.
fn by_kernel<'a>(
    without: impl Iterator<Item = (&'a Kind, &'a Tally)>,
    with: impl Iterator<Item = (&'a Kind, &'a Tally)>,
) -> bool {
    let names = |tallies: Vec<&Tally>,
                 of: fn(&Tally) -> &BTreeSet<Box<str>>|
     -> BTreeSet<Box<str>> { tallies.into_iter().flat_map(of).cloned().collect() };
    let (without, with): (Vec<_>, Vec<_>) = (
        without.map(|(_, tally)| tally).collect(),
        with.map(|(_, tally)| tally).collect(),
    );
    let processors = |tallies: &[&Tally]| names(tallies.to_vec(), |tally| &tally.processors.0);
    let kernels = |tallies: &[&Tally]| names(tallies.to_vec(), |tally| &tally.kernels.0);
    let own = processors(&without);
    !own.is_empty()
        && own.is_subset(&processors(&with))
        && !kernels(&without).is_empty()
        && kernels(&without).is_disjoint(&kernels(&with))
}

/// Hosts of several kinds as one.
fn together<'a>(kinds: impl Iterator<Item = (&'a Kind, &'a Tally)>) -> Hosts {
    let mut sum = Tally::default();
    let mut obstacles = Vec::new();
    for (kind, tally) in kinds {
        sum.merge(tally.clone());
        if !obstacles.contains(&kind.obstacle) {
            obstacles.push(kind.obstacle);
        }
    }
    Hosts {
        hosts: sum.hosts,
        names: sum.names.into_names(),
        processors: sum.processors.into_names(),
        kernels: sum.kernels.into_names(),
        obstacle: match obstacles[..] {
            [obstacle] => obstacle,
            _ => None,
        },
    }
}

/// What keeps a feature that every kind has out of the baseline: something that it needs, as the
/// first kind has it, and others have not.
fn because(feature: &Feature, sets: &[FeatureSet], common: &FeatureSet) -> Option<Feature> {
    let first = sets.first()?;
    let needs = match feature {
        Feature::Component(shape) => group(shape.id),
        other => other.needs(),
    };
    let component = needs
        .components()
        .filter_map(|id| first.components.get(&id))
        .map(|shape| Feature::Component(*shape))
        .find(|component| !common.supports(component));
    let palette = || {
        first
            .palettes
            .iter()
            .map(|palette| Feature::Palette(*palette))
            .find(|palette| !common.supports(palette))
    };
    component.or_else(palette)
}

fn group(id: ComponentId) -> XFeatures {
    [
        XFeatures::MPX,
        XFeatures::AVX512 | XFeatures::AVX,
        XFeatures::AMX,
    ]
    .into_iter()
    .find(|group| group.contains(id.bit()))
    .unwrap_or(id.bit())
}

/// What is shared without each kind: the intersection of those before it with those behind it.
fn gains(
    kinds: &[(&Kind, &Tally)],
    sets: &[FeatureSet],
    common: &FeatureSet,
    baseline: &FeatureSet,
) -> Vec<Gain> {
    let mut behind: Vec<Option<FeatureSet>> = Vec::with_capacity(sets.len());
    let mut rest: Option<FeatureSet> = None;
    for set in sets.iter().rev() {
        behind.push(rest.clone());
        rest = Some(both(rest, set));
    }
    let mut before: Option<FeatureSet> = None;
    let mut gains = Vec::new();
    for ((set, kind), behind) in sets.iter().zip(kinds).zip(behind.into_iter().rev()) {
        let others = match (before.clone(), behind) {
            (Some(before), Some(behind)) => Some(before.intersection(&behind)),
            (one, other) => one.or(other),
        };
        // Without the last kind there is no fleet.
        if let Some(others) = others.filter(|others| others != common) {
            let features: Vec<Feature> = others
                .closed()
                .iter()
                .filter(|feature| !baseline.supports(feature))
                .collect();
            if !features.is_empty() {
                gains.push(Gain {
                    without: Hosts::of(kind.0, kind.1),
                    features,
                });
            }
        }
        before = Some(both(before, set));
    }
    gains.sort_by_key(|gain| (gain.without.hosts, std::cmp::Reverse(gain.features.len())));
    gains
}

fn both(some: Option<FeatureSet>, set: &FeatureSet) -> FeatureSet {
    some.map_or_else(|| set.clone(), |some| some.intersection(set))
}
