//! Descriptions of hosts: from this machine, from a file, or from a dump of CPUID.

use std::path::Path;

use anyhow::{Context, bail};
use host_compat::Host;
use host_compat::host::NoKvm;
use host_compat::probe;

use crate::cli::DescribeArgs;
use crate::{Outcome, load, screen};

/// A description has about 8 KB.
const MAX_BYTES: u64 = 1 << 20;

/// `amxctl describe`.
pub(crate) fn describe(args: &DescribeArgs) -> anyhow::Result<Outcome> {
    let mut host = match &args.cpuid {
        Some(path) => Host::from_cpuid(path.display().to_string(), load::cpuid(path)?),
        None => probe(),
    };
    if let Some(name) = &args.name {
        host.name.clone_from(name);
    }
    let text = if args.pretty {
        serde_json::to_string_pretty(&host)?
    } else {
        serde_json::to_string(&host)?
    };
    Outcome::yes(text + "\n")
}

/// This machine, or the one that a file describes.
pub(crate) fn this_or(path: Option<&Path>) -> anyhow::Result<Host> {
    path.map_or_else(|| Ok(probe()), read)
}

/// The host that a file describes.
pub(crate) fn read(path: &Path) -> anyhow::Result<Host> {
    parse(path, &load::text(path, MAX_BYTES)?)
}

/// The host that a text from that file describes.
pub(crate) fn parse(path: &Path, text: &str) -> anyhow::Result<Host> {
    let name = || path.display().to_string();
    if text.trim().is_empty() {
        bail!("{}: expected a host's description, found nothing", name());
    }
    let mut host: Host = serde_json::from_str(text).with_context(|| {
        format!(
            "{}: expected a host's description, as `amxctl describe` writes it",
            name()
        )
    })?;
    // It is shown on terminals.
    for text in [
        &mut host.name,
        &mut host.processor.name,
        &mut host.processor.vendor,
    ] {
        *text = screen::plain(text);
    }
    if let Some(kernel) = &mut host.kernel {
        kernel.release = screen::plain(&kernel.release);
    }
    if let Err(NoKvm::Failed { call, .. }) = &mut host.kvm {
        *call = screen::plain(call);
    }
    Ok(host)
}
