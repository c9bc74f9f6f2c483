//! `amxctl verify`: whether a saved state can be restored on a host, as it is.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::rules::{self, Finding, Rule, Verdict};
use cpuid_amx::compat;
use serde_json::json;

use crate::cli::VerifyArgs;
use crate::compat::Judged;
use crate::screen::{self, Mark};
use crate::{Answer, Outcome, host, inspect, load};

/// Text for no more vCPUs; JSON has them all.
const SHOWN: usize = 16;

pub(crate) fn run(args: &VerifyArgs, json: bool) -> anyhow::Result<Outcome> {
    let given = load::given(&args.given)?;
    let host = host::this_or(args.on.as_deref())?;
    let loaded = load::load(&args.file, &args.vcpu, &given)?;
    let broken: Vec<(&Subject, Vec<Finding>)> = loaded
        .subjects
        .iter()
        .map(|subject| (subject, refused(subject)))
        .filter(|(_, findings)| !findings.is_empty())
        .collect();
    // What breaks a rule is refused whatever the host.
    let judged = broken
        .is_empty()
        .then(|| Judged::saved(&loaded.subjects, &host));
    let passes = judged
        .as_ref()
        .is_some_and(|judged| judged.verdict == compat::Verdict::Runs);
    let text = if json {
        let vcpus: Vec<_> = broken
            .iter()
            .map(|(subject, findings)| {
                json!({
                    "id": subject.owner.id(),
                    "rules": inspect::rules_json(findings),
                })
            })
            .collect();
        let value = json!({
            "file": loaded.name,
            "host": host.name,
            "restorable": passes,
            "refused": vcpus,
            "compatibility": judged.as_ref().map(Judged::as_json),
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let verdict = match &judged {
            None => Mark::Bad.paint("must not be restored, on any host"),
            Some(_) if passes => console::style(format!("can be restored on {}", host.name))
                .green()
                .to_string(),
            Some(judged) => {
                let said = format!("cannot be restored on {} as it is", host.name);
                judged.mark().paint(&said)
            }
        };
        let mut text = format!("{}: {verdict}\n", screen::title(&loaded.name));
        for (subject, findings) in broken.iter().take(SHOWN) {
            let _ = writeln!(text, "\n{}", screen::title(&subject.owner.to_string()));
            text.push_str(&inspect::findings(findings));
        }
        let more = broken.len().saturating_sub(SHOWN);
        if more > 0 {
            let note = format!("{more} more; --json has them");
            let _ = writeln!(text, "\n{}", screen::dim(note));
        }
        if let Some(judged) = &judged {
            text.push_str(&judged.text());
        }
        text
    };
    Ok(Outcome {
        text,
        answer: if passes { Answer::Yes } else { Answer::No },
    })
}

/// The rules that are broken, or that protect the host and cannot be judged.
fn refused(subject: &Subject) -> Vec<Finding> {
    let findings = rules::check(subject).into_iter();
    findings
        .filter(|finding| {
            // A state whose XFD nobody knows may be the one that takes its host down.
            finding.verdict == Verdict::Broken
                || finding.verdict == Verdict::Unknown && finding.rule == Rule::XfdInUse
        })
        .collect()
}
