//! A baseline as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use cpuid_amx::CpuidTable;
use cpuid_amx::features::{Feature, FeatureSet, XsaveFeatures};
use host_compat::Fleet;
use host_compat::baseline::{Baseline, Gain, Hosts, Loss, ObstacleKind};
use serde_json::{Value, json};
use xsave_state::{ComponentId, XFeatures};

use crate::screen::{self, Mark};

/// Losses and gains as text; JSON has them all.
const SHOWN: usize = 12;

/// What all hosts have, what some have, and what the fleet would gain.
pub(super) fn text(fleet: &Fleet, baseline: &Baseline) -> String {
    let kinds = fleet.kinds().len();
    let mut text = format!(
        "{} of {}\n",
        screen::title(&many(baseline.hosts, "host")),
        screen::count(kinds, "kind")
    );
    text.push_str(&undescribed(baseline));
    let _ = writeln!(text, "\n  {}", screen::title("All of them have"));
    text.push_str(&features(&baseline.features));
    text.push_str(&losses(baseline));
    text.push_str(&gains(&baseline.gains));
    text
}

/// Hosts of which it is not known what they can give.
fn undescribed(baseline: &Baseline) -> String {
    let mut text = String::new();
    if baseline.undescribed.is_empty() {
        return text;
    }
    let title = "Undescribed: not counted below, describe them again";
    let _ = writeln!(text, "\n  {}", screen::title(title));
    for hosts in &baseline.undescribed {
        let why = hosts.obstacle.map_or("", word);
        let line = screen::wrap(&format!("{} ({why})", named(hosts)), 4);
        let mark = screen::mark(Mark::Unknown);
        let _ = write!(text, "  {mark} {}", line.trim_start());
    }
    text
}

/// By groups, a line or two for each.
fn features(set: &FeatureSet) -> String {
    let mut text = String::new();
    for (name, features) in groups(set.iter()) {
        let joined = features.join(", ");
        let wrapped = screen::wrap(&joined, 16);
        let _ = write!(text, "  {name:<13} {}", wrapped.trim_start());
    }
    if set.amx.is_empty() {
        let _ = writeln!(text, "  {:<13} {}", "AMX", Mark::Warning.paint("none"));
    }
    text
}

