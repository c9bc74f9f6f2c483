//! `amxctl diff` of two descriptions of a host: what an update gave, took or moved, and which running
//! guests it would strand.

use std::fmt::Write;

use host_compat::Host;
use host_compat::compat::Reason;
use host_compat::kernel::State;
use host_compat::update::{self, Changes, Strands};
use serde_json::{Value, json};

use crate::outcome::{Answer, Outcome};
use crate::screen::{self, Mark};

pub(super) fn run(before: &Host, after: &Host, json: bool) -> anyhow::Result<Outcome> {
    let changes = update::changes(before, after);
    let same = changes.lost.is_empty()
        && changes.gained.is_empty()
        && changes.fixes.is_empty()
        && !changes.undescribed;
    let text = if json {
        serde_json::to_string_pretty(&as_json(before, after, &changes, same))? + "\n"
    } else {
        text(before, after, &changes, same)
    };
    Ok(Outcome {
        text,
        answer: match (same, changes.undescribed) {
            (_, true) => Answer::Unknown,
            (true, _) => Answer::Yes,
            _ => Answer::No,
        },
    })
}

fn text(before: &Host, after: &Host, changes: &Changes, same: bool) -> String {
    let mut text = format!(
        "{} {}\n{} {}\n",
        console::style("-").red(),
        screen::title(&before.name),
        console::style("+").green(),
        screen::title(&after.name)
    );
    if let Some([before, after]) = &changes.kernels {
        let _ = writeln!(text, "  kernel {before} → {after}");
    }
    if changes.undescribed {
        let note = "one of the two has no KVM, so that what guests can have was not compared";
        let _ = writeln!(text, "  {} {note}", screen::mark(Mark::Unknown));
    } else if same {
        let _ = writeln!(
            text,
            "  {} guests can have the same",
            screen::mark(Mark::Good)
        );
    }
    let lost = changes.lost.iter().map(|lost| {
        let line = format!(
            "{} (strands running guests that {})",
            what(&lost.reason),
            whom(lost.strands)
        );
        (Mark::Bad, line)
    });
    let gained = changes
        .gained
        .iter()
        .map(|reason| (Mark::Good, what(reason)));
    let fixes = changes.fixes.iter().map(|(fix, before, after)| {
        let mark = match after {
            State::Present | State::NotAffected => Mark::Good,
            State::Absent => Mark::Bad,
            _ => Mark::Unknown,
        };
        (mark, format!("{}: {before} → {after}", fix.id))
    });
    let open = changes
        .not_compared
        .iter()
        .map(|one| (Mark::Unknown, one.to_string()));
    section(&mut text, "Guests cannot have any more", lost);
    section(&mut text, "Guests can have now", gained);
    section(&mut text, "Known fixes", fixes);
    section(&mut text, "Not compared", open);
    text
}

fn section(text: &mut String, title: &str, lines: impl Iterator<Item = (Mark, String)>) {
    let mut lines = lines.peekable();
    if lines.peek().is_some() {
        let _ = writeln!(text, "\n  {}", screen::title(title));
    }
    for (mark, line) in lines {
        let wrapped = screen::wrap(&screen::plain(&line), 4);
        let _ = write!(text, "  {} {}", screen::mark(mark), wrapped.trim_start());
    }
}

/// The thing itself: who lacks it says the heading.
fn what(reason: &Reason) -> String {
    match reason {
        Reason::Feature { feature, .. } => feature.to_string(),
        Reason::Component { sees, .. } => sees.to_string(),
        Reason::Elsewhere { sees, has, .. } => format!("{sees} is now {has}"),
        Reason::Bits { bits, .. } => bits.to_string(),
        other => other.to_string(),
    }
}

fn whom(strands: Strands) -> String {
    match strands {
        Strands::Enabled(components) => format!("have enabled {components}"),
        _ => "have seen it".to_owned(),
    }
}

fn as_json(before: &Host, after: &Host, changes: &Changes, same: bool) -> Value {
    json!({
        "first": before.name,
        "second": after.name,
        "same": same,
        "kernels": changes.kernels,
        "lost": changes.lost.iter().map(|lost| json!({
            "what": what(&lost.reason),
            "strands": whom(lost.strands),
        })).collect::<Vec<_>>(),
        "gained": changes.gained.iter().map(what).collect::<Vec<_>>(),
        "fixes": changes.fixes.iter().map(|(fix, before, after)| json!({
            "id": fix.id,
            "before": before.to_string(),
            "after": after.to_string(),
        })).collect::<Vec<_>>(),
        "not_compared": changes.not_compared.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
