//! `amxctl inspect`: what is in a saved state.

use std::fmt::Write;

use amxctl::rules;
use amxctl::{Known, Source, Subject};
use cpuid_amx::coherence;
use serde_json::{Value, json};
use xsave_state::{Component, XFeatures};

use crate::cli::InspectArgs;
use crate::input::{self, Loaded};
use crate::outcome::Outcome;
use crate::screen::{self, Mark};
use crate::{map, render, svg, tiles};

/// Where the values of registers begin.
const VALUES: usize = 16;
/// Text for no more vCPUs; JSON has them all.
const SHOWN: usize = 16;

pub(crate) fn run(args: &InspectArgs, json: bool) -> anyhow::Result<Outcome> {
    let given = input::given(&args.given)?;
    let loaded = input::saved(&args.file, &args.vcpu, &given)?;
    if let (Some(path), Some(subject)) = (&args.svg, loaded.subjects.first()) {
        svg::write(path, subject, &loaded.name)?;
    }
    if json {
        let text = serde_json::to_string_pretty(&as_json(&loaded))?;
        return Outcome::yes(text + "\n");
    }
    let mut text = heading(&loaded);
    for subject in loaded.subjects.iter().take(SHOWN) {
        text.push_str(&vcpu(subject));
    }
    let more = loaded.subjects.len().saturating_sub(SHOWN);
    if more > 0 {
        writeln!(
            text,
            "\n{}",
            screen::dim(format!(
                "{more} more; --vcpu ID shows one of them, --json all"
            ))
        )?;
    }
    if let (Some(path), Some(subject)) = (&args.svg, loaded.subjects.first()) {
        writeln!(
            text,
            "\n{}",
            screen::dim(format!(
                "The picture of {} is in {}",
                subject.owner,
                path.display()
            ))
        )?;
    }
    Outcome::yes(text)
}

/// What the file is.
pub(crate) fn heading(loaded: &Loaded) -> String {
    let what = match loaded.format {
        amxctl::Format::ElfCore => "thread",
        _ => "vCPU",
    };
    format!(
        "{}: {}, {} bytes, {}\n",
        screen::title(&loaded.name),
        loaded.format,
        screen::grouped(loaded.file_bytes),
        screen::count(loaded.subjects.len(), what)
    )
}

fn vcpu(subject: &Subject) -> String {
    let mut text = format!("\n{}\n", screen::title(&subject.owner.to_string()));
    text.push_str(&registers(subject));
    text.push_str(&components(subject));
    let _ = writeln!(text, "\n  {}", screen::title("Rules"));
    let found = rules::check(subject);
    if found.is_empty() {
        let mark = screen::mark(Mark::Good);
        let _ = writeln!(
            text,
            "  {mark} all hold: the area and its registers can be restored"
        );
    }
    text.push_str(&render::findings(&found));
    text.push_str(&cpuid(subject));
    text.push_str(&tiles::text(subject));
    text
}

fn registers(subject: &Subject) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String, source: Option<&Source>| {
        let said = match source.filter(|source| **source != Source::File) {
            Some(source) => format!("({source})"),
            None => String::new(),
        };
        let wrapped = screen::wrap(&value, VALUES);
        let _ = write!(text, "  {name:<13} {}", wrapped.trim());
        let last = wrapped.lines().next_back().unwrap_or_default();
        let room = screen::width().saturating_sub(console::measure_text_width(last));
        if said.is_empty() {
            text.push('\n');
        } else if said.chars().count() < room {
            let _ = writeln!(text, " {}", screen::dim(said));
        } else {
            let _ = writeln!(
                text,
                "\n{}",
                screen::dim(screen::wrap(&said, VALUES).trim_end())
            );
        }
    };
    let or_unknown = |known: &Option<Known<XFeatures>>| match known {
        Some(known) => known.value.to_string(),
        None => Mark::Unknown.paint("not in the file"),
    };
    line("XSTATE_BV", subject.xstate_bv().to_string(), None);
    line(
        "XCR0",
        subject.xcr0.value.to_string(),
        Some(&subject.xcr0.source),
    );
    let source =
        |known: &Option<Known<XFeatures>>| known.as_ref().map(|known| known.source.clone());
    line(
        "IA32_XFD",
        or_unknown(&subject.xfd),
        source(&subject.xfd).as_ref(),
    );
    line(
        "IA32_XFD_ERR",
        or_unknown(&subject.xfd_err),
        source(&subject.xfd_err).as_ref(),
    );
    line("MXCSR", format!("{:#x}", subject.mxcsr()), None);
    if subject.xss.is_some() || !subject.layout.value.supervisor().is_empty() {
        line(
            "IA32_XSS",
            or_unknown(&subject.xss),
            source(&subject.xss).as_ref(),
        );
    }
    let layout = &subject.layout;
    let format = match subject.is_compacted() {
        true => "; the area is compacted",
        false => "",
    };
    line(
        "layout",
        format!(
            "{} bytes{format}",
            screen::grouped(layout.value.standard_size() as u64)
        ),
        Some(&layout.source),
    );
    text
}

