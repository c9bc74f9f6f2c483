//! What the program can be told.

use std::num::NonZeroU32;
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use amx_vmm::Linux;
use amx_vmm::host::KVM_DEVICE;
use amx_vmm::memory::MAX_MEMORY_BYTES;
use amx_vmm::migration::{MAX_THROTTLE_PERCENT, Options};
use clap::{Args, Parser, Subcommand};

use crate::control::Request;

const MIB: u64 = 1 << 20;

/// Runs a Linux guest with AMX, and moves it between processes while it runs.
#[derive(Debug, Parser)]
#[command(name = "amx-vmm", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Prints one JSON object per line instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit status:
  0    the guest has switched itself off, was handed over or saved, or the order was carried out
  1    the guest has failed or reset itself, or something here has failed
  2    wrong arguments
  3    the guest was not moved: the source still has it
  4    it is not known which side has the guest: it stands still here
  130  ended by a second Ctrl-C or SIGTERM; the first asks the guest to switch itself off";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boots a Linux guest and runs it.
    Run(Run),
    /// Waits at a Unix socket for a guest, and runs it.
    Receive(Receive),
    /// Goes on with the guest of a snapshot file.
    Restore(Restore),
    /// Moves a running guest to whoever waits at a Unix socket.
    Send(Send),
    /// Saves a running guest to a snapshot file; it ends here.
    Save(Save),
    /// Says how a running guest does, also while it is moved.
    Status(Control),
    /// Keeps a guest that is being moved where it is.
    Cancel(Control),
    /// Lets a guest run on that stands still because nobody knew which side has it.
    Resume(Control),
    /// Asks the init of a running guest to switch the machine off, and waits until it has; drops one that
    /// may be elsewhere.
    Stop(Control),
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The guest's kernel, vmlinux or bzImage. `amx-lab guest-kernel FOLDER` writes one.
    #[arg(long)]
    pub(crate) kernel: PathBuf,
    /// The guest's initial file system, a cpio archive [default: an init that computes on tiles and switches
    /// the machine off when it is asked to; others do not know how they are asked].
    #[arg(long)]
    pub(crate) initramfs: Option<PathBuf>,
    /// Further words for the kernel's command line.
    #[arg(long)]
    pub(crate) append: Option<String>,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(Linux::MAX_VCPUS)))]
    pub(crate) vcpus: u8,
    /// Memory in MiB.
    #[arg(long, default_value_t = Linux::MEMORY_BYTES / MIB, value_parser = clap::value_parser!(u64).range(64..=MAX_MEMORY_BYTES / MIB))]
    pub(crate) memory_mib: u64,
    /// The guest sees nothing of AMX, so that it can be moved to hosts without.
    #[arg(long)]
    pub(crate) hide_amx: bool,
    #[command(flatten)]
    pub(crate) here: Here,
}

#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Path of the socket; it is made, and removed again.
    pub(crate) socket: PathBuf,
    /// Seconds within which the guest has to be handed over, from the first connection on.
    #[arg(long, default_value = "300")]
    deadline_s: NonZeroU32,
    #[command(flatten)]
    pub(crate) here: Here,
}

impl Receive {
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_s.get().into())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The file.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) here: Here,
}

/// The process that has the guest.
#[derive(Debug, Args)]
pub(crate) struct Here {
    /// Takes orders (send, save, status, cancel, stop) at this Unix socket, which only its user can reach.
    #[arg(long)]
    pub(crate) control: Option<PathBuf>,
    /// Prints what the guest writes to its serial port, on standard error.
    #[arg(long)]
    pub(crate) console: bool,
    /// KVM's device file.
    #[arg(long, default_value = KVM_DEVICE, hide = true)]
    pub(crate) kvm: String,
}

