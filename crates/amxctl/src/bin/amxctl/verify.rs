//! `amxctl verify`: whether a saved state can be restored on a host.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::rules::{self, Finding, Rule, Verdict};
use cpuid_amx::{CpuidTable, Host};
use serde_json::json;
use xsave_state::{Layout, XFeatures};

use crate::cli::VerifyArgs;
use crate::screen::{self, Mark};
use crate::{Answer, Outcome, host, inspect, load};

/// What there is to say of one vCPU.
struct Judged<'a> {
    subject: &'a Subject,
    /// The rules that are broken, or cannot be judged.
    broken: Vec<Finding>,
    /// Why the host cannot hold it.
    reasons: Vec<String>,
}

impl Judged<'_> {
    fn passes(&self) -> bool {
        self.broken.is_empty() && self.reasons.is_empty()
    }
}

pub(crate) fn run(args: &VerifyArgs, json: bool) -> anyhow::Result<Outcome> {
    let given = load::given(&args.given)?;
    let host = host::this_or(args.on.as_deref())?;
    let loaded = load::load(&args.file, &args.vcpu, &given)?;
    let judged: Vec<_> = loaded
        .subjects
        .iter()
        .map(|subject| judge(subject, &host))
        .collect();
    let passes = judged.iter().all(Judged::passes);
    let text = if json {
        let vcpus: Vec<_> = judged.iter().map(as_json).collect();
        let value = json!({
            "file": loaded.name,
            "host": host.name,
            "restorable": passes,
            "vcpus": vcpus,
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let mut text = String::new();
        let verdict = if passes {
            console::style(format!("can be restored on {}", host.name)).green()
        } else {
            console::style(format!("must not be restored on {}", host.name)).red()
        };
        let name = screen::title(&loaded.name);
        writeln!(text, "{name}: {}", verdict.bold())?;
        for one in &judged {
            text.push_str(&vcpu(one, &host));
        }
        text
    };
    Ok(Outcome {
        text,
        answer: if passes { Answer::Yes } else { Answer::No },
    })
}

fn judge<'a>(subject: &'a Subject, host: &Host) -> Judged<'a> {
    let broken = rules::check(subject).into_iter().filter(|finding| {
        // A state whose XFD nobody knows may be the one that takes its host down.
        finding.verdict == Verdict::Broken
            || finding.verdict == Verdict::Unknown && finding.rule == Rule::XfdInUse
    });
    Judged {
        subject,
        broken: broken.collect(),
        reasons: reasons(subject, host),
    }
}

/// Why this host cannot hold the state; none where it can.
fn reasons(subject: &Subject, host: &Host) -> Vec<String> {
    let Some(table) = host.guest_cpuid() else {
        return vec!["there is no KVM".to_owned()];
    };
    let target = match Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)) {
        Ok(layout) => layout,
        Err(error) => return vec![format!("its CPUID: {error}")],
    };
    let layout = &subject.layout.value;
    let enabled = subject.xcr0.value;
    let mut reasons: Vec<String> = layout
        .misfits(&target, subject.xstate_bv() | enabled)
        .map(|misfit| misfit.to_string())
        .collect();
    let xfd = subject.registers().xfd;
    if !target.xfd().contains(xfd) {
        let missing: XFeatures = xfd - target.xfd();
        reasons.push(format!("IA32_XFD cannot disable {missing} there"));
    }
    reasons
}

fn vcpu(judged: &Judged<'_>, host: &Host) -> String {
    let owner = judged.subject.owner;
    if judged.passes() {
        return format!("  {} {owner}\n", screen::mark(Mark::Good));
    }
    let mut text = format!("  {} {owner}\n", screen::mark(Mark::Bad));
    text.push_str(&inspect::findings(&judged.broken));
    if !judged.reasons.is_empty() {
        let _ = writeln!(text, "    {} cannot hold it:", host.name);
        for reason in &judged.reasons {
            text.push_str(&screen::wrap(reason, 6));
        }
    }
    text
}

fn as_json(judged: &Judged<'_>) -> serde_json::Value {
    json!({
        "id": judged.subject.owner.id(),
        "restorable": judged.passes(),
        "rules": inspect::rules_json(&judged.broken),
        "reasons": judged.reasons,
    })
}
