//! Builds the emulator: Debian's source of Bochs, the lab's patches, and the boot code that belongs to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::{Apt, AptError};
use crate::kernel::About;
use crate::patch_set::{self, Patch, PatchError};
use crate::progress::Progress;
use crate::store::key;
use crate::tools::{self, ToolError};

/// Names of its files.
pub(crate) const PROGRAM: &str = "bochs";
pub(crate) const BIOS: &str = "bios.rom";
pub(crate) const VGA: &str = "vga.rom";
pub(crate) const MSRS: &str = "msrs.def";

const PACKAGE: &str = "bochs";
/// The suite whose version the patches are for.
pub(crate) const SUITE: &str = "trixie";

const BIOS_SOURCE: &str = include_str!("../boot/bios.S");
const VGA_SOURCE: &str = include_str!("../boot/vga.S");
const MSRS_TEXT: &str = include_str!("../boot/msrs.def");

/// No display, no sound, no disks, no debugger: processors, memory and a serial line.
const CONFIGURE: [&str; 29] = [
    "--with-nogui",
    "--without-x11",
    "--without-wx",
    "--enable-smp",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    "--enable-amx",
    "--enable-protection-keys",
    "--enable-long-phy-address",
    "--enable-memtype",
    "--enable-handlers-chaining",
    "--enable-repeat-speedups",
    "--enable-fast-function-calls",
    "--enable-configurable-msrs",
    "--enable-pci",
    "--enable-monitor-mwait",
    // Guest memory that is swapped to a file could not be mapped from the saved state.
    "--disable-large-ramfile",
    "--disable-debugger",
    "--disable-debugger-gui",
    "--disable-plugins",
    "--disable-docbook",
    "--disable-xpm",
    "--disable-stats",
    "--disable-readline",
    "--disable-cdrom",
    "--disable-show-ips",
];

