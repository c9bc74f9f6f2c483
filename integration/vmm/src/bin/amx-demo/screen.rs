//! What there is to look at: tables, the progress bar, the verdict.
//!
//! The progress bar and errors go to standard error, results to standard output. Colours only on a
//! terminal, and not with NO_COLOR.

use amx_vmm::words::in_words;
use std::io;
use std::time::Duration;

use amx_vmm::linux::guest::Verdict;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};
use console::{StyledObject, style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use xsave_state::XFeatures;

use crate::far_terminal::FarTerminal;
use crate::lab;
use crate::linux::Journey;
use crate::report::{HostFacts, Report};

/// Tables are no wider, whatever the terminal.
const WIDTH: u16 = 92;

/// The lab is not there yet.
pub(crate) fn preparing() {
    println!(
        "{}\n",
        style(
            "This machine's KVM has no AMX. The AMX lab has: it is built now, once, in some minutes."
        )
        .yellow()
    );
}

/// The demo goes on in the lab.
pub(crate) fn in_lab(release: &str) {
    println!(
        "This machine's KVM has no AMX, so the demo runs in the {}: an emulated Sapphire Rapids\n\
         with Linux {release} and kvm-intel. With {} it runs on this machine's KVM.\n",
        style("AMX lab").bold(),
        style("--here").cyan()
    );
}

/// What the host can do.
pub(crate) fn host(facts: &HostFacts) {
    let mut table = new_table();
    let missing = || "unknown".to_owned();
    row(
        &mut table,
        "processor",
        facts.processor.clone().unwrap_or_else(missing),
    );
    row(
        &mut table,
        "kernel",
        facts.kernel.clone().unwrap_or_else(missing),
    );
    let names = |there: bool| {
        let names = facts
            .capabilities
            .iter()
            .filter(|(_, value)| (**value != 0) == there);
        names.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    };
    row(&mut table, "KVM has", names(true));
    if !names(false).is_empty() {
        row(&mut table, "KVM lacks", red(names(false)).to_string());
    }
    row(
        &mut table,
        "guests may have",
        match facts.guest_supported {
            Some(bits) => XFeatures::from_bits_retain(bits).to_string(),
            None => "not said: this kernel has no XCOMP_GUEST_SUPP".to_owned(),
        },
    );
    row(
        &mut table,
        "XSAVE size",
        format!(
            "{} bytes by the guest's CPUID, {} copied by KVM",
            grouped(facts.area_bytes),
            grouped(facts.xsave_bytes)
        ),
    );
    row(&mut table, "permission", facts.permission.clone());
    if facts.rewrites_cpuid {
        row(
            &mut table,
            "CPUID",
            "this KVM gives guests the processor's features, not those it is told".to_owned(),
        );
    }
    let registers = facts.registers.unwrap_or("nothing");
    if facts.amx {
        row(
            &mut table,
            "AMX",
            format!("yes, and the guests use it: {registers}"),
        );
    } else {
        row(
            &mut table,
            "AMX",
            format!("not for guests; in its place: {registers}"),
        );
    }
    title("This host");
    println!("{table}\n");
}

/// The outcome.
pub(crate) fn report(report: &Report) {
    title("The moves");
    let mut table = new_table();
    row(
        &mut table,
        "moved",
        format!(
            "{} of {} times to a new process, in {:.1} s on {} cores",
            grouped_u64(report.moves),
            grouped_u64(report.moves_wanted),
            report.seconds,
            report.workers
        ),
    );
    row(
        &mut table,
        "guests",
        format!(
            "{}, of {} vCPUs, {} rounds each; seed {}",
            report.guests,
            report.vcpus,
            grouped_u64(report.rounds),
            report.seed
        ),
    );
    let lost = format!("{} moves", report.lost);
    row(
        &mut table,
        "lost",
        if report.lost == 0 {
            good(lost)
        } else {
            red(lost)
        }
        .to_string(),
    );
    row(
        &mut table,
        "in use",
        XFeatures::from_bits_retain(report.in_use).to_string(),
    );
    row(
        &mut table,
        "sizes",
        format!(
            "{} bytes of extended state per vCPU; a file of {} bytes with {} pages of memory",
            grouped(report.state_bytes),
            grouped(report.file_bytes),
            report.pages
        ),
    );
    println!("{table}\n");

    title("The time a move takes");
    let mut table = new_table();
    let heading = |text| Cell::new(style(text).dim());
    let right = |text| heading(text).set_alignment(CellAlignment::Right);
    table.set_header([heading("step"), heading(""), right("median"), right("99 %")]);
    for step in &report.steps {
        table.add_row([
            Cell::new(style(step.name).cyan()),
            Cell::new(style(explain(step.name)).dim()),
            number(step.summary.median_ns),
            number(step.summary.p99_ns),
        ]);
    }
    println!("{table}\n");

    title("The control: the same move with something left out");
    let mut table = new_table();
    table.set_header(
        ["left out", "wrong registers at the end", ""].map(|text| Cell::new(style(text).dim())),
    );
    for control in &report.control {
        let outcome = match &control.error {
            Some(error) => error.clone(),
            None => control.wrong_registers.to_string(),
        };
        let verdict = match (control.as_expected(), control.harmless) {
            (true, true) => good("right, as it must be"),
            (true, false) => good("seen"),
            (false, true) => red("wrong although nothing was left out"),
            (false, false) => red("NOT SEEN"),
        };
        table.add_row([
            Cell::new(style(&control.lost).cyan()),
            Cell::new(outcome),
            Cell::new(verdict),
        ]);
    }
    println!("{table}\n");

    if !report.armed.is_empty() {
        title("XFD: a guest moved while it is armed, and in the middle of an #NM");
        let mut table = new_table();
        for moment in &report.armed {
            table.add_row([
                Cell::new(style(moment.what).cyan()),
                Cell::new(&moment.found),
                Cell::new(match (moment.good, moment.control) {
                    (true, false) => good("as it must be"),
                    (true, true) => good("seen"),
                    (false, false) => red("WRONG"),
                    (false, true) => red("NOT SEEN"),
                }),
            ]);
        }
        println!("{table}\n");
    }

    match (&report.linux, report.linux_lacks) {
        (Some(linux), _) => self::linux(linux),
        (None, Some(lacks)) => println!("{}\n", style(lacks).yellow()),
        (None, None) => {}
    }

    for trouble in report.troubles.iter().take(5) {
        println!("{} {trouble}", red("✘"));
    }
    verdict(report);
}

fn linux(journey: &Journey) {
    title("A Linux guest that multiplies matrices on tiles, moved while it runs");
    let mut table = new_table();
    table.set_header(
        [
            "",
            "pages",
            "rounds",
            "stopped",
            "live at the stop",
            "the guest's own verdict",
        ]
        .map(|text| Cell::new(style(text).dim())),
    );
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for (number, moved) in (1..).zip(&journey.moves) {
        table.add_row([
            right(grouped_u64(number)),
            right(grouped(moved.pages)),
            right(format!("{} + 1", moved.rounds)),
            right(duration(nanos(moved.downtime))),
            Cell::new(if moved.live_tiles {
                good(moved.live())
            } else {
                style(moved.live())
            }),
            Cell::new(match &moved.verdict {
                Some(verdict) => said(verdict),
                None => red("NONE".to_owned()),
            }),
        ]);
    }
    if let Some(first) = journey
        .moves
        .iter()
        .find_map(|moved| moved.verdict.as_ref())
    {
        let loads: Vec<&str> = (first.processes.iter())
            .filter(|process| process.lacks.is_none())
            .map(|process| process.load.as_str())
            .collect();
        let loads = format!("rounds so far of its processes: {}", loads.join(", "));
        println!("{table}\n{}\n", style(loads).dim());
    }
    if let Some(control) = &journey.control {
        let mut table = new_table();
        let found = match &control.without_tiles.wrong {
            Some(wrong) => good(wrong.clone()),
            None => red("NOT SEEN".to_owned()),
        };
        let left_out = match control.moments {
            1 => "without its tiles".to_owned(),
            moments => format!("without its tiles, at moment {moments}"),
        };
        table.add_row([Cell::new(style(left_out).cyan()), Cell::new(found)]);
        table.add_row([
            Cell::new(style("with them, to its end").cyan()),
            Cell::new(said(&control.whole)),
        ]);
        title("The control: the Linux guest restored without its tiles must notice");
        println!("{table}\n");
    }
    if journey.moves.len() as u64 >= journey.moves_wanted && journey.with_live_tiles == 0 {
        println!(
            "{} no move had a program's tiles in a register: this proves little",
            red("✘")
        );
    }
    if let Some(trouble) = &journey.trouble {
        println!("{} the Linux guest: {trouble}", red("✘"));
    }
}

/// The guest's words.
fn said(verdict: &Verdict) -> StyledObject<String> {
    match &verdict.wrong {
        Some(wrong) => red(format!("WRONG: {wrong}")),
        None => {
            let rounds: Vec<String> = (verdict.processes.iter())
                .filter(|process| process.lacks.is_none())
                .map(|process| process.round.to_string())
                .collect();
            good(format!("right: {}", rounds.join(", ")))
        }
    }
}

fn nanos(seconds: f64) -> u64 {
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn verdict(report: &Report) {
    let moved = format!("{} moves, {} lost", grouped_u64(report.moves), report.lost);
    let linux = report.linux.as_ref().map_or_else(String::new, |linux| {
        format!(
            "; Linux moved {} times, {} with live tiles, all right, its control detected",
            linux.moves.len(),
            linux.with_live_tiles
        )
    });
    if report.good {
        println!(
            "{} {}",
            good("✔").bold(),
            good(format!("{moved}, control detected{linux}")).bold()
        );
        return;
    }
    let control = if !report.control_detected {
        "and the control was NOT detected: the comparison proves nothing"
    } else if report.moves < report.moves_wanted {
        "control detected, but moves are missing"
    } else if report.linux_missing() {
        "control detected, but the Linux guest has not proven it"
    } else {
        "control detected"
    };
    println!(
        "{} {}",
        red("✘").bold(),
        red(format!("{moved}, {control}")).bold()
    );
}

/// The same as one JSON object.
pub(crate) fn json(report: &Report) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(io::stdout(), report)?;
    println!();
    Ok(())
}

/// One sentence on standard error.
pub(crate) fn error(error: &anyhow::Error) {
    let name = style("amx-demo:").for_stderr().red().bold();
    eprintln!("{name} {}", in_words(error.as_ref()));
}

/// Ctrl-C.
pub(crate) fn interrupted() {
    eprintln!(
        "{} interrupted",
        style("amx-demo:").for_stderr().yellow().bold()
    );
}

/// The progress bar; nothing where standard error is not a terminal.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(moves: u64, quiet: bool) -> Self {
        let far = std::env::var(lab::COLUMNS).ok();
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else if let Some(columns) = far.and_then(|columns| columns.parse().ok()) {
            ProgressDrawTarget::term_like(Box::new(FarTerminal { columns }))
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(moves), target);
        let template =
            "{spinner:.cyan} {bar:40.cyan/black.bright} {pos}/{len} moves  {msg}  {elapsed:.dim}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    pub(crate) fn moved(&self) {
        self.0.inc(1);
    }

    pub(crate) fn guests(&self, guests: u64, lost: u64) {
        self.0
            .set_message(format!("{guests} guests checked, {lost} lost"));
    }

    /// The bar is that of the Linux guest.
    pub(crate) fn linux(&self) {
        self.0.set_message("a Linux guest, while it runs");
    }

    pub(crate) fn control(&self) {
        self.0.set_message("now the control");
    }

    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn explain(step: &str) -> &'static str {
    match step {
        "capture" => "read all vCPUs and memory from KVM",
        "write" => "to a file, synced and renamed",
        "read" => "the file, in the new process",
        "check" => "every rule, and whether it fits this host",
        "restore" => "a new VM with all of it",
        _ => "all of these, for one move",
    }
}

