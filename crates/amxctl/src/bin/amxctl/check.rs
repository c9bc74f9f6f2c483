//! `amxctl check`: whether a host can have guests with AMX, and what to do where it cannot.

use std::fmt::Write;

use anyhow::bail;
use cpuid_amx::{Contradiction, CpuidTable, coherence};
use host_compat::Host;
use host_compat::host::{Capabilities, Obstacle, Permission};
use host_compat::kernel::{FIXES, Fix, State};
use serde_json::{Value, json};
use xsave_state::Layout;

use crate::cli::CheckArgs;
use crate::input;
use crate::outcome::{Answer, Outcome};
use crate::screen::{self, Mark};

mod many;

pub(crate) fn run(args: &CheckArgs, json: bool) -> anyhow::Result<Outcome> {
    for id in &args.ignore {
        if !FIXES.iter().any(|fix| fix.id == *id) {
            let known: Vec<_> = FIXES.iter().map(|fix| fix.id).collect();
            bail!(
                "--ignore {id}: no such fix; the known ones are {}",
                known.join(", ")
            );
        }
    }
    let hosts = match &args.host {
        Some(path) => input::hosts(path)?,
        None => vec![input::this_or(None)?],
    };
    let [host] = hosts.as_slice() else {
        return many::run(&hosts, args, json);
    };
    let checked = Checked::of(host, &args.ignore);
    let text = if json {
        serde_json::to_string_pretty(&checked.as_json(host))? + "\n"
    } else {
        text(host, &checked)
    };
    Ok(Outcome {
        text,
        answer: checked.answer,
    })
}

/// What there is to say of a host.
pub(crate) struct Checked {
    pub(crate) obstacles: Vec<Obstacle>,
    pub(crate) fixes: Vec<(&'static Fix, State)>,
    ignored: Vec<String>,
    pub(crate) answer: Answer,
}

impl Checked {
    pub(crate) fn of(host: &Host, ignore: &[String]) -> Self {
        let obstacles = host.obstacles();
        let fixes: Vec<_> = host.fixes().collect();
        let answer = if !obstacles.is_empty() {
            Answer::No
        } else if fixes.iter().any(|(fix, state)| counts(fix, *state, ignore)) {
            Answer::Warning
        } else {
            Answer::Yes
        };
        Self {
            obstacles,
            fixes,
            ignored: ignore.to_vec(),
            answer,
        }
    }

    /// Fixes in that state that decide.
    pub(crate) fn serious(&self, wanted: State) -> usize {
        let fixes = self.fixes.iter();
        fixes
            .filter(|(fix, state)| *state == wanted && counts(fix, *state, &self.ignored))
            .count()
    }

