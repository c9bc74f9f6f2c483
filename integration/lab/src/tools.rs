//! The programs of the machine that prepare needs, and how each is called.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

/// A program that prepare calls, and the Debian package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
}

const NEEDED: [Tool; 8] = [
    Tool {
        program: "apt-get",
        package: "apt",
    },
    Tool {
        program: "dpkg-deb",
        package: "dpkg",
    },
    Tool {
        program: "xz",
        package: "xz-utils",
    },
    Tool {
        program: "gcc",
        package: "gcc",
    },
    Tool {
        program: "g++",
        package: "g++",
    },
    Tool {
        program: "make",
        package: "make",
    },
    Tool {
        program: "objcopy",
        package: "binutils",
    },
    Tool {
        program: "sh",
        package: "dash",
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
    missing_in(&path)
}

fn missing_in(path: &OsStr) -> Option<(Vec<&'static str>, String)> {
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|tool| {
            !std::env::split_paths(path).any(|folder| folder.join(tool.program).is_file())
        })
        .collect();
    if missing.is_empty() {
        return None;
    }
    let programs = missing.iter().map(|tool| tool.program).collect();
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    Some((programs, format!("apt-get install {}", packages.join(" "))))
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
        let (programs, command) = missing_in(OsStr::new("/nonexistent")).unwrap();
        assert_eq!(programs.len(), NEEDED.len());
        assert!(command.starts_with("apt-get install apt dpkg xz-utils gcc g++ make"));
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
