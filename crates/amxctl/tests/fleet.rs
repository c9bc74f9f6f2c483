//! A fleet has the same baseline in one stream and in parts, however it is split.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

use std::fs;
use std::path::Path;

use cpuid_amx::{CpuidTable, Policy, Table};
use host_compat::Host;
use proptest::prelude::*;
use snapbox::cmd::{Command, cargo_bin};

/// Some hosts have no AMX, some no PKRU, some have their tiles elsewhere.
fn line(number: usize) -> String {
    let mut table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
    let kind = number % 7;
    if kind == 1 {
        Policy::hide_amx().apply(&mut table).unwrap();
    }
    let shift = kind as u32 / 3 * 64;
    if kind > 1 {
        let size = 11_008 + shift;
        table.set_leaf(0xd, 0, [0x602e7, size, size, 0]).unwrap();
        table.set_leaf(0xd, 17, [64, 2752 + shift, 2, 0]).unwrap();
        table.set_leaf(0xd, 18, [8192, 2816 + shift, 6, 0]).unwrap();
    }
    let host = Host::from_cpuid(format!("node-{number}"), table);
    serde_json::to_string(&host).unwrap()
}

fn run(folder: &Path, args: &[String]) -> Vec<u8> {
    let output = Command::new(cargo_bin("amxctl"))
        .args(args)
        .current_dir(folder)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    output.stdout
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn parts_make_the_same_baseline_in_any_order(
        parts in proptest::collection::vec(0usize..4, 60),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let whole: Vec<String> = (0..parts.len()).map(line).collect();
        fs::write(folder.path().join("all.jsonl"), whole.join("\n")).unwrap();
        let strings = |args: &[&str]| args.iter().map(ToString::to_string).collect::<Vec<_>>();
        let in_one = run(folder.path(), &strings(&["baseline", "--json", "all.jsonl"]));
        let mut merge = strings(&["merge", "--json"]);
        for part in order {
            let lines: Vec<&str> = whole
                .iter()
                .zip(&parts)
                .filter(|(_, own)| **own == part)
                .map(|(line, _)| &**line)
                .collect();
            let name = format!("{part}.jsonl");
            fs::write(folder.path().join(&name), lines.join("\n")).unwrap();
            let tally = run(folder.path(), &strings(&["baseline", "--tally", &name]));
            let name = format!("{part}.tally");
            fs::write(folder.path().join(&name), tally).unwrap();
            merge.push(name);
        }
        prop_assert_eq!(run(folder.path(), &merge), in_one);
    }
}

/// The commands of docs/fleet.md, as they are there.
#[test]
fn xargs_gives_the_same_baseline() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/fleet.md");
    let guide = fs::read_to_string(guide).unwrap();
    let section = guide.split("## With xargs").nth(1).unwrap();
    let commands = section.split("```").nth(1).unwrap();
    let commands = commands.strip_prefix("sh\n").unwrap();

    let folder = tempfile::tempdir().unwrap();
    let whole: Vec<String> = (0..200).map(line).collect();
    fs::write(folder.path().join("fleet.jsonl"), whole.join("\n") + "\n").unwrap();
    let binary = cargo_bin("amxctl");
    let path = format!(
        "{}:{}",
        binary.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let output = std::process::Command::new("sh")
        .args(["-e", "-c", commands])
        .current_dir(folder.path())
        .env("PATH", path)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    let in_one = run(folder.path(), &["baseline".into(), "fleet.jsonl".into()]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(in_one).unwrap()
    );
    let parts = fs::read_dir(folder.path()).unwrap();
    let tallies = parts.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str().unwrap().ends_with(".tally")
    });
    assert_eq!(tallies.count(), 8);
}
