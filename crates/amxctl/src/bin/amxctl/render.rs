//! Shows what was judged: to people, and to machines.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::rules::{Finding, Verdict as Found};
use amxctl::vcpu::Owner;
use host_compat::compat::Remedy;
use serde_json::{Value, json};

use crate::judge::{self, Compared, Judgement, Verdict};
use crate::screen::{self, Mark};

/// Text for no more vCPUs; JSON has them all.
const SHOWN: usize = 16;

/// All but the first line.
pub(crate) fn text(judgement: &Judgement<'_>) -> String {
    let subjects: Vec<&Subject> = judgement
        .vcpus
        .iter()
        .map(|(subject, _)| *subject)
        .collect();
    let mut text = guesses(&subjects);
    text.push_str(&refused(&judgement.vcpus));
    if let Some(compared) = &judgement.compared {
        text.push_str(&comparison(compared, &judgement.verdict));
    }
    text
}

/// A line for each guess, with those whose it is where that is not everyone.
fn guesses(subjects: &[&Subject]) -> String {
    let mut guesses: Vec<(String, Vec<Owner>)> = Vec::new();
    for subject in subjects {
        for guess in judge::guesses(subject) {
            match guesses.iter_mut().find(|(other, _)| *other == guess) {
                Some((_, whose)) => whose.push(subject.owner),
                None => guesses.push((guess, vec![subject.owner])),
            }
        }
    }
    let mut text = String::new();
    for (guess, whose) in guesses {
        let said = match whose.as_slice() {
            all if all.len() == subjects.len() => format!("guessed: {guess}"),
            [one] => format!("guessed for {one}: {guess}"),
            several => {
                let what = match several {
                    [Owner::Thread(_), ..] => "thread",
                    _ => "vCPU",
                };
                format!(
                    "guessed for {}: {guess}",
                    screen::count(several.len(), what)
                )
            }
        };
        text.push_str(&line(Mark::Warning, &Mark::Warning.paint(&said)));
    }
    text
}

/// Each vCPU about which there is something to say whatever the host.
fn refused(vcpus: &[(&Subject, Vec<Finding>)]) -> String {
    let mut text = String::new();
    let with = vcpus.iter().filter(|(_, found)| !found.is_empty());
    for (subject, found) in with.clone().take(SHOWN) {
        let _ = writeln!(text, "\n{}", screen::title(&subject.owner.to_string()));
        text.push_str(&findings(found));
    }
    let more = with.count().saturating_sub(SHOWN);
    if more > 0 {
        let note = format!("{more} more; --json has them");
        let _ = writeln!(text, "\n{}", screen::dim(note));
    }
    text
}

/// Findings, each with its mark; with what a broken rule can do, and what helps.
pub(crate) fn findings(findings: &[Finding]) -> String {
    let mut text = String::new();
    let next = findings.iter().skip(1).map(Some).chain([None]);
    for (finding, next) in findings.iter().zip(next) {
        let mark = match finding.verdict {
            Found::Broken => Mark::Bad,
            Found::Unknown { .. } => Mark::Unknown,
            _ => Mark::Warning,
        };
        let title = format!("{:<24}", finding.rule.title());
        let wrapped = screen::wrap(&screen::plain(&finding.values), 29);
        let mut lines = wrapped.lines();
        let first = lines.next().unwrap_or_default().trim_start();
        let (mark, title) = (screen::mark(mark), mark.paint(&title));
        let _ = writeln!(text, "  {mark} {title} {first}");
        for line in lines {
            let _ = writeln!(text, "{line}");
        }
        // Once for several of a rule.
        let is_same = |next: &Finding| next.rule == finding.rule && next.verdict == Found::Broken;
        if finding.verdict == Found::Broken && !next.is_some_and(is_same) {
            let danger = screen::wrap(&sentence(finding.rule.danger()), 4);
            let _ = writeln!(text, "{}", Mark::Bad.paint(danger.trim_end()));
        }
    }
    let mut broken = findings.iter().filter(|one| one.verdict == Found::Broken);
    let is_any = broken.clone().next().is_some();
    if is_any && broken.all(|finding| finding.is_mendable) {
        let said = "`amxctl convert` writes a valid area with the same state: nothing is lost.";
        text.push_str(&line(Mark::Good, said));
    }
    text
}

/// A mark and a text, wrapped.
fn line(mark: Mark, text: &str) -> String {
    let wrapped = screen::wrap(text, 4);
    format!("  {} {}", screen::mark(mark), wrapped.trim_start())
}

