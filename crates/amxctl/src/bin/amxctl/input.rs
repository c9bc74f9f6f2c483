//! Reads every input of the command line that is no saved state: descriptions of hosts, and CPUID as
//! `cpuid -r` prints it. Wherever one is taken, so is the other; `-` is standard input.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use amxctl::{OpenError, Snapshot, open};
use anyhow::{Context, bail};
use cpuid_amx::{CpuidTable, Table};
use host_compat::host::NoKvm;
use host_compat::{Host, probe};
use xsave_state::Layout;

use crate::{load, screen};

/// A description has about 8 KB, text with CPUID about 5 KB per processor.
const MAX_BYTES: u64 = 16 << 20;
/// Of a fleet of about 30,000 hosts.
const MAX_FLEET_BYTES: u64 = 256 << 20;
/// Of a saved state that comes through a pipe.
const MAX_PIPE_BYTES: u64 = 256 << 20;

/// A guest that has not started, or one that ran.
pub(crate) enum Guest {
    Host(Box<Host>),
    Saved(Snapshot),
}

/// This machine, or the one that a file describes.
pub(crate) fn this_or(path: Option<&Path>) -> anyhow::Result<Host> {
    path.map_or_else(|| Ok(probe()), host)
}

/// The host that a file describes, or a host of which there is only CPUID.
pub(crate) fn host(path: &Path) -> anyhow::Result<Host> {
    parse(path, &text(path, MAX_BYTES)?)
}

/// The hosts of a file with several descriptions, one a line; `None` where it describes one host, or
/// comes through a pipe that can be read only once.
pub(crate) fn fleet(path: &Path) -> anyhow::Result<Option<Vec<Host>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = text(path, MAX_FLEET_BYTES)?;
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    // One description can have many lines, and each of a fleet's is one.
    let is_whole = |line: &&&str| line.starts_with('{') && line.trim_end().ends_with('}');
    if lines.len() < 2 || lines.iter().filter(is_whole).count() < lines.len() {
        return Ok(None);
    }
    let hosts = lines.iter().zip(1..).map(|(line, number): (_, usize)| {
        let host: Host = serde_json::from_str(line)
            .with_context(|| format!("{}, line {number}", path.display()))?;
        Ok(plain(host))
    });
    hosts.collect::<anyhow::Result<_>>().map(Some)
}

/// CPUID of a guest: as `cpuid -r` prints it, or all that the host of a description gives to one.
pub(crate) fn cpuid(path: &Path) -> anyhow::Result<Table> {
    let host = host(path)?;
    let table = host.guest_cpuid().cloned();
    table.with_context(|| format!("{}: a host without KVM has no guests", path.display()))
}

/// Where the components of a guest with that CPUID lie.
pub(crate) fn layout(path: &Path) -> anyhow::Result<Layout> {
    let table = cpuid(path)?;
    Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
        .with_context(|| path.display().to_string())
}

/// A saved state, or a host whose guests get all that there is.
pub(crate) fn guest(path: &Path) -> anyhow::Result<Guest> {
    let name = || path.display().to_string();
    // A pipe can be read only once, a folder not at all.
    let is_pipe =
        path == Path::new("-") || path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir());
    let opened = if is_pipe {
        let bytes = bytes(path, MAX_PIPE_BYTES)?;
        match open::open_bytes(&bytes) {
            Err(OpenError::HostDescription | OpenError::CpuidDump) => {
                let text = String::from_utf8(bytes).with_context(name)?;
                return Ok(Guest::Host(Box::new(parse(path, &text)?)));
            }
            opened => opened,
        }
    } else {
        load::snapshot(path)
    };
    match opened {
        Err(OpenError::HostDescription | OpenError::CpuidDump) => {
            Ok(Guest::Host(Box::new(host(path)?)))
        }
        opened => Ok(Guest::Saved(opened.with_context(name)?)),
    }
}

/// A file of text, if it is not longer than that.
pub(crate) fn text(path: &Path, max_bytes: u64) -> anyhow::Result<String> {
    String::from_utf8(bytes(path, max_bytes)?).with_context(|| path.display().to_string())
}

fn bytes(path: &Path, max_bytes: u64) -> anyhow::Result<Vec<u8>> {
    let name = || path.display().to_string();
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).with_context(name)?)
    };
    let mut bytes = Vec::new();
    let read = source
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .with_context(name)?;
    if u64::try_from(read).unwrap_or(u64::MAX) > max_bytes {
        bail!("{}: more than {max_bytes} bytes", path.display());
    }
    Ok(bytes)
}

fn parse(path: &Path, text: &str) -> anyhow::Result<Host> {
    let name = || path.display().to_string();
    if text.trim().is_empty() {
        bail!("{}: expected a host's description, found nothing", name());
    }
    if !text.trim_start().starts_with('{') {
        let table = text.parse::<Table>().with_context(|| {
            format!(
                "{}: expected CPUID as `cpuid -r` prints it, or a host's description",
                name()
            )
        })?;
        return Ok(Host::from_cpuid(name(), table));
    }
    let host: Host = serde_json::from_str(text).with_context(|| {
        format!(
            "{}: expected a host's description, as `amxctl describe` writes it",
            name()
        )
    })?;
    Ok(plain(host))
}

/// Names are shown on terminals.
pub(crate) fn plain(mut host: Host) -> Host {
    let names = [
        &mut host.name,
        &mut host.processor.name,
        &mut host.processor.vendor,
    ];
    for text in names.into_iter().chain(&mut host.unknown) {
        *text = screen::plain(text);
    }
    if let Some(kernel) = &mut host.kernel {
        kernel.release = screen::plain(&kernel.release);
    }
    if let Err(NoKvm::Failed { call, .. }) = &mut host.kvm {
        *call = screen::plain(call);
    }
    host
}
