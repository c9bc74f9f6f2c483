//! The main job, to be seen: guests are stopped at random points and each goes on in a new process.
//!
//! | module | its one job |
//! |---|---|
//! | [`job`] | what a process of the chain is told, and what it says when it is done |
//! | [`leg`] | one process of the chain: restore, run, stop, save |
//! | [`child`] | starts such a process and waits for it, with a time-out |
//! | [`fleet`] | guests on every core, from process to process |
//! | [`control`] | the same move with a part left out: it must be seen |
//! | [`lab`] | the same in the AMX lab, where this machine's KVM has no AMX |
//! | [`far_terminal`] | the progress bar of the lab, drawn here |
//! | [`pace`] | makes a guest run long enough to be stopped often |
//! | [`armed`] | XFD armed, and in the middle of an #NM |
//! | [`linux`] | a Linux guest with live tiles, moved while it runs |
//! | [`journey`] | what one process does with it, and how the next is started |
//! | [`stats`] | times, and their median and 99th percentile |
//! | [`report`] | what it all comes to, as data |
//! | [`screen`] | and to look at |

mod armed;
mod child;
mod control;
mod far_terminal;
mod fleet;
mod job;
mod journey;
mod lab;
mod leg;
mod linux;
mod pace;
mod report;
mod screen;
mod stats;

use std::num::{NonZeroU8, NonZeroU64};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use amx_guest::Kind;
use amx_vmm::host::KVM_DEVICE;
use amx_vmm::{Host, HostError};
use clap::{Parser, Subcommand};

/// Moves running guests from process to process, through snapshot files and, a Linux guest, while it
/// runs, with live vector or tile state; and says whether all of it arrived.
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
    /// How many times a guest goes on in a new process [default: 200; in the lab 50].
    #[arg(long)]
    moves: Option<NonZeroU64>,
    /// How many times a Linux guest is moved while it runs; more where that was never with live tiles.
    #[arg(long, default_value = "10")]
    linux_moves: NonZeroU64,
    /// Kernel of the Linux guest, vmlinux or bzImage; in the AMX lab its own.
    #[arg(long)]
    guest_kernel: Option<PathBuf>,
    /// vCPUs of each bare guest.
    #[arg(long, default_value = "2", value_parser = vcpus)]
    vcpus: NonZeroU8,
    /// Decides inputs and stopping points; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs on this machine's KVM, also where it has no AMX, instead of in the AMX lab.
    #[arg(long)]
    here: bool,
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
    /// One process of the Linux guest's.
    #[command(hide = true)]
    LinuxLeg {
        /// KVM's device file.
        #[arg(long)]
        kvm: String,
        /// The guest's kernel.
        #[arg(long)]
        guest_kernel: PathBuf,
    },
}

impl Options {
    /// How many moves, here or in the lab.
    fn moves(&self) -> u64 {
        const HERE: u64 = 200;
        match self.moves {
            Some(moves) => moves.get(),
            None if lab::is_here() => lab::MOVES,
            None => HERE,
        }
    }

    /// The arguments that make the same demo in the lab.
    fn for_lab(&self) -> Vec<String> {
        let mut arguments = vec![
            "--here".to_owned(),
            format!("--vcpus={}", self.vcpus),
            format!("--linux-moves={}", self.linux_moves),
            format!("--guest-kernel={}/{}", lab::GUEST_KERNEL, amx_lab::VMLINUX),
        ];
        arguments.extend(self.moves.map(|moves| format!("--moves={moves}")));
        arguments.extend(self.seed.map(|seed| format!("--seed={seed}")));
        arguments.extend(self.json.then(|| "--json".to_owned()));
        arguments
    }
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
        Some(Command::LinuxLeg { kvm, guest_kernel }) => linux::leg(&kvm, &guest_kernel),
        None => demo(&arguments.options),
    };
    match code {
        Ok(code) => ExitCode::from(code),
        // The children hear of Ctrl-C first, and that one of them is gone is an error.
        Err(_) if fleet::interrupted() => {
            screen::interrupted();
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            screen::error(&error);
            ExitCode::from(BAD)
        }
    }
}

fn demo(options: &Options) -> anyhow::Result<u8> {
    let probed = Host::probe_at(&options.kvm);
    let here = options.here || lab::is_here();
    if !here
        && !probed
            .as_ref()
            .is_ok_and(|host| host.best_kind() == Some(Kind::Tiles))
    {
        return lab::run(options);
    }
    let host = match probed {
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
    let mut plan = fleet::Plan {
        kvm: options.kvm.clone(),
        kind,
        moves: options.moves(),
        vcpus: options.vcpus.get(),
        seed,
        slower: 1,
        directory: directory.path().to_owned(),
    };
    plan.slower = pace::slower(&plan)?;
    let started = Instant::now();
    let progress = screen::Progress::new(plan.moves, options.json);
    let fleet = fleet::run(&plan, &progress)?;
    let took = started.elapsed();
    progress.control();
    let control = if fleet.interrupted {
        Vec::new()
    } else {
        control::run(&plan)?
    };
    let armed = if fleet.interrupted {
        Vec::new()
    } else {
        armed::run(&plan)?
    };
    progress.finish();
    let lacks = linux::lacks(plan.kind, options.guest_kernel.as_deref());
    let linux = match &options.guest_kernel {
        Some(kernel) if lacks.is_none() && !fleet.interrupted => {
            let moves = options.linux_moves.get();
            let progress = screen::Progress::new(moves, options.json);
            progress.linux();
            let journey = linux::run(&plan, kernel, moves, &progress)?;
            progress.finish();
            Some(journey)
        }
        _ => None,
    };
    if fleet::interrupted() {
        screen::interrupted();
        return Ok(INTERRUPTED);
    }
    let report = report::Report::new(facts, &plan, fleet, control, armed, took).with_linux(
        linux,
        lacks,
        options.guest_kernel.is_some(),
    );
    if options.json {
        screen::json(&report)?;
    } else {
        screen::report(&report);
    }
    Ok(if report.good { GOOD } else { BAD })
}
