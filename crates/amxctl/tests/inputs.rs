//! Inputs from everywhere: standard input, FIFOs, files without end or without content, and what is said of
//! those that are refused.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    missing_docs
)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{fixture, fixtures};
use serde_json::Value;

/// The fixtures in a folder of their own.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    }
    let state = fixture("cloud-hypervisor/state.json");
    fs::write(folder.path().join("state.json"), state).unwrap();
    folder
}

/// Runs a line of a shell in which `amxctl` is the tool.
fn shell(place: &Path, line: &str) -> Output {
    let binary = Path::new(env!("CARGO_BIN_EXE_amxctl"));
    let path = std::env::var("PATH").unwrap();
    Command::new("sh")
        .args(["-c", line])
        .current_dir(place)
        .env(
            "PATH",
            format!("{}:{path}", binary.parent().unwrap().display()),
        )
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    // A state may be among it.
    let text = String::from_utf8_lossy(&all);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whatever is read from a file is read from standard input.
#[test]
fn standard_input_is_an_input_like_any_other() {
    let folder = folder();
    for (file, before, after) in [
        ("state.json", "amxctl inspect", ""),
        ("state.json", "amxctl verify", "--on zen4.json"),
        ("zen4.json", "amxctl verify state.json --on", ""),
        ("icelake.cpuid", "amxctl verify state.json --on", ""),
        ("state.json", "amxctl compat", "zen4.json"),
        ("zen4.json", "amxctl compat state.json", ""),
        ("state.json", "amxctl diff", "firecracker.txt"),
        ("firecracker.txt", "amxctl diff state.json", ""),
        ("state.json", "amxctl convert", "--to state -o -"),
        (
            "icelake.json",
            "amxctl convert state.json --to raw -o - --layout",
            "",
        ),
        (
            "icelake.cpuid",
            "amxctl inspect strangers.xsave --cpuid",
            "",
        ),
        ("icelake.cpuid", "amxctl describe --cpuid", "--name a"),
        ("icelake.json", "amxctl check --host", ""),
        ("node-17.tally", "amxctl merge", ""),
        ("icelake.json", "amxctl baseline", ""),
    ] {
        let raw = fixture("strangers/noamx-on-amx-host.xsave");
        fs::write(folder.path().join("strangers.xsave"), raw).unwrap();
        let named = shell(folder.path(), &format!("{before} {file} {after}"));
        let piped = shell(folder.path(), &format!("cat {file} | {before} - {after}"));
        let line = format!("{before} - {after}");
        assert_eq!(named.status.code(), piped.status.code(), "{line}");
        let [named, piped] = [named, piped].map(|output| said(&output));
        let [named, piped] = [named.replace(file, "-"), piped].map(|text| text.replace('─', ""));
        assert_eq!(named, piped, "{line}");
        assert!(!named.is_empty(), "{line}");
    }
    let twice = shell(folder.path(), "cat state.json | amxctl compat - -");
    assert_eq!(twice.status.code(), Some(2));
    assert!(said(&twice).contains("standard input can be read only once"));
}

/// Wherever a host is expected.
#[test]
fn what_describes_nothing_is_no_host() {
    let folder = folder();
    for nothing in ["", "\n", "   \n\n", "# a comment\n", "CPU 0:\n"] {
        fs::write(folder.path().join("nothing"), nothing).unwrap();
        for line in [
            "amxctl check --host nothing",
            "amxctl check --host - < nothing",
            "amxctl verify state.json --on nothing",
            "amxctl compat state.json nothing",
            "amxctl compat nothing icelake.json",
            "amxctl inspect state.json --cpuid nothing",
            "amxctl describe --cpuid nothing",
            "amxctl convert state.json --to raw -o x --layout nothing",
        ] {
            let output = shell(folder.path(), line);
            let text = said(&output);
            assert_eq!(output.status.code(), Some(2), "{line} {nothing:?}: {text}");
        }
    }
}

/// As much is kept in memory as what it is can have.
#[test]
fn a_gigabyte_of_spaces_does_not_exhaust_the_memory() {
    let folder = folder();
    let spaces = "head -c 1000000000 /dev/zero | tr '\\0' ' '";
    for (start, line) in [
        ("{", "inspect -"),
        ("{", "inspect /dev/stdin"),
        ("{", "compat - icelake.json"),
        ("{", "verify state.json --on -"),
        ("{", "check --host -"),
        ("{", "merge -"),
        ("", "inspect -"),
        ("", "check --host -"),
        ("CPU 0:", "compat - icelake.json"),
        ("vcpu 0:", "inspect -"),
        ("", "baseline"),
        ("", "baseline --skip-broken"),
    ] {
        let line = format!("(printf '{start}'; {spaces}) | (ulimit -v 700000; amxctl {line})");
        let output = shell(folder.path(), &line);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{line}: {text}");
        assert!(
            text.starts_with("error:") || text.contains(" error: "),
            "{line}: {text}"
        );
        let bound = match start {
            "{" | "vcpu 0:" => "at most 268435456 are read",
            "CPU 0:" => "at most 16777216 are read",
            _ => "",
        };
        assert!(text.contains(bound), "{line}: {text}");
    }
}

#[test]
fn a_file_that_is_a_hole_is_not_read() {
    let folder = folder();
    for start in ["{", "CPU 0:", "vcpu 0:", "x"] {
        let path = folder.path().join("hole");
        fs::write(&path, start).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        if let Err(error) = file.set_len(1 << 40) {
            println!("skipped: no files of a terabyte here: {error}");
            return;
        }
        let output = shell(folder.path(), "ulimit -v 1500000; amxctl inspect hole");
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{start}: {text}");
    }
}

#[test]
fn a_fifo_that_nobody_writes_to_is_given_up() {
    let folder = folder();
    let output = shell(folder.path(), "mkfifo fifo && amxctl inspect fifo");
    let text = said(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("no process has opened this FIFO for writing"),
        "{text}"
    );
    // One with a writer is a file like others.
    let line = "(timeout 20 sh -c 'cat state.json > fifo' &) ; amxctl inspect fifo";
    let output = shell(folder.path(), line);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}

/// A line that is longer than a description can be is one that is broken, as any other.
#[test]
fn a_long_line_can_be_left_out_of_a_fleet() {
    let folder = folder();
    let fleet = "(cat icelake.json; head -c 3000000 /dev/zero | tr '\\0' 'a'; echo; cat zen4.json)";
    let run = |options: &str| {
        let output = shell(
            folder.path(),
            &format!("{fleet} | amxctl baseline {options}"),
        );
        (output.status.code(), said(&output))
    };
    let (code, text) = run("");
    assert_eq!(code, Some(2), "{text}");
    assert!(
        text.contains("-, line 2") || text.contains("standard input, line 2"),
        "{text}"
    );
    let (code, text) = run("--skip-broken");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("2 hosts"), "{text}");
    assert!(text.contains("1 line left out"), "{text}");
}

