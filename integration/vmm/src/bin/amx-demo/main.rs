//! The main job, to be seen: guests are stopped at random points and each goes on in a new process.
//!
//! | module | its one job |
//! |---|---|
//! | [`job`] | what a process of the chain is told, and what it says when it is done |
//! | [`leg`] | one process of the chain: restore, run, stop, save |
//! | [`child`] | starts such a process and waits for it, with a time-out |
//! | [`fleet`] | guests on every core, from process to process |
//! | [`control`] | the same move with a part left out: it must be seen |
//! | [`stats`] | times, and their median and 99th percentile |
//! | [`report`] | what it all comes to, as data |
//! | [`screen`] | and to look at |

mod child;
mod control;
mod fleet;
mod job;
mod leg;
mod report;
mod screen;
mod stats;

use std::num::{NonZeroU8, NonZeroU64};
use std::process::ExitCode;
use std::time::Instant;

use amx_vmm::host::KVM_DEVICE;
use amx_vmm::{Host, HostError};
use clap::{Parser, Subcommand};

/// Moves running guests from process to process through snapshot files, with live vector or tile
/// state, and says whether all of it arrived.
#[derive(Parser)]
#[command(name = "amx-demo", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Args, Clone)]
struct Options {
    /// How many times a guest goes on in a new process.
    #[arg(long, default_value = "200")]
    moves: NonZeroU64,
    /// vCPUs of each guest.
    #[arg(long, default_value = "2", value_parser = vcpus)]
    vcpus: NonZeroU8,
    /// Decides inputs and stopping points; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// KVM's device file.
    #[arg(long, default_value = KVM_DEVICE, hide = true)]
    kvm: String,
}

#[derive(Subcommand)]
enum Command {
    /// One process of a chain; told on standard input what to do.
    #[command(hide = true)]
    Leg {
        /// KVM's device file.
        #[arg(long, default_value = KVM_DEVICE)]
        kvm: String,
    },
}

fn vcpus(text: &str) -> Result<NonZeroU8, String> {
    let limit = amx_vmm::vm::MAX_VCPUS;
    text.parse()
        .ok()
        .filter(|vcpus: &NonZeroU8| vcpus.get() <= limit)
        .ok_or_else(|| format!("1 to {limit}"))
}

/// Everything arrived, and the control was seen.
const GOOD: u8 = 0;
/// Something was lost, or the control was not seen.
const BAD: u8 = 1;
/// Nothing could be tried here.
const NO_KVM: u8 = 2;
/// Ctrl-C.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let code = match arguments.command {
        Some(Command::Leg { kvm }) => leg::main(&kvm),
        None => demo(&arguments.options),
    };
    match code {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            screen::error(&error);
            ExitCode::from(BAD)
        }
    }
}

fn demo(options: &Options) -> anyhow::Result<u8> {
    let host = match Host::probe_at(&options.kvm) {
        Ok(host) => host,
        Err(
            error @ (HostError::NoKvm { .. }
            | HostError::Permission { .. }
            | HostError::NotKvm { .. }
            | HostError::Open { .. }),
        ) => {
            screen::error(&error.into());
            return Ok(NO_KVM);
        }
        Err(error) => return Err(error.into()),
    };
    let facts = report::HostFacts::new(&host);
    if !options.json {
        screen::host(&facts);
    }
    let Some(kind) = host.best_kind() else {
        anyhow::bail!("guests of this host cannot even run the SSE payload");
    };
    let seed = options
        .seed
        .unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let directory = tempfile::Builder::new().prefix("amx-demo-").tempdir()?;
    let plan = fleet::Plan {
        kvm: options.kvm.clone(),
        kind,
        moves: options.moves.get(),
        vcpus: options.vcpus.get(),
        seed,
        directory: directory.path().to_owned(),
    };
    let started = Instant::now();
    let progress = screen::Progress::new(plan.moves, options.json);
    let fleet = fleet::run(&plan, &progress)?;
    progress.control();
    let control = if fleet.interrupted {
        Vec::new()
    } else {
        control::run(&plan)?
    };
    progress.finish();
    if fleet.interrupted {
        screen::interrupted();
        return Ok(INTERRUPTED);
    }
    let report = report::Report::new(facts, &plan, fleet, control, started.elapsed());
    if options.json {
        screen::json(&report)?;
    } else {
        screen::report(&report);
    }
    Ok(if report.good { GOOD } else { BAD })
}
