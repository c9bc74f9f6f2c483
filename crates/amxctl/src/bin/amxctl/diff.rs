//! `amxctl diff`: in which registers two saved states differ, or what changed on a host.

use std::fmt::Write;

use amxctl::Subject;
use amxctl::diff::{ComponentDiff, Diff, PartDiff, RegisterDiff, Use, diff};
use anyhow::bail;
use serde_json::{Value, json};
use xsave_state::XFeatures;

use crate::cli::DiffArgs;
use crate::input::{self, Guest, Loaded};
use crate::outcome::{Answer, Outcome};
use crate::screen::{self, Mark};

mod hosts;

/// Of each component, without --all: so many rows of sixteen bytes.
const SHOWN_ROWS: usize = 8;
/// Bytes of a part on one line.
const ROW: usize = 16;

/// What there is to say of one vCPU.
enum Pair<'a> {
    Both(&'a Subject, &'a Subject, Diff),
    OnlyFirst(&'a Subject),
    OnlySecond(&'a Subject),
}

impl Pair<'_> {
    fn same(&self) -> bool {
        matches!(self, Self::Both(.., diff) if diff.is_empty())
    }
}

pub(crate) fn run(args: &DiffArgs, json: bool) -> anyhow::Result<Outcome> {
    let (first, second) = match (input::guest(&args.first)?, input::guest(&args.second)?) {
        (Guest::Host(first), Guest::Host(second)) => return hosts::run(&first, &second, json),
        (Guest::Saved(first), Guest::Saved(second)) => (first, second),
        _ => bail!(
            "{} and {}: one is a saved state, and the other a host",
            args.first.display(),
            args.second.display()
        ),
    };
    let given = input::given(&args.given)?;
    let first = input::subjects(&args.first, first, &args.vcpu, &given)?;
    let second = input::subjects(&args.second, second, &args.vcpu, &given)?;
    for loaded in [&first, &second] {
        for subject in &loaded.subjects {
            // Components that are looked for at the wrong places are other registers.
            if let Some(doubt) = &subject.doubt {
                bail!("{}: {}: {doubt}", loaded.name, subject.owner);
            }
        }
    }
    let pairs = pairs(&first, &second);
    let same = pairs.iter().all(Pair::same);
    let text = if json {
        let vcpus: Vec<Value> = pairs.iter().map(pair_json).collect();
        let value = json!({
            "first": first.name,
            "second": second.name,
            "same": same,
            "vcpus": vcpus,
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        text(&first, &second, &pairs, args.all)
    };
    Ok(Outcome {
        text,
        answer: if same { Answer::Yes } else { Answer::No },
    })
}

/// By identifier. Two single ones are compared whatever theirs: a thread has another one in each core
/// dump, and a raw area or a state has none of its own.
fn pairs<'a>(first: &'a Loaded, second: &'a Loaded) -> Vec<Pair<'a>> {
    if let ([first], [second]) = (&*first.subjects, &*second.subjects) {
        return vec![Pair::Both(first, second, diff(first, second))];
    }
    let find = |all: &'a [Subject], id: u32| all.iter().find(|s| s.owner.id() == id);
    let mut pairs: Vec<Pair<'a>> = first
        .subjects
        .iter()
        .map(|ours| match find(&second.subjects, ours.owner.id()) {
            Some(theirs) => Pair::Both(ours, theirs, diff(ours, theirs)),
            None => Pair::OnlyFirst(ours),
        })
        .collect();
    let only_second = second
        .subjects
        .iter()
        .filter(|theirs| find(&first.subjects, theirs.owner.id()).is_none());
    pairs.extend(only_second.map(Pair::OnlySecond));
    pairs
}

fn text(first: &Loaded, second: &Loaded, pairs: &[Pair<'_>], all: bool) -> String {
    let mut text = format!(
        "{} {}\n{} {}\n",
        console::style("-").red(),
        screen::title(&first.name),
        console::style("+").green(),
        screen::title(&second.name)
    );
    let same = pairs.iter().filter(|pair| pair.same()).count();
    for pair in pairs {
        match pair {
            Pair::OnlyFirst(subject) => {
                let _ = writeln!(text, "\n{}: only in the first", subject.owner);
            }
            Pair::OnlySecond(subject) => {
                let _ = writeln!(text, "\n{}: only in the second", subject.owner);
            }
            // Of a thousand of them one line is enough.
            Pair::Both(..) if pair.same() && same > 1 => {}
            Pair::Both(first, second, diff) => {
                let owner = if first.owner == second.owner {
                    first.owner.to_string()
                } else {
                    format!(
                        "{} in the first, {} in the second",
                        first.owner, second.owner
                    )
                };
                let title = screen::title(&owner);
                if diff.is_empty() {
                    let mark = screen::mark(Mark::Good);
                    let _ = writeln!(text, "\n{title} {mark} the same state");
                } else {
                    let _ = writeln!(text, "\n{title}");
                }
                for register in &diff.registers {
                    text.push_str(&register_text(register));
                }
                for component in &diff.components {
                    text.push_str(&component_text(component, all));
                }
                for (id, ours, theirs) in &diff.places {
                    let [(offset, bytes), (other, others)] =
                        [(ours[0], ours[1]), (theirs[0], theirs[1])];
                    let note = format!(
                        "{id} lies at {offset} ({bytes} bytes) in the first and at {other} ({others} bytes) in the second"
                    );
                    let _ = writeln!(text, "  {}", screen::dim(note));
                }
            }
        }
    }
    if same > 1 {
        let who = screen::count(same, "vCPU");
        let mark = screen::mark(Mark::Good);
        let _ = writeln!(text, "\n{who} {mark} the same state");
    }
    text
}

fn register_text(register: &RegisterDiff) -> String {
    let bitmap = register.name != "MXCSR";
    let value = |value: Option<u64>| match value {
        Some(bits) if bitmap => XFeatures::from_bits_retain(bits).to_string(),
        Some(value) => format!("{value:#x}"),
        None => "not known".to_owned(),
    };
    format!(
        "  {}\n{}{}",
        register.name,
        minus(&value(register.first)),
        plus(&value(register.second))
    )
}

fn component_text(component: &ComponentDiff, all: bool) -> String {
    let mut text = format!("  {}", component.id);
    if component.parts.is_empty() {
        let _ = writeln!(text, ": the same value");
    } else {
        let bytes: usize = component.parts.iter().map(PartDiff::bytes).sum();
        let _ = writeln!(
            text,
            ": {} of {} parts differ, in {}",
            component.parts.len(),
            component.parts_total,
            screen::count(bytes, "byte")
        );
    }
    if component.first != component.second {
        let _ = write!(
            text,
            "{}{}",
            minus(word(component.first)),
            plus(word(component.second))
        );
    }
    let mut rows = if all { usize::MAX } else { SHOWN_ROWS };
    let mut shown = 0usize;
    for part in &component.parts {
        // The first is shown whatever its size.
        let needs = differing_rows(part);
        if shown > 0 && needs > rows {
            break;
        }
        rows = rows.saturating_sub(needs);
        shown = shown.saturating_add(1);
        text.push_str(&part_text(part));
    }
    let more = component.parts.len().saturating_sub(shown);
    if more > 0 {
        let note = format!("{more} more; --all shows them");
        let _ = writeln!(text, "    {}", screen::dim(note));
    }
    text
}

fn word(one: Use) -> &'static str {
    match one {
        Use::Absent => "not in its CPUID",
        Use::Initial => "initial",
        Use::InUse => "in use",
    }
}

fn differing_rows(part: &PartDiff) -> usize {
    let rows = part.first.chunks(ROW).zip(part.second.chunks(ROW));
    rows.filter(|(first, second)| first != second).count()
}

/// A number on one line; else rows of sixteen bytes that differ, with what is the same dimmed.
fn part_text(part: &PartDiff) -> String {
    let name = console::style(&part.name).cyan();
    if let (Some(first), Some(second)) = (number(&part.first), number(&part.second)) {
        let (first, second) = (console::style(first).red(), console::style(second).green());
        return format!("    {name}: {first} → {second}\n");
    }
    let mut text = format!("    {name}\n");
    let rows = part.first.chunks(ROW).zip(part.second.chunks(ROW));
    for (row, (first, second)) in rows.enumerate() {
        if first == second {
            continue;
        }
        let at = if part.first.len() > ROW {
            format!("{:>3}: ", row.saturating_mul(ROW))
        } else {
            String::new()
        };
        let hex = |own: &[u8], other: &[u8]| {
            own.iter()
                .zip(other)
                .map(|(byte, other)| {
                    let text = format!("{byte:02x}");
                    if byte == other {
                        screen::dim(text)
                    } else {
                        text
                    }
                })
                .collect::<Vec<_>>()
                .join(" ")
        };
        text.push_str(&minus(&format!("{at}{}", hex(first, second))));
        text.push_str(&plus(&format!("{at}{}", hex(second, first))));
    }
    text
}

/// What fits into a register of 64 bits, in the order of x86: sizes and numbers in decimal.
fn number(bytes: &[u8]) -> Option<String> {
    if bytes.len() > 8 {
        return None;
    }
    let value = bytes
        .iter()
        .rev()
        .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    Some(if bytes.len() == 1 || value < 10 {
        value.to_string()
    } else {
        format!("{value:#x}")
    })
}

fn minus(text: &str) -> String {
    format!("    {} {text}\n", console::style("-").red())
}

fn plus(text: &str) -> String {
    format!("    {} {text}\n", console::style("+").green())
}

fn pair_json(pair: &Pair<'_>) -> Value {
    match pair {
        Pair::OnlyFirst(subject) => json!({
            "first": screen::owner_json(subject.owner),
            "second": null,
            "same": false,
        }),
        Pair::OnlySecond(subject) => json!({
            "first": null,
            "second": screen::owner_json(subject.owner),
            "same": false,
        }),
        Pair::Both(first, second, diff) => json!({
            "first": screen::owner_json(first.owner),
            "second": screen::owner_json(second.owner),
            "same": diff.is_empty(),
            "registers": diff.registers.iter().map(|register| json!({
                "name": register.name,
                "first": register.first.map(|value| format!("{value:#x}")),
                "second": register.second.map(|value| format!("{value:#x}")),
            })).collect::<Vec<_>>(),
            "components": diff.components.iter().map(component_json).collect::<Vec<_>>(),
            "places": diff.places.iter().map(|(id, ours, theirs)| json!({
                "component": id.to_string(),
                "first": { "offset": ours[0], "bytes": ours[1] },
                "second": { "offset": theirs[0], "bytes": theirs[1] },
            })).collect::<Vec<_>>(),
        }),
    }
}

fn component_json(component: &ComponentDiff) -> Value {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let word = |one: Use| match one {
        Use::Absent => "absent",
        Use::Initial => "initial",
        Use::InUse => "in_use",
    };
    json!({
        "number": component.id.number(),
        "name": component.id.to_string(),
        "first": word(component.first),
        "second": word(component.second),
        "parts": component.parts.iter().map(|part| json!({
            "name": part.name,
            "offset": part.offset,
            "first": hex(&part.first),
            "second": hex(&part.second),
        })).collect::<Vec<_>>(),
    })
}
