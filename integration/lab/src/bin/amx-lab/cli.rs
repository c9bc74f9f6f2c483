//! The command line.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use amx_lab::{Cpu, Kernel, LabOptions};
use clap::{Args, Parser, Subcommand};

/// Runs any static x86-64 program on a host with real KVM, Intel AMX and XFD, on a machine that has none of them.
///
/// The host is emulated and boots an unmodified Debian kernel. No root, no /dev/kvm and, once prepared, no network is needed.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program in the lab as if it ran here
    #[command(after_help = RUN_HELP)]
    Run(RunArgs),
    /// Run cargo with all its tests and programs in the lab: amx-lab cargo test -p some-crate
    Cargo(CargoArgs),
    /// Look around in the lab
    Shell(ShellArgs),
    /// Build the emulator and fetch the kernels, once
    Prepare(PrepareArgs),
    /// Write a kernel of the lab as files that a VMM inside the lab boots as its guest
    GuestKernel(GuestKernelArgs),
    /// Say what of the lab is there; the exit status is 0 if it can be used, and 125 if not
    Status(StatusArgs),
    /// Remove all of it
    Clean,
}

const RUN_HELP: &str = "The program runs under its own path, in a directory of the same name as this one. It finds the files that it is given, \
/proc, /sys, /dev with /dev/kvm, and an empty /tmp.

Exit status: that of the program, and 128 more than the number of the signal that ended it. Of its own:
  120  the lab's kernel crashed        125  the lab could not be used
  121  the emulator failed             126  the program cannot run there (not static)
  124  time was out                    127  there is no such program

As a cargo runner, in .cargo/config.toml:
  target.x86_64-unknown-linux-gnu = { runner = \"amx-lab run --timeout 3600 --\", rustflags = [\"-Ctarget-feature=+crt-static\"] }";

/// What kind of lab.
#[derive(Debug, Clone, Args)]
pub(crate) struct LabArgs {
    /// The host's kernel: trixie, sid or bookworm
    #[arg(
        long,
        value_name = "NAME",
        env = "AMX_LAB_KERNEL",
        default_value = "trixie"
    )]
    kernel: Kernel,
    /// The host's processor: sapphire-rapids, granite-rapids, granite-rapids-d; without AMX: tiger-lake, ice-lake, skylake-x, arrow-lake
    #[arg(long, value_name = "NAME", env = "AMX_LAB_CPU", default_value_t = Cpu::default())]
    cpu: Cpu,
    /// How many processors the host has, up to 8
    #[arg(long, value_name = "NUMBER", env = "AMX_LAB_CPUS", default_value_t = LabOptions::default().cpus)]
    cpus: u32,
    /// The host's memory in MiB
    #[arg(long, value_name = "MIB", env = "AMX_LAB_MEMORY", default_value_t = LabOptions::default().memory_mib)]
    memory: u32,
    /// Boot the host anew instead of resuming one that was saved after its boot
    #[arg(long)]
    cold: bool,
    /// Fail if the lab is not prepared, and do not prepare it
    #[arg(long, env = "AMX_LAB_NO_PREPARE", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) no_prepare: bool,
    /// Use an emulator that lacks this patch (its build takes minutes)
    #[arg(
        long,
        value_name = "PATCH",
        env = "AMX_LAB_WITHOUT_PATCH",
        value_delimiter = ',',
        hide_short_help = true
    )]
    without_patch: Vec<String>,
}

impl LabArgs {
    pub(crate) fn options(&self) -> LabOptions {
        LabOptions {
            kernel: self.kernel,
            cpu: self.cpu,
            cpus: self.cpus,
            memory_mib: self.memory,
            cold: self.cold,
            without_patches: self.without_patch.clone(),
        }
    }
}

/// How long a program may run; zero seconds are no limit, as for timeout(1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limit(Duration);

impl Limit {
    pub(crate) fn get(self) -> Option<Duration> {
        Some(self.0).filter(|limit| !limit.is_zero())
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds: f64 = text
            .parse()
            .map_err(|_| "not a number of seconds".to_owned())?;
        Duration::try_from_secs_f64(seconds)
            .map(Self)
            .map_err(|error| error.to_string())
    }
}

