//! Judges whether a guest can run on a host: `compat` and `verify` give the same answer.

use std::collections::BTreeMap;

use amxctl::rules::{self, Finding};
use amxctl::vcpu::Owner;
use amxctl::{Source, Subject};
use cpuid_amx::{FeatureSet, Table};
use host_compat::compat::{self, Compatibility, Guest, Reason, Remedy, Usage};
use host_compat::kernel::State;
use host_compat::{FeatureMsrs, Host};
use xsave_state::{ExtendedState, XFeatures};

use crate::outcome::Answer;

/// The kernels without this fix refuse what older ones have reported: KVM_SET_XSAVE of components that the
/// guest does not have.
const OVER_REPORTED: &str = "8647c52e9504";

/// Whether a guest runs on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Runs,
    /// After its states are moved, or features are hidden from it.
    After {
        relayout: bool,
        hide: bool,
    },
    /// Nothing is known against it, but too little is known: these options help.
    Unknown(Vec<&'static str>),
    /// The host lacks something that it relies on.
    No,
    /// A vCPU breaks a rule, whatever the host.
    Nowhere,
}

impl Verdict {
    /// How bad it is, to find the worst of several.
    fn rank(&self) -> u8 {
        match self {
            Self::Runs => 0,
            Self::After { .. } => 1,
            Self::Unknown(_) => 2,
            Self::No => 3,
            Self::Nowhere => 4,
        }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown(mut ours), Self::Unknown(theirs)) => {
                ours.extend(theirs);
                ours.sort_unstable();
                ours.dedup();
                Self::Unknown(ours)
            }
            (
                Self::After { relayout, hide },
                Self::After {
                    relayout: also,
                    hide: too,
                },
            ) => Self::After {
                relayout: relayout || also,
                hide: hide || too,
            },
            (ours, theirs) if ours.rank() < theirs.rank() => theirs,
            (ours, _) => ours,
        }
    }
}

/// A guest and what was found about it.
pub(crate) struct Judgement<'a> {
    pub(crate) verdict: Verdict,
    /// Whether the guest has run.
    pub(crate) is_running: bool,
    /// Each vCPU, and what there is to say about it whatever the host.
    pub(crate) vcpus: Vec<(&'a Subject, Vec<Finding>)>,
    /// The comparison with the host; `None` where a rule is broken, or where its places are not known.
    pub(crate) compared: Option<Compared>,
}

impl Judgement<'_> {
    /// The exit code: a running guest cannot be given less than it has seen.
    pub(crate) fn answer(&self) -> Answer {
        match &self.verdict {
            Verdict::Runs => Answer::Yes,
            Verdict::After { hide: true, .. } if self.is_running => Answer::No,
            Verdict::After { .. } => Answer::Warning,
            Verdict::Unknown(_) => Answer::Unknown,
            Verdict::No | Verdict::Nowhere => Answer::No,
        }
    }
}

/// A guest that would be started on `host`.
pub(crate) fn fresh(guest: Guest<'_>, host: &Host) -> Judgement<'static> {
    let compared = Compared::of(&compat::check(guest, host), &[]);
    Judgement {
        verdict: compared.verdict.clone(),
        is_running: false,
        vcpus: Vec::new(),
        compared: Some(compared),
    }
}

/// A saved guest that would go on on `host`.
pub(crate) fn saved<'a>(subjects: &'a [Subject], host: &Host, relayout: bool) -> Judgement<'a> {
    let vcpus: Vec<_> = subjects
        .iter()
        .map(|subject| (subject, rules::check(subject)))
        .collect();
    let findings = || vcpus.iter().flat_map(|(_, findings)| findings);
    let mut verdict = Verdict::Runs;
    for finding in findings() {
        verdict = verdict.and(match finding.verdict {
            rules::Verdict::Broken => Verdict::Nowhere,
            rules::Verdict::Unknown { option } => Verdict::Unknown(vec![option]),
            _ => Verdict::Runs,
        });
    }
    // Components that are looked for at the wrong places are other registers.
    let has_places = subjects.iter().all(|subject| subject.doubt.is_none());
    let mut compared = None;
    if has_places && verdict != Verdict::Nowhere {
        let all = groups(subjects).map(|group| Compared::running(&group, host, relayout));
        compared = all.reduce(Compared::and);
        if let Some(compared) = &compared {
            verdict = verdict.and(compared.verdict.clone());
        }
    }
    Judgement {
        verdict,
        is_running: true,
        vcpus,
        compared,
    }
}

