//! What there is to look at: a progress bar and lines, or JSON.
//!
//! The bar and errors go to standard error, what has happened to standard output. Where standard error is
//! no terminal there is no bar, and a line now and then instead.

use std::fmt;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::time::{Duration, Instant};

use amx_vmm::linux::guest::Verdict;
use amx_vmm::memory::PAGE_BYTES;
use amx_vmm::migration::Round;
use amx_vmm::snapshot::AtStop;
use console::style;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use xsave_state::XFeatures;

use crate::control;
use crate::event::{Ending, Event, State};

/// Without a bar, a line within a round comes no more often.
const SPARSE: Duration = Duration::from_secs(5);

/// Where events are shown.
pub(crate) struct Screen {
    json: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    /// What the last round has said of the rate.
    rate: String,
    last_line: Instant,
}

impl Screen {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            terminal: stderr().is_terminal(),
            bar: None,
            rate: String::new(),
            last_line: Instant::now(),
        }
    }

    /// Shows it.
    pub(crate) fn show(&mut self, event: &Event) {
        if self.json {
            // Nobody may read it; the guest runs on.
            let _ = control::tell(stdout().lock(), event);
            return;
        }
        match event {
            Event::Pages {
                round, sent, of, ..
            } => {
                if self.terminal {
                    self.bar(*round, *of).set_position(*sent as u64);
                    return;
                }
            }
            Event::Arrived { pages } if self.terminal => {
                let text = format!("{} pages have come", grouped(*pages));
                self.spinner().set_message(text);
                return;
            }
            Event::Round { round, .. } => {
                self.rate = rate(round);
                self.finish();
            }
            _ => self.finish(),
        }
        if matches!(event, Event::Pages { .. } | Event::Arrived { .. })
            && self.last_line.elapsed() < SPARSE
        {
            return;
        }
        self.last_line = Instant::now();
        let text = line(event);
        match event {
            Event::Failed { .. }
            | Event::NotMoved { .. }
            | Event::NotTaken { .. }
            | Event::Undecided { .. } => {
                let name = style("amx-vmm:").for_stderr().red().bold();
                print(stderr().lock(), format_args!("{name} {text}"));
            }
            Event::Wrong { .. } => out(format_args!("{} {text}", style("✘").red().bold())),
            Event::HandedOver(_) | Event::TakenOver { .. } | Event::Saved { .. } => {
                out(format_args!("{} {text}", style("✔").green().bold()));
            }
            _ => out(format_args!("{text}")),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn bar(&mut self, round: u32, of: usize) -> &ProgressBar {
        let rate = &self.rate;
        self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(of as u64);
            let template = "{msg} {bar:30.cyan/black.bright} {pos}/{len} pages  {elapsed:.dim}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_message(format!("round {round}{rate}"));
            bar
        })
    }

    fn spinner(&mut self) -> &ProgressBar {
        self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        })
    }
}

fn out(text: fmt::Arguments<'_>) {
    print(stdout().lock(), text);
}

/// One line. Whoever reads it may be gone, which is no reason to lose a guest.
fn print(mut to: impl Write, text: fmt::Arguments<'_>) {
    let _ = writeln!(to, "{text}");
}

/// An event in words.
fn line(event: &Event) -> String {
    match event {
        Event::State { state } => doing(*state).to_owned(),
        Event::Pages {
            round, sent, of, ..
        } => format!(
            "round {round}: {} of {} pages",
            grouped(*sent),
            grouped(*of)
        ),
        Event::Round { round, .. } => {
            let stopped = if round.stopped { ", stopped" } else { "" };
            format!(
                "round {}{stopped}: {} pages, {}/s, {} changed meanwhile{}",
                round.round,
                grouped(round.pages),
                HumanBytes(whole(round.bytes_per_second)),
                grouped(round.changed),
                if round.stopped {
                    String::new()
                } else {
                    expected(round)
                },
            )
        }
        Event::Arrived { pages } => format!("{} pages have come", grouped(*pages)),
        Event::HandedOver(report) => {
            let pages = report.rounds.iter().map(|round| round.pages).sum();
            format!(
                "handed over: {} pages ({}) in {} rounds, stopped for {}, {} in all; live at the stop: {}",
                grouped(pages),
                HumanBytes(pages.saturating_mul(PAGE_BYTES) as u64),
                report.rounds.len(),
                seconds(report.downtime),
                seconds(report.total),
                live(&report.vcpus),
            )
        }
        Event::TakenOver { pages } => {
            format!(
                "the guest is here, and nowhere else: {} pages came",
                grouped(*pages)
            )
        }
        Event::NotMoved { reason } => {
            format!(
                "the guest was not moved, the source still has it: {}",
                printable(reason)
            )
        }
        Event::NotTaken { reason } => {
            format!("the guest has not come: {}", printable(reason))
        }
        Event::Undecided { reason } | Event::Failed { reason } => printable(reason),
        Event::Saved {
            file,
            bytes,
            pages,
            vcpus,
        } => format!(
            "saved to {}: {}, {} pages; live at the stop: {}; go on with `amx-vmm restore`",
            file.display(),
            HumanBytes(*bytes as u64),
            grouped(*pages),
            live(vcpus),
        ),
        Event::Status {
            state,
            vcpus,
            memory_bytes,
            verdict,
        } => format!(
            "{}; vCPUs: {vcpus}, {} of memory; {}",
            doing(*state),
            HumanBytes(*memory_bytes),
            checked(verdict)
        ),
        Event::Missed { events } => {
            format!("{events} events before were not told: nobody has read the others")
        }
        Event::Wrong { what } => format!("the guest has found a wrong result: {what}"),
        Event::Ended { how, verdict } => {
            let how = match how {
                Ending::Off => "switched itself off",
                Ending::Reset => "reset itself",
            };
            format!("the guest has {how}; {}", checked(verdict))
        }
    }
}

