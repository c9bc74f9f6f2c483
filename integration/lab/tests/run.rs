//! `amx-lab run` behaves as if the program had run here. Each test boots or resumes a real lab.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

mod common;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use amx_lab::{Ending, Job, Kernel, Lab, LabError, LabOptions, Streams};
use common::{amx_lab, children, first_line, output, probe, runs, signal, store, text, until};

fn run(args: &[&str]) -> Command {
    store(&[Kernel::Trixie]);
    let mut command = amx_lab();
    command
        .args(["run", "--timeout", "100", "--"])
        .arg(probe())
        .args(args);
    command
}

#[test]
fn the_host_has_kvm_and_amx_on_every_kernel() {
    store(&Kernel::ALL);
    for (kernel, version) in [("trixie", "6.12."), ("sid", "7."), ("bookworm", "6.1.")] {
        let output = output(
            amx_lab()
                .args(["run", "--kernel", kernel, "--timeout", "100", "--"])
                .arg(probe())
                .arg("lab"),
        );
        let text = text(&output.stdout);
        assert!(text.starts_with(version), "{kernel}: {text}");
        for flag in [
            "vmx", "amx_tile", "amx_int8", "amx_bf16", "avx512f", "pku", "kvm", "loopback",
        ] {
            assert!(
                text.contains(&format!("\n{flag} true\n")),
                "{kernel}, {flag}: {text}"
            );
        }
    }
}

#[test]
fn exit_status_and_signals_are_the_programs() {
    for (args, status) in [
        (["exit", "0"].as_slice(), 0),
        (&["exit", "77"], 77),
        (&["exit", "255"], 255),
        (&["abort"], 128 + 6),
    ] {
        assert_eq!(
            output(&mut run(args)).status.code(),
            Some(status),
            "{args:?}"
        );
    }
}

#[test]
fn arguments_streams_environment_and_directory_arrive() {
    let echo = output(&mut run(&["echo", "a b", "", "--timeout", "ü"]));
    assert_eq!(text(&echo.stdout), "a b||--timeout|ü\n");
    assert_eq!(text(&echo.stderr), format!("argv0 {}\n", probe().display()));
    let mut command = amx_lab();
    command
        .args(["run", "--env", "CHOSEN=1=2", "--env", "PASSED", "--"])
        .arg(probe())
        .arg("env");
    let env = text(
        &output(
            command
                .env("PASSED", "yes")
                .env("CARGO_MANIFEST_DIR", "/m")
                .env("SECRET", "s"),
        )
        .stdout,
    );
    for line in [
        "CHOSEN=1=2",
        "PASSED=yes",
        "CARGO_MANIFEST_DIR=/m",
        "AMX_LAB=1",
    ] {
        assert!(env.lines().any(|have| have == line), "{line}: {env}");
    }
    assert!(!env.contains("SECRET"));
    let directory = output(&mut run(&["directory"]));
    assert_eq!(
        text(&directory.stdout).trim(),
        std::env::current_dir().unwrap().to_str().unwrap()
    );
}

#[test]
fn megabytes_of_output_come_unharmed_and_apart() {
    let bytes = 3_000_000;
    let output = output(&mut run(&["pour", &bytes.to_string()]));
    let expected: Vec<u8> = (0..bytes).map(|at: usize| (at % 251) as u8).collect();
    assert!(output.stdout == expected && output.stderr == expected);
}

#[test]
fn output_is_live_and_input_arrives() {
    store(&[Kernel::Trixie]);
    let mut child = amx_lab()
        .args(["run", "-i", "--"])
        .arg(probe())
        .arg("slowly")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let watch = common::Watch::new(child.id());
    // The program ends only after its input, which is not there yet.
    assert_eq!(first_line(&mut child), "first\n");
    child.stdin.take().unwrap().write_all(b"x").unwrap();
    assert!(child.wait().unwrap().success());
    watch.stop();
}

#[test]
fn input_of_any_length_arrives_whole() {
    store(&[Kernel::Trixie]);
    let data: Vec<u8> = (0..700_000_u32).map(|at| (at % 256) as u8).collect();
    let sum: u64 = data.iter().map(|byte| u64::from(*byte)).sum();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&data).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let output = output(
        amx_lab()
            .args(["run", "-i", "--"])
            .arg(probe())
            .arg("stdin")
            .stdin(file),
    );
    assert_eq!(text(&output.stdout), format!("700000 bytes, sum {sum}\n"));
}

