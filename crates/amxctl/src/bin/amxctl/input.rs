//! Reads every input of the command line: saved states, descriptions of hosts, and CPUID as `cpuid -r`
//! prints it. Where one of the latter two is accepted, so is the other; `-` is standard input everywhere.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use amxctl::{Content, Format, Given, OpenError, Snapshot, Subject};
use anyhow::{Context, bail};
use cpuid_amx::{CpuidTable, Table};
use host_compat::host::NoKvm;
use host_compat::{Host, probe};
use indicatif::ProgressBar;
use xsave_state::Layout;

use crate::cli::GivenArgs;
use crate::screen;

/// Below, reading is over before the eye has seen a bar.
const SLOW_BYTES: u64 = 64 << 20;

/// A guest that has not started, or one that ran.
pub(crate) enum Guest {
    Host(Box<Host>),
    Saved(Snapshot),
}

/// A saved state and its vCPUs, ready to be judged.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) format: Format,
    pub(crate) file_bytes: u64,
    pub(crate) subjects: Vec<Subject>,
}

/// This machine, or the one that a file describes.
pub(crate) fn this_or(path: Option<&Path>) -> anyhow::Result<Host> {
    path.map_or_else(|| Ok(probe()), host)
}

/// The host that a file describes, or a host of which there is only CPUID.
pub(crate) fn host(path: &Path) -> anyhow::Result<Host> {
    parse(path, text_of(path, &content(path)?)?)
}

/// The hosts of a file with several descriptions, one a line, or its only one.
pub(crate) fn hosts(path: &Path) -> anyhow::Result<Vec<Host>> {
    let content = content(path)?;
    let text = text_of(path, &content)?;
    let lines = || text.lines().filter(|line| !line.trim().is_empty());
    // One description can have many lines, and each of a fleet's is one.
    let is_whole = |line: &str| line.starts_with('{') && line.trim_end().ends_with('}');
    if lines().nth(1).is_none() || !lines().all(is_whole) {
        return Ok(vec![parse(path, text)?]);
    }
    let hosts = lines().zip(1..).map(|(line, number): (_, usize)| {
        let host: Host = serde_json::from_str(line)
            .with_context(|| format!("{}, line {number}", path.display()))?;
        Ok(plain(host))
    });
    hosts.collect()
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
    let content = content(path)?;
    match content.open() {
        Err(OpenError::HostDescription | OpenError::CpuidDump) => {
            let host = parse(path, text_of(path, &content)?)?;
            Ok(Guest::Host(Box::new(host)))
        }
        opened => Ok(Guest::Saved(
            opened.with_context(|| path.display().to_string())?,
        )),
    }
}

/// A saved state: all of its vCPUs, or those of `only`.
pub(crate) fn saved(path: &Path, only: &[u32], given: &Given) -> anyhow::Result<Loaded> {
    let opened = content(path)?.open();
    let snapshot = opened.with_context(|| path.display().to_string())?;
    subjects(path, snapshot, only, given)
}

/// The vCPUs of an opened state: all, or those of `only`.
pub(crate) fn subjects(
    path: &Path,
    snapshot: Snapshot,
    only: &[u32],
    given: &Given,
) -> anyhow::Result<Loaded> {
    let name = path.display().to_string();
    let Snapshot {
        format,
        file_bytes,
        mut vcpus,
    } = snapshot;
    let there: Vec<u32> = vcpus.iter().map(|vcpu| vcpu.owner.id()).collect();
    if let Some(missing) = only.iter().find(|id| !there.contains(id)) {
        bail!("{name}: no vCPU {missing}; there are {}", ids(&there));
    }
    if !only.is_empty() {
        vcpus.retain(|vcpu| only.contains(&vcpu.owner.id()));
    }
    let subjects = vcpus.into_iter().map(|vcpu| vcpu.subject(given));
    let subjects = subjects.collect();
    Ok(Loaded {
        name,
        format,
        file_bytes,
        subjects,
    })
}

/// What the options say.
pub(crate) fn given(args: &GivenArgs) -> anyhow::Result<Given> {
    let cpuid = match &args.cpuid {
        Some(path) => Some((cpuid(path)?.into(), format!("--cpuid {}", path.display()))),
        None => None,
    };
    Ok(Given {
        cpuid,
        xcr0: args.xcr0,
        xfd: args.xfd,
        xfd_err: args.xfd_err,
        xss: args.xss,
    })
}

/// A file of text, if it is not longer than that.
pub(crate) fn text(path: &Path, max_bytes: u64) -> anyhow::Result<String> {
    let content = content(path)?;
    let text = text_of(path, &content)?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > max_bytes {
        bail!("{}: more than {max_bytes} bytes", path.display());
    }
    Ok(text.to_owned())
}

/// What a file has, with a progress bar where reading takes a while.
fn content(path: &Path) -> anyhow::Result<Content> {
    static STDIN_IS_TAKEN: AtomicBool = AtomicBool::new(false);
    if path == Path::new("-") {
        if STDIN_IS_TAKEN.swap(true, Ordering::Relaxed) {
            bail!("-: standard input can be read only once; put one of the inputs into a file");
        }
        return Ok(Content::of_stream(io::stdin().lock(), path)?);
    }
    let mut bar: Option<ProgressBar> = None;
    let content = Content::read(path, &mut |done, all| {
        if all > SLOW_BYTES {
            bar.get_or_insert_with(|| screen::bytes_bar(all))
                .set_position(done);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(content?)
}

fn text_of<'a>(path: &Path, content: &'a Content) -> anyhow::Result<&'a str> {
    std::str::from_utf8(content.bytes()).with_context(|| {
        format!(
            "{}: expected a host's description or CPUID as `cpuid -r` prints it, found bytes that are \
             no text",
            path.display()
        )
    })
}

fn parse(path: &Path, text: &str) -> anyhow::Result<Host> {
    let name = || path.display().to_string();
    if text.trim_start().starts_with('{') {
        let host: Host = serde_json::from_str(text).with_context(|| {
            format!(
                "{}: expected a host's description, as `amxctl describe` writes it",
                name()
            )
        })?;
        return Ok(plain(host));
    }
    let expected = || {
        format!(
            "{}: expected CPUID as `cpuid -r` prints it, or a host's description",
            name()
        )
    };
    let table = text.parse::<Table>().with_context(expected)?;
    if table.is_empty() {
        bail!("{}, found no leaf of CPUID", expected());
    }
    Ok(Host::from_cpuid(name(), table))
}

/// Names are shown on terminals.
fn plain(mut host: Host) -> Host {
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

/// The first of them, and how many more.
fn ids(there: &[u32]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = there.iter().take(SHOWN).map(u32::to_string).collect();
    let more = there.len().saturating_sub(SHOWN);
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    shown.join(", ") + &more
}
