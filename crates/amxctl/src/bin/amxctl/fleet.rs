//! `amxctl baseline` and `amxctl merge`: what a fleet shares, in one go or from parts, and the CPU of its
//! guests.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use host_compat::Fleet;
use host_compat::baseline::{LineError, Lines};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::cli::{BaselineArgs, GuestArgs, MergeArgs};
use crate::input;
use crate::outcome::{Answer, Outcome};
use crate::screen;

mod guest;
mod show;

pub(crate) use guest::write_for_host;
pub(crate) use show::word;

/// A description has about 8 KB.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// A tally has at most 4,096 kinds of about 4 KB.
const MAX_TALLY_BYTES: u64 = 64 << 20;
/// Below, it is over before the eye has seen a bar.
const SLOW_BYTES: u64 = 64 << 20;
/// Between two looks at the bar.
const LINES_PER_TICK: u64 = 4096;

/// `amxctl baseline`.
pub(crate) fn baseline(args: &BaselineArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut input = Input::new(&args.files);
    let mut lines = Lines::new();
    if args.files.is_empty() {
        input.read(
            "standard input",
            io::stdin().lock(),
            &mut lines,
            args.skip_broken,
        )?;
    }
    for path in &args.files {
        let name = path.display().to_string();
        if path == Path::new("-") {
            input.read(&name, io::stdin().lock(), &mut lines, args.skip_broken)?;
        } else {
            let file = amxctl::open::open_file(path).with_context(|| name.clone())?;
            let file = BufReader::with_capacity(1 << 20, file);
            input.read(&name, file, &mut lines, args.skip_broken)?;
        }
    }
    input.bar.finish_and_clear();
    if input.broken > 0 {
        let broken = usize::try_from(input.broken).unwrap_or(usize::MAX);
        screen::warning(&format!(
            "{} left out, the first of them {}",
            screen::count(broken, "line"),
            input.first_broken.unwrap_or_default()
        ));
    }
    let output = Output {
        tally: args.tally,
        guest: &args.guest,
        skip_undescribed: args.skip_undescribed,
        json,
    };
    output.of(&lines.into_fleet())
}

/// `amxctl merge`.
pub(crate) fn merge(args: &MergeArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut fleet = Fleet::new();
    for path in &args.files {
        let name = || path.display().to_string();
        let text = input::text(path, MAX_TALLY_BYTES)?;
        let part: Fleet = serde_json::from_str(&text).with_context(|| {
            format!(
                "{}: expected a tally, as `amxctl baseline --tally` writes it",
                name()
            )
        })?;
        fleet.merge(part).with_context(name)?;
    }
    let output = Output {
        tally: args.tally,
        guest: &args.guest,
        skip_undescribed: args.skip_undescribed,
        json,
    };
    output.of(&fleet)
}

/// What is to be printed of a fleet.
struct Output<'a> {
    tally: bool,
    guest: &'a GuestArgs,
    skip_undescribed: bool,
    json: bool,
}

impl Output<'_> {
    fn of(&self, fleet: &Fleet) -> anyhow::Result<Outcome> {
        if self.tally {
            return Outcome::yes(serde_json::to_string(fleet)? + "\n");
        }
        if fleet.hosts() == 0 {
            bail!(
                "there are no hosts: expected descriptions, as `amxctl describe` writes them, one a \
                 line"
            );
        }
        let baseline = fleet.baseline();
        let text = match self.guest.format {
            Some(tool) => guest::write(fleet, self.guest.host.as_deref(), tool, self.json)?,
            None if self.json => {
                serde_json::to_string_pretty(&show::as_json(fleet, &baseline))? + "\n"
            }
            None => show::text(fleet, &baseline),
        };
        let complete = baseline.undescribed.is_empty() || self.skip_undescribed;
        Ok(Outcome {
            text,
            answer: if complete {
                Answer::Yes
            } else {
                Answer::Warning
            },
        })
    }
}

/// What is read, line by line, and how far.
struct Input {
    bar: ProgressBar,
    lines: u64,
    bytes: u64,
    broken: u64,
    first_broken: Option<String>,
}

impl Input {
    fn new(files: &[PathBuf]) -> Self {
        let sizes = files.iter().map(|path| Some(path.metadata().ok()?.len()));
        // Of a pipe nobody knows how long it is.
        let all: Option<u64> = sizes
            .sum::<Option<u64>>()
            .filter(|&all| all > 0 && !files.is_empty());
        let bar = match all {
            Some(all) if all < SLOW_BYTES => ProgressBar::hidden(),
            Some(all) => screen::bytes_bar(all),
            None => ProgressBar::new_spinner(),
        };
        if all.is_none()
            && let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg}, {elapsed}")
        {
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self {
            bar,
            lines: 0,
            bytes: 0,
            broken: 0,
            first_broken: None,
        }
    }

    fn read(
        &mut self,
        name: &str,
        mut input: impl BufRead,
        fleet: &mut Lines,
        skip_broken: bool,
    ) -> anyhow::Result<()> {
        let mut line = Vec::new();
        let (mut number, mut next) = (0u64, 0u64);
        loop {
            line.clear();
            (&mut input)
                .take(MAX_LINE_BYTES.saturating_add(1))
                .read_until(b'\n', &mut line)
                .with_context(|| name.to_owned())?;
            let read = u64::try_from(line.len()).unwrap_or(u64::MAX);
            if read == 0 {
                return Ok(());
            }
            let at = next;
            next = next.saturating_add(read);
            number = number.saturating_add(1);
            self.tick(read);
            let place = || format!("{name}, line {number} (byte {at})");
            if read > MAX_LINE_BYTES {
                let long = format!(
                    "{}: expected one description a line, found a line of more than \
                     {MAX_LINE_BYTES} bytes",
                    place()
                );
                if !skip_broken {
                    bail!(long);
                }
                self.leave_out(|| long);
                if !line.ends_with(b"\n") {
                    let rest = input.skip_until(b'\n').with_context(|| name.to_owned())?;
                    next = next.saturating_add(u64::try_from(rest).unwrap_or(u64::MAX));
                }
                continue;
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let Err(error) = fleet.add(&line) else {
                continue;
            };
            if skip_broken && matches!(error, LineError::Parse(_)) {
                self.leave_out(|| format!("{}: {error}", place()));
                continue;
            }
            return Err(anyhow::Error::new(error).context(format!(
                "{}: expected a host's description on one line, as `amxctl describe` writes it",
                place()
            )));
        }
    }

    fn leave_out(&mut self, why: impl FnOnce() -> String) {
        self.broken = self.broken.saturating_add(1);
        self.first_broken.get_or_insert_with(why);
    }

    fn tick(&mut self, read: u64) {
        self.bytes = self.bytes.saturating_add(read);
        self.lines = self.lines.saturating_add(1);
        if self.lines.is_multiple_of(LINES_PER_TICK) {
            self.bar.set_position(self.bytes);
            self.bar
                .set_message(format!("{} hosts", HumanCount(self.lines)));
        }
    }
}