#[test]
fn a_program_may_end_before_its_input() {
    store(&[Kernel::Trixie]);
    let mut lab = Lab::start(&common::store(&[Kernel::Trixie]), &LabOptions::default()).unwrap();
    let job = Job::new(probe()).unwrap().args(["exit", "3"]);
    let endless = std::fs::File::open("/dev/zero").unwrap();
    let ending = lab
        .run(
            &job,
            Streams::to(std::io::sink(), std::io::sink()).stdin(endless),
            Some(common::LIMIT),
        )
        .unwrap();
    assert_eq!(ending, Ending::Exited(3));
    // The next job is found where it starts.
    let job = Job::new(probe()).unwrap().args(["exit", "4"]);
    assert_eq!(
        lab.run(
            &job,
            Streams::to(std::io::sink(), std::io::sink()),
            Some(common::LIMIT)
        )
        .unwrap(),
        Ending::Exited(4)
    );
}

#[test]
fn files_go_in_and_come_out() {
    let folder = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..5_000_001_u32).map(|at| (at % 239) as u8).collect();
    std::fs::write(folder.path().join("in"), &data).unwrap();
    store(&[Kernel::Trixie]);
    let here = folder.path().join("in");
    for (file, inside) in [
        (here.to_str().unwrap().to_owned(), here.to_str().unwrap()),
        (format!("{}:/other/place", here.display()), "/other/place"),
    ] {
        let output = output(
            amx_lab()
                .args(["run", "--file", &file, "--"])
                .arg(probe())
                .args(["cat", inside]),
        );
        assert!(output.stdout == data, "{file}");
    }
    let out = folder.path().join("out");
    let status = output(
        amx_lab()
            .args(["run", "--out"])
            .arg(&out)
            .arg("--")
            .arg(probe())
            .args(["out", "5000003"]),
    )
    .status;
    assert!(status.success());
    let expected: Vec<u8> = (0..5_000_003_u32).map(|at| (at % 241) as u8).collect();
    assert!(std::fs::read(out.join("deep/data")).unwrap() == expected);
    assert!(std::fs::read(out.join("link")).unwrap() == expected);
}

/// What the program of a job ended with, when it was given input without end, and printed what nobody reads.
fn run_in(lab: &mut Lab, job: &Job) -> Result<Ending, LabError> {
    let endless = std::fs::File::open("/dev/zero").unwrap();
    lab.run(
        job,
        Streams::to(std::io::sink(), std::io::sink()).stdin(endless),
        Some(common::LIMIT),
    )
}

#[test]
fn a_job_that_cannot_be_done_costs_neither_the_lab_nor_the_next_job() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "data").unwrap();
    let at = |path: &str| Some(std::path::PathBuf::from(path));
    let mut lab = Lab::start(&store(&[Kernel::Trixie]), &LabOptions::default()).unwrap();
    let job = Job::new(probe()).unwrap().args(["exit", "4"]);
    // A file where a folder is to be, and more to come after it.
    let no_place = job
        .clone()
        .file(&file, at("/x").as_deref())
        .and_then(|job| job.file(&file, at("/x/y").as_deref()))
        .and_then(|job| job.file(&file, at("/z").as_deref()))
        .unwrap();
    let error = run_in(&mut lab, &no_place).unwrap_err();
    assert!(
        matches!(&error, LabError::NotUnpacked { how } if how.starts_with("x/y: ")),
        "{error}"
    );
    // A file where the working directory is to be.
    let here = std::env::current_dir().unwrap();
    let no_start = job.clone().file(&file, Some(&here)).unwrap();
    let error = run_in(&mut lab, &no_start).unwrap_err();
    assert!(matches!(error, LabError::NotStarted { .. }), "{error}");
    assert_eq!(run_in(&mut lab, &job).unwrap(), Ending::Exited(4));
}