    fn as_json(&self, host: &Host) -> Value {
        let fixes: Vec<_> = self
            .fixes
            .iter()
            .map(|(fix, state)| {
                json!({
                    "id": fix.id,
                    "severity": fix.severity.name(),
                    "state": match state {
                        State::Present => "fixed",
                        State::NotAffected => "not_affected",
                        State::Absent => "not_fixed",
                        _ => "unknown",
                    },
                    "ignored": self.ignored.iter().any(|id| id == fix.id),
                    "without": fix.without,
                })
            })
            .collect();
        json!({
            "ready": self.answer != Answer::No,
            "warnings": self.answer == Answer::Warning,
            "obstacles": self.obstacles.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "guest_amx": host.guest_features().amx.names().collect::<Vec<_>>(),
            "fixes": fixes,
            "host": host,
        })
    }
}

/// Whether a fix keeps a host from being ready without a warning.
fn counts(fix: &Fix, state: State, ignore: &[String]) -> bool {
    fix.severity.is_serious()
        && !matches!(state, State::Present | State::NotAffected)
        && !ignore.iter().any(|id| id == fix.id)
}

fn text(host: &Host, checked: &Checked) -> String {
    let verdict = match checked.answer {
        Answer::Yes => console::style("ready for guests with AMX".to_owned())
            .green()
            .bold(),
        Answer::Warning => {
            let missing = checked.serious(State::Absent);
            let unknown = checked.serious(State::Unknown);
            let defects = [(missing, "not fixed"), (unknown, "not known to be fixed")];
            let defects = defects.into_iter().filter(|(count, _)| *count > 0);
            let defects: Vec<_> = defects
                .map(|(count, what)| format!("{} {what}", screen::count(count, "serious defect")))
                .collect();
            let text = format!("ready for guests with AMX, but {}", defects.join(", "));
            console::style(text).yellow().bold()
        }
        _ => console::style("not ready for guests with AMX".to_owned())
            .red()
            .bold(),
    };
    let mut text = format!("{}: {verdict}\n", screen::title(&host.name));
    let mut table = screen::table(&[]);
    for (mark, name, value) in rows(host, &checked.obstacles) {
        table.add_row([
            screen::mark(mark),
            console::style(name).cyan().to_string(),
            mark.paint(&value),
        ]);
    }
    text.push_str(&screen::indented(&table));
    text.push_str(&todo(host, &checked.obstacles));
    text.push_str(&known_fixes(host, checked));
    text
}

/// What keeps guests from using AMX, and what to do.
fn todo(host: &Host, obstacles: &[Obstacle]) -> String {
    let mut lines: Vec<(Mark, String)> = obstacles
        .iter()
        .map(|obstacle| (Mark::Bad, obstacle.to_string()))
        .collect();
    for contradiction in contradictions(host) {
        if !obstacles.contains(&Obstacle::Contradiction(contradiction)) {
            lines.push((Mark::Bad, contradiction.to_string()));
        }
    }
    let kvm = host.kvm.as_ref();
    if kvm.is_ok_and(|kvm| kvm.rewritten.is_some()) {
        lines.push((
            Mark::Warning,
            "this KVM takes a guest's CPUID from the processor and not from its VMM: nothing can be \
             hidden from guests here, and a guest can move only between hosts with the same CPUID; use \
             a KVM that runs on the processor's own virtualization where guests must move"
                .to_owned(),
        ));
    }
    for name in &host.unknown {
        lines.push((
            Mark::Unknown,
            format!("{name}: this version does not know this field of the description"),
        ));
    }
    if lines.is_empty() {
        return String::new();
    }
    let mut text = format!("\n  {}\n", screen::title("What to do"));
    for (mark, line) in lines {
        let wrapped = screen::wrap(&line, 4);
        let _ = write!(text, "  {} {}", screen::mark(mark), wrapped.trim_start());
    }
    text
}

fn known_fixes(host: &Host, checked: &Checked) -> String {
    if host.kernel.is_none() {
        return String::new();
    }
    let mut text = format!(
        "\n  {}\n  {}\n",
        screen::title("Known fixes"),
        screen::dim(
            "Inferred from the kernel's version; a distribution may have taken one in earlier."
        )
    );
    for (fix, state) in &checked.fixes {
        let (mark, word) = match state {
            State::Present => (Mark::Good, "fixed"),
            State::NotAffected => (Mark::Good, "not affected"),
            State::Absent => (Mark::Warning, "not fixed"),
            _ => (Mark::Unknown, "the version does not tell"),
        };
        let ignored = checked.ignored.iter().any(|id| id == fix.id);
        let note = if ignored { " (ignored)" } else { "" };
        let _ = writeln!(
            text,
            "  {} {:<16} {}{note}",
            screen::mark(mark),
            fix.id,
            mark.paint(word)
        );
        if !matches!(state, State::Present | State::NotAffected) {
            text.push_str(&screen::dim(screen::wrap(fix.without, 4).trim_end()));
            text.push('\n');
        }
    }
    text
}

/// One line for each thing on which AMX in guests depends, from the processor upwards.
fn rows(host: &Host, obstacles: &[Obstacle]) -> Vec<(Mark, &'static str, String)> {
    let bad = |is: fn(&Obstacle) -> bool| {
        if obstacles.iter().any(is) {
            Mark::Bad
        } else {
            Mark::Good
        }
    };
    let processor = &host.processor;
    let mut rows = vec![(
        Mark::Good,
        "processor",
        format!(
            "{} (family {}, model {}, stepping {})",
            processor.name, processor.family, processor.model, processor.stepping
        ),
    )];
    rows.push((
        bad(|obstacle| matches!(obstacle, Obstacle::Processor)),
        "AMX in the kernel",
        processor.amx.to_string(),
    ));
    if let Some(kernel) = &host.kernel {
        let upstream = match kernel.upstream {
            Some(version) if !kernel.release.starts_with(&version.to_string()) => {
                format!(", upstream {version}")
            }
            _ => String::new(),
        };
        rows.push((
            bad(|obstacle| matches!(obstacle, Obstacle::Kernel { .. })),
            "kernel",
            format!("Linux {}{upstream}", kernel.release),
        ));
    }
    let permission = match host.permission {
        Permission::NotAsked => (Mark::Unknown, "nobody asked".to_owned()),
        Permission::Granted(_) => (Mark::Good, "granted to guests".to_owned()),
        Permission::Refused(_) => (Mark::Bad, "not granted to guests".to_owned()),
    };
    rows.push((permission.0, "permission", permission.1));
    match &host.kvm {
        Err(error) => rows.push((Mark::Bad, "KVM", short(&error.to_string()).to_owned())),
        Ok(kvm) => {
            let capabilities = kvm.capabilities.as_ref();
            rows.push(match capabilities.map(lacks) {
                None => (Mark::Unknown, "KVM", "nobody asked".to_owned()),
                Some(lacks) if lacks.is_empty() => (Mark::Good, "KVM", has(capabilities)),
                Some(lacks) => (Mark::Warning, "KVM", format!("lacks {}", lacks.join(", "))),
            });
            if let Some(components) = kvm.guest_components {
                rows.push((
                    bad(|obstacle| matches!(obstacle, Obstacle::Guest { .. })),
                    "guests may have",
                    components.to_string(),
                ));
            }
        }
    }
    if let Some(row) = area(host, obstacles) {
        rows.push(row);
    }
    if host.guest_cpuid().is_some() {
        let amx = host.guest_features().amx;
        let mark = if amx.is_empty() {
            Mark::Bad
        } else {
            Mark::Good
        };
        rows.push((mark, "AMX in guests", amx.to_string()));
        rows.push(coherent(contradictions(host).count()));
    }
    let rewritten = host
        .kvm
        .as_ref()
        .ok()
        .and_then(|kvm| kvm.rewritten.as_ref());
    if rewritten.is_some() {
        rows.push((
            Mark::Warning,
            "CPUID of a vCPU",
            "this KVM gives guests another CPUID than it is told".to_owned(),
        ));
    }
    rows
}

/// Those of the CPUID that KVM supports. Without the permission it always has one.
fn contradictions(host: &Host) -> impl Iterator<Item = Contradiction> {
    let refused = matches!(host.permission, Permission::Refused(_));
    let found = host.guest_cpuid().map(coherence::check);
    found.into_iter().flatten().filter(move |found| {
        let before = matches!(found, Contradiction::BeforePermission { .. });
        !(found.is_recomputed_by_kvm() || refused && before)
    })
}

/// What was checked is CPUID's leaves against each other, whatever else keeps guests from using AMX.
fn coherent(found: usize) -> (Mark, &'static str, String) {
    let (mark, said) = if found == 0 {
        let said = "no leaf of XSAVE and AMX contradicts another".to_owned();
        (Mark::Good, said)
    } else {
        (Mark::Bad, screen::count(found, "contradiction"))
    };
    (mark, "supported CPUID", said)
}

/// How large the state of one vCPU is.
fn area(host: &Host, obstacles: &[Obstacle]) -> Option<(Mark, &'static str, String)> {
    let table = host.guest_cpuid()?;
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    Some(match layout {
        Ok(layout) => {
            let own = layout.standard_size();
            let kvm = host.kvm.as_ref().ok()?.capabilities.as_ref();
            let copied = kvm.map(|kvm| kvm.xsave2).filter(|&bytes| bytes != 0);
            let copied = match copied {
                Some(bytes) => format!(", {} copied by KVM", screen::grouped(bytes)),
                None => String::new(),
            };
            let short = obstacles
                .iter()
                .any(|one| matches!(one, Obstacle::Area { .. }));
            (
                if short { Mark::Bad } else { Mark::Good },
                "state of a vCPU",
                format!("{} bytes{copied}", screen::grouped(own as u64)),
            )
        }
        Err(error) => (Mark::Bad, "state of a vCPU", error.to_string()),
    })
}

fn has(capabilities: Option<&Capabilities>) -> String {
    let named = capabilities.into_iter().flat_map(Capabilities::by_name);
    named
        .filter(|(_, value)| *value != 0)
        .map(|(name, _)| name)
        .collect::<Vec<_>>()
        .join(", ")
}

fn lacks(capabilities: &Capabilities) -> Vec<&'static str> {
    let named = capabilities.by_name();
    named
        .filter(|(_, value)| *value == 0)
        .map(|(name, _)| name)
        .collect()
}

