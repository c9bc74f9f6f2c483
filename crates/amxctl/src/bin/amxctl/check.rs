//! `amxctl check`: whether a host can have guests with AMX, and what to do where it cannot.

use std::fmt::Write;

use cpuid_amx::CpuidTable;
use host_compat::Host;
use host_compat::host::{Capabilities, Obstacle, Permission};
use host_compat::kernel::{Fix, State};
use serde_json::json;
use xsave_state::Layout;

use crate::cli::CheckArgs;
use crate::screen::{self, Mark};
use crate::{Answer, Outcome, input};

pub(crate) fn run(args: &CheckArgs, json: bool) -> anyhow::Result<Outcome> {
    let host = input::this_or(args.host.as_deref())?;
    let obstacles = host.obstacles();
    let missing: Vec<_> = fixes(&host)
        .filter(|(_, state)| *state == State::Absent)
        .collect();
    let answer = if !obstacles.is_empty() {
        Answer::No
    } else if missing.is_empty() {
        Answer::Yes
    } else {
        Answer::Warning
    };
    let text = if json {
        as_json(&host, &obstacles, answer)?
    } else {
        text(&host, &obstacles, answer)
    };
    Ok(Outcome { text, answer })
}

fn fixes(host: &Host) -> impl Iterator<Item = (&'static Fix, State)> {
    host.kernel.iter().flat_map(|kernel| kernel.fixes())
}

fn text(host: &Host, obstacles: &[Obstacle], answer: Answer) -> String {
    let verdict = match answer {
        Answer::Yes => console::style("ready for guests with AMX").green().bold(),
        Answer::Warning => console::style("ready for guests with AMX, but for missing fixes")
            .yellow()
            .bold(),
        _ => console::style("not ready for guests with AMX").red().bold(),
    };
    let mut text = format!("{}: {verdict}\n", screen::title(&host.name));
    let mut table = screen::table(&[]);
    for (mark, name, value) in rows(host, obstacles) {
        table.add_row([
            screen::mark(mark),
            console::style(name).cyan().to_string(),
            mark.paint(&value),
        ]);
    }
    text.push_str(&screen::indented(&table));
    text.push_str(&todo(obstacles));
    text.push_str(&known_fixes(host));
    text
}

/// What keeps guests from using AMX, and what to do.
fn todo(obstacles: &[Obstacle]) -> String {
    if obstacles.is_empty() {
        return String::new();
    }
    let mut text = format!("\n  {}\n", screen::title("What to do"));
    for obstacle in obstacles {
        let wrapped = screen::wrap(&obstacle.to_string(), 4);
        let mark = screen::mark(Mark::Bad);
        let _ = write!(text, "  {mark} {}", wrapped.trim_start());
    }
    text
}

fn known_fixes(host: &Host) -> String {
    if host.kernel.is_none() {
        return String::new();
    }
    let mut text = format!(
        "\n  {}\n  {}\n",
        screen::title("Known fixes"),
        screen::dim("By the kernel's version; a distribution may have taken one in earlier.")
    );
    for (fix, state) in fixes(host) {
        let (mark, word) = match state {
            State::Present => (Mark::Good, "fixed"),
            State::NotAffected => (Mark::Good, "not affected"),
            State::Absent => (Mark::Warning, "not fixed"),
            _ => (Mark::Unknown, "the version does not tell"),
        };
        let _ = writeln!(
            text,
            "  {} {:<16} {}",
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
    let amx = if processor.amx.is_empty() {
        "none".to_owned()
    } else {
        processor.amx.to_string()
    };
    rows.push((
        bad(|obstacle| matches!(obstacle, Obstacle::Processor)),
        "AMX",
        amx,
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
    if let Some(row) = area(host) {
        rows.push(row);
    }
    if host.guest_cpuid().is_some() {
        let mark =
            bad(|obstacle| matches!(obstacle, Obstacle::Cpuid(_) | Obstacle::Contradiction(_)));
        let said = if mark == Mark::Bad {
            "not as a guest with AMX needs it"
        } else {
            "coherent"
        };
        rows.push((mark, "supported CPUID", said.to_owned()));
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

/// How large the state of one vCPU is.
fn area(host: &Host) -> Option<(Mark, &'static str, String)> {
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
            (
                Mark::Good,
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

fn as_json(host: &Host, obstacles: &[Obstacle], answer: Answer) -> anyhow::Result<String> {
    let fixes: Vec<_> = fixes(host)
        .map(|(fix, state)| {
            json!({
                "id": fix.id,
                "state": match state {
                    State::Present => "fixed",
                    State::NotAffected => "not_affected",
                    State::Absent => "not_fixed",
                    _ => "unknown",
                },
                "without": fix.without,
            })
        })
        .collect();
    let value = json!({
        "ready": answer != Answer::No,
        "warnings": answer == Answer::Warning,
        "obstacles": obstacles.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "fixes": fixes,
        "host": host,
    });
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Here and in the lab: what /proc/cpuinfo and /dev/kvm say decides.
    #[test]
    fn this_machine_is_judged_by_what_it_has() {
        let args = CheckArgs { host: None };
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