#[test]
fn names_that_cannot_come_out_are_said_and_the_rest_comes() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = Lab::start(&store(&[Kernel::Trixie]), &LabOptions::default()).unwrap();
    let job = Job::new(probe()).unwrap();
    let names = job.clone().arg("bad-names").out(folder.path());
    let error = run_in(&mut lab, &names).unwrap_err();
    let LabError::OutFolder { source, .. } = &error else {
        panic!("{error}")
    };
    let said = source.to_string();
    assert!(
        said.contains("TRAILER!!!") && said.contains("1 more") && said.contains("status 5"),
        "{said}"
    );
    let mut came: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    came.sort();
    assert_eq!(came, ["good", "z"]);
    let next = job.args(["exit", "4"]);
    assert_eq!(run_in(&mut lab, &next).unwrap(), Ending::Exited(4));
}

#[test]
fn what_is_left_running_does_not_hold_the_end_up() {
    let output = output(&mut run(&["leave"]));
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains("leaving\n"));
}

#[test]
fn own_exit_codes() {
    store(&[Kernel::Trixie]);
    let code = |args: &[&str]| output(amx_lab().arg("run").args(args)).status.code();
    assert_eq!(code(&["--", "/bin/sh"]), Some(126), "not static");
    assert_eq!(code(&["--", "/nonexistent"]), Some(127), "no program");
    assert_eq!(code(&["--no-such-option"]), Some(125), "usage");
    let before = Instant::now();
    assert_eq!(
        code(&["--timeout", "2", "--", probe().to_str().unwrap(), "hang"]),
        Some(124),
        "time-out"
    );
    assert!(before.elapsed() < common::LIMIT / 4);
    let reset = output(&mut run(&["reboot"]));
    assert_eq!(
        reset.status.code(),
        Some(121),
        "emulator: {}",
        text(&reset.stderr)
    );
}

#[test]
fn time_is_out_for_endless_output_too() {
    store(&[Kernel::Trixie]);
    // With a reader that never waits there is always a next piece; with one that never reads there is no end of the first.
    for reader in [Stdio::null(), Stdio::piped()] {
        let mut child = amx_lab()
            .args(["run", "--timeout", "2", "--"])
            .arg(probe())
            .arg("endless")
            .stdout(reader)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let watch = common::Watch::new(child.id());
        assert_eq!(child.wait().unwrap().code(), Some(124));
        watch.stop();
    }
}

#[test]
fn a_host_panic_is_reported_at_once() {
    for kernel in ["trixie", "sid", "bookworm"] {
        store(&Kernel::ALL);
        let output = output(
            amx_lab()
                .args(["run", "--timeout", "20", "--kernel", kernel, "--"])
                .arg(probe())
                .arg("panic"),
        );
        let report = text(&output.stderr);
        assert_eq!(output.status.code(), Some(120), "{kernel}: {report}");
        assert_eq!(
            text(&output.stdout),
            "before\n",
            "what came before is not lost"
        );
        for part in [
            "Kernel panic - not syncing: sysrq triggered crash",
            "Call Trace:",
            "---[ end Kernel panic",
        ] {
            assert!(report.contains(part), "{kernel}, {part}: {report}");
        }
    }
}

#[test]
fn whatever_ends_us_leaves_nothing_running() {
    store(&[Kernel::Trixie]);
    for signal_name in ["INT", "TERM", "KILL"] {
        let mut child = amx_lab()
            .args(["run", "--"])
            .arg(probe())
            .arg("hang")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let watch = common::Watch::new(child.id());
        assert_eq!(first_line(&mut child), "hanging\n");
        let emulators = children(child.id());
        assert_eq!(emulators.len(), 1);
        signal(child.id(), signal_name);
        assert!(!child.wait().unwrap().success());
        until("the emulator ends", || !runs(emulators[0]));
        watch.stop();
    }
}

#[test]
fn runs_at_once_do_not_disturb_each_other() {
    store(&[Kernel::Trixie]);
    std::thread::scope(|scope| {
        for status in ["11", "12", "13"] {
            scope.spawn(move || {
                let output = output(&mut run(&["exit", status]));
                assert_eq!(output.status.code().unwrap().to_string(), status);
            });
        }
    });
}

