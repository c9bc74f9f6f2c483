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
mod input;
mod inspect;
mod judge;
mod map;
mod outcome;
mod pages;
mod render;
mod screen;
mod svg;
mod tiles;
mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use cli::{Cli, Command};
use outcome::{Answer, Outcome};

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
            return trouble(&cli::plain_error(&error), true, true);
        }
        Err(error) => error.exit(),
    };
    cli.color.apply();
    let outcome = match run(&cli) {
        Ok(outcome) => outcome,
        Err(error) => return trouble(&error, cli.json, !cli.command.writes_to_stdout()),
    };
    match io::stdout().write_all(outcome.text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            trouble(&error.into(), cli.json, false)
        }
        _ => match outcome.answer {
            Answer::Yes => ExitCode::SUCCESS,
            Answer::No => ExitCode::from(1),
            Answer::Warning => ExitCode::from(3),
            Answer::Unknown => ExitCode::from(4),
        },
    }
}

/// Says what is wrong: to people, or to the machine that reads standard output. Where that is for a state, or
/// cannot be written, standard error has to do.
fn trouble(error: &anyhow::Error, json: bool, on_stdout: bool) -> ExitCode {
    if !json {
        screen::error(error);
        return ExitCode::from(2);
    }
    let text = screen::error_json(error);
    if !on_stdout || write!(io::stdout(), "{text}").is_err() {
        eprint!("{text}");
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
