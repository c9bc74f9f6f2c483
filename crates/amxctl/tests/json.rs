//! docs/amxctl-json.md lists the keys that the commands print: all of them, and no others.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

/// Has a schema of its own.
const HOST: &str = "host.";

type Keys = BTreeMap<String, BTreeSet<String>>;

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What each command has printed in the golden sessions.
fn printed() -> Keys {
    let mut keys = Keys::new();
    for entry in fs::read_dir(package().join("tests/golden")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "trycmd")
        {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for block in text.split("```\n").filter(|block| block.starts_with("$ ")) {
            let (line, output) = block.split_once('\n').unwrap();
            let json = output.find('{').filter(|_| line.contains(" --json"));
            let Some(start) = json else { continue };
            let value: Value = serde_json::from_str(&output[start..])
                .unwrap_or_else(|error| panic!("{line}: {error}"));
            let command = if value.get("error").is_some() {
                "Errors"
            } else {
                let mut words = line.split_whitespace().skip(2);
                words.find(|word| !word.starts_with("--")).unwrap()
            };
            collect(&value, "", keys.entry(command.to_owned()).or_default());
        }
    }
    keys
}

fn collect(value: &Value, place: &str, keys: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let place = if place.is_empty() {
                    key.clone()
                } else {
                    format!("{place}.{key}")
                };
                collect(value, &place, keys);
                keys.insert(place);
            }
        }
        Value::Array(values) => {
            for value in values {
                collect(value, &format!("{place}[]"), keys);
            }
        }
        _ => {}
    }
}

/// The first column of each section's table; a section may be of several commands.
fn documented() -> Keys {
    let path = package().join("../../docs/amxctl-json.md");
    let text = fs::read_to_string(path).unwrap();
    let mut keys = Keys::new();
    for section in text.split("\n## ").skip(1) {
        let (title, body) = section.split_once('\n').unwrap();
        let rows = body.lines().filter(|line| line.starts_with("| `"));
        let listed: BTreeSet<String> = rows
            .flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2))
            .map(str::to_owned)
            .collect();
        for command in title.split(" and ") {
            keys.insert(command.to_owned(), listed.clone());
        }
    }
    keys
}

#[test]
fn every_key_that_is_printed_is_documented_and_no_other() {
    let mut printed = printed();
    if let Some(check) = printed.get_mut("check") {
        check.retain(|key| !key.starts_with(HOST));
    }
    let documented = documented();
    assert!(printed.len() > 7, "{:?}", printed.keys());
    assert_eq!(
        printed.keys().collect::<Vec<_>>(),
        documented.keys().collect::<Vec<_>>()
    );
    for (command, keys) in &printed {
        let listed = &documented[command];
        let missing: Vec<_> = keys.difference(listed).collect();
        assert!(missing.is_empty(), "{command}: not documented: {missing:?}");
        let left: Vec<_> = listed.difference(keys).collect();
        assert!(left.is_empty(), "{command}: never printed: {left:?}");
    }
}

/// One spelling: keys, and values that are one of a few words.
#[test]
fn keys_and_words_are_in_snake_case() {
    for (command, keys) in printed() {
        for key in keys {
            let snake =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.[]".contains(c);
            assert!(key.chars().all(snake), "{command}: {key}");
        }
    }
    let rules = amxctl::rules::Rule::ALL.map(amxctl::rules::Rule::name);
    for word in rules {
        assert!(!word.contains('-'), "{word}");
    }
    let text = fs::read_to_string(package().join("../../docs/amxctl-json.md")).unwrap();
    for rule in rules {
        assert!(text.contains(&format!("`{rule}`")), "{rule}");
    }
}
