//! Completions and man pages, made from the command line's own description.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::cli::Cli;

/// The script that a shell reads.
pub(crate) fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "amxctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// One page for the tool and one for each subcommand.
pub(crate) fn man(folder: &Path) -> anyhow::Result<String> {
    let name = || folder.display().to_string();
    std::fs::create_dir_all(folder).with_context(name)?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(name)?;
    let mut written = String::new();
    let mut pages: Vec<_> = std::fs::read_dir(folder)
        .with_context(name)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("amxctl") && name.ends_with(".1"))
        .collect();
    pages.sort();
    for page in pages {
        writeln!(written, "{}", folder.join(page).display())?;
    }
    Ok(written)
}