fn title(text: &str) {
    println!("{}", style(text).bold());
}

fn new_table() -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY.with_rounded_corners())
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(
            console::Term::stdout()
                .size_checked()
                .map(|(_, columns)| columns)
                .or_else(|| std::env::var(lab::COLUMNS).ok()?.parse().ok())
                .map_or(WIDTH, |columns| columns.min(WIDTH)),
        );
    table
}

fn row(table: &mut Table, name: &str, value: String) {
    table.add_row([Cell::new(style(name).cyan()), Cell::new(value)]);
}

fn number(nanos: u64) -> Cell {
    Cell::new(duration(nanos)).set_alignment(CellAlignment::Right)
}

/// Three digits and a unit.
fn duration(nanos: u64) -> String {
    let (whole, unit) = match nanos {
        0..1_000 => return format!("{nanos} ns"),
        1_000..1_000_000 => (Duration::from_nanos(nanos).as_secs_f64() * 1e6, "µs"),
        1_000_000..1_000_000_000 => (Duration::from_nanos(nanos).as_secs_f64() * 1e3, "ms"),
        _ => (Duration::from_nanos(nanos).as_secs_f64(), "s"),
    };
    let decimals = match whole {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{whole:.decimals$} {unit}")
}

/// 11008 as 11,008.
fn grouped(number: usize) -> String {
    grouped_u64(number as u64)
}

fn grouped_u64(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}

fn good<D>(text: D) -> StyledObject<D> {
    style(text).green()
}

fn red<D>(text: D) -> StyledObject<D> {
    style(text).red()
}
