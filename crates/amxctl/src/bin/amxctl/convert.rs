//! `amxctl convert`: the same state in another format or layout.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use amxctl::Subject;
use amxctl::vcpu::Owner;
use anyhow::{Context, bail};
use serde_json::json;
use xsave_state::relayout::{Allowed, RelayoutError, relayout};
use xsave_state::sanitize::{Foreign, Losses, Policy, SanitizeError, Target, sanitize};
use xsave_state::wire::{self, Codec, Writer};
use xsave_state::{ComponentId, ExtendedState, Layout, XFeatures};

use crate::cli::{ConvertArgs, To};
use crate::screen::{self, Mark};
use crate::{Outcome, guesses, input, load};

/// What may be lost.
#[derive(Default)]
struct Allow {
    losses: Losses,
    relayout: Allowed,
}

/// One vCPU, converted.
struct Converted {
    owner: Owner,
    state: ExtendedState<'static>,
    /// What is not as it was.
    changes: Vec<String>,
    /// What was guessed and now looks like a fact.
    guesses: Vec<String>,
}

pub(crate) fn run(args: &ConvertArgs, json: bool) -> anyhow::Result<Outcome> {
    let allow = allow(&args.allow)?;
    let given = load::given(&args.given)?;
    let target = match &args.layout {
        Some(path) => Some(input::layout(path)?),
        None => None,
    };
    let loaded = load::load(&args.file, &args.vcpu, &given)?;
    if args.to != To::Container && loaded.subjects.len() != 1 {
        bail!(
            "{}: {}; choose one with --vcpu, or write a container",
            loaded.name,
            screen::count(loaded.subjects.len(), "vCPU")
        );
    }
    let converted = loaded
        .subjects
        .iter()
        .map(|subject| {
            convert(subject, args.to, target.as_ref(), &allow)
                .with_context(|| format!("{}: {}", loaded.name, subject.owner))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let bytes = encode(args.to, &converted)?;
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
    allow: &Allow,
) -> anyhow::Result<Converted> {
    if to != To::Raw && subject.xfd.is_none() && !subject.layout.value.xfd().is_empty() {
        bail!(
            "IA32_XFD is not in the file, and would be stored as 0: a guest that has armed XFD goes \
             wrong with that. Give it with --xfd (0 if the guest has not)"
        );
    }
    // Raw bytes stay where they are unless they are laid out anew.
    if to != To::Raw || target.is_some() {
        guesses::only_one_layout(subject)?;
    }
    let (state, mut changes) = valid(subject, allow)?;
    let state = match target {
        None => state,
        Some(layout) => {
            let relaid = relayout(&state, layout, allow.relayout).map_err(lossy)?;
            changes.extend(relaid.lost.iter().map(ToString::to_string));
            relaid.state
        }
    };
    let mut guessed: Vec<String> = guesses::layout(subject).into_iter().collect();
    if to != To::Raw {
        guessed.extend(guesses::registers(subject));
    }
    Ok(Converted {
        owner: subject.owner,
        state,
        changes,
        guesses: guessed,
    })
}

/// The state as it is where it is valid, or made so.
fn valid(
    subject: &Subject,
    allow: &Allow,
) -> anyhow::Result<(ExtendedState<'static>, Vec<String>)> {
    if let Ok(state) = subject.state() {
        return Ok((state.into_owned(), Vec::new()));
    }
    let foreign = Foreign::new(&subject.area, subject.registers());
    let target = Target::new(&subject.layout.value);
    let sanitized = sanitize(&foreign, &target, Policy::Allow(allow.losses)).map_err(refused)?;
    let changes = sanitized.report.changes().iter();
    Ok((sanitized.state, changes.map(ToString::to_string).collect()))
}

/// By which names of --allow it would go.
fn refused(error: SanitizeError) -> anyhow::Error {
    match error {
        SanitizeError::Refused {
            not_allowed,
            report,
        } => {
            let names: Vec<_> = KINDS
                .iter()
                .filter(|(_, losses)| not_allowed.intersects(*losses))
                .map(|(name, _)| *name)
                .collect();
            anyhow::anyhow!(
                "the state is not valid, and making it so loses something: {report}. --allow {} \
                 accepts that",
                names.join(",")
            )
        }
        other => other.into(),
    }
}

fn lossy(error: RelayoutError) -> anyhow::Error {
    match &error {
        RelayoutError::Lossy { losses } => {
            let mut names: Vec<String> = losses.iter().flat_map(allow_name).collect();
            names.sort();
            names.dedup();
            anyhow::anyhow!("{error}. --allow {} accepts that", names.join(","))
        }
        _ => error.into(),
    }
}

fn allow_name(loss: &xsave_state::relayout::Loss) -> Vec<String> {
    use xsave_state::relayout::Loss;
    let names = |features: XFeatures| features.components().map(name_of).collect();
    match *loss {
        Loss::Mxcsr { .. } => vec!["mxcsr".to_owned()],
        Loss::Missing { component }
        | Loss::Size { component, .. }
        | Loss::Palette { component, .. } => vec![name_of(component)],
        Loss::TileConfig { .. } => vec![name_of(ComponentId::XTILECFG)],
        Loss::Xcr0 { lost, .. } | Loss::Xfd { lost, .. } | Loss::XfdErr { lost, .. } => names(lost),
        _ => Vec::new(),
    }
}

/// `component 40` has no name of its own: its number will do.
fn name_of(id: ComponentId) -> String {
    match id.name() {
        Some(name) => name.to_owned(),
        None => id.number().to_string(),
    }
}

/// Losses by kind, as sanitising knows them.
const KINDS: [(&str, Losses); 6] = [
    ("unsupported", Losses::UNSUPPORTED),
    ("disabled", Losses::DISABLED),
    ("tile-config", Losses::TILE_CONFIG),
    ("mxcsr", Losses::MXCSR),
    ("xcr0", Losses::XCR0),
    ("xfd", Losses::XFD),
];

fn allow(names: &[String]) -> anyhow::Result<Allow> {
    let mut allow = Allow::default();
    for name in names {
        let kind = KINDS
            .iter()
            .find(|(kind, _)| kind.eq_ignore_ascii_case(name));
        if let Some((kind, losses)) = kind {
            allow.losses |= *losses;
            allow.relayout.mxcsr |= *kind == "mxcsr";
            continue;
        }
        let component = (0..ComponentId::COUNT)
            .filter_map(ComponentId::new)
            .find(|id| name_of(*id).eq_ignore_ascii_case(name));
        let Some(component) = component else {
            bail!(
                "--allow {name}: expected a component, as XTILEDATA or PKRU, or one of {}",
                KINDS.map(|(kind, _)| kind).join(", ")
            );
        };
        allow.relayout.components |= component.bit();
    }
    Ok(allow)
}

fn encode(to: To, converted: &[Converted]) -> anyhow::Result<Vec<u8>> {
    if to == To::Container {
        let mut writer = Writer::new();
        let mut bytes = Vec::new();
        for one in converted {
            let codec = Codec::new(one.state.layout());
            bytes.extend_from_slice(writer.push(one.owner.id(), &codec, &one.state)?);
        }
        bytes.extend_from_slice(writer.finish());
        return Ok(bytes);
    }
    let mut bytes = Vec::new();
    for one in converted {
        match to {
            To::State => bytes.extend(wire::encode(&one.state)),
            _ => bytes.extend(raw(&one.state)),
        }
    }
    Ok(bytes)
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
        To::Container => "vmm-amx container",
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
        let (mark, said) = if one.changes.is_empty() {
            (Mark::Good, "the same state")
        } else {
            (Mark::Warning, "not as it was:")
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