#[test]
fn errors_are_json_wherever_json_is_asked_for() {
    let folder = folder();
    for (line, on_stderr) in [
        ("amxctl --json", false),
        ("amxctl --json=1 inspect state.json", false),
        ("amxctl inspect --json", false),
        ("amxctl inspect state.json --json --xfd tiles", false),
        ("amxctl inspect nothing --json", false),
        ("amxctl frobnicate --json", false),
        ("amxctl compat state.json --json nothing", false),
        ("amxctl check --host state.json --json", false),
        ("amxctl baseline --json state.json", false),
        ("amxctl merge --json state.json", false),
        ("amxctl convert nothing --to raw -o - --json", true),
        (
            "amxctl convert state.json --to raw -o /none/x --json",
            false,
        ),
        (
            "amxctl verify state.json --on zen4.json --json > /dev/full",
            true,
        ),
    ] {
        let output = shell(folder.path(), line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        let (json, other) = match on_stderr {
            false => (&output.stdout, &output.stderr),
            true => (&output.stderr, &output.stdout),
        };
        let value: Value = serde_json::from_slice(json).unwrap_or_else(|error| {
            panic!("{line}: {error}: {}", String::from_utf8_lossy(json));
        });
        let keys: Vec<_> = value.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["error"], "{line}");
        assert!(other.is_empty(), "{line}");
    }
}