/// The vCPUs that have the same CPUID, but for what tells one logical processor from another.
fn groups(subjects: &[Subject]) -> impl Iterator<Item = Vec<&Subject>> {
    let mut groups: BTreeMap<Option<Table>, Vec<&Subject>> = BTreeMap::new();
    for subject in subjects {
        let own = subject.cpuid.as_ref().map(|cpuid| cpuid.table.clone());
        // A description forgets the logical processor.
        let own = own.and_then(|table| Host::from_cpuid("", table).guest_cpuid().cloned());
        groups.entry(own).or_default().push(subject);
    }
    groups.into_values()
}

/// A comparison with a host, in words.
#[derive(Clone)]
pub(crate) struct Compared {
    pub(crate) verdict: Verdict,
    /// Each reason with what would help.
    pub(crate) reasons: Vec<(String, Option<Remedy>)>,
    /// The same, with what is alike in one.
    pub(crate) lines: Vec<(String, Option<Remedy>)>,
    /// What was not compared.
    pub(crate) not_compared: Vec<String>,
    /// What contradicts itself in the guest's CPUID.
    pub(crate) contradictions: Vec<String>,
    /// What a guest would see once the rest is hidden.
    pub(crate) shared: FeatureSet,
}

impl Compared {
    /// vCPUs with the same CPUID.
    fn running(subjects: &[&Subject], host: &Host, relayout: bool) -> Self {
        let mut owners = Vec::new();
        let mut states: Vec<ExtendedState<'_>> = Vec::new();
        let mut invalid = Vec::new();
        for subject in subjects {
            match subject.restorable() {
                Ok(state) => {
                    owners.push(subject.owner);
                    states.push(state);
                }
                // Not known to be possible: no rule is broken here.
                Err(error) => invalid.push(format!("{}: {error}", subject.owner)),
            }
        }
        let cpuid = subjects.iter().find_map(|subject| subject.cpuid.as_ref());
        let msrs = same(subjects.iter().map(|subject| Some(feature_msrs(subject))));
        let tsc_khz = same(subjects.iter().map(|subject| subject.listed.tsc_khz));
        let xss = subjects
            .iter()
            .map(|subject| Some(subject.xss.as_ref()?.value));
        let xss = xss.collect::<Option<Vec<_>>>();
        let is_guess = |subject: &&Subject| matches!(subject.xcr0.source, Source::Guess(_));
        let has_guess = subjects.iter().any(is_guess);
        let check = |states: &[ExtendedState<'_>]| {
            let mut guest = match cpuid {
                Some(cpuid) => Guest::new(&cpuid.table)
                    .listed(&cpuid.entries)
                    .running(states),
                None => Guest::from_states(states),
            };
            guest = guest
                .feature_msrs(msrs.unwrap_or_default())
                .tsc_khz(tsc_khz);
            if let Some(xss) = &xss {
                guest = guest.xss(xss.iter().copied().collect());
            }
            if has_guess {
                guest = guest.with_guessed_xcr0();
            }
            if relayout {
                guest = guest.with_relayout();
            }
            compat::check(guest, host)
        };
        let mut compared = Self::of(&check(&states), &owners);
        // All that the layout has was taken for XCR0. What only that refuses is an open question.
        if has_guess && compared.verdict == Verdict::No {
            let least = states.iter().filter_map(|state| {
                let registers = state.registers().with_xcr0(XFeatures::X87);
                ExtendedState::new(state.image().clone(), registers).ok()
            });
            if check(&least.collect::<Vec<_>>()).verdict() != compat::Verdict::No {
                compared.verdict = Verdict::Unknown(vec!["--xcr0"]);
            }
        }
        let over = subjects.iter().map(|subject| subject.over_reported());
        compared.over_reported(over.collect(), host);
        invalid.into_iter().for_each(|error| compared.refuse(error));
        compared
    }

