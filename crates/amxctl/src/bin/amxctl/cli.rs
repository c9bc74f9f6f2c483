//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use xsave_state::XFeatures;

use crate::screen::Color;

const EXIT_CODES: &str = "\
Exit codes:
  0  yes: the host is ready, the states are the same, the state can be restored
  1  no: the host is not ready, the states differ, the state cannot be restored
  2  trouble: a file that cannot be read, an option that does not exist
  3  yes, but: check: a known fix is missing, or not known to be there; compat:
     something must be hidden from a new guest, or with --relayout the states of
     a running one must be moved first; baseline: hosts are undescribed
  4  cannot be judged: too little is known, and the answer names the option that
     helps";

/// Check hosts for Intel AMX, compare fleets, look into saved vCPU states, convert them
///
/// amxctl trusts no file that it reads, and changes nothing: it reads files and asks /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "amxctl", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// When to use colours; auto: on a terminal, and not with NO_COLOR
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "WHEN",
        default_value_t = Color::Auto
    )]
    pub(crate) color: Color,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// `--json` before clap has parsed it: errors of the command line are JSON then, too.
pub(crate) fn wants_json(args: impl Iterator<Item = OsString>) -> bool {
    args.take_while(|arg| arg != "--")
        .filter_map(|arg| arg.into_string().ok())
        .any(|arg| arg == "--json" || arg.starts_with("--json="))
}

/// What clap says of the command line, without usage and advice.
pub(crate) fn plain_error(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.split_whitespace().collect();
    let words = words.join(" ");
    anyhow::Error::msg(words.trim_start_matches("error: ").to_owned())
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether a host is ready for guests with AMX, and what to do where it is not
    #[command(after_help = CHECK)]
    Check(CheckArgs),
    /// Describe this host as JSON, for the other commands and other machines
    #[command(after_help = DESCRIBE)]
    Describe(DescribeArgs),
    /// Say what a fleet shares, which hosts lack what, and what it would gain without them
    #[command(after_help = BASELINE)]
    Baseline(BaselineArgs),
    /// Put parts of a fleet together that `baseline --tally` wrote
    #[command(after_help = MERGE)]
    Merge(MergeArgs),
    /// Say whether the guest of A runs on host B, every reason why not, and what helps
    #[command(after_help = COMPAT)]
    Compat(CompatArgs),
    /// Look into a saved state: components, registers, rules, tiles
    #[command(after_help = INSPECT)]
    Inspect(InspectArgs),
    /// Say in which registers two saved states differ, or what an update did to a host
    #[command(after_help = DIFF)]
    Diff(DiffArgs),
    /// Say whether a saved state can be restored on a host, and refuse what endangers it
    #[command(after_help = VERIFY)]
    Verify(VerifyArgs),
    /// Write a saved state in another format or layout
    #[command(after_help = CONVERT)]
    Convert(ConvertArgs),
    /// Print completions for a shell
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages to a folder
    #[command(after_help = MAN)]
    Man {
        /// The folder; it is made where it is not there
        folder: PathBuf,
    },
}

impl Command {
    /// Whether standard output is for what is converted, and reports go to standard error.
    pub(crate) fn writes_to_stdout(&self) -> bool {
        matches!(self, Self::Convert(args) if args.output == Path::new("-"))
    }
}

const CHECK: &str = "\
It exits with 0 when the host is ready, with 3 when a serious fix is missing or
not known to be there (--ignore accepts one), and with 1 when it is not ready.
Of a fleet the worst host decides. No root is needed where the user may open
/dev/kvm.

Examples:
  amxctl check
  amxctl check --host node-17.json --ignore 3ef0df3f760f
  amxctl check --host fleet.jsonl
  ssh node-17 amxctl describe | amxctl check --host - --json";

const DESCRIBE: &str = "\
One line of JSON, as docs/host.schema.json has it: the lines of a fleet, one
behind the other, are what `amxctl baseline` reads. It asks for the permission
of guests, for its own process only.

Examples:
  amxctl describe > this-host.json
  for host in $(cat hosts); do ssh $host amxctl describe; done > fleet.jsonl
  amxctl describe --cpuid icelake.cpuid --name icelake --pretty
  amxctl describe --format firecracker > template.json";

const BASELINE: &str = "\
It reads descriptions as `amxctl describe` writes them, one a line, in a
stream: a million hosts take seconds and no more memory than their kinds.
With --tally it prints a part, for `amxctl merge`. A host whose KVM or permission
could not be asked takes nothing away: it is listed as undescribed, and the exit
code is 3 unless --skip-undescribed is given.

Examples:
  amxctl baseline fleet.jsonl
  amxctl baseline node-17.json icelake.json --json
  amxctl baseline --tally < fleet.jsonl > fleet.tally
  amxctl baseline node-17.json icelake.json --format qemu
  amxctl baseline node-17.json icelake.json --format firecracker --for node-17.json";