/// Why the emulator could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatorError {
    /// The source could not be fetched.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// The patches could not be applied.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// A program failed.
    #[error("{0}")]
    Tool(Box<dyn std::error::Error + Send + Sync>),
    /// The tarball is not one.
    #[error("{path}: not the source of the emulator", path = path.display())]
    Source {
        /// The tarball.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{path}", path = path.display())]
    Io {
        /// What was being used.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

impl From<ToolError> for EmulatorError {
    fn from(error: ToolError) -> Self {
        Self::Tool(error.into())
    }
}

/// The part's name in the store: another one for each set of patches and options.
pub(crate) fn part_name(patches: &[Patch]) -> String {
    let texts = patches.iter().map(|patch| patch.hunks().as_bytes());
    let rest = [SUITE, BIOS_SOURCE, VGA_SOURCE, MSRS_TEXT]
        .into_iter()
        .chain(CONFIGURE)
        .map(str::as_bytes);
    format!("emulator-{}", key(texts.chain(rest)))
}

/// Fetches and builds it in `work` and leaves what is needed in `to`.
pub(crate) fn build(
    patches: &[Patch],
    apt: &Apt,
    work: &Path,
    to: &Path,
    progress: &dyn Progress,
) -> Result<About, EmulatorError> {
    let tarball = apt.source_tarball(PACKAGE)?;
    let source = unpack(&tarball.file, &work.join("source"))?;
    patch_set::apply(patches, &source)?;
    let build = work.join("build");
    fs::create_dir_all(&build).map_err(|source| EmulatorError::Io {
        path: build.clone(),
        source,
    })?;
    progress.step("configuring the emulator", None);
    // The build is for this machine, whatever flags its user has set for other things.
    let mut configure = Command::new(source.join("configure"));
    configure
        .args(CONFIGURE)
        .current_dir(&build)
        .env("CFLAGS", "-O3 -w")
        .env("CXXFLAGS", "-O3 -w")
        .env_remove("MAKEFLAGS");
    tools::run(&mut configure)?;
    progress.done();
    make(&build, progress)?;
    let copy = |from: PathBuf, name: &str| {
        let target = to.join(name);
        fs::copy(&from, &target)
            .map(drop)
            .map_err(|source| EmulatorError::Io {
                path: target,
                source,
            })
    };
    copy(build.join(PROGRAM), PROGRAM)?;
    tools::run(
        Command::new("objcopy")
            .arg("--strip-debug")
            .arg(to.join(PROGRAM)),
    )?;
    for (name, text) in [(BIOS, BIOS_SOURCE), (VGA, VGA_SOURCE)] {
        assemble(text, &work.join("boot.o"), &to.join(name))?;
    }
    let msrs = to.join(MSRS);
    fs::write(&msrs, MSRS_TEXT).map_err(|source| EmulatorError::Io { path: msrs, source })?;
    let packages = BTreeMap::from([(PACKAGE.to_owned(), tarball.version)]);
    let names = patches
        .iter()
        .map(|patch| patch.name)
        .collect::<Vec<_>>()
        .join(" ");
    Ok((packages, BTreeMap::from([("patches".to_owned(), names)])))
}

/// Unpacks the tarball and gives the one folder that it has.
fn unpack(tarball: &Path, to: &Path) -> Result<PathBuf, EmulatorError> {
    let io = |source| EmulatorError::Io {
        path: tarball.to_owned(),
        source,
    };
    let file = File::open(tarball).map_err(io)?;
    let mut xz = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .stdin(file)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(io)?;
    let stream = xz
        .stdout
        .take()
        .ok_or_else(|| io(io::ErrorKind::BrokenPipe.into()))?;
    let mut archive = tar::Archive::new(stream);
    let unpacked = archive.unpack(to);
    // An archive ends before its file does: xz must be able to write the rest, or it fails.
    let rest = io::copy(&mut archive.into_inner(), &mut io::sink());
    let status = xz.wait().map_err(io)?;
    unpacked.and(rest.map(drop)).map_err(io)?;
    let mut folders = fs::read_dir(to)
        .map_err(io)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("configure").is_file());
    match (status.success(), folders.next()) {
        (true, Some(folder)) => Ok(folder),
        _ => Err(EmulatorError::Source {
            path: tarball.to_owned(),
        }),
    }
}

/// Compiles, with one step of progress for each file.
fn make(build: &Path, progress: &dyn Progress) -> Result<(), EmulatorError> {
    let compiles = |line: &str| line.starts_with("g++ -c") || line.starts_with("gcc -c");
    let plan = tools::run(
        Command::new("make")
            .args(["--dry-run", PROGRAM])
            .current_dir(build)
            .env_remove("MAKEFLAGS"),
    )?;
    let total = plan.lines().filter(|line| compiles(line)).count();
    progress.step("building the emulator (once)", Some(total as u64));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let log = build.join("make.log");
    let io = |source| EmulatorError::Io {
        path: log.clone(),
        source,
    };
    let errors = File::create(&log).map_err(io)?;
    let mut make = Command::new("make");
    make.arg(format!("--jobs={jobs}"))
        .arg(PROGRAM)
        .current_dir(build)
        .env_remove("MAKEFLAGS");
    let mut child = make
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .map_err(io)?;
    let mut done: u64 = 0;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            if compiles(&line.map_err(io)?) {
                done = done.saturating_add(1);
                progress.at(done);
            }
        }
    }
    let status = child.wait().map_err(io)?;
    progress.done();
    if status.success() {
        return Ok(());
    }
    let output = tools::last_lines(&String::from_utf8_lossy(&fs::read(&log).map_err(io)?));
    Err(ToolError::Failed {
        program: "make".into(),
        status: status.to_string(),
        output,
    }
    .into())
}

/// Turns assembler text into plain bytes.
fn assemble(text: &str, object: &Path, to: &Path) -> Result<(), EmulatorError> {
    tools::run_with_input(
        Command::new("gcc")
            .args(["-c", "-x", "assembler", "-o"])
            .arg(object)
            .arg("-"),
        text.as_bytes(),
    )?;
    tools::run(
        Command::new("objcopy")
            .args(["-O", "binary", "-j", ".text"])
            .arg(object)
            .arg(to),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_is_keyed_by_the_patches() {
        assert_eq!(part_name(patch_set::ALL), part_name(patch_set::ALL));
        let fewer = patch_set::without(&["13-xfd".into()]).unwrap();
        assert_ne!(part_name(patch_set::ALL), part_name(&fewer));
    }
}
