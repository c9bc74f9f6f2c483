//! `amxctl compat`: whether the guest of A runs on B, every reason why not, and what would help.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::vcpu::Owner;
use anyhow::{Context, bail};
use cpuid_amx::FeatureSet;
use host_compat::Host;
use host_compat::compat::{self, Compatibility, Guest, Reason, Remedy, Usage, Verdict};
use serde_json::{Value, json};

use crate::cli::CompatArgs;
use crate::load::{self, Loaded};
use crate::screen::{self, Mark};
use crate::{Answer, Outcome, guesses, input, verify};

/// A guest, from what there is of it.
enum Source {
    /// One that has not started, and would get all that a host has.
    Host(Box<Host>),
    /// One that ran.
    Saved(Loaded),
}

pub(crate) fn run(args: &CompatArgs, json: bool) -> anyhow::Result<Outcome> {
    let guest = source(args)?;
    let host = input::host(&args.host)?;
    let saved: &[Subject] = match &guest {
        Source::Host(_) => &[],
        Source::Saved(loaded) => &loaded.subjects,
    };
    let refused = verify::refused(saved);
    let missing = verify::missing(refused.iter().flat_map(|(_, findings)| findings));
    let judged = match (&guest, &missing) {
        (Source::Host(own), _) => {
            let guest = Guest::of_host(own).with_context(|| {
                format!("{}: a host without KVM has no guests", args.guest.display())
            })?;
            Some(Judged::of(&compat::check(guest, &host), &[]))
        }
        // What would tell is not known.
        (Source::Saved(_), Some(_)) => None,
        (Source::Saved(loaded), None) => {
            Some(Judged::saved(&loaded.subjects, &host, args.relayout))
        }
    };
    let name = args.guest.display().to_string();
    let text = if json {
        let mut value = judged.as_ref().map_or_else(unknown_json, Judged::as_json);
        if let Some(map) = value.as_object_mut() {
            map.insert("guest".to_owned(), name.into());
            map.insert("host".to_owned(), host.name.clone().into());
            map.insert("vcpus".to_owned(), verify::vcpus_json(saved));
        }
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let what = match &guest {
            Source::Host(_) => "a new guest of",
            Source::Saved(_) => "the guest in",
        };
        let verdict = match (&judged, &missing) {
            (Some(judged), _) => judged.mark().paint(&judged.verdict.to_string()),
            (None, options) => {
                let options = options.as_deref().unwrap_or_default();
                Mark::Unknown.paint(&format!("cannot be judged: give {options}"))
            }
        };
        let mut text = format!(
            "{what} {} on {}: {verdict}\n",
            screen::title(&name),
            screen::title(&host.name),
        );
        text.push_str(&guesses::text(saved));
        match &judged {
            Some(judged) => text.push_str(&judged.text()),
            None => text.push_str(&verify::findings(&refused)),
        }
        text
    };
    Ok(Outcome {
        text,
        answer: match (&guest, judged.map(|judged| judged.verdict)) {
            (_, Some(Verdict::Runs)) => Answer::Yes,
            // A guest that has not started can be given less, and must be.
            (Source::Host(_), Some(Verdict::RunsAfter { .. })) => Answer::Warning,
            (_, None | Some(Verdict::Unknown)) => Answer::Unknown,
            _ => Answer::No,
        },
    })
}

/// A saved state, a host whose guests get all that there is, or a dump of CPUID.
fn source(args: &CompatArgs) -> anyhow::Result<Source> {
    let path = &args.guest;
    match input::guest(path)? {
        input::Guest::Host(host) => {
            if args.given.any() {
                bail!(
                    "{}: this is no saved state, and says all that there is to say: --cpuid, --xcr0, \
                     --xfd and --xfd-err are for what a saved state does not say",
                    path.display()
                );
            }
            Ok(Source::Host(host))
        }
        input::Guest::Saved(snapshot) => {
            let given = load::given(&args.given)?;
            let loaded = load::subjects(path, snapshot, &[], &given)?;
            Ok(Source::Saved(loaded))
        }
    }
}

/// For machines, where nothing can be said.
fn unknown_json() -> Value {
    json!({
        "verdict": "unknown",
        "relayout": false,
        "hide": false,
        "reasons": [],
        "not_compared": [],
        "contradictions": [],
        "shared": [],
    })
}

/// A comparison in words.
pub(crate) struct Judged {
    pub(crate) verdict: Verdict,
    /// Each with what would help.
    reasons: Vec<(String, Option<Remedy>)>,
    /// The same, with what is alike in one.
    lines: Vec<(String, Option<Remedy>)>,
    /// What was not compared.
    not_compared: Vec<String>,
    /// What contradicts itself in the guest's CPUID.
    contradictions: Vec<String>,
    /// What a guest would see once the rest is hidden.
    shared: FeatureSet,
}