    fn of(compatibility: &Compatibility, owners: &[Owner]) -> Self {
        Self {
            verdict: match compatibility.verdict() {
                compat::Verdict::Runs => Verdict::Runs,
                compat::Verdict::RunsAfter { relayout, hide } => Verdict::After { relayout, hide },
                compat::Verdict::Unknown => {
                    let not = compatibility.not_compared.iter();
                    let is_guest = |one: &_| matches!(one, compat::NotCompared::GuestCpuid);
                    let options = not.filter(|one| is_guest(*one)).map(|_| "--cpuid");
                    Verdict::Unknown(options.collect())
                }
                _ => Verdict::No,
            },
            reasons: compatibility
                .reasons
                .iter()
                .map(|reason| (words(reason, owners), compatibility.remedy(reason)))
                .collect(),
            lines: lines(compatibility, owners),
            not_compared: texts(&compatibility.not_compared),
            contradictions: texts(&compatibility.contradictions),
            shared: compatibility.shared(),
        }
    }

    /// Components that an older kernel has reported although the guest has never had them: KVM refuses them
    /// where the host has none, and in between also where it has.
    fn over_reported(&mut self, components: XFeatures, host: &Host) {
        if components.is_empty() {
            return;
        }
        let state = host.fixes().find(|(fix, _)| fix.id == OVER_REPORTED);
        let has_all = host.guest_features().user().contains(components);
        // A dump may be that of a guest, and tells nothing about the host's KVM.
        let kvm = host.kvm.as_ref();
        let is_described = kvm.is_ok_and(|kvm| kvm.capabilities.is_some());
        let why = match state.map(|(_, state)| state) {
            _ if !has_all && is_described => "because the host lacks it",
            Some(State::Absent) => "because its kernel lacks the fix 8647c52e9504",
            Some(State::Present | State::NotAffected) => return,
            _ => {
                self.not_compared.push(format!(
                    "whether the host's KVM accepts an area with {components} in use for a guest without it: its \
                     kernel is not known to have the fix {OVER_REPORTED}; `amxctl convert` takes it out"
                ));
                return;
            }
        };
        let reason = format!(
            "{components} is in use in the area, although the guest has never had it: KVM_SET_XSAVE refuses \
             that there with EINVAL, {why}. `amxctl convert` takes it out, which loses nothing"
        );
        self.refuse(reason);
    }

    fn refuse(&mut self, reason: String) {
        self.reasons.push((reason.clone(), None));
        self.lines.push((reason, None));
        self.verdict = Verdict::No;
    }

    /// Both, for a guest whose vCPUs differ.
    fn and(mut self, other: Self) -> Self {
        fn add<T: PartialEq>(ours: &mut Vec<T>, theirs: Vec<T>) {
            for one in theirs {
                if !ours.contains(&one) {
                    ours.push(one);
                }
            }
        }
        self.verdict = self.verdict.and(other.verdict);
        add(&mut self.reasons, other.reasons);
        add(&mut self.lines, other.lines);
        add(&mut self.not_compared, other.not_compared);
        add(&mut self.contradictions, other.contradictions);
        self
    }
}

/// The value that all have, if they have the same one.
fn same<T: PartialEq>(mut values: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = values.next()??;
    values
        .all(|value| value.as_ref() == Some(&first))
        .then_some(first)
}

fn feature_msrs(subject: &Subject) -> FeatureMsrs {
    let mut msrs = FeatureMsrs::default();
    for &(index, value) in &subject.listed.msrs {
        msrs.set(index, value);
    }
    msrs
}

/// What a group of reasons has in common.
#[derive(PartialEq)]
enum Alike {
    Lacks(Usage),
    Elsewhere(Usage),
}

