//! `amxctl convert`: the same state in another format or layout.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use amxctl::Subject;
use amxctl::rules::Rule;
use amxctl::vcpu::{Doubt, Owner};
use anyhow::{Context, bail};
use serde_json::json;
use xsave_state::sanitize::{SanitizeError, sanitize};
use xsave_state::{ExtendedState, Layout, Losses, Misfit, RelocateError, wire};

use crate::cli::{ConvertArgs, To};
use crate::outcome::Outcome;
use crate::screen::{self, Mark};
use crate::{input, judge};

/// One vCPU, converted.
struct Converted {
    owner: Owner,
    state: ExtendedState<'static>,
    /// What is not as it was.
    changes: Vec<String>,
    /// Whether the guest cannot notice any of it.
    is_lossless: bool,
    /// What was guessed and now looks like a fact.
    guesses: Vec<String>,
}

pub(crate) fn run(args: &ConvertArgs, json: bool) -> anyhow::Result<Outcome> {
    let allow = allow(&args.allow)?;
    let given = input::given(&args.given)?;
    let target = match &args.layout {
        Some(path) => Some(input::layout(path)?),
        None => None,
    };
    let loaded = input::saved(&args.file, &args.vcpu, &given)?;
    if args.to == To::Raw && loaded.subjects.len() != 1 {
        bail!(
            "{}: {}; choose one with --vcpu, or write them with --to state",
            loaded.name,
            screen::count(loaded.subjects.len(), "vCPU")
        );
    }
    let converted = loaded
        .subjects
        .iter()
        .map(|subject| {
            convert(subject, args.to, target.as_ref(), allow)
                .with_context(|| format!("{}: {}", loaded.name, subject.owner))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let bytes = encode(args.to, &converted);
    let to_stdout = args.output == Path::new("-");
    if to_stdout {
        std::io::stdout().write_all(&bytes)?;
        screen::speak_on_stderr();
    } else {
        std::fs::write(&args.output, &bytes).with_context(|| args.output.display().to_string())?;
    }
    let text = if json {
        as_json(args, &converted, bytes.len())?
    } else {
        text(args, &converted, bytes.len())
    };
    if to_stdout {
        eprint!("{text}");
        return Outcome::yes(String::new());
    }
    Outcome::yes(text)
}

fn convert(
    subject: &Subject,
    to: To,
    target: Option<&Layout>,
    allow: Losses,
) -> anyhow::Result<Converted> {
    if to != To::Raw && subject.xfd.is_none() && !subject.layout.value.xfd().is_empty() {
        bail!(
            "IA32_XFD is not in the file, and would be stored as 0: a guest that has armed XFD goes \
             wrong with that. Give it with --xfd (0 if the guest has not)"
        );
    }
    match &subject.doubt {
        // Raw bytes stay where they are unless they are laid out anew.
        Some(Doubt::Other(_)) if to == To::Raw && target.is_none() => {}
        Some(doubt) => bail!("{doubt}"),
        None => {}
    }
    let unsettled = subject
        .unsettled()
        .filter(|finding| to != To::Raw || matches!(finding.rule, Rule::Layout | Rule::Cpuid));
    if let Some(finding) = unsettled {
        bail!("{}", finding.values);
    }
    let (state, mut changes, mut is_lossless) = valid(subject, allow)?;
    let state = match target {
        None => state,
        Some(layout) => {
            let relocated = state.relocate(layout, allow).map_err(lossy)?;
            is_lossless &= relocated.lost.is_empty();
            changes.extend(relocated.lost.iter().map(ToString::to_string));
            relocated.state
        }
    };
    let mut guessed: Vec<String> = judge::guessed_layout(subject).into_iter().collect();
    if to != To::Raw {
        guessed.extend(judge::guessed_registers(subject));
    }
    Ok(Converted {
        owner: subject.owner,
        state,
        changes,
        is_lossless,
        guesses: guessed,
    })
}

/// The state as it is where it is valid, or made so.
fn valid(
    subject: &Subject,
    allow: Losses,
) -> anyhow::Result<(ExtendedState<'static>, Vec<String>, bool)> {
    if let Ok(state) = subject.state()
        && !subject.is_compacted()
    {
        return Ok((state.into_owned(), Vec::new(), true));
    }
    let sanitized =
        sanitize(&subject.untrusted(), &subject.layout.value, allow).map_err(refused)?;
    let changes = sanitized.report.changes();
    let is_lossless = changes.iter().all(|change| change.loss().is_empty());
    let changes = changes.iter().map(ToString::to_string).collect();
    Ok((sanitized.state, changes, is_lossless))
}

/// By which names of --allow it would go.
fn refused(error: SanitizeError) -> anyhow::Error {
    match error {
        SanitizeError::Refused { lost, report } => anyhow::anyhow!(
            "the state is not valid, and making it so loses something: {report}. --allow {} accepts \
             that",
            names(&lost)
        ),
        other => other.into(),
    }
}

fn lossy(error: RelocateError) -> anyhow::Error {
    match &error {
        RelocateError::Lossy { losses } => {
            anyhow::anyhow!("{error}. --allow {} accepts that", names(losses))
        }
        _ => error.into(),
    }
}

fn names(misfits: &[Misfit]) -> String {
    let losses: Losses = misfits.iter().map(Misfit::loss).collect();
    let names = KINDS.iter().filter(|(_, kind)| losses.intersects(*kind));
    names.map(|(name, _)| *name).collect::<Vec<_>>().join(",")
}

/// What can be lost, by the names of --allow.
const KINDS: [(&str, Losses); 6] = [
    ("content", Losses::CONTENT),
    ("disabled", Losses::DISABLED),
    ("tile-config", Losses::TILE_CONFIG),
    ("mxcsr", Losses::MXCSR),
    ("xcr0", Losses::XCR0),
    ("xfd", Losses::XFD),
];

fn allow(names: &[String]) -> anyhow::Result<Losses> {
    let mut allowed = Losses::empty();
    for name in names {
        let kind = KINDS
            .iter()
            .find(|(kind, _)| kind.eq_ignore_ascii_case(name));
        let Some((_, losses)) = kind else {
            bail!(
                "--allow {name}: expected one of {}",
                KINDS.map(|(kind, _)| kind).join(", ")
            );
        };
        allowed |= *losses;
    }
    Ok(allowed)
}

fn encode(to: To, converted: &[Converted]) -> Vec<u8> {
    let states = converted.iter().map(|one| match to {
        To::State => wire::encode(one.owner.id(), &one.state),
        To::Raw => raw(&one.state),
    });
    states.collect::<Vec<_>>().concat()
}

/// As KVM_GET_XSAVE2 gives it: at least 4,096 bytes, and in bytes 464 to 471 which components there
/// are, so that the next reader need not guess by what is in use.
fn raw(state: &ExtendedState<'_>) -> Vec<u8> {
    let mut bytes = state.image().as_bytes().to_vec();
    bytes.resize(bytes.len().max(4096), 0);
    let components = state.layout().user().bits().to_le_bytes();
    for (to, from) in bytes.iter_mut().skip(464).zip(components) {
        *to = from;
    }
    bytes
}

fn text(args: &ConvertArgs, converted: &[Converted], bytes: usize) -> String {
    let what = match args.to {
        To::State => "vmm-amx state",
        To::Raw => "raw XSAVE area",
    };
    let mut text = format!(
        "{}: {what}, {} bytes, {}\n",
        screen::title(&args.output.display().to_string()),
        screen::grouped(bytes as u64),
        screen::count(converted.len(), "vCPU")
    );
    let (same, others): (Vec<_>, Vec<_>) = converted
        .iter()
        .partition(|one| one.changes.is_empty() && one.guesses.is_empty());
    if let Some(first) = same.first() {
        let who = match same.len() {
            1 => first.owner.to_string(),
            many => screen::count(many, "vCPU"),
        };
        let _ = writeln!(text, "  {} {who}: the same state", screen::mark(Mark::Good));
    }
    for one in others {
        let (mark, said) = match (one.changes.is_empty(), one.is_lossless) {
            (true, _) => (Mark::Good, "the same state"),
            (_, true) => (Mark::Good, "the same state, in another form:"),
            _ => (Mark::Warning, "not as it was:"),
        };
        let _ = writeln!(text, "  {} {}: {said}", screen::mark(mark), one.owner);
        for change in &one.changes {
            text.push_str(&screen::wrap(change, 4));
        }
        for guess in &one.guesses {
            let said = screen::wrap(&format!("guessed: {guess}"), 4);
            text.push_str(&Mark::Warning.paint(&said));
        }
    }
    text
}

fn as_json(args: &ConvertArgs, converted: &[Converted], bytes: usize) -> anyhow::Result<String> {
    let vcpus: Vec<_> = converted
        .iter()
        .map(|one| {
            json!({
                "owner": one.owner.to_string(),
                "id": one.owner.id(),
                "changes": one.changes,
                "lossless": one.is_lossless,
                "guesses": one.guesses,
            })
        })
        .collect();
    let value = json!({
        "output": args.output.display().to_string(),
        "bytes": bytes,
        "vcpus": vcpus,
    });
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_help_names_every_kind_of_loss() {
        let cli = crate::cli::Cli::command();
        let convert = cli.find_subcommand("convert").unwrap();
        let allow = convert.get_arguments().find(|arg| arg.get_id() == "allow");
        let help = allow.unwrap().get_help().unwrap().to_string();
        for (kind, _) in KINDS {
            assert!(help.contains(kind), "{kind}: {help}");
        }
    }
}
