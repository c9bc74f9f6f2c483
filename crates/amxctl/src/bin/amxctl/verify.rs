//! `amxctl verify`: whether a saved state can be restored on a host, as it is.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::rules::{self, Finding};
use host_compat::compat;
use serde_json::{Value, json};

use crate::cli::VerifyArgs;
use crate::compat::Judged;
use crate::screen::{self, Mark};
use crate::{Answer, Outcome, guesses, input, inspect, load};

/// Text for no more vCPUs; JSON has them all.
const SHOWN: usize = 16;

pub(crate) fn run(args: &VerifyArgs, json: bool) -> anyhow::Result<Outcome> {
    let given = load::given(&args.given)?;
    let host = input::this_or(args.on.as_deref())?;
    let loaded = load::load(&args.file, &args.vcpu, &given)?;
    let refused = refused(&loaded.subjects);
    let verdict = if refused.is_empty() {
        Verdict::On(Judged::saved(&loaded.subjects, &host, false))
    } else {
        let findings = refused.iter().flat_map(|(_, findings)| findings);
        match missing(findings) {
            Some(options) => Verdict::Unknown(options),
            // What breaks a rule is refused whatever the host.
            None => Verdict::Nowhere,
        }
    };
    let passes = verdict.passes();
    let text = if json {
        let value = json!({
            "file": loaded.name,
            "format": loaded.snapshot.format.name(),
            "host": host.name,
            "judged": !verdict.is_unknown(),
            "restorable": passes,
            "vcpus": vcpus_json(&loaded.subjects),
            "compatibility": verdict.judged().map(Judged::as_json),
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let said = verdict.text(&host.name);
        let mut text = format!("{}: {said}\n", screen::title(&loaded.name));
        text.push_str(&guesses::text(&loaded.subjects));
        text.push_str(&findings(&refused));
        if let Some(judged) = verdict.judged() {
            text.push_str(&judged.text());
        }
        text
    };
    Ok(Outcome {
        text,
        answer: match &verdict {
            _ if passes => Answer::Yes,
            Verdict::Unknown(_) => Answer::Unknown,
            Verdict::On(judged) if judged.verdict == compat::Verdict::Unknown => Answer::Unknown,
            _ => Answer::No,
        },
    })
}

/// What there is to say in the first line.
enum Verdict {
    /// A rule is broken.
    Nowhere,
    /// No rule is known to be broken, and these options would tell.
    Unknown(String),
    /// No rule is broken; how the host takes it.
    On(Judged),
}

impl Verdict {
    fn judged(&self) -> Option<&Judged> {
        match self {
            Self::On(judged) => Some(judged),
            Self::Nowhere | Self::Unknown(_) => None,
        }
    }

    fn is_unknown(&self) -> bool {
        match self {
            Self::Unknown(_) => true,
            Self::On(judged) => judged.verdict == compat::Verdict::Unknown,
            Self::Nowhere => false,
        }
    }

    fn passes(&self) -> bool {
        self.judged()
            .is_some_and(|judged| judged.verdict == compat::Verdict::Runs)
    }

    fn text(&self, host: &str) -> String {
        match self {
            Self::Nowhere => Mark::Bad.paint("must not be restored, on any host"),
            Self::Unknown(options) => {
                Mark::Unknown.paint(&format!("cannot be judged: give {options}"))
            }
            Self::On(_) if self.passes() => console::style(format!("can be restored on {host}"))
                .green()
                .to_string(),
            Self::On(judged) if judged.verdict == compat::Verdict::Unknown => {
                Mark::Unknown.paint(&format!("cannot be judged on {host}: give --cpuid"))
            }
            Self::On(judged) => {
                let said = format!("cannot be restored on {host} as it is");
                judged.mark().paint(&said)
            }
        }
    }
}

/// The vCPUs that must not be restored, wherever, or of which nobody knows; and why not.
pub(crate) fn refused(subjects: &[Subject]) -> Vec<(&Subject, Vec<Finding>)> {
    let all = subjects.iter().map(|subject| (subject, refusing(subject)));
    all.filter(|(_, findings)| !findings.is_empty()).collect()
}

/// What was guessed of each vCPU, and why it is refused.
pub(crate) fn vcpus_json(subjects: &[Subject]) -> Value {
    subjects
        .iter()
        .map(|subject| {
            json!({
                "owner": subject.owner.to_string(),
                "id": subject.owner.id(),
                "guesses": guesses::of(subject),
                "refused": inspect::rules_json(&refusing(subject)),
            })
        })
        .collect()
}

/// The reasons not to restore it, wherever.
fn refusing(subject: &Subject) -> Vec<Finding> {
    let findings = rules::check(subject).into_iter();
    findings.filter(Finding::refuses).collect()
}

/// The options without which nothing can be said; `None` where none helps: a rule is broken in any
/// case, or all hold.
pub(crate) fn missing<'a>(findings: impl Iterator<Item = &'a Finding>) -> Option<String> {
    let mut options = findings.map(Finding::option).collect::<Option<Vec<_>>>()?;
    options.sort_unstable();
    options.dedup();
    (!options.is_empty()).then(|| options.join(" and "))
}

/// Each vCPU with the reasons not to restore it.
pub(crate) fn findings(refused: &[(&Subject, Vec<Finding>)]) -> String {
    let mut text = String::new();
    for (subject, findings) in refused.iter().take(SHOWN) {
        let _ = writeln!(text, "\n{}", screen::title(&subject.owner.to_string()));
        text.push_str(&inspect::findings(findings));
    }
    let more = refused.len().saturating_sub(SHOWN);
    if more > 0 {
        let note = format!("{more} more; --json has them");
        let _ = writeln!(text, "\n{}", screen::dim(note));
    }
    text
}

#[cfg(test)]
mod tests {
    use amxctl::rules::{Rule, Verdict};

    use super::*;

    #[test]
    fn what_is_broken_needs_no_option() {
        let finding = |rule, verdict| Finding {
            rule,
            verdict,
            values: String::new(),
        };
        let unknown = finding(Rule::XfdInUse, Verdict::Unknown);
        let broken = finding(Rule::Length, Verdict::Broken);
        let both = [unknown.clone(), unknown.clone()];
        assert_eq!(missing(both.iter()).as_deref(), Some("--xfd"));
        assert_eq!(missing([unknown, broken].iter()), None);
    }
}