#[test]
fn a_resumed_lab_has_the_time_and_its_own_randomness() {
    let runs: Vec<_> = (0..2)
        .map(|_| text(&output(&mut run(&["lab"])).stdout))
        .collect();
    let line = |text: &str, name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .to_owned()
    };
    assert_ne!(line(&runs[0], "random "), line(&runs[1], "random "));
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let clock: u64 = line(&runs[1], "clock ").parse().unwrap();
    assert!(now.abs_diff(clock) < 120, "{clock} is not about {now}");
}

#[test]
fn programs_can_share_a_boot_and_do_not_see_each_other() {
    let mut lab = Lab::start(&store(&[Kernel::Trixie]), &LabOptions::default()).unwrap();
    let job = Job::new(probe()).unwrap().arg("mark");
    for _ in 0..3 {
        let mut printed = Vec::new();
        let ending = lab
            .run(
                &job,
                Streams::to(&mut printed, std::io::sink()),
                Some(common::LIMIT),
            )
            .unwrap();
        assert_eq!(
            (text(&printed).as_str(), ending),
            ("was here false\n", Ending::Exited(0))
        );
    }
    let hang = Job::new(probe()).unwrap().arg("hang");
    let limit = std::time::Duration::from_secs(1);
    let error = lab
        .run(
            &hang,
            Streams::to(std::io::sink(), std::io::sink()),
            Some(limit),
        )
        .unwrap_err();
    assert!(matches!(error, LabError::TimedOut { .. }) && !lab.is_usable());
}

#[test]
fn memory_that_ran_out_is_told() {
    store(&[Kernel::Trixie]);
    let output = output(&mut run(&["eat"]));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(137), "{said}");
    assert_eq!(text(&output.stdout), "eating\n");
    assert!(
        said.contains("killed 1 of the program's processes") && said.contains("--memory"),
        "{said}"
    );
}

#[test]
fn processors_go_and_come_back() {
    store(&Kernel::ALL);
    for kernel in Kernel::ALL {
        let output = output(
            amx_lab()
                .args(["run", "--cpus", "2", "--kernel", kernel.suite(), "--"])
                .arg(probe())
                .arg("cpus"),
        );
        assert_eq!(
            (text(&output.stdout).as_str(), output.status.code()),
            ("2 0-1\n1 0\n2 0-1\n", Some(0)),
            "{kernel}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn no_lab_has_too_many_processors() {
    for cpus in ["0", "9"] {
        let output = output(
            amx_lab()
                .args(["run", "--cpus", cpus, "--"])
                .arg(probe())
                .args(["exit", "0"]),
        );
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("1 to 8"), "{said}");
    }
}

#[test]
fn a_lab_that_boots_anew_is_the_same() {
    store(&[Kernel::Trixie]);
    let output = output(
        amx_lab()
            .args(["run", "--cold", "--"])
            .arg(probe())
            .args(["exit", "9"]),
    );
    assert_eq!(output.status.code(), Some(9));
}

/// As a cache of CI or a layer of an image gives the parts back: every byte, and other times.
#[test]
fn a_cold_lab_boots_once_from_copies_and_leaves_nothing() {
    let store = store(&[Kernel::Trixie]);
    let folder = tempfile::tempdir().unwrap();
    let members = || -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "lock")
            .collect();
        names.sort();
        names
    };
    for part in std::fs::read_dir(store.root()).unwrap() {
        let part = part.unwrap();
        let name = part.file_name().into_string().unwrap();
        if name == "kernel-trixie" || name.starts_with("emulator-") {
            let copied = Command::new("cp")
                .arg("-r")
                .arg(part.path())
                .arg(folder.path())
                .status()
                .unwrap();
            assert!(copied.success());
        }
    }
    let copies = members();
    let output = output(
        amx_lab()
            .args(["run", "--cold", "--no-prepare", "--"])
            .arg(probe())
            .args(["exit", "9"])
            .env("AMX_LAB_DIR", folder.path()),
    );
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    assert_eq!(members(), copies);
}

#[test]
fn a_shell_takes_commands() {
    store(&[Kernel::Trixie]);
    let output = output(amx_lab().args(["shell", "-c", "grep -c amx_tile /proc/cpuinfo; exit 6"]));
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("1\n", Some(6))
    );
}
