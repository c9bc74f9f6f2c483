//! Opens what the command line names, with a progress bar where that takes a while.

use std::path::Path;
use std::time::Duration;

use amxctl::{Given, OpenError, Snapshot, Subject, open};
use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::GivenArgs;
use crate::input;

/// Below, reading is over before the eye has seen a bar.
const SLOW_BYTES: u64 = 64 << 20;

/// A file and its vCPUs, ready to be judged.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) snapshot: Snapshot,
    pub(crate) subjects: Vec<Subject>,
}

/// Opens a saved state: all of its vCPUs, or those of `only`.
pub(crate) fn load(path: &Path, only: &[u32], given: &Given) -> anyhow::Result<Loaded> {
    let snapshot = snapshot(path).with_context(|| path.display().to_string())?;
    subjects(path, snapshot, only, given)
}

/// Opens a saved state.
pub(crate) fn snapshot(path: &Path) -> Result<Snapshot, OpenError> {
    let mut bar: Option<ProgressBar> = None;
    let snapshot = open(path, &mut |done, all| {
        if all > SLOW_BYTES {
            bar.get_or_insert_with(|| bytes_bar(all)).set_position(done);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    snapshot
}

/// The vCPUs of an opened state: all, or those of `only`.
pub(crate) fn subjects(
    path: &Path,
    mut snapshot: Snapshot,
    only: &[u32],
    given: &Given,
) -> anyhow::Result<Loaded> {
    let name = path.display().to_string();
    let there: Vec<u32> = snapshot.vcpus.iter().map(|vcpu| vcpu.owner.id()).collect();
    if let Some(missing) = only.iter().find(|id| !there.contains(id)) {
        bail!("{name}: no vCPU {missing}; there are {}", ids(&there));
    }
    if !only.is_empty() {
        snapshot
            .vcpus
            .retain(|vcpu| only.contains(&vcpu.owner.id()));
    }
    let subjects = std::mem::take(&mut snapshot.vcpus)
        .into_iter()
        .map(|vcpu| vcpu.subject(given))
        .collect::<Result<_, _>>()
        .with_context(|| name.clone())?;
    Ok(Loaded {
        name,
        snapshot,
        subjects,
    })
}

/// What the options say.
pub(crate) fn given(args: &GivenArgs) -> anyhow::Result<Given> {
    let cpuid = match &args.cpuid {
        Some(path) => Some((input::cpuid(path)?, format!("--cpuid {}", path.display()))),
        None => None,
    };
    Ok(Given {
        cpuid,
        xcr0: args.xcr0,
        xfd: args.xfd,
        xfd_err: args.xfd_err,
    })
}

/// A bar for bytes, on standard error and on a terminal only.
pub(crate) fn bytes_bar(all: u64) -> ProgressBar {
    let bar = ProgressBar::new(all);
    let style = ProgressStyle::with_template(
        "{bar:24.cyan} {percent:>3} %  {bytes} of {total_bytes}, {eta} left",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The first of them, and how many more.
fn ids(there: &[u32]) -> String {
    const SHOWN: usize = 8;
    let mut text = there
        .iter()
        .take(SHOWN)
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let more = there.len().saturating_sub(SHOWN);
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
