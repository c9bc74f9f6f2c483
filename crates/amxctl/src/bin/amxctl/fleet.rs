//! `amxctl baseline` and `amxctl merge`: what a fleet shares, in one go or from parts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use cpuid_amx::baseline::{Baseline, Gain, Hosts, Lines, Loss, ObstacleKind};
use cpuid_amx::features::{Feature, FeatureSet, XsaveFeatures};
use cpuid_amx::{CpuidTable, Fleet};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use xsave_state::{ComponentId, XFeatures};

use crate::cli::{BaselineArgs, MergeArgs};
use crate::screen::{self, Mark};
use crate::{Outcome, load};

/// A description has about 8 KB.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// A tally has at most 4,096 kinds of about 4 KB.
const MAX_TALLY_BYTES: u64 = 64 << 20;
/// Below, it is over before the eye has seen a bar.
const SLOW_BYTES: u64 = 64 << 20;
/// Losses and gains as text; JSON has them all.
const SHOWN: usize = 12;
/// Between two looks at the bar.
const LINES_PER_TICK: u64 = 4096;

/// `amxctl baseline`.
pub(crate) fn baseline(args: &BaselineArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut input = Input::new(&args.files);
    let mut lines = Lines::new();
    if args.files.is_empty() {
        input.read(
            "standard input",
            io::stdin().lock(),
            &mut lines,
            args.skip_broken,
        )?;
    }
    for path in &args.files {
        let name = path.display().to_string();
        if path == Path::new("-") {
            input.read(&name, io::stdin().lock(), &mut lines, args.skip_broken)?;
        } else {
            let file = File::open(path).with_context(|| name.clone())?;
            let file = BufReader::with_capacity(1 << 20, file);
            input.read(&name, file, &mut lines, args.skip_broken)?;
        }
    }
    input.bar.finish_and_clear();
    if input.broken > 0 {
        let broken = usize::try_from(input.broken).unwrap_or(usize::MAX);
        eprintln!(
            "{} {} left out, the first of them {}",
            Mark::Warning.paint("warning:"),
            screen::count(broken, "line"),
            screen::plain(&input.first_broken.unwrap_or_default())
        );
    }
    say(&lines.into_fleet(), args.tally, json)
}

/// `amxctl merge`.
pub(crate) fn merge(args: &MergeArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut fleet = Fleet::new();
    for path in &args.files {
        let name = || path.display().to_string();
        let text = load::text(path, MAX_TALLY_BYTES)?;
        let part: Fleet = serde_json::from_str(&text).with_context(|| {
            format!(
                "{}: expected a tally, as `amxctl baseline --tally` writes it",
                name()
            )
        })?;
        fleet.merge(part).with_context(name)?;
    }
    say(&fleet, args.tally, json)
}

fn say(fleet: &Fleet, tally: bool, json: bool) -> anyhow::Result<Outcome> {
    if tally {
        return Outcome::yes(serde_json::to_string(fleet)? + "\n");
    }
    if fleet.hosts() == 0 {
        bail!(
            "there are no hosts: expected descriptions, as `amxctl describe` writes them, one a line"
        );
    }
    let baseline = fleet.baseline();
    if json {
        let text = serde_json::to_string_pretty(&as_json(fleet, &baseline))?;
        return Outcome::yes(text + "\n");
    }
    Outcome::yes(text(fleet, &baseline))
}

/// What is read, line by line, and how far.
struct Input {
    bar: ProgressBar,
    lines: u64,
    bytes: u64,
    broken: u64,
    first_broken: Option<String>,
}

impl Input {
    fn new(files: &[PathBuf]) -> Self {
        let sizes = files.iter().map(|path| Some(path.metadata().ok()?.len()));
        // Of a pipe nobody knows how long it is.
        let all: Option<u64> = sizes
            .sum::<Option<u64>>()
            .filter(|&all| all > 0 && !files.is_empty());
        let bar = match all {
            Some(all) if all < SLOW_BYTES => ProgressBar::hidden(),
            Some(all) => load::bytes_bar(all),
            None => ProgressBar::new_spinner(),
        };
        if all.is_none()
            && let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg}, {elapsed}")
        {
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self {
            bar,
            lines: 0,
            bytes: 0,
            broken: 0,
            first_broken: None,
        }
    }