impl Judged {
    /// The vCPUs of a saved guest. Those that break a rule are not compared: they run nowhere.
    pub(crate) fn saved(subjects: &[Subject], host: &Host, relayout: bool) -> Self {
        let mut owners = Vec::new();
        let mut states = Vec::new();
        let mut broken = Vec::new();
        for subject in subjects {
            match subject.state() {
                Ok(state) => {
                    owners.push(subject.owner);
                    states.push(state);
                }
                Err(error) => broken.push(format!("{}: {error}", subject.owner)),
            }
        }
        let table = subjects.iter().find_map(|subject| subject.cpuid.as_ref());
        let mut guest = match table {
            Some(table) => Guest::new(table).running(&states),
            None => Guest::from_states(&states),
        };
        if relayout {
            guest = guest.with_relayout();
        }
        let mut judged = Self::of(&compat::check(guest, host), &owners);
        if !broken.is_empty() {
            judged.verdict = Verdict::No;
            let broken: Vec<_> = broken.into_iter().map(|reason| (reason, None)).collect();
            judged.lines.splice(0..0, broken.clone());
            judged.reasons.splice(0..0, broken);
        }
        judged
    }

    fn of(compatibility: &Compatibility, owners: &[Owner]) -> Self {
        Self {
            verdict: compatibility.verdict(),
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

    pub(crate) fn mark(&self) -> Mark {
        match self.verdict {
            Verdict::Runs => Mark::Good,
            Verdict::RunsAfter { .. } => Mark::Warning,
            Verdict::Unknown => Mark::Unknown,
            _ => Mark::Bad,
        }
    }

    /// The reasons, and what to do about those about which something can be done.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for (reason, remedy) in &self.lines {
            let mark = match remedy {
                Some(_) => Mark::Warning,
                None => Mark::Bad,
            };
            let wrapped = screen::wrap(reason, 4);
            let _ = write!(text, "  {} {}", screen::mark(mark), wrapped.trim_start());
        }
        let said = [
            (
                "The guest's own CPUID contradicts itself",
                &self.contradictions,
                Mark::Bad,
            ),
            ("Not compared", &self.not_compared, Mark::Unknown),
        ];
        for (title, lines, mark) in said {
            if !lines.is_empty() {
                let _ = writeln!(text, "\n  {}", screen::title(title));
            }
            for line in lines {
                let wrapped = screen::wrap(&screen::plain(line), 4);
                let _ = write!(text, "  {} {}", screen::mark(mark), wrapped.trim_start());
            }
        }
        let helps = self.helps();
        if !helps.is_empty() && self.verdict != Verdict::No {
            let _ = writeln!(text, "\n  {}", screen::title("What helps"));
            for help in helps {
                text.push_str(&screen::wrap(&help, 4));
            }
        }
        text
    }

    fn helps(&self) -> Vec<String> {
        let has = |wanted| {
            self.reasons
                .iter()
                .any(|(_, remedy)| *remedy == Some(wanted))
        };
        let mut helps = Vec::new();
        if has(Remedy::Hide) {
            let amx = match self.shared.amx.is_empty() {
                true => "no AMX".to_owned(),
                false => self.shared.amx.to_string(),
            };
            helps.push(format!(
                "Hide what the host lacks from the guest's CPUID: what is left has {amx} and the \
                 components {}",
                self.shared.user()
            ));
        }
        if has(Remedy::Relayout) {
            helps.push(
                "Move the states into the host's layout, with `amxctl convert --layout` or \
                 xsave_state's ExtendedState::relocate. A guest that uses the standard format with places that it has \
                 read from CPUID goes wrong with that, as Linux does with its signal frames."
                    .to_owned(),
            );
        }
        helps
    }

    pub(crate) fn as_json(&self) -> Value {
        let (verdict, relayout, hide) = match self.verdict {
            Verdict::Runs => ("runs", false, false),
            Verdict::RunsAfter { relayout, hide } => ("runs_after", relayout, hide),
            Verdict::Unknown => ("unknown", false, false),
            _ => ("no", false, false),
        };
        json!({
            "verdict": verdict,
            "relayout": relayout,
            "hide": hide,
            "reasons": self.reasons.iter().map(|(reason, remedy)| json!({
                "reason": reason,
                "remedy": remedy.map(|remedy| match remedy {
                    Remedy::Relayout => "relayout",
                    Remedy::Hide => "hide",
                    _ => "other",
                }),
            })).collect::<Vec<_>>(),
            "not_compared": self.not_compared,
            "contradictions": self.contradictions,
            "shared": self.shared.iter().map(|feature| feature.to_string()).collect::<Vec<_>>(),
        })
    }
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
            Alike::Lacks(usage) => ("lacks", usage),
            Alike::Elsewhere(usage) => ("has at another place", usage),
        };
        let whose = match usage {
            Usage::Enabled => "what the guest has enabled and may use at any moment",
            Usage::Seen => "what the guest has seen when it started, and may rely on",
            Usage::NotEnabled => "what the guest sees and has not enabled",
            Usage::NotStarted => "what the guest would see",
            _ => "what the guest may have enabled (its IA32_XSS is not known)",
        };
        (format!("the host {what} {whose}: {names}"), remedy)
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