/// The value of AMX_LAB_TIMEOUT that says the same.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_secs_f64().fmt(f)
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) lab: LabArgs,
    /// End the program after so many seconds; 0 is no limit, as it is without this option
    #[arg(
        long,
        value_name = "SECONDS",
        env = "AMX_LAB_TIMEOUT",
        default_value = "0",
        hide_default_value = true
    )]
    pub(crate) timeout: Limit,
    /// Take a file or folder along, to the same path or another one (several: once each)
    #[arg(
        long,
        value_name = "HOST[:GUEST]",
        env = "AMX_LAB_FILES",
        value_delimiter = ','
    )]
    pub(crate) file: Vec<OsString>,
    /// Bring what the program leaves in /out (also in $AMX_LAB_OUT) back to this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Set a variable for the program, or pass on the one that is set here (RUST_*, CARGO_* and a few more are passed on)
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Pass standard input on; otherwise it is empty
    #[arg(long, short = 'i')]
    pub(crate) stdin: bool,
    /// Show the console of the lab's kernel on standard error
    #[arg(long)]
    pub(crate) console: bool,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct CargoArgs {
    #[command(flatten)]
    pub(crate) lab: LabArgs,
    /// End each program after so many seconds; 0 is no limit
    #[arg(
        long,
        value_name = "SECONDS",
        env = "AMX_LAB_TIMEOUT",
        default_value = "3600"
    )]
    pub(crate) timeout: Limit,
    /// Labs that may run at once; each runs one program after the other [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(crate) labs: Option<usize>,
    /// Cargo's command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    pub(crate) lab: LabArgs,
    /// Take a file or folder along, to the same path or another one
    #[arg(long, value_name = "HOST[:GUEST]")]
    pub(crate) file: Vec<OsString>,
    /// Run this command and leave
    #[arg(short = 'c', value_name = "COMMAND")]
    pub(crate) command: Option<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    /// A kernel: trixie, sid or bookworm (several: once each) [default: trixie]
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    pub(crate) kernel: Vec<Kernel>,
    /// All kernels
    #[arg(long)]
    pub(crate) all: bool,
    /// Address of a Debian mirror, if not the one of this machine's apt
    #[arg(long, value_name = "URL", env = "AMX_LAB_MIRROR")]
    pub(crate) mirror: Option<String>,
    /// Processor of the hosts that are booted in advance
    #[arg(long, value_name = "NAME", env = "AMX_LAB_CPU", default_value_t = Cpu::default())]
    pub(crate) cpu: Cpu,
    /// How many processors the hosts have that are booted in advance
    #[arg(long, value_name = "NUMBER", env = "AMX_LAB_CPUS", default_value_t = LabOptions::default().cpus)]
    pub(crate) cpus: u32,
    /// Memory in MiB of the hosts that are booted in advance
    #[arg(long, value_name = "MIB", env = "AMX_LAB_MEMORY", default_value_t = LabOptions::default().memory_mib)]
    pub(crate) memory: u32,
    /// Fetch the kernels anew: Debian may have newer ones
    #[arg(long)]
    pub(crate) update: bool,
    /// Compare every byte of what is there with its hash, and make anew what has changed
    #[arg(long)]
    pub(crate) verify: bool,
    /// Build an emulator that lacks this patch
    #[arg(
        long,
        value_name = "PATCH",
        value_delimiter = ',',
        hide_short_help = true
    )]
    pub(crate) without_patch: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct GuestKernelArgs {
    #[command(flatten)]
    pub(crate) lab: LabArgs,
    /// Folder for vmlinux, an ELF file, vmlinuz, a bzImage, and msr.ko
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,
    /// Compare every byte with its hash
    #[arg(long)]
    pub(crate) verify: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn zero_seconds_are_no_limit() {
        let limit = |text: &str| text.parse::<Limit>();
        let after = |text| limit(text).map(Limit::get);
        assert_eq!(after("0"), Ok(None));
        assert_eq!(after("1.5"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(
            limit("1.5").map(|limit| limit.to_string()),
            Ok("1.5".to_owned())
        );
        for text in ["", "x", "-1", "NaN", "inf", "1e30"] {
            assert!(limit(text).is_err(), "{text}");
        }
    }
}