/// With a capital and a full stop.
fn sentence(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters
        .next()
        .map(|first| first.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), characters.as_str())
}

/// The reasons against a host, and what to do about those about which something can be done.
fn comparison(compared: &Compared, verdict: &Verdict) -> String {
    let mut text = String::new();
    for (reason, remedy) in &compared.lines {
        let mark = match remedy {
            Some(_) => Mark::Warning,
            None => Mark::Bad,
        };
        text.push_str(&line(mark, &screen::plain(reason)));
    }
    let said = [
        (
            "The guest's own CPUID contradicts itself",
            &compared.contradictions,
            Mark::Bad,
        ),
        ("Not compared", &compared.not_compared, Mark::Unknown),
    ];
    for (title, lines, mark) in said {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n  {}", screen::title(title));
        }
        for one in lines {
            text.push_str(&line(mark, &screen::plain(one)));
        }
    }
    let helps = helps(compared);
    if !helps.is_empty() && *verdict != Verdict::No {
        let _ = writeln!(text, "\n  {}", screen::title("What helps"));
        for help in helps {
            text.push_str(&screen::wrap(&help, 4));
        }
    }
    text
}

fn helps(compared: &Compared) -> Vec<String> {
    let has = |wanted| {
        let mut reasons = compared.reasons.iter();
        reasons.any(|(_, remedy)| *remedy == Some(wanted))
    };
    let mut helps = Vec::new();
    if has(Remedy::Hide) {
        let amx = match compared.shared.amx.is_empty() {
            true => "no AMX".to_owned(),
            false => compared.shared.amx.to_string(),
        };
        helps.push(format!(
            "Hide what the host lacks from the guest's CPUID: what is left has {amx} and the \
             components {}",
            compared.shared.user()
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

/// What was guessed of each vCPU, why it is refused, and what else was found.
pub(crate) fn vcpus_json(judgement: &Judgement<'_>) -> Value {
    let vcpus = judgement.vcpus.iter().map(|(subject, found)| {
        let refused = found.iter().filter(|one| one.verdict != Found::Note);
        let notes = found.iter().filter(|one| one.verdict == Found::Note);
        json!({
            "owner": subject.owner.to_string(),
            "id": subject.owner.id(),
            "guesses": judge::guesses(subject),
            "refused": refused.map(finding_json).collect::<Vec<_>>(),
            "notes": notes.map(|note| &note.values).collect::<Vec<_>>(),
        })
    });
    vcpus.collect()
}

/// A finding for machines.
pub(crate) fn finding_json(finding: &Finding) -> Value {
    let mut value = json!({
        "rule": finding.rule.name(),
        "verdict": match finding.verdict {
            Found::Broken => "broken",
            Found::Unknown { .. } => "unknown",
            _ => "note",
        },
        "values": finding.values,
    });
    if let Some(map) = value.as_object_mut() {
        match finding.verdict {
            Found::Broken => {
                map.insert("danger".to_owned(), finding.rule.danger().into());
                map.insert("convert_mends".to_owned(), finding.is_mendable.into());
            }
            Found::Unknown { option } => {
                map.insert("option".to_owned(), option.into());
            }
            _ => {}
        }
    }
    value
}

/// A comparison with a host for machines.
pub(crate) fn compared_json(compared: &Compared) -> Value {
    json!({
        "reasons": compared.reasons.iter().map(|(reason, remedy)| json!({
            "reason": reason,
            "remedy": remedy.map(|remedy| match remedy {
                Remedy::Relayout => "relayout",
                Remedy::Hide => "hide",
                _ => "other",
            }),
        })).collect::<Vec<_>>(),
        "not_compared": compared.not_compared,
        "contradictions": compared.contradictions,
        "shared": compared.shared.iter().map(|feature| feature.to_string()).collect::<Vec<_>>(),
    })
}

/// The verdict for machines.
pub(crate) fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Runs => "runs",
        Verdict::After { .. } => "runs_after",
        Verdict::Unknown(_) => "unknown",
        Verdict::No | Verdict::Nowhere => "no",
    }
}

/// The options without which nothing can be said, as in `: give --cpuid and --xfd`.
pub(crate) fn give(options: &[&str]) -> String {
    match options {
        [] => String::new(),
        options => format!(": give {}", options.join(" and ")),
    }
}
