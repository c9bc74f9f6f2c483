//! Where the lab's parts are kept: outside the checkout, one folder per part, complete or not there at all.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// Overrides the place of the store.
pub(crate) const DIRECTORY_VARIABLE: &str = "AMX_LAB_DIR";
/// Unfinished work has this prefix, so that the next prepare finds and removes what a killed one left.
const UNFINISHED: &str = "unfinished-";

/// The folder that holds the lab's parts.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no home directory to put it in.
    #[error(
        "no place for the lab: neither {DIRECTORY_VARIABLE} nor XDG_CACHE_HOME nor HOME is set; set {DIRECTORY_VARIABLE} to a folder"
    )]
    NoPlace,
    /// The file system refused.
    #[error("{path}: the lab needs a folder that it can write to (set {DIRECTORY_VARIABLE} to another one)", path = path.display())]
    Io {
        /// What was being used.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// Held by the one process that changes the store.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock goes when the file is closed")] File);

impl Store {
    /// The user's store: `$AMX_LAB_DIR`, or `amx-lab` in the XDG cache folder. Creates the folder.
    ///
    /// # Errors
    /// When no place is known or the folder cannot be made.
    pub fn open() -> Result<Self, StoreError> {
        let root = match std::env::var_os(DIRECTORY_VARIABLE).filter(|value| !value.is_empty()) {
            Some(directory) => PathBuf::from(directory),
            None => etcetera::choose_base_strategy()
                .map_err(|_| StoreError::NoPlace)?
                .cache_dir()
                .join("amx-lab"),
        };
        Self::at(root)
    }

    /// A store in this folder. Creates it.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn at(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        let io = |source| StoreError::Io {
            path: root.clone(),
            source,
        };
        fs::create_dir_all(&root).map_err(io)?;
        // Absolute, because the emulator's saved state names the files it was made from.
        Ok(Self {
            root: fs::canonicalize(&root).map_err(io)?,
        })
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits until no other process changes the store. `waiting` is called if that is not now.
    ///
    /// # Errors
    /// When the lock file cannot be made or locked.
    pub fn lock(&self, waiting: impl FnOnce()) -> Result<Lock, StoreError> {
        let path = self.root.join("lock");
        let io = |source| StoreError::Io {
            path: path.clone(),
            source,
        };
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            flock(&file, FlockOperation::LockExclusive).map_err(|errno| io(errno.into()))?;
        }
        Ok(Lock(file))
    }

    pub(crate) fn part(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A folder for unfinished work. Needs the lock, because others' unfinished work is taken for abandoned.
    pub(crate) fn unfinished(&self, _lock: &Lock, name: &str) -> Result<PathBuf, StoreError> {
        // A name of its own: compilers of a process that was killed may still be writing to the last one's.
        let folder = tempfile::Builder::new()
            .prefix(&format!("{UNFINISHED}{name}-"))
            .tempdir_in(&self.root);
        let path = folder
            .map_err(|source| StoreError::Io {
                path: self.root.clone(),
                source,
            })?
            .keep();
        // Ours alone is for secrets. What is published from here may be read by others.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(|source| {
            StoreError::Io {
                path: path.clone(),
                source,
            }
        })?;
        Ok(path)
    }

    /// Removes what a killed process left.
    pub(crate) fn remove_unfinished(&self, _lock: &Lock) -> Result<(), StoreError> {
        for (name, path) in self.members()? {
            if is_unfinished(&name) {
                // What a compiler is still writing to cannot be removed now; the next prepare will.
                let _ = remove(&path);
            }
        }
        Ok(())
    }

    /// Makes finished work a part of the store, all of it at once.
    pub(crate) fn publish(
        &self,
        _lock: &Lock,
        finished: &Path,
        name: &str,
    ) -> Result<PathBuf, StoreError> {
        let path = self.part(name);
        let io = |source| StoreError::Io {
            path: path.clone(),
            source,
        };
        remove(&path).map_err(io)?;
        fs::rename(finished, &path).map_err(io)?;
        sync(&self.root).map_err(io)?;
        Ok(path)
    }

    /// Removes the oldest parts with this prefix. Running labs keep what they have open.
    pub(crate) fn keep_newest(
        &self,
        _lock: &Lock,
        prefix: &str,
        count: usize,
    ) -> Result<(), StoreError> {
        let age = |path: &PathBuf| fs::metadata(path).and_then(|about| about.modified()).ok();
        let mut parts: Vec<_> = self
            .members()?
            .into_iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(_, path)| path)
            .collect();
        parts.sort_by_key(age);
        for path in parts.iter().rev().skip(count) {
            remove(path).map_err(|source| StoreError::Io {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Names and paths of what is there.
    pub(crate) fn members(&self) -> Result<Vec<(String, PathBuf)>, StoreError> {
        let io = |source| StoreError::Io {
            path: self.root.clone(),
            source,
        };
        let mut members = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io)? {
            let entry = entry.map_err(io)?;
            members.push((
                entry.file_name().to_string_lossy().into_owned(),
                entry.path(),
            ));
        }
        members.sort();
        Ok(members)
    }
}

/// Whether a member of the store with this name is work that nobody has published.
pub(crate) fn is_unfinished(name: &str) -> bool {
    name.starts_with(UNFINISHED)
}

/// Removes a file or a tree, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes sure that a file or folder is on the disk.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A short name for everything that a part is made from.
pub(crate) fn key<'a>(ingredients: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for ingredient in ingredients {
        hash.update((ingredient.len() as u64).to_le_bytes());
        hash.update(ingredient);
    }
    let mut name = hex(&hash.finalize());
    name.truncate(16);
    name
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_ingredients_apart() {
        assert_ne!(key([b"ab".as_slice(), b"c"]), key([b"a".as_slice(), b"bc"]));
        assert_eq!(key([b"ab".as_slice()]).len(), 16);
    }

    #[test]
    fn the_oldest_parts_go() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path()).unwrap();
        let lock = store.lock(|| {}).unwrap();
        for (age, name) in [(30, "m-b"), (20, "m-c"), (10, "m-a"), (90, "other")] {
            fs::create_dir(store.part(name)).unwrap();
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
            fs::File::open(store.part(name))
                .unwrap()
                .set_modified(then)
                .unwrap();
        }
        store.keep_newest(&lock, "m-", 2).unwrap();
        let names: Vec<_> = store
            .members()
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["lock", "m-a", "m-c", "other"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path()).unwrap();
        let lock = store.lock(|| panic!("nobody else is here")).unwrap();
        let work = store.unfinished(&lock, "x").unwrap();
        fs::write(work.join("f"), "1").unwrap();
        store.publish(&lock, &work, "part").unwrap();
        store.unfinished(&lock, "y").unwrap();
        store.remove_unfinished(&lock).unwrap();
        let names: Vec<_> = store
            .members()
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["lock", "part"]);
    }
}
