//! What prepare needs of the machine, and how its programs are called.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What prepare needs of the machine, and the Debian package that has it.
struct Need {
    what: &'static str,
    package: &'static str,
    kind: Kind,
}

enum Kind {
    /// A program of this name, somewhere in PATH.
    Program,
    /// This file.
    File(&'static str),
}

const fn program(what: &'static str, package: &'static str) -> Need {
    Need {
        what,
        package,
        kind: Kind::Program,
    }
}

const NEEDS: [Need; 9] = [
    program("apt-get", "apt"),
    program("dpkg-deb", "dpkg"),
    program("xz", "xz-utils"),
    program("gcc", "gcc"),
    program("g++", "g++"),
    program("make", "make"),
    program("objcopy", "binutils"),
    program("sh", "dash"),
    // A compiler alone only recommends them.
    Need {
        what: "the C library's headers",
        package: "libc6-dev",
        kind: Kind::File("usr/include/stdlib.h"),
    },
];

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error("{program} could not be started")]
    Start { program: String, source: io::Error },
    #[error("{program} failed ({status}):\n{output}")]
    Failed {
        program: String,
        status: String,
        output: String,
    },
}

/// Names of what is missing, and the one command that installs all of it.
pub(crate) fn missing() -> Option<(Vec<&'static str>, String)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let by_root = rustix::process::geteuid().is_root();
    missing_in(&path, Path::new("/"), by_root)
}

fn missing_in(path: &OsStr, root: &Path, by_root: bool) -> Option<(Vec<&'static str>, String)> {
    let is_there = |need: &&Need| match need.kind {
        Kind::Program => std::env::split_paths(path).any(|folder| folder.join(need.what).is_file()),
        Kind::File(file) => root.join(file).is_file(),
    };
    let missing: Vec<_> = NEEDS.iter().filter(|need| !is_there(need)).collect();
    if missing.is_empty() {
        return None;
    }
    let names = missing.iter().map(|need| need.what).collect();
    let packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    let sudo = if by_root { "" } else { "sudo " };
    Some((
        names,
        format!("{sudo}apt-get install {}", packages.join(" ")),
    ))
}

/// Runs a program to its end and gives what it printed; if it fails, the end of that is in the error.
pub(crate) fn run(command: &mut Command) -> Result<String, ToolError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ToolError::Start {
            program: name(command),
            source,
        })?;
    checked(command, output)
}

/// Runs a program with this as its input.
pub(crate) fn run_with_input(command: &mut Command, input: &[u8]) -> Result<String, ToolError> {
    let start = |source| ToolError::Start {
        program: name(command),
        source,
    };
    let mut file = tempfile::tempfile().map_err(start)?;
    file.write_all(input).map_err(start)?;
    std::io::Seek::rewind(&mut file).map_err(start)?;
    let output = command
        .stdin(file)
        .output()
        .map_err(|source| ToolError::Start {
            program: name(command),
            source,
        })?;
    checked(command, output)
}

fn checked(command: &Command, output: Output) -> Result<String, ToolError> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(ToolError::Failed {
        program: name(command),
        status: output.status.to_string(),
        output: last_lines(&format!("{text}{errors}")),
    })
}

/// The end of a long text.
pub(crate) fn last_lines(text: &str) -> String {
    const LINES: usize = 25;
    let lines: Vec<_> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(LINES)..)
        .unwrap_or_default()
        .join("\n")
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_together() {
        let nowhere = Path::new("/nonexistent");
        let (names, command) = missing_in(nowhere.as_os_str(), nowhere, true).unwrap();
        assert_eq!(names.len(), NEEDS.len());
        assert!(
            command.starts_with("apt-get install apt dpkg xz-utils gcc g++ make"),
            "{command}"
        );
    }

    #[test]
    fn a_compiler_without_the_c_librarys_headers_is_not_enough() {
        let machine = tempfile::tempdir().unwrap();
        for need in NEEDS
            .iter()
            .filter(|need| matches!(need.kind, Kind::Program))
        {
            std::fs::write(machine.path().join(need.what), "").unwrap();
        }
        let look = || missing_in(machine.path().as_os_str(), machine.path(), false);
        let (names, command) = look().unwrap();
        assert_eq!(names, ["the C library's headers"]);
        assert_eq!(command, "sudo apt-get install libc6-dev");
        std::fs::create_dir_all(machine.path().join("usr/include")).unwrap();
        std::fs::write(machine.path().join("usr/include/stdlib.h"), "").unwrap();
        assert_eq!(look(), None);
    }

    #[test]
    fn a_failure_carries_what_was_printed() {
        let error =
            run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("out\nerr") && text.contains("3"), "{text}");
        let echoed = run_with_input(&mut Command::new("cat"), b"x").unwrap();
        assert_eq!(echoed, "x");
    }
}
