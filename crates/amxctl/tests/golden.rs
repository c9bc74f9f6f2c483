//! What each command prints, without colour and in colour, and the session in the README.
//!
//! `TRYCMD=overwrite` and `SNAPSHOTS=overwrite` write what is printed now: look at it before you
//! commit it. The pictures in colour open in any browser.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{cloud_hypervisor, cloud_hypervisor_with_xstate_bv, fixtures};
use snapbox::Data;
use snapbox::cmd::{Command, cargo_bin};
use snapbox::data::DataFormat;

/// Real ones and one from a dump: the lab with two kernels, a Zen 4, an Ice Lake, a Sapphire Rapids.
const HOSTS: [&str; 5] = [
    "amx-lab.json",
    "amx-lab-bookworm.json",
    "icelake.json",
    "node-17.json",
    "zen4.json",
];

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The fixtures, and snapshots with the two known dangers, in a folder of their own.
fn sandbox(folder: &Path) {
    copy(&fixtures(), folder);
    let made = [
        ("in-use", cloud_hypervisor_with_xstate_bv(0x402a2)),
        (
            "short",
            cloud_hypervisor(|state| {
                state["Kvm"]["xsave"]
                    .as_object_mut()
                    .unwrap()
                    .remove("extra");
            }),
        ),
        ("three-vcpus", with_vcpus(&["0", "1", "7"])),
        (
            "cet",
            cloud_hypervisor(|state| {
                let kvm = &mut state["Kvm"];
                common::add_cet(kvm, true, true);
                let msr = serde_json::json!({"index": 0xda0, "reserved": 0, "data": 0x1800});
                kvm["msrs"].as_array_mut().unwrap().push(msr);
            }),
        ),
        (
            "no-xcrs",
            cloud_hypervisor(|state| state["Kvm"]["xcrs"] = serde_json::json!([])),
        ),
        ("compacted", cloud_hypervisor(compacted)),
    ];
    fs::write(folder.join("zen4.xsave2"), rounded_up()).unwrap();
    let fleet: Vec<u8> = HOSTS
        .iter()
        .flat_map(|name| fs::read(folder.join(name)).unwrap())
        .collect();
    fs::write(folder.join("fleet.jsonl"), fleet).unwrap();
    for (name, bytes) in made {
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("state.json"), bytes).unwrap();
    }
}

/// As KVM gives it on a Zen 4: the components are those of Intel's, the length is that of a page.
fn rounded_up() -> Vec<u8> {
    let mut area = vec![0; 4096];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for at in [464, 512] {
        area[at..at + 8].copy_from_slice(&0xe7u64.to_le_bytes());
    }
    area
}

