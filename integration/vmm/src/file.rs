//! A file that is there entirely or not at all.
//!
//! Written under a temporary name beside the final one, synced, renamed, and the directory synced:
//! whenever the machine stops, the old file or the new one is there.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use thiserror::Error;

/// No snapshot file is longer. It is looked at before anything is read.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

/// One step of [`write`](write()).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Making the temporary file.
    Create,
    /// Writing the bytes to it.
    Write,
    /// Waiting until they are on the disk.
    Sync,
    /// Giving it its name.
    Rename,
    /// Waiting until the name is on the disk.
    SyncDirectory,
}

impl Step {
    /// All, in their order.
    pub const ALL: [Self; 5] = [
        Self::Create,
        Self::Write,
        Self::Sync,
        Self::Rename,
        Self::SyncDirectory,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Create => "creating a temporary file beside it",
            Self::Write => "writing the temporary file",
            Self::Sync => "syncing the temporary file",
            Self::Rename => "renaming the temporary file",
            Self::SyncDirectory => "syncing its directory",
        }
    }
}

/// Puts `bytes` into the file at `path`.
///
/// # Errors
///
/// The step that failed. Up to and with the rename the old file is still there, and no temporary
/// file is left; after it the new one is there, and may be lost again if the machine stops.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_checking(path, bytes, |_| Ok(()))
}

/// As [`write`](write()), but asks `before` before each step, and fails where that fails. For tests.
///
/// # Errors
///
/// As [`write`](write()).
pub fn write_checking(
    path: &Path,
    bytes: &[u8],
    mut before: impl FnMut(Step) -> io::Result<()>,
) -> Result<(), FileError> {
    let failed = |step| {
        move |error| FileError::Write {
            path: path.to_owned(),
            step,
            error,
        }
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    before(Step::Create).map_err(failed(Step::Create))?;
    let mut file = NamedTempFile::new_in(directory).map_err(failed(Step::Create))?;
    before(Step::Write).map_err(failed(Step::Write))?;
    file.write_all(bytes).map_err(failed(Step::Write))?;
    before(Step::Sync).map_err(failed(Step::Sync))?;
    file.as_file().sync_all().map_err(failed(Step::Sync))?;
    before(Step::Rename).map_err(failed(Step::Rename))?;
    file.persist(path)
        .map_err(|error| failed(Step::Rename)(error.error))?;
    before(Step::SyncDirectory).map_err(failed(Step::SyncDirectory))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed(Step::SyncDirectory))
}

/// All bytes of the file at `path`, at most [`MAX_FILE_BYTES`].
///
/// # Errors
///
/// It cannot be read, or it is longer.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    read_at_most(path, MAX_FILE_BYTES)
}

fn read_at_most(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, FileError> {
    let failed = |error| FileError::Read {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(failed)?;
    let expected = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::new();
    if expected <= limit_bytes {
        // It may grow meanwhile: one byte more than the limit says that it did.
        file.take(limit_bytes.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(failed)?;
    }
    let actual_bytes = expected.max(bytes.len() as u64);
    if actual_bytes > limit_bytes {
        return Err(FileError::TooLong {
            path: path.to_owned(),
            actual_bytes,
            limit_bytes,
        });
    }
    Ok(bytes)
}

/// Removes a file that is not needed any more. That it is not there is no error.
///
/// # Errors
///
/// It is there and cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A file could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// A step of writing failed.
    #[error("{}: {}: {error}", .path.display(), .step.name())]
    Write {
        /// The file.
        path: PathBuf,
        /// Which step.
        step: Step,
        /// By the system.
        error: io::Error,
    },
    /// It cannot be read.
    #[error("{}: {error}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// By the system.
        error: io::Error,
    },
    /// It is too long to be a snapshot.
    #[error("{} has {actual_bytes} bytes; no snapshot has more than {limit_bytes}", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        actual_bytes: u64,
        /// [`MAX_FILE_BYTES`].
        limit_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read_at_most(&path, 100).unwrap(), [7; 100]);
        let error = read_at_most(&path, 99).unwrap_err();
        assert!(matches!(
            error,
            FileError::TooLong {
                actual_bytes: 100,
                limit_bytes: 99,
                ..
            }
        ));
    }
}
