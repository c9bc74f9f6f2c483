//! What becomes of a session's one lab when a program in it ends badly: the next program has a lab all the same.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;

use std::process::{Command, Stdio};

use amx_lab::{Kernel, LabOptions, Quiet, session};
use common::{amx_lab, first_line, output, probe, signal, store, text};

fn in_session(server: &session::Server) -> Command {
    let mut command = amx_lab();
    command.env(session::VARIABLE, server.address()).arg("run");
    command
}

#[test]
fn the_next_program_has_a_lab() {
    let store = store(&[Kernel::Trixie]);
    let server = session::Server::start(&store, &LabOptions::default(), 1, &Quiet).unwrap();
    let next_ends_well = |after: &str| {
        let output = output(
            in_session(&server)
                .arg("--")
                .arg(probe())
                .args(["exit", "7"]),
        );
        assert_eq!(
            output.status.code(),
            Some(7),
            "{after}: {}",
            text(&output.stderr)
        );
    };
    next_ends_well("nothing");

    let crash = output(in_session(&server).arg("--").arg(probe()).arg("panic"));
    assert_eq!(crash.status.code(), Some(120), "{}", text(&crash.stderr));
    assert_eq!(text(&crash.stdout), "before\n");
    next_ends_well("a crash");

    // It does not read the input that it is given without end.
    let mut killed = in_session(&server)
        .args(["-i", "--"])
        .arg(probe())
        .arg("hang")
        .stdin(std::fs::File::open("/dev/zero").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let watch = common::Watch::new(killed.id());
    assert_eq!(first_line(&mut killed), "hanging\n");
    signal(killed.id(), "KILL");
    assert_eq!(killed.wait().unwrap().code(), None);
    watch.stop();
    next_ends_well("a client that was killed");

    let here = std::env::current_dir().unwrap();
    let no_place = output(
        in_session(&server)
            .arg("--file")
            .arg(format!("{}:/x", here.join("Cargo.toml").display()))
            .arg("--file")
            .arg(format!("{}:/x/y", here.join("Cargo.toml").display()))
            .arg("--")
            .arg(probe())
            .args(["exit", "0"]),
    );
    let said = text(&no_place.stderr);
    assert_eq!(no_place.status.code(), Some(125), "{said}");
    assert!(
        said.contains("x/y: ") && said.contains("--memory"),
        "{said}"
    );
    next_ends_well("files without a place");
}