#[derive(Debug, Args)]
pub(crate) struct Control {
    /// Control socket of the process that has the guest.
    #[arg(long)]
    pub(crate) control: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Send {
    /// Where the destination waits: `amx-vmm receive SOCKET`.
    socket: PathBuf,
    #[command(flatten)]
    pub(crate) control: Control,
    /// The guest is stopped when what is left takes no longer, in milliseconds.
    #[arg(long, default_value_t = millis(Options::default().downtime))]
    downtime_ms: u64,
    /// It is stopped after so many rounds in any case.
    #[arg(long, default_value_t = Options::default().max_rounds, value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// The guest runs on here when it has stood still for so long and is not handed over, in milliseconds.
    #[arg(long, default_value_t = millis(Options::default().max_downtime))]
    max_downtime_ms: u64,
    /// It stays here when it is not handed over within so many seconds.
    #[arg(long, default_value = "300")]
    deadline_s: NonZeroU32,
    /// Seconds after the hand-over within which the destination has to answer, or the move is undecided.
    #[arg(long, default_value = "30")]
    answer_s: NonZeroU32,
    /// Percent of the time that the guest stands still meanwhile: for one that changes too much.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=i64::from(MAX_THROTTLE_PERCENT)))]
    throttle_percent: u8,
}

impl Send {
    pub(crate) fn request(&self) -> Request {
        Request::Send {
            socket: absolute(&self.socket),
            downtime_ms: self.downtime_ms,
            max_rounds: self.max_rounds,
            max_downtime_ms: self.max_downtime_ms,
            deadline_s: self.deadline_s.get(),
            answer_s: self.answer_s.get(),
            throttle_percent: self.throttle_percent,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The file.
    file: PathBuf,
    #[command(flatten)]
    pub(crate) control: Control,
}

impl Save {
    pub(crate) fn request(&self) -> Request {
        Request::Save {
            file: absolute(&self.file),
        }
    }
}

/// The other process may have another working directory.
fn absolute(path: &Path) -> PathBuf {
    path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(arguments: &str) -> Result<Cli, ErrorKind> {
        let arguments = std::iter::once("amx-vmm").chain(arguments.split(' '));
        Cli::try_parse_from(arguments).map_err(|error| error.kind())
    }

    #[test]
    fn the_arguments_agree_with_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn paths_of_an_order_hold_in_any_directory() {
        let Command::Send(send) = parse("send there --control here").unwrap().command else {
            panic!("it is send")
        };
        let Request::Send {
            socket,
            downtime_ms,
            max_rounds,
            max_downtime_ms,
            deadline_s,
            answer_s,
            throttle_percent,
        } = send.request()
        else {
            panic!("it is send")
        };
        assert!(socket.is_absolute() && socket.ends_with("there"));
        let defaults = Options::default();
        assert_eq!(u128::from(downtime_ms), defaults.downtime.as_millis());
        assert_eq!(
            u128::from(max_downtime_ms),
            defaults.max_downtime.as_millis()
        );
        assert_eq!(u64::from(deadline_s), defaults.deadline.as_secs());
        assert_eq!(u64::from(answer_s), defaults.answer.as_secs());
        assert_eq!(
            (max_rounds, throttle_percent),
            (defaults.max_rounds, defaults.throttle_percent)
        );
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        for (arguments, refused) in [
            ("run --kernel k", None),
            ("run --kernel k --vcpus 8 --memory-mib 256 --json", None),
            ("run", Some(ErrorKind::MissingRequiredArgument)),
            ("run --kernel k --vcpus 0", Some(ErrorKind::ValueValidation)),
            ("run --kernel k --vcpus 9", Some(ErrorKind::ValueValidation)),
            (
                "run --kernel k --memory-mib 257",
                Some(ErrorKind::ValueValidation),
            ),
            ("send s", Some(ErrorKind::MissingRequiredArgument)),
            ("send s --control c --throttle-percent 99", None),
            (
                "send s --control c --throttle-percent 100",
                Some(ErrorKind::ValueValidation),
            ),
            (
                "send s --control c --max-rounds 0",
                Some(ErrorKind::ValueValidation),
            ),
            ("receive s --deadline-s 0", Some(ErrorKind::ValueValidation)),
        ] {
            assert_eq!(parse(arguments).err(), refused, "{arguments}");
        }
    }
}
