//! Sections of docs/model.md, and docs/model-traces.md, that are written by the tests, so that they cannot be out of date.
//!
//! `UPDATE_MODEL=1 cargo test -p vcpu-realloc --test model` writes them anew.

use std::sync::Mutex;
use std::{env, fs};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");

/// Tests run at the same time, and all write the same file.
static FILE: Mutex<()> = Mutex::new(());

/// Compares a section with what it must be.
///
/// # Panics
///
/// When they differ.
pub(crate) fn check(section: &str, expected: &str) {
    let _held = FILE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let name = match section {
        "mutants" => "model-traces.md",
        _ => "model.md",
    };
    let path = format!("{FOLDER}/{name}");
    let Ok(text) = fs::read_to_string(&path) else {
        println!("skipped: no docs/{name} beside the crate");
        return;
    };
    let begin = format!("<!-- {section}: written by the tests -->\n");
    let end = format!("<!-- end of {section} -->\n");
    let start = text.find(&begin).expect("the section is there") + begin.len();
    let len = text[start..].find(&end).expect("the section has an end");
    let expected = format!("\n{}\n\n", expected.trim());
    if env::var_os("UPDATE_MODEL").is_some() {
        let (before, after) = (&text[..start], &text[start + len..]);
        fs::write(&path, format!("{before}{expected}{after}")).unwrap();
        return;
    }
    let actual = &text[start..start + len];
    assert!(
        actual == expected,
        "docs/{name}, {section}, is out of date: UPDATE_MODEL=1 writes it. It must be:\n{expected}"
    );
}
