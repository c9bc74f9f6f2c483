//! A snapshot file is there entirely or not at all.

use std::fs;
use std::io;
use std::path::Path;

use amx_vmm::file::{self, FileError, Step};

const OLD: &[u8] = b"the old file";
const NEW: &[u8] = b"the new file, which is longer";

/// Writes over the old file, and fails before `failing`.
fn write_failing_before(path: &Path, failing: Step) -> FileError {
    file::write_checking(path, NEW, |step| {
        if step == failing {
            Err(io::Error::other("made to fail"))
        } else {
            Ok(())
        }
    })
    .expect_err("it was made to fail")
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .expect("it is there")
        .map(|entry| entry.expect("it can be read").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_step_that_fails_leaves_the_old_file_or_the_new_one() {
    for failing in Step::ALL {
        let directory = tempfile::tempdir().expect("a folder");
        let path = directory.path().join("snapshot");
        fs::write(&path, OLD).expect("the old file");
        let error = write_failing_before(&path, failing);
        assert!(
            matches!(&error, FileError::Write { step, .. } if *step == failing),
            "{error}"
        );
        let expected = if failing == Step::SyncDirectory {
            NEW
        } else {
            OLD
        };
        assert_eq!(file::read(&path).expect("it is there"), expected, "{error}");
        assert_eq!(names(directory.path()), ["snapshot"], "{error}");
    }
}

#[test]
fn a_step_that_fails_leaves_no_file_where_none_was() {
    for failing in Step::ALL {
        let directory = tempfile::tempdir().expect("a folder");
        write_failing_before(&directory.path().join("snapshot"), failing);
        let expected: &[&str] = if failing == Step::SyncDirectory {
            &["snapshot"]
        } else {
            &[]
        };
        assert_eq!(names(directory.path()), expected, "{failing:?}");
    }
}

#[test]
fn the_bytes_are_synced_before_they_get_the_name() {
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("snapshot");
    let mut steps = Vec::new();
    file::write_checking(&path, NEW, |step| {
        assert_eq!(path.exists(), step == Step::SyncDirectory, "{step:?}");
        steps.push(step);
        Ok(())
    })
    .expect("it is written");
    assert_eq!(steps, Step::ALL);
    assert_eq!(file::read(&path).expect("it is there"), NEW);
}

#[test]
fn errors_name_the_file() {
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("missing").join("snapshot");
    for error in [
        file::write(&path, NEW).expect_err("there is no such folder"),
        file::read(&path).expect_err("there is no such file"),
    ] {
        assert!(error.to_string().contains("missing/snapshot"), "{error}");
    }
    file::remove(&path).expect("what is not there needs no removal");
}