const MERGE: &str = "\
Parts can be merged in any order and shape, and parts of parts with --tally.

Examples:
  amxctl merge rack-1.tally rack-2.tally
  amxctl merge --tally rack-1.tally rack-2.tally > fleet.tally";

const COMPAT: &str = "\
It exits with 0 when the guest of A runs on B as it is, and with 1 when it does
not. It exits with 3 when the guest has not started, and runs on B once something
is hidden from it. A saved guest is judged as `amxctl verify` judges it. What a
saved state does not say is guessed, and named as a guess; where too little is
known, it exits with 4 and names the option that helps.

Examples:
  amxctl compat node-17.json icelake.json
  amxctl compat snapshot node-17.json
  amxctl compat guest.cpuid node-17.json --json";

const INSPECT: &str = "\
It opens states of vmm-amx, raw areas of KVM_GET_XSAVE2, the snapshot folder or
state.json of Cloud Hypervisor, the text of Firecracker's `snapshot-editor
info-vmstate vcpu-states`, and core dumps; `-` is standard input. It exits with
0 when the file could be read, whatever is in it; `amxctl verify` judges.

Examples:
  amxctl inspect snapshot
  amxctl inspect vcpu.xsave2 --xfd 0x40000 --svg vcpu.svg
  amxctl inspect --json core.4711 | jq '.vcpus[].findings'";

const DIFF: &str = "\
Like diff(1), it exits with 1 when they differ. It compares the values of
components, not where they lie, nor the bytes of initial ones. Of two
descriptions of a host it says which features guests lose, which they gain, and
which running guests rely on what is lost.

Examples:
  amxctl diff before.xstate after.xstate
  amxctl diff k618.json k612.json
  amxctl diff snapshot vcpus.xstate --vcpu 0 --all";

const VERIFY: &str = "\
The rules of the area and its registers come first: a state that breaks one is
refused on any host. So is a file that lacks registers of its guest, such as
IA32_XSS. Then the guest is compared with the host. It exits with 1 when the
state must not, or cannot, be restored, and with 4 when the file does not say
enough: then it names the option that helps.

Examples:
  amxctl verify snapshot --on node-17.json
  amxctl verify vcpus.xstate";

const CONVERT: &str = "\
A conversion that would lose something is refused, and names the --allow that
accepts the loss.

Examples:
  amxctl convert snapshot --to state -o vcpus.xstate
  amxctl convert vcpus.xstate --vcpu 0 --to raw -o vcpu0.xsave2
  amxctl convert snapshot --to state --layout node-17.json -o moved.xstate";

const COMPLETIONS: &str = "\
Examples:
  amxctl completions bash > amxctl.bash
  amxctl completions zsh > ~/.zfunc/_amxctl";

const MAN: &str = "\
Examples:
  amxctl man man1
  amxctl man man1 && man --local-file man1/amxctl-inspect.1";

/// What the file may not say.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct GivenArgs {
    /// CPUID of the guest: as `cpuid -r` prints it, or the description of a host whose guests get all that it has
    #[arg(long, value_name = "FILE", help_heading = "What the file may not say")]
    pub(crate) cpuid: Option<PathBuf>,
    /// XCR0 of the guest
    #[arg(long, value_name = "BITMAP", value_parser = bitmap, help_heading = "What the file may not say")]
    pub(crate) xcr0: Option<XFeatures>,
    /// IA32_XFD of the guest, MSR 0x1c4
    #[arg(long, value_name = "BITMAP", value_parser = bitmap, help_heading = "What the file may not say")]
    pub(crate) xfd: Option<XFeatures>,
    /// IA32_XFD_ERR of the guest, MSR 0x1c5
    #[arg(long, value_name = "BITMAP", value_parser = bitmap, help_heading = "What the file may not say")]
    pub(crate) xfd_err: Option<XFeatures>,
    /// IA32_XSS of the guest, MSR 0xda0, where the VMM keeps it and the MSRs behind it in another file
    #[arg(long, value_name = "BITMAP", value_parser = bitmap, help_heading = "What the file may not say")]
    pub(crate) xss: Option<XFeatures>,
}

impl GivenArgs {
    pub(crate) fn any(&self) -> bool {
        let Self {
            cpuid,
            xcr0,
            xfd,
            xfd_err,
            xss,
        } = self;
        cpuid.is_some() || xcr0.or(*xfd).or(*xfd_err).or(*xss).is_some()
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The host: its description, or CPUID as `cpuid -r` prints it; or a fleet, one description a line; without it, this host
    #[arg(long, value_name = "FILE")]
    pub(crate) host: Option<PathBuf>,
    /// Accept that this fix is missing, by its CVE or commit; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) ignore: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    /// What to call it, instead of its host name
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Describe a host of which there is only CPUID, as `cpuid -r` prints it
    #[arg(long, value_name = "FILE")]
    pub(crate) cpuid: Option<PathBuf>,
    /// For people: on many lines
    #[arg(long)]
    pub(crate) pretty: bool,
    /// Write the CPU of a guest that gets all that this host has, for this tool
    #[arg(long, value_enum, value_name = "TOOL", conflicts_with = "pretty")]
    pub(crate) format: Option<Tool>,
}

#[derive(Debug, Args)]
pub(crate) struct BaselineArgs {
    /// Descriptions of hosts, one a line; without any, or for `-`, standard input
    pub(crate) files: Vec<PathBuf>,
    /// Print the tally, for `amxctl merge`, and not the baseline
    #[arg(long)]
    pub(crate) tally: bool,
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// Leave out lines that are no description, and count them
    #[arg(long)]
    pub(crate) skip_broken: bool,
    /// Exit with 0 although KVM or the permission could not be asked on some hosts; they are listed all the same
    #[arg(long)]
    pub(crate) skip_undescribed: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// Tallies
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Exit with 0 although KVM or the permission could not be asked on some hosts; they are listed all the same
    #[arg(long)]
    pub(crate) skip_undescribed: bool,
    /// Print the tally of all, and not the baseline
    #[arg(long)]
    pub(crate) tally: bool,
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
}

/// The CPU of a guest that runs on every host, for another tool.
#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// Write the CPU of a guest that runs on every host, for this tool; what its format cannot hold is said on standard error
    #[arg(long, value_enum, value_name = "TOOL", conflicts_with = "tally")]
    pub(crate) format: Option<Tool>,
    /// The host of the fleet that starts the guest: needed where no single template fits all hosts
    #[arg(long = "for", value_name = "HOST.JSON", requires = "format")]
    pub(crate) host: Option<PathBuf>,
}

/// A tool that reads the CPU of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tool {
    /// A custom CPU template, JSON
    Firecracker,
    /// The option -cpu, on one line
    Qemu,
    /// CPUID as `cpuid -r` prints it
    Cpuid,
}

#[derive(Debug, Args)]
pub(crate) struct CompatArgs {
    /// The guest: a saved state, its CPUID as `cpuid -r` prints it, or the description of a host whose guests get all that it has
    #[arg(value_name = "A")]
    pub(crate) guest: PathBuf,
    /// The host: its description, or CPUID as `cpuid -r` prints it
    #[arg(value_name = "B")]
    pub(crate) host: PathBuf,
    /// The guest does not use the standard format with places that it has read from CPUID: its states may be moved into B's layout
    #[arg(long)]
    pub(crate) relayout: bool,
    #[command(flatten)]
    pub(crate) given: GivenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The saved state
    pub(crate) file: PathBuf,
    /// The host: its description, or CPUID as `cpuid -r` prints it; without it, this host
    #[arg(long, value_name = "FILE")]
    pub(crate) on: Option<PathBuf>,
    /// Only this vCPU; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) vcpu: Vec<u32>,
    #[command(flatten)]
    pub(crate) given: GivenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The saved state
    pub(crate) file: PathBuf,
    /// Only this vCPU, or thread of a core dump; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) vcpu: Vec<u32>,
    /// Write a picture of the area and the tiles
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) given: GivenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The first saved state, or host
    pub(crate) first: PathBuf,
    /// The second
    pub(crate) second: PathBuf,
    /// Only this vCPU; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) vcpu: Vec<u32>,
    /// List every part that differs, not only the first of each component
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) given: GivenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The saved state
    pub(crate) file: PathBuf,
    /// Where to write; `-` is standard output
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// The format to write
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) to: To,
    /// Only this vCPU; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) vcpu: Vec<u32>,
    /// Lay it out for a guest with this CPUID, as `cpuid -r` prints it, or for the host of this description
    #[arg(long, value_name = "FILE")]
    pub(crate) layout: Option<PathBuf>,
    /// Let this be lost: content (of components that the target lacks or cannot hold), disabled (what IA32_XFD disables), tile-config, mxcsr, xcr0 or xfd; may be repeated
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) allow: Vec<String>,
    #[command(flatten)]
    pub(crate) given: GivenArgs,
}

/// A format to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum To {
    /// Each vCPU: sparse, checksummed, with its registers and layout
    State,
    /// One vCPU: the bytes that KVM_SET_XSAVE takes
    Raw,
}

/// A state component bitmap: decimal, or hexadecimal with 0x.
fn bitmap(text: &str) -> Result<XFeatures, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed
        .map(XFeatures::from_bits_retain)
        .map_err(|error| format!("{error}; a bitmap is a number, as in 0x40000"))
}