/// The fixture's area as XSAVEC writes it.
fn compacted(state: &mut serde_json::Value) {
    let subject = common::subject(&common::fixture("cloud-hypervisor/state.json"));
    let mut area = subject.state().unwrap().image().to_compacted();
    area.resize(4096, 0);
    let words = area
        .chunks(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    state["Kvm"]["xsave"] = serde_json::json!({ "region": words.collect::<Vec<_>>() });
}

/// The Cloud Hypervisor fixture with its vCPU several times.
fn with_vcpus(ids: &[&str]) -> Vec<u8> {
    let mut file: serde_json::Value =
        serde_json::from_slice(&common::fixture("cloud-hypervisor/state.json")).unwrap();
    let vcpus = file
        .pointer_mut("/snapshots/cpu-manager/snapshots")
        .unwrap();
    for id in ids {
        vcpus[*id] = vcpus["0"].clone();
    }
    serde_json::to_vec(&file).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Runs the commands of one file in a sandbox and compares what they print.
fn session(file: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join("session.trycmd");
    fs::copy(file, &case).unwrap();
    sandbox(&folder.path().join("session.in"));
    let result = std::panic::catch_unwind(|| {
        trycmd::TestCases::new()
            .env("NO_COLOR", "1")
            .timeout(Duration::from_secs(60))
            .register_bin("amxctl", cargo_bin("amxctl"))
            .case(&case)
            .run();
    });
    if std::env::var_os("TRYCMD").is_some() {
        fs::copy(&case, file).unwrap();
    }
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

macro_rules! sessions {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            session(&package().join(concat!("tests/golden/", stringify!($name), ".trycmd")));
        })*

        #[test]
        fn no_session_is_forgotten() {
            let mut files: Vec<_> = fs::read_dir(package().join("tests/golden"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter_map(|name| Some(name.strip_suffix(".trycmd")?.to_owned()))
                .collect();
            files.sort();
            assert_eq!(files, [$(stringify!($name)),*]);
        }
    };
}

sessions!(
    baseline, check, compat, convert, describe, diff, errors, help, inspect, json, merge, verify
);

#[test]
fn readme() {
    session(&package().join("README.md"));
}

/// Examples that need what a test has not: another machine, another tool, a home.
const ELSEWHERE: [&str; 4] = ["ssh ", "| jq", "~/", "man --local-file"];

#[test]
fn the_examples_of_every_command_work() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    sandbox(place);
    // What the examples call their files.
    copy(&place.join("cloud-hypervisor"), &place.join("snapshot"));
    for (from, to) in [
        ("armed.xsave2", "vcpu.xsave2"),
        ("process.core", "core.4711"),
        ("icelake.cpuid", "guest.cpuid"),
        ("node-17.tally", "rack-1.tally"),
        ("amd.tally", "rack-2.tally"),
    ] {
        fs::copy(place.join(from), place.join(to)).unwrap();
    }
    let binary = cargo_bin("amxctl");
    let path = format!(
        "{}:{}",
        binary.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let shell = |line: &str| {
        let output = std::process::Command::new("sh")
            .args(["-c", line])
            .current_dir(place)
            .env("PATH", &path)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let converted = "amxctl convert snapshot --to state -o vcpus.xstate && cp vcpus.xstate before.xstate && cp vcpus.xstate after.xstate";
    assert_eq!(shell(converted), (Some(0), String::new()));

    let help = fs::read_to_string(package().join("tests/golden/help.trycmd")).unwrap();
    let examples: Vec<&str> = help
        .lines()
        .filter(|line| line.starts_with("  amxctl ") || line.starts_with("  for host"))
        .collect();
    let mut commands = std::collections::BTreeSet::new();
    for line in examples {
        commands.insert(
            line.split_whitespace()
                .find(|word| *word != "amxctl" && !word.starts_with("--"))
                .unwrap(),
        );
        if ELSEWHERE.iter().any(|word| line.contains(word)) {
            continue;
        }
        let (code, stderr) = shell(line);
        // Also no is an answer.
        assert!(matches!(code, Some(0 | 1 | 3)), "{line}: {code:?} {stderr}");
    }
    let all = [
        "baseline",
        "check",
        "compat",
        "completions",
        "convert",
        "describe",
        "diff",
        "for",
        "inspect",
        "man",
        "merge",
        "verify",
    ];
    assert_eq!(commands.into_iter().collect::<Vec<_>>(), all);
}

/// What a terminal with colours shows, as a picture.
fn colors(name: &str, args: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    sandbox(&folder.path().join("in"));
    let picture = package().join(format!("tests/golden/{name}.term.svg"));
    let output = Command::new(cargo_bin("amxctl"))
        .args(["--color", "always"])
        .args(args)
        .current_dir(folder.path().join("in"))
        .timeout(Duration::from_secs(60))
        .assert();
    output.stdout_eq(Data::read_from(&picture, Some(DataFormat::TermSvg)));
}

#[test]
fn inspect_in_color() {
    colors("inspect", &["inspect", "live-tiles.xsave2", "--xfd", "0"]);
    colors("inspect-danger", &["inspect", "in-use"]);
}

#[test]
fn the_picture_of_an_area() {
    let folder = tempfile::tempdir().unwrap();
    sandbox(&folder.path().join("in"));
    Command::new(cargo_bin("amxctl"))
        .args([
            "inspect",
            "live-tiles.xsave2",
            "--xfd",
            "0",
            "--svg",
            "area.svg",
        ])
        .current_dir(folder.path().join("in"))
        .assert()
        .success();
    let picture = fs::read_to_string(folder.path().join("in/area.svg")).unwrap();
    let golden = Data::read_from(
        &package().join("tests/golden/area.svg"),
        Some(DataFormat::Text),
    );
    snapbox::assert_data_eq!(picture, golden.raw());
}

#[test]
fn diff_in_color() {
    colors("diff", &["diff", "armed.xsave2", "live-tiles.xsave2"]);
}

#[test]
fn verify_in_color() {
    colors("verify", &["verify", "short", "--on", "node-17.json"]);
}

#[test]
fn fleet_in_color() {
    colors("baseline", &["baseline", "fleet.jsonl"]);
    colors("compat", &["compat", "cloud-hypervisor", "icelake.json"]);
}

#[test]
fn check_in_color() {
    colors("check", &["check", "--host", "node-17.json"]);
}

#[test]
fn convert_in_color() {
    let args = [
        "convert",
        "armed.xsave2",
        "--xfd",
        "0x40000",
        "--to",
        "state",
        "-o",
        "a.xstate",
    ];
    colors("convert", &args);
}

/// Names in files could say anything to a terminal.
#[test]
fn no_file_speaks_to_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let host = fs::read_to_string(fixtures().join("node-17.json")).unwrap();
    let named = |name: &str| host.replace("\"node-17\"", &format!("\"{name}\""));
    fs::write(folder.path().join("host.json"), named("\\u001b]0;x\\u0007")).unwrap();
    // A field that there is not, and is named in the error.
    let field = host.replacen("\"name\"", "\"\\u001b[2J\"", 1);
    fs::write(folder.path().join("field.json"), field).unwrap();
    for args in [
        ["check", "--host", "host.json"].as_slice(),
        &["check", "--host", "field.json"],
        &["baseline", "host.json"],
        &["baseline", "field.json"],
        &["baseline", "host.json", "field.json", "--skip-broken"],
        &["compat", "host.json", "host.json"],
    ] {
        let output = Command::new(cargo_bin("amxctl"))
            .args(args)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let all = [output.stdout, output.stderr].concat();
        assert!(!all.is_empty());
        let text = String::from_utf8(all).unwrap();
        assert!(!text.contains(['\u{1b}', '\u{7}']), "{args:?}: {text:?}");
    }
}

/// Each format comes through a pipe as it does from a file; what does not end is refused.
#[test]
fn a_pipe_is_as_good_as_a_file() {
    let folder = tempfile::tempdir().unwrap();
    sandbox(folder.path());
    let run = |line: &str| {
        let binary = cargo_bin("amxctl");
        let output = std::process::Command::new("sh")
            .args(["-c", &line.replace("amxctl", &binary.display().to_string())])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    for file in [
        "cloud-hypervisor/state.json",
        "firecracker.txt",
        "live-tiles.xsave2",
        "process.core",
    ] {
        let (code, from_file, _) = run(&format!("amxctl inspect {file}"));
        assert_eq!(code, Some(0));
        let (code, from_pipe, said) = run(&format!("cat {file} | amxctl inspect /dev/stdin"));
        assert_eq!((code, &*said), (Some(0), ""), "{file}");
        assert_eq!(from_pipe.replace("/dev/stdin", file), from_file);
    }
    for (line, expected) in [
        (":", "found 0 bytes"),
        ("head -c 70000 /dev/zero", "found 65537 bytes"),
        ("head -c 9999999 /dev/zero", "found 65537 bytes"),
        ("printf '\\037\\213'", "compressed by gzip"),
    ] {
        let (code, _, said) = run(&format!("{line} | amxctl inspect /dev/stdin"));
        assert_eq!(code, Some(2), "{line}");
        assert!(said.contains(expected), "{line}: {said}");
    }
    // Whatever is taken for a guest or a host, also as `-`.
    for guest in [
        "icelake.cpuid",
        "node-17.json",
        "cloud-hypervisor/state.json",
    ] {
        let (code, from_file, _) = run(&format!("amxctl compat {guest} zen4.json"));
        let (piped, from_pipe, _) = run(&format!("cat {guest} | amxctl compat - zen4.json"));
        assert_eq!(
            (code, from_file),
            (piped, from_pipe.replacen(" - ", &format!(" {guest} "), 1))
        );
    }
    for host in ["icelake.cpuid", "icelake.json"] {
        let (code, ..) = run(&format!("cat {host} | amxctl compat icelake.cpuid -"));
        assert_eq!(code, Some(0), "{host}");
    }
}

/// Standard output is a terminal, standard error a file: what goes there has no colours.
#[test]
fn a_file_gets_no_colours_because_the_other_output_is_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    sandbox(folder.path());
    let run = |line: &str| {
        let binary = cargo_bin("amxctl");
        let output = std::process::Command::new("script")
            .args([
                "-qec",
                &format!("{} {line} 2>err", binary.display()),
                "/dev/null",
            ])
            .current_dir(folder.path())
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(std::process::Stdio::null())
            .output()
            .ok()?;
        let said = fs::read_to_string(folder.path().join("err")).unwrap();
        Some((output.stdout.contains(&0x1b), said))
    };
    let Some((colours, said)) = run("baseline fleet.jsonl armed.xsave2 --skip-broken") else {
        println!("skipped: there is no script(1) to make a terminal");
        return;
    };
    assert!(colours, "the terminal has colours");
    assert!(
        said.contains("warning:") && !said.contains('\u{1b}'),
        "{said:?}"
    );
    let (_, said) = run("convert armed.xsave2 --xfd 0x40000 --to state -o -").unwrap();
    assert!(
        said.contains("guessed:") && !said.contains('\u{1b}'),
        "{said:?}"
    );
}

#[test]
fn colours_are_for_terminals_and_for_who_asks() {
    let folder = tempfile::tempdir().unwrap();
    sandbox(&folder.path().join("in"));
    let run = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new(cargo_bin("amxctl"))
            .args(args)
            .current_dir(folder.path().join("in"))
            .env_remove("NO_COLOR");
        for (name, value) in variables {
            command = command.env(name, value);
        }
        let output = command.output().unwrap();
        output.stdout.contains(&0x1b) || output.stderr.contains(&0x1b)
    };
    let command = ["check", "--host", "node-17.json"];
    let with = |option: &'static str| [&command[..], &["--color", option]].concat();
    assert!(!run(&command, &[]));
    assert!(!run(&with("auto"), &[("NO_COLOR", "1")]));
    assert!(!run(&with("never"), &[("CLICOLOR_FORCE", "1")]));
    assert!(run(&with("always"), &[]));
    assert!(run(&with("always"), &[("NO_COLOR", "1")]));
    // Errors and help as well.
    assert!(!run(&["inspect", "none"], &[]));
    assert!(run(&["inspect", "none", "--color=always"], &[]));
    assert!(run(&["--color", "always", "--help"], &[]));
    assert!(!run(&["--help"], &[]));
}