    fn read(
        &mut self,
        name: &str,
        mut input: impl BufRead,
        fleet: &mut Lines,
        skip_broken: bool,
    ) -> anyhow::Result<()> {
        let mut line = Vec::new();
        let (mut number, mut next) = (0u64, 0u64);
        loop {
            line.clear();
            (&mut input)
                .take(MAX_LINE_BYTES.saturating_add(1))
                .read_until(b'\n', &mut line)
                .with_context(|| name.to_owned())?;
            let read = u64::try_from(line.len()).unwrap_or(u64::MAX);
            if read == 0 {
                return Ok(());
            }
            let at = next;
            next = next.saturating_add(read);
            number = number.saturating_add(1);
            self.tick(read);
            let place = || format!("{name}, line {number} (byte {at})");
            if read > MAX_LINE_BYTES {
                bail!(
                    "{}: expected one description a line, found a line of more than \
                     {MAX_LINE_BYTES} bytes",
                    place()
                );
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let mut is_broken = false;
            let parsed = fleet.add(&line, |line| {
                serde_json::from_slice(line).inspect_err(|_| is_broken = true)
            });
            let Err(error) = parsed else {
                continue;
            };
            if is_broken && skip_broken {
                self.broken = self.broken.saturating_add(1);
                self.first_broken
                    .get_or_insert_with(|| format!("{}: {error}", place()));
                continue;
            }
            return Err(anyhow::Error::new(error).context(format!(
                "{}: expected a host's description on one line, as `amxctl describe` writes it",
                place()
            )));
        }
    }

    fn tick(&mut self, read: u64) {
        self.bytes = self.bytes.saturating_add(read);
        self.lines = self.lines.saturating_add(1);
        if self.lines.is_multiple_of(LINES_PER_TICK) {
            self.bar.set_position(self.bytes);
            self.bar
                .set_message(format!("{} hosts", HumanCount(self.lines)));
        }
    }
}

fn text(fleet: &Fleet, baseline: &Baseline) -> String {
    let kinds = fleet.kinds().len();
    let mut text = format!(
        "{} of {}\n",
        screen::title(&many(baseline.hosts, "host")),
        screen::count(kinds, "kind")
    );
    let _ = writeln!(text, "\n  {}", screen::title("All of them have"));
    text.push_str(&features(&baseline.features));
    text.push_str(&losses(baseline));
    text.push_str(&gains(&baseline.gains));
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
        let who = match (&loss.because, loss.taken_by.obstacle) {
            (Some(because), _) => {
                format!("no host alone: {because} is not the same on all")
            }
            (None, Some(obstacle)) if about_amx => {
                format!("taken by {} ({})", named(&loss.taken_by), word(obstacle))
            }
            (None, _) => format!("taken by {}", named(&loss.taken_by)),
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
    let _ = writeln!(text, "\n  {}", screen::title("What it would gain without"));
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

fn word(obstacle: ObstacleKind) -> &'static str {
    match obstacle {
        ObstacleKind::Processor => "the processor has no AMX",
        ObstacleKind::Kernel => "the kernel does not use AMX",
        ObstacleKind::Permission => "the permission was refused",
        ObstacleKind::Kvm => "there is no KVM",
        ObstacleKind::Guest => "KVM has no AMX for guests",
        ObstacleKind::Cpuid => "KVM's CPUID has no usable AMX",
        _ => "KVM's CPUID contradicts itself",
    }
}

fn as_json(fleet: &Fleet, baseline: &Baseline) -> Value {
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
        "baseline": {
            "features": texts(&mut baseline.features.iter()),
            "cpuid": cpuid,
        },
        "losses": baseline.losses.iter().map(|loss| json!({
            "feature": loss.feature.to_string(),
            "taken_by": loss.taken_by,
            "because": loss.because.map(|feature| feature.to_string()),
        })).collect::<Vec<_>>(),
        "more_losses": baseline.more_losses,
        "gains": baseline.gains.iter().map(|gain| json!({
            "without": gain.without,
            "features": texts(&mut gain.features.iter().copied()),
        })).collect::<Vec<_>>(),
    })
}