fn groups(features: impl Iterator<Item = Feature>) -> Vec<(&'static str, Vec<String>)> {
    let mut groups: Vec<(&'static str, Vec<String>)> = Vec::new();
    for feature in features {
        let name = match feature {
            Feature::Xsave(_) => "XSAVE",
            Feature::Component(_) => "components",
            Feature::Amx(_) => "AMX",
            Feature::Palette(_) => "tiles",
            _ => "TMUL",
        };
        let text = match feature {
            Feature::Component(shape) => shape.id.to_string(),
            other => other.to_string(),
        };
        match groups.last_mut().filter(|(last, _)| *last == name) {
            Some((_, group)) => group.push(text),
            None => groups.push((name, vec![text])),
        }
    }
    groups
}

/// What the same hosts took is said together.
fn losses(baseline: &Baseline) -> String {
    let mut text = String::new();
    if baseline.losses.is_empty() {
        return text;
    }
    let _ = writeln!(
        text,
        "\n  {}",
        screen::title("Some have, and the fleet does not")
    );
    let names = Names::of(baseline.losses.iter().map(|loss| loss.feature));
    let grouped = by_takers(&baseline.losses, &names);
    for (features, who) in grouped.iter().take(SHOWN) {
        let who = screen::wrap(who, 4);
        let mark = screen::mark(Mark::Bad);
        let _ = write!(text, "  {mark} {}", who.trim_start());
        text.push_str(&screen::wrap(&features.join(", "), 4));
    }
    let more = grouped
        .len()
        .saturating_sub(SHOWN)
        .saturating_add(baseline.more_losses);
    text.push_str(&more_of(more));
    text
}

fn by_takers(losses: &[Loss], names: &Names) -> Vec<(Vec<String>, String)> {
    let mut grouped: Vec<(Vec<String>, String)> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for loss in losses {
        let about_amx = match loss.feature {
            Feature::Component(shape) => XFeatures::AMX.contains(shape.id.bit()),
            Feature::Xsave(feature) => feature == XsaveFeatures::XFD,
            _ => true,
        };
        let who = match (&loss.because, loss.missing_on.obstacle) {
            (Some(because), _) => {
                format!("no single host is the cause: hosts disagree on {because}")
            }
            (None, Some(obstacle)) if about_amx => {
                format!(
                    "missing on {} ({})",
                    named(&loss.missing_on),
                    word(obstacle)
                )
            }
            (None, _) if loss.by_kernel => format!(
                "missing on {} (by the kernel: {}; others with this processor have it)",
                named(&loss.missing_on),
                screen::plain(&loss.missing_on.kernels.join(", "))
            ),
            (None, _) => format!("missing on {}", named(&loss.missing_on)),
        };
        let feature = names.name(&loss.feature);
        match places.get(&who).and_then(|&place| grouped.get_mut(place)) {
            Some((features, _)) => features.push(feature),
            None => {
                places.insert(who.clone(), grouped.len());
                grouped.push((vec![feature], who));
            }
        }
    }
    grouped
}

fn gains(gains: &[Gain]) -> String {
    let mut text = String::new();
    if gains.is_empty() {
        return text;
    }
    let _ = writeln!(
        text,
        "\n  {}",
        screen::title("Features gained by leaving hosts out")
    );
    for gain in gains.iter().take(SHOWN) {
        let who = screen::wrap(&named(&gain.without), 4);
        let mark = screen::mark(Mark::Warning);
        let _ = write!(text, "  {mark} {}", who.trim_start());
        let names = Names::of(gain.features.iter().copied());
        let features: Vec<String> = gain.features.iter().map(|one| names.name(one)).collect();
        text.push_str(&screen::wrap(&features.join(", "), 4));
    }
    text.push_str(&more_of(gains.len().saturating_sub(SHOWN)));
    text
}

fn more_of(more: usize) -> String {
    if more == 0 {
        return String::new();
    }
    let note = format!("{more} more; --json has them");
    format!("  {}\n", screen::dim(note))
}

/// Components are named by their place where the same one has several.
struct Names(BTreeMap<ComponentId, usize>);

impl Names {
    fn of(features: impl Iterator<Item = Feature>) -> Self {
        let mut places = BTreeMap::new();
        for feature in features {
            if let Feature::Component(shape) = feature {
                let count: &mut usize = places.entry(shape.id).or_default();
                *count = count.saturating_add(1);
            }
        }
        Self(places)
    }

    fn name(&self, feature: &Feature) -> String {
        match feature {
            Feature::Component(shape) if self.0.get(&shape.id).is_some_and(|&n| n > 1) => {
                format!("{} at {}", shape.id, screen::grouped(shape.offset))
            }
            Feature::Component(shape) => shape.id.to_string(),
            other => other.to_string(),
        }
    }
}

/// `3 hosts: node-1, node-2, node-3`.
fn named(hosts: &Hosts) -> String {
    let shown = u64::try_from(hosts.names.len()).unwrap_or(u64::MAX);
    let mut names = screen::plain(&hosts.names.join(", "));
    if shown < hosts.hosts {
        names.push_str(", ...");
    }
    format!("{}: {names}", many(hosts.hosts, "host"))
}

fn many(count: u64, what: &str) -> String {
    screen::count(usize::try_from(count).unwrap_or(usize::MAX), what)
}

pub(crate) fn word(obstacle: ObstacleKind) -> &'static str {
    match obstacle {
        ObstacleKind::Processor => "the processor has no AMX",
        ObstacleKind::Kernel => "the kernel does not use AMX",
        ObstacleKind::Permission => "the permission was refused",
        ObstacleKind::Kvm => "there is no KVM",
        ObstacleKind::Guest => "KVM has no AMX for guests",
        ObstacleKind::Cpuid => "KVM's CPUID has no usable AMX",
        ObstacleKind::Area => "KVM copies less than its CPUID describes",
        _ => "KVM's CPUID contradicts itself",
    }
}

/// The same, all of it, for machines.
pub(super) fn as_json(fleet: &Fleet, baseline: &Baseline) -> Value {
    let texts = |features: &mut dyn Iterator<Item = Feature>| -> Vec<String> {
        features.map(|feature| feature.to_string()).collect()
    };
    let cpuid: Vec<Value> = baseline
        .features
        .to_table()
        .entries()
        .map(|entry| {
            let [eax, ebx, ecx, edx] = entry.value.map(|value| format!("{value:#x}"));
            json!({
                "leaf": format!("{:#x}", entry.leaf),
                "subleaf": entry.subleaf.map(|subleaf| format!("{subleaf:#x}")),
                "eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx,
            })
        })
        .collect();
    json!({
        "hosts": baseline.hosts,
        "kinds": fleet.kinds().len(),
        "undescribed": baseline.undescribed,
        "baseline": {
            "features": texts(&mut baseline.features.iter()),
            "cpuid": cpuid,
        },
        "losses": baseline.losses.iter().map(|loss| json!({
            "feature": loss.feature.to_string(),
            "missing_on": loss.missing_on,
            "by_kernel": loss.by_kernel,
            "because": loss.because.map(|feature| feature.to_string()),
        })).collect::<Vec<_>>(),
        "more_losses": baseline.more_losses,
        "gains": baseline.gains.iter().map(|gain| json!({
            "without": gain.without,
            "features": texts(&mut gain.features.iter().copied()),
        })).collect::<Vec<_>>(),
    })
}
