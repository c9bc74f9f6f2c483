//! What there is to look at: colours, tables, marks, errors.

use std::ffi::OsString;
use std::fmt::Write;
use std::time::Duration;

use amxctl::vcpu::Owner;
use clap::ValueEnum;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

/// No wider, whatever the terminal: long lines are hard to read.
const MAX_WIDTH: u16 = 110;
const ERROR: &str = "error:";
/// Characters of an error.
const MAX_ERROR: usize = 1000;
/// Where there is no terminal.
const DEFAULT_WIDTH: u16 = 80;

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

impl Color {
    /// From here on.
    pub(crate) fn apply(self) {
        let wanted = match self {
            Self::Auto => return,
            Self::Always => true,
            Self::Never => false,
        };
        console::set_colors_enabled(wanted);
        console::set_colors_enabled_stderr(wanted);
    }

    pub(crate) fn for_clap(self) -> clap::ColorChoice {
        match self {
            Self::Auto => clap::ColorChoice::Auto,
            Self::Always => clap::ColorChoice::Always,
            Self::Never => clap::ColorChoice::Never,
        }
    }
}

/// `--color` before clap has parsed it: help and errors have colours too.
pub(crate) fn color_of(args: impl Iterator<Item = OsString>) -> Color {
    let mut color = Color::Auto;
    let mut is_value = false;
    for arg in args.filter_map(|arg| arg.into_string().ok()) {
        let value = if is_value {
            Some(arg.as_str())
        } else {
            arg.strip_prefix("--color=")
        };
        if let Some(value) = value.and_then(|value| Color::from_str(value, false).ok()) {
            color = value;
        }
        is_value = arg == "--color";
    }
    color
}

/// The columns that there are to write in.
pub(crate) fn width() -> usize {
    let terminal = console::Term::stdout();
    let width = match terminal.size_checked() {
        Some((_, columns)) if terminal.is_term() => columns,
        _ => DEFAULT_WIDTH,
    };
    usize::from(width.clamp(40, MAX_WIDTH))
}

/// A table with a border, as wide as it must be and no wider than the screen.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY.with_rounded_corners())
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(u16::try_from(width().saturating_sub(2)).unwrap_or(DEFAULT_WIDTH));
    if !header.is_empty() {
        table.set_header(header.iter().map(|title| style(title).bold().to_string()));
    }
    table
}

/// Numbers stand under each other by their last digit.
pub(crate) fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// The table as text, two columns to the right.
pub(crate) fn indented(table: &Table) -> String {
    let mut text = String::new();
    for line in table.lines() {
        let _ = writeln!(text, "{}", format!("  {line}").trim_end());
    }
    text
}

/// A heading.
pub(crate) fn title(text: &str) -> String {
    style(text).bold().to_string()
}

/// What is said beside the point.
pub(crate) fn dim(text: impl std::fmt::Display) -> String {
    style(text).dim().to_string()
}

/// A tick, a cross, a question mark, an exclamation mark.
pub(crate) fn mark(mark: Mark) -> String {
    match mark {
        Mark::Good => style("✔").green().to_string(),
        Mark::Bad => style("✘").red().bold().to_string(),
        Mark::Unknown => style("?").yellow().to_string(),
        Mark::Warning => style("!").yellow().bold().to_string(),
    }
}

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Good,
    Bad,
    Unknown,
    Warning,
}

impl Mark {
    /// Text of that kind in its colour.
    pub(crate) fn paint(self, text: &str) -> String {
        match self {
            Self::Good => text.to_owned(),
            Self::Bad => style(text).red().to_string(),
            Self::Unknown | Self::Warning => style(text).yellow().to_string(),
        }
    }
}

/// Lines of at most the screen's width, each indented.
pub(crate) fn wrap(text: &str, indent: usize) -> String {
    let room = width().saturating_sub(indent).max(20);
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let columns = console::measure_text_width;
        if !line.is_empty() && columns(&line).saturating_add(columns(word)) >= room {
            let _ = writeln!(lines, "{:indent$}{line}", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(lines, "{:indent$}{line}", "");
    }
    lines
}

/// Text from a file, without what a terminal would take for a command.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let escaped = character.is_control().then(|| character.escape_default());
            let own = escaped.is_none().then_some(character);
            escaped.into_iter().flatten().chain(own)
        })
        .collect()
}

/// Whose state it is, for machines: the same two keys wherever there is a vCPU.
pub(crate) fn owner_json(owner: Owner) -> Value {
    json!({ "owner": owner.to_string(), "id": owner.id() })
}

/// 11008 as 11,008.
pub(crate) fn grouped(number: impl TryInto<u64>) -> String {
    indicatif::HumanCount(number.try_into().unwrap_or(u64::MAX)).to_string()
}

/// A bar for bytes, on standard error and on a terminal only.
pub(crate) fn bytes_bar(all: u64) -> ProgressBar {
    let bar = ProgressBar::new(all);
    let style = ProgressStyle::with_template(
        "{bar:24.cyan} {percent:>3} %  {bytes} of {total_bytes}, {eta} left",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// `1 vCPU`, `2 vCPUs`.
pub(crate) fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {what}{plural}", grouped(number))
}

/// To standard error, beside what a command has to say.
pub(crate) fn warning(text: &str) {
    let warning = style("warning:").for_stderr().yellow();
    eprintln!("{warning} {}", plain(text));
}

/// What a reader of standard output has to know as well, to standard error.
pub(crate) fn note(text: &str) {
    let indent = "note: ".len();
    let lines = wrap(&plain(text), indent);
    eprintln!("{} {}", style("note:").for_stderr().dim(), lines.trim());
}

/// Text is made for standard error from here on: its colours are, and not those of standard output.
pub(crate) fn speak_on_stderr() {
    console::set_colors_enabled(console::colors_enabled_stderr());
}

/// To standard error, with all that led to it.
pub(crate) fn error(error: &anyhow::Error) {
    let text = wrap(&plain(&chain(error)), ERROR.len().saturating_add(1));
    eprintln!("{} {}", style(ERROR).for_stderr().red().bold(), text.trim());
}

/// The same for machines.
pub(crate) fn error_json(error: &anyhow::Error) -> String {
    format!("{:#}\n", json!({ "error": plain(&chain(error)) }))
}

/// The causes, from the outermost; what one of them repeats of the one before is said once.
fn chain(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.last().is_some_and(|before| before.contains(&cause)) {
            continue;
        }
        if said
            .last()
            .is_some_and(|before| cause.starts_with(&**before))
        {
            said.pop();
        }
        said.push(cause);
    }
    let text = said.join(": ");
    // A file that is one long line is not repeated whole.
    if text.chars().count() <= MAX_ERROR {
        return text;
    }
    let start: String = text.chars().take(MAX_ERROR).collect();
    start + " ..."
}
