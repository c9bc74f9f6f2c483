//! cargo with the lab as its runner, and labs that stay up from one test binary to the next.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use amx_lab::{Show, Store, session};
use anyhow::{Context, Result};

use crate::cli::CargoArgs;
use crate::run::prepare_if_allowed;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
const FLAGS: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS";
const STATIC: &str = "-C target-feature=+crt-static";

pub(crate) fn cargo(args: &CargoArgs) -> Result<u8> {
    let options = args.lab.options();
    let store = Store::open()?;
    let at_once = args
        .labs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let server = {
        let show = Show::default();
        prepare_if_allowed(&store, &args.lab, &options, &show)?;
        session::Server::start(&store, &options, at_once, &show)?
    };
    let mut runner = this_program()?;
    runner.push(" run --");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(&args.command)
        .env("CARGO_BUILD_TARGET", TARGET)
        .env(RUNNER, runner)
        .env(session::VARIABLE, server.address())
        .env("AMX_LAB_KERNEL", options.kernel.suite())
        .env("AMX_LAB_CPU", options.cpu.name())
        .env("AMX_LAB_CPUS", options.cpus.to_string())
        .env("AMX_LAB_MEMORY", options.memory_mib.to_string())
        .env("AMX_LAB_TIMEOUT", args.timeout.to_string());
    // RUSTFLAGS, where it is set, is all that cargo looks at.
    let flags = if std::env::var_os("RUSTFLAGS").is_some() {
        "RUSTFLAGS"
    } else {
        FLAGS
    };
    let mut value = std::env::var_os(flags).unwrap_or_else(OsString::new);
    value.push(" ");
    value.push(STATIC);
    command.env(flags, value);
    let status = command.status().context("cargo could not be started")?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| signal.saturating_add(128)))
        .unwrap_or(1);
    Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}

/// A path of this program as cargo and nextest take it in a variable: they split that at white space.
fn this_program() -> Result<OsString> {
    let path = std::env::current_exe()
        .context("the path of amx-lab")?
        .into_os_string();
    let splits = path
        .to_string_lossy()
        .contains(|character: char| character.is_whitespace());
    // The kernel's own name for it, which lasts as long as we do; cargo ends before.
    Ok(if splits {
        format!("/proc/{}/exe", std::process::id()).into()
    } else {
        path
    })
}