/// Without control characters: a reason can be the other side's words.
fn printable(text: &str) -> String {
    let visible = |letter: char| {
        if letter.is_control() {
            '\u{fffd}'
        } else {
            letter
        }
    };
    text.chars().map(visible).collect()
}

fn doing(state: State) -> &'static str {
    match state {
        State::Waiting => "waits for a guest",
        State::Receiving => "a guest comes",
        State::Restoring => "reads the snapshot",
        State::Running => "the guest runs",
        State::Moving => "the guest is moved while it runs",
        State::Saving => "the guest stands still and is saved",
        State::Stopping => "the guest was asked to switch itself off",
        State::Undecided => "the guest stands still, and may be elsewhere already",
    }
}

/// The guest's own words about its work, as far as this process has heard them.
fn checked(verdict: &Verdict) -> String {
    let rounds: Vec<String> = verdict
        .processes
        .iter()
        .map(|process| match &process.lacks {
            Some(_) => format!("{} nothing", process.load),
            None => format!("{} {}", process.load, process.rounds_here),
        })
        .collect();
    let right = match &verdict.wrong {
        None if verdict.right => "all right".to_owned(),
        wrong => format!("WRONG: {}", wrong.as_deref().unwrap_or("see its console")),
    };
    if verdict
        .processes
        .iter()
        .all(|process| process.rounds_here == 0 && process.lacks.is_none())
        && verdict.right
    {
        return "nothing reported by the guest here".to_owned();
    }
    format!(
        "rounds checked by the guest here: {}; {right}",
        rounds.join(", ")
    )
}

/// What was in use when the vCPUs were stopped, and where they were.
fn live(vcpus: &[AtStop]) -> String {
    let vcpus: Vec<String> = vcpus
        .iter()
        .map(|vcpu| {
            let place = if vcpu.user_mode {
                "a program"
            } else {
                "its kernel"
            };
            format!("{} in {place}", XFeatures::from_bits_retain(vcpu.in_use))
        })
        .collect();
    vcpus.join("; ")
}

fn rate(round: &Round) -> String {
    let rate = HumanBytes(whole(round.bytes_per_second));
    format!(", {rate}/s{}", expected(round))
}

fn expected(round: &Round) -> String {
    format!(
        ", {} of downtime if stopped now",
        seconds(round.expected_downtime)
    )
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a rate is not negative"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

/// Three digits and a unit.
fn seconds(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{seconds:.2} s")
    }
}

/// 14439 as 14,439.
fn grouped(number: usize) -> String {
    indicatif::HumanCount(number as u64).to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use amx_vmm::linux::guest::Checked;
    use amx_vmm::migration::Report;

    use super::*;
    use crate::event::tests::round;

    #[test]
    fn events_in_words() {
        let text = line(&Event::Round {
            bytes: 1_228_800,
            round: round(),
        });
        assert_eq!(
            text,
            "round 1: 300 pages, 95.37 MiB/s, 20 changed meanwhile, 0.8 ms of downtime if stopped now"
        );
        let last = Round {
            stopped: true,
            pages: 1234,
            changed: 0,
            ..round()
        };
        let text = line(&Event::HandedOver(Report {
            rounds: vec![round(), last],
            state_bytes: 16_000,
            vcpus: vec![AtStop {
                in_use: XFeatures::AMX.bits(),
                user_mode: true,
            }],
            downtime: 0.0123,
            total: 1.5,
        }));
        assert_eq!(
            text,
            "handed over: 1,534 pages (5.99 MiB) in 2 rounds, stopped for 12.3 ms, 1.50 s in all; \
             live at the stop: XTILECFG | XTILEDATA (0x60000) in a program"
        );
    }

    /// A reason can come from the other side.
    #[test]
    fn no_reason_moves_the_cursor() {
        let reason = "no\u{1b}[2J\nroot#".to_owned();
        let text = line(&Event::NotTaken { reason });
        assert_eq!(text, "the guest has not come: no\u{fffd}[2J\u{fffd}root#");
    }

    #[test]
    fn a_verdict_says_what_is_wrong() {
        let right = Verdict {
            right: true,
            processes: Vec::new(),
            wrong: None,
            finished: false,
        };
        assert_eq!(checked(&right), "nothing reported by the guest here");
        let process = Checked {
            load: "int8".to_owned(),
            round: 7,
            rounds_here: 3,
            lacks: None,
        };
        let right = Verdict {
            processes: vec![process],
            ..right
        };
        assert_eq!(
            checked(&right),
            "rounds checked by the guest here: int8 3; all right"
        );
        let wrong = Verdict {
            right: false,
            wrong: Some("int8: round 3: tile 2".to_owned()),
            ..right
        };
        assert!(checked(&wrong).ends_with("WRONG: int8: round 3: tile 2"));
    }
}