/// What is the matter, without what to do.
fn short(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(what, _)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Here and in the lab: what /proc/cpuinfo and /dev/kvm say decides.
    #[test]
    fn this_machine_is_judged_by_what_it_has() {
        let args = CheckArgs {
            host: None,
            ignore: Vec::new(),
        };
        let outcome = run(&args, false).unwrap();
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_amx = processor.contains(" amx_tile ");
        let has_kvm = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if has_amx && has_kvm {
            assert_ne!(outcome.answer, Answer::No, "{}", outcome.text);
            assert!(outcome.text.contains("ready for guests with AMX"));
            assert!(outcome.text.contains("AMX-TILE"), "{}", outcome.text);
            assert!(outcome.text.contains("11,008 copied by KVM"));
        } else {
            println!("skipped: no AMX or no /dev/kvm here, so only the refusal is seen");
            assert_eq!(outcome.answer, Answer::No, "{}", outcome.text);
            assert!(outcome.text.contains("What to do"), "{}", outcome.text);
        }
        let json: serde_json::Value =
            serde_json::from_str(&run(&args, true).unwrap().text).unwrap();
        assert_eq!(json["ready"], outcome.answer != Answer::No);
        // What a description says of this machine is what is seen from it.
        let host: Host = serde_json::from_value(json["host"].clone()).unwrap();
        assert_eq!(
            host.obstacles().is_empty(),
            json["obstacles"].as_array().unwrap().is_empty()
        );
    }
}