fn components(subject: &Subject) -> String {
    let mut table = screen::table(&[
        "",
        "component",
        "state",
        "offset",
        "bytes",
        "lines",
        "content",
    ]);
    for component in user_components(subject) {
        let content = subject.component(component.id());
        let in_use = subject.xstate_bv().contains(component.id().bit());
        let (used, all) = map::lines(content);
        let short = content.len() < component.size();
        let state = if in_use && short {
            Mark::Bad.paint("cut off")
        } else if in_use {
            console::style("in use").green().to_string()
        } else {
            screen::dim("initial")
        };
        let (lines, bars) = if in_use {
            (
                format!("{used} of {all}"),
                console::style(map::bars(content)).cyan().to_string(),
            )
        } else {
            (String::new(), String::new())
        };
        table.add_row([
            component.id().number().to_string(),
            component.id().to_string(),
            state,
            offset(subject, component),
            screen::grouped(component.size() as u64),
            lines,
            bars,
        ]);
    }
    screen::align_right(&mut table, &[0, 3, 4, 5]);
    screen::indented(&table)
}

/// Where a component lies in the area.
fn offset(subject: &Subject, component: &Component) -> String {
    let has_place = |placed: XFeatures| placed.contains(component.id().bit());
    match subject.place(component.id()) {
        Some(place) => screen::grouped(place.start as u64),
        None if subject.placed().is_some_and(has_place) => "?".to_owned(),
        None => "none".to_owned(),
    }
}

fn user_components(subject: &Subject) -> impl Iterator<Item = &Component> {
    let components = subject.layout.value.components();
    components.filter(|component| component.offset().is_some())
}

/// Whether the guest's CPUID is coherent, where the file has it.
fn cpuid(subject: &Subject) -> String {
    let Some(cpuid) = &subject.cpuid else {
        return String::new();
    };
    let found = coherence::check(&cpuid.entries);
    if found.is_empty() {
        return format!(
            "  {} {:<24} {} entries\n",
            screen::mark(Mark::Good),
            "CPUID is coherent",
            cpuid.entries.len()
        );
    }
    // Entries that hide others are among the rules.
    let hidden: Vec<_> = cpuid.hidden_entries().collect();
    let mut others = found.iter().filter(|one| !hidden.contains(one)).peekable();
    if others.peek().is_none() {
        return String::new();
    }
    let mut text = format!(
        "  {} {}\n",
        screen::mark(Mark::Warning),
        Mark::Warning.paint("CPUID contradicts itself")
    );
    for contradiction in others {
        text.push_str(&screen::wrap(&contradiction.to_string(), 4));
    }
    text
}

fn as_json(loaded: &Loaded) -> Value {
    json!({
        "file": loaded.name,
        "format": loaded.format.name(),
        "file_bytes": loaded.file_bytes,
        "vcpus": loaded.subjects.iter().map(vcpu_json).collect::<Vec<_>>(),
    })
}

fn vcpu_json(subject: &Subject) -> Value {
    let known = |known: &Known<XFeatures>| {
        json!({
            "value": format!("{:#x}", known.value.bits()),
            "source": source(&known.source),
            "why": why(&known.source),
        })
    };
    let components: Vec<Value> = user_components(subject)
        .map(|component| {
            let content = subject.component(component.id());
            let (lines_not_zero, lines) = map::lines(content);
            json!({
                "number": component.id().number(),
                "name": component.id().to_string(),
                "in_use": subject.xstate_bv().contains(component.id().bit()),
                "offset": subject.place(component.id()).map(|place| place.start),
                "bytes": component.size(),
                "lines": lines,
                "lines_not_zero": lines_not_zero,
            })
        })
        .collect();
    let config = tiles::config(subject).map(|config| {
        json!({
            "palette": config.palette().id(),
            "start_row": config.start_row(),
            "tiles": config.shapes().iter().map(|shape| json!({
                "rows": shape.rows,
                "row_bytes": shape.row_bytes,
            })).collect::<Vec<_>>(),
        })
    });
    let tiles: Vec<Value> = tiles::tiles(subject)
        .iter()
        .map(|tile| json!({ "tile": tile.number, "bytes_not_zero": tile.nonzero_bytes() }))
        .collect();
    json!({
        "owner": subject.owner.to_string(),
        "id": subject.owner.id(),
        "xstate_bv": format!("{:#x}", subject.xstate_bv().bits()),
        "xcr0": known(&subject.xcr0),
        "xfd": subject.xfd.as_ref().map(known),
        "xfd_err": subject.xfd_err.as_ref().map(known),
        "xss": subject.xss.as_ref().map(known),
        "mxcsr": format!("{:#x}", subject.mxcsr()),
        "area_bytes": subject.area.len(),
        "compacted": subject.is_compacted(),
        "layout": {
            "bytes": subject.layout.value.standard_size(),
            "source": source(&subject.layout.source),
            "why": why(&subject.layout.source),
        },
        "components": components,
        "findings": rules::check(subject).iter().map(render::finding_json).collect::<Vec<_>>(),
        "contradictions": subject.cpuid.as_ref().map(|cpuid| {
            coherence::check(&cpuid.entries).iter().map(ToString::to_string).collect::<Vec<_>>()
        }),
        "tile_config": config,
        "tiles": tiles,
    })
}

fn source(source: &Source) -> &str {
    match source {
        Source::File => "file",
        Source::Given(_) => "option",
        Source::Guess(_) => "guess",
        Source::Reset(_) => "reset",
    }
}

/// Why a guess was made, or by which option it was given.
fn why(source: &Source) -> Option<&str> {
    match source {
        Source::File => None,
        Source::Given(why) | Source::Guess(why) | Source::Reset(why) => Some(why),
    }
}
