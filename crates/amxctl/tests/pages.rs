//! Completions and man pages name every command.
#![allow(clippy::unwrap_used, missing_docs)]

use snapbox::cmd::{Command, cargo_bin};

const COMMANDS: [&str; 9] = [
    "check",
    "describe",
    "inspect",
    "diff",
    "verify",
    "convert",
    "completions",
    "man",
    "help",
];

#[test]
fn every_shell_completes_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = Command::new(cargo_bin("amxctl"))
            .args(["completions", shell])
            .output()
            .unwrap();
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).unwrap();
        for command in COMMANDS {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

#[test]
fn bash_takes_the_script_that_is_for_it() {
    let output = Command::new(cargo_bin("amxctl"))
        .args(["completions", "bash"])
        .output()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("amxctl");
    std::fs::write(&script, output.stdout).unwrap();
    let line = format!(
        "source {} && COMP_WORDS=(amxctl insp) COMP_CWORD=1 && _amxctl amxctl insp amxctl && echo \"${{COMPREPLY[@]}}\"",
        script.display()
    );
    let Ok(output) = std::process::Command::new("bash")
        .args(["-c", &line])
        .output()
    else {
        println!("skipped: there is no bash");
        return;
    };
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "inspect");
}

#[test]
fn each_command_has_a_page_with_an_example() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let output = Command::new(cargo_bin("amxctl"))
        .arg("man")
        .arg(&pages)
        .output()
        .unwrap();
    assert!(output.status.success());
    let read = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap();
    assert!(read("amxctl.1").contains("Exit codes"));
    for command in COMMANDS.iter().filter(|command| **command != "help") {
        let page = read(&format!("amxctl-{command}.1"));
        // roff escapes the hyphen.
        assert!(page.contains("Examples:"), "{command}");
        assert!(page.contains(&format!("amxctl {command}")), "{command}");
    }
}