/// Features that the host lacks, or has elsewhere, together: there are a dozen where AMX is missing.
fn lines(compatibility: &Compatibility, owners: &[Owner]) -> Vec<(String, Option<Remedy>)> {
    let alike = |reason: &Reason| {
        Some(match reason {
            Reason::Feature { feature, usage } => (Alike::Lacks(*usage), feature.to_string()),
            Reason::Component { sees, usage } => (Alike::Lacks(*usage), sees.id.to_string()),
            Reason::Bits { bits, usage } => (Alike::Lacks(*usage), bits.to_string()),
            Reason::Elsewhere { sees, has, usage } => (
                Alike::Elsewhere(*usage),
                if sees.offset == has.offset {
                    format!("{sees} (there {has})")
                } else {
                    format!("{} (at {}, there {})", sees.id, sees.offset, has.offset)
                },
            ),
            _ => return None,
        })
    };
    let mut groups: Vec<(Alike, Vec<String>, Option<Remedy>)> = Vec::new();
    let mut others = Vec::new();
    for reason in &compatibility.reasons {
        let remedy = compatibility.remedy(reason);
        match alike(reason) {
            None => others.push((words(reason, owners), remedy)),
            Some((key, name)) => match groups.iter_mut().find(|(other, ..)| *other == key) {
                Some((_, names, _)) => names.push(name),
                None => groups.push((key, vec![name], remedy)),
            },
        }
    }
    let groups = groups.into_iter().map(|(key, names, remedy)| {
        let names = names.join(", ");
        let (what, usage) = match key {
            Alike::Lacks(usage) => ("missing on the host", usage),
            Alike::Elsewhere(usage) => ("at another place on the host", usage),
        };
        let whose = match usage {
            Usage::Enabled => "; the guest has enabled these and may use them at any moment",
            Usage::InUse => "; the guest has state in these",
            Usage::Seen => "; the guest has seen these since it started and may rely on them",
            Usage::NotEnabled => "; the guest sees these and has not enabled them",
            Usage::NotStarted => "",
            _ => "; the guest may have enabled these: what it has enabled is not known",
        };
        (format!("{what}{whose}: {names}"), remedy)
    });
    groups.chain(others).collect()
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

/// vCPUs by their own names, not by their places.
fn words(reason: &Reason, owners: &[Owner]) -> String {
    let (place, what) = match reason {
        Reason::Misfit { vcpu, misfit } => (*vcpu, misfit.to_string()),
        Reason::Loss { vcpu, loss } => (*vcpu, loss.to_string()),
        Reason::State { vcpu, error } => (*vcpu, error.to_string()),
        _ => return reason.to_string(),
    };
    let owner = usize::try_from(place)
        .ok()
        .and_then(|place| owners.get(place));
    match owner {
        Some(owner) => format!("{owner}: {what}"),
        None => what,
    }
}

/// What nobody said of a saved state, and was taken all the same.
pub(crate) fn guesses(subject: &Subject) -> Vec<String> {
    guessed_layout(subject)
        .into_iter()
        .chain(guessed_registers(subject))
        .collect()
}

/// Where its components lie, if that is a guess.
pub(crate) fn guessed_layout(subject: &Subject) -> Option<String> {
    match &subject.layout.source {
        Source::Guess(why) => Some(format!("the layout: {why}")),
        _ => None,
    }
}

/// Registers that are not in the file, and whose values were guessed. Where IA32_XFD can disable something
/// it is asked for, and not guessed.
pub(crate) fn guessed_registers(subject: &Subject) -> Vec<String> {
    let mut guesses = Vec::new();
    if let Source::Guess(why) = &subject.xcr0.source {
        guesses.push(format!("XCR0 {:#x}: {why}", subject.xcr0.value.bits()));
    }
    // Where nothing can be disabled both are 0, and nobody has to say so.
    if subject.xfd_err.is_none() && !subject.layout.value.xfd().is_empty() {
        guesses.push("IA32_XFD_ERR 0: not in the file; --xfd-err says it".to_owned());
    }
    guesses
}
