//! amxctl: the operator's tool for Intel AMX on KVM.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

mod check;
mod cli;
mod compat;
mod convert;
mod describe;
mod diff;
mod fleet;
mod guesses;
mod input;
mod inspect;
mod load;
mod map;
mod pages;
mod screen;
mod svg;
mod tiles;
mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use cli::{Cli, Command};

/// What a command has to say, and whether the answer is yes.
struct Outcome {
    text: String,
    answer: Answer,
}

/// The exit codes, as `amxctl --help` lists them. Trouble is 2, as clap has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    Warning,
    Unknown,
}

impl Outcome {
    fn yes(text: String) -> anyhow::Result<Self> {
        Ok(Self {
            text,
            answer: Answer::Yes,
        })
    }
}

fn main() -> ExitCode {
    let color = screen::color_of(std::env::args_os());
    let parsed = Cli::command()
        .color(color.for_clap())
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        // --help and --version are no errors.
        Err(error) if error.use_stderr() && cli::wants_json(std::env::args_os()) => {
            return trouble(&cli::plain_error(&error), true);
        }
        Err(error) => error.exit(),
    };
    cli.color.apply();
    let outcome = match run(&cli) {
        Ok(outcome) => outcome,
        Err(error) => return trouble(&error, cli.json && !cli.command.writes_to_stdout()),
    };
    match io::stdout().write_all(outcome.text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => trouble(&error.into(), false),
        _ => match outcome.answer {
            Answer::Yes => ExitCode::SUCCESS,
            Answer::No => ExitCode::from(1),
            Answer::Warning => ExitCode::from(3),
            Answer::Unknown => ExitCode::from(4),
        },
    }
}

/// Says what is wrong: to people, or to the machine that reads standard output.
fn trouble(error: &anyhow::Error, json: bool) -> ExitCode {
    // Where standard output is gone there is the exit code.
    if !json || write!(io::stdout(), "{}", screen::error_json(error)).is_err() {
        screen::error(error);
    }
    ExitCode::from(2)
}

fn run(cli: &Cli) -> anyhow::Result<Outcome> {
    let json = cli.json;
    match &cli.command {
        Command::Check(args) => check::run(args, json),
        Command::Describe(args) => describe::run(args, json),
        Command::Baseline(args) => fleet::baseline(args, json),
        Command::Merge(args) => fleet::merge(args, json),
        Command::Compat(args) => compat::run(args, json),
        Command::Inspect(args) => inspect::run(args, json),
        Command::Diff(args) => diff::run(args, json),
        Command::Verify(args) => verify::run(args, json),
        Command::Convert(args) => convert::run(args, json),
        Command::Completions { shell } => Outcome::yes(pages::completions(*shell)),
        Command::Man { folder } => Outcome::yes(pages::man(folder)?),
    }
}
