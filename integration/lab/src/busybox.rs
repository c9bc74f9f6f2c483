//! A shell for a look around in the lab: Debian's static busybox, fetched when it is first asked for.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::apt::{Apt, AptError};
use crate::emulator::SUITE;
use crate::manifest::{Care, Manifest};
use crate::prepare::PrepareError;
use crate::progress::Progress;
use crate::store::{Store, StoreError, remove};
use crate::tools;

const PART: &str = "shell";
const PACKAGE: &str = "busybox-static";
const PROGRAM: &str = "busybox";

/// The shell's path on this machine. Fetches it, if that is allowed.
///
/// # Errors
/// When it is not there and cannot be fetched.
pub fn busybox(
    store: &Store,
    fetch: bool,
    progress: &dyn Progress,
) -> Result<PathBuf, PrepareError> {
    let folder = store.part(PART);
    match Manifest::check(&folder, Care::Glance) {
        Ok(_) => return Ok(folder.join(PROGRAM)),
        Err(error) if !fetch => return Err(error.into()),
        Err(_) => {}
    }
    let lock = store.lock(|| progress.step("waiting for another prepare to end", None))?;
    if Manifest::check(&folder, Care::Glance).is_ok() {
        return Ok(folder.join(PROGRAM));
    }
    progress.step("fetching a shell", None);
    let scratch = store.unfinished(&lock, "scratch")?;
    let apt = Apt::new(
        &scratch,
        SUITE,
        std::env::var("AMX_LAB_MIRROR").ok().as_deref(),
        false,
    )?;
    let package = apt.package(PACKAGE)?;
    let tree = scratch.join("tree");
    tools::run(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&package.file)
            .arg(&tree),
    )
    .map_err(|source| PrepareError::Shell {
        source: source.into(),
    })?;
    let work = store.unfinished(&lock, PART)?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| tree.join(place));
    let program =
        places
            .iter()
            .find(|place| place.is_file())
            .ok_or_else(|| AptError::NoPackage {
                package: PACKAGE.into(),
                suite: SUITE.into(),
            })?;
    let target = work.join(PROGRAM);
    fs::copy(program, &target).map_err(|source| StoreError::Io {
        path: target,
        source,
    })?;
    Manifest::create(
        &work,
        BTreeMap::from([(PACKAGE.to_owned(), package.version)]),
        BTreeMap::new(),
    )?;
    store.publish(&lock, &work, PART)?;
    // What stays is removed by the next prepare.
    let _ = remove(&scratch);
    progress.done();
    Ok(folder.join(PROGRAM))
}
