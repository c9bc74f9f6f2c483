//! The list of a part's files with their hashes: what was made, and whether it is still that.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::{hex, sync};

const NAME: &str = "manifest.json";

/// What a part is and what it consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// Packages that it came from, with their versions.
    pub(crate) packages: BTreeMap<String, String>,
    /// Facts about it that its users need.
    pub(crate) facts: BTreeMap<String, String>,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    sha256: String,
    bytes: u64,
    /// When it was last changed, in nanoseconds since 1970: a file with another time is hashed again.
    changed: i128,
}

/// Why a part cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// It was never finished, or was removed.
    #[error("{path} is not there; run `amx-lab prepare` (with --kernel, if not for trixie)", path = path.display())]
    Missing {
        /// The manifest that was looked for.
        path: PathBuf,
    },
    /// A file is not what it was when the part was made.
    #[error("{path} is not what it was when it was made; run `amx-lab prepare`", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// An older version of the lab has kept less of it than is wanted now.
    #[error("{path} is of an older version; run `amx-lab prepare` (with --kernel, if not for trixie)", path = path.display())]
    Incomplete {
        /// The part.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// How closely files are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Care {
    /// Size and time of the last change, and the bytes only where that time has changed. Enough to find a part that was damaged by
    /// accident.
    Glance,
    /// Every byte.
    Hash,
}

impl Manifest {
    /// Describes the files in `folder`, writes that down there, and puts it all on the disk.
    pub(crate) fn create(
        folder: &Path,
        packages: BTreeMap<String, String>,
        facts: BTreeMap<String, String>,
    ) -> Result<Self, ManifestError> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(current) = folders.pop() {
            let io = |source| ManifestError::Io {
                path: current.clone(),
                source,
            };
            for entry in fs::read_dir(&current).map_err(io)? {
                let path = entry.map_err(io)?.path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path
                        .strip_prefix(folder)
                        .unwrap_or(&path)
                        .to_string_lossy()
                        .into_owned();
                    let io = |source| ManifestError::Io {
                        path: path.clone(),
                        source,
                    };
                    sync(&path).map_err(io)?;
                    files.insert(name, FileRecord::of(&path, Care::Hash).map_err(io)?);
                }
            }
            sync(&current).map_err(io)?;
        }
        let manifest = Self {
            packages,
            facts,
            files,
        };
        let path = folder.join(NAME);
        let io = |source| ManifestError::Io {
            path: path.clone(),
            source,
        };
        let text = serde_json::to_string_pretty(&manifest).map_err(|error| io(error.into()))?;
        fs::write(&path, text).map_err(io)?;
        sync(&path).map_err(io)?;
        sync(folder).map_err(io)?;
        Ok(manifest)
    }

    /// Reads the description of the part in `folder` and compares the files with it. A file whose time has changed is hashed: caches and
    /// layers of images keep bytes and lose times. If it is what it was, its new time is written down.
    pub(crate) fn check(folder: &Path, care: Care) -> Result<Self, ManifestError> {
        let path = folder.join(NAME);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::Missing { path });
            }
            Err(source) => return Err(ManifestError::Io { path, source }),
            Ok(text) => text,
        };
        let mut manifest: Self =
            serde_json::from_slice(&text).map_err(|_| ManifestError::Changed { path })?;
        let mut moved = false;
        for (name, record) in &mut manifest.files {
            let path = folder.join(name);
            let seen = |care| match FileRecord::of(&path, care) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(ManifestError::Changed { path: path.clone() })
                }
                other => other.map_err(|source| ManifestError::Io {
                    path: path.clone(),
                    source,
                }),
            };
            let mut now = seen(care)?;
            let has_moved = now.changed != record.changed;
            if now.bytes == record.bytes && has_moved && care == Care::Glance {
                now = seen(Care::Hash)?;
            }
            if now.bytes != record.bytes || now.sha256_or(record) != record.sha256 {
                return Err(ManifestError::Changed { path });
            }
            record.changed = now.changed;
            moved |= has_moved;
        }
        if moved {
            // Where it cannot be written, it is hashed again the next time.
            let _ = manifest.replace(folder);
        }
        Ok(manifest)
    }

    /// Writes the description anew, all of it at once: others may be reading it.
    fn replace(&self, folder: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        // What others may read stays so.
        let permissions = fs::metadata(folder.join(NAME))?.permissions();
        file.as_file().set_permissions(permissions)?;
        file.persist(folder.join(NAME))?;
        Ok(())
    }

    /// Whether the part was made with a file of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// A fact that the part was made with.
    pub(crate) fn fact(&self, folder: &Path, name: &str) -> Result<&str, ManifestError> {
        self.facts
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| ManifestError::Changed {
                path: folder.join(NAME),
            })
    }

    /// Stands for the content of all files.
    pub(crate) fn digest(&self) -> String {
        let lines: String = self
            .files
            .iter()
            .map(|(name, record)| format!("{} {name}\n", record.sha256))
            .collect();
        hex(&Sha256::digest(lines))
    }
}

impl FileRecord {
    fn of(path: &Path, care: Care) -> io::Result<Self> {
        let about = fs::metadata(path)?;
        let changed = i128::from(about.mtime())
            .saturating_mul(1_000_000_000)
            .saturating_add(i128::from(about.mtime_nsec()));
        let sha256 = if care == Care::Hash {
            hash_file(path)?
        } else {
            String::new()
        };
        Ok(Self {
            sha256,
            bytes: about.len(),
            changed,
        })
    }

    fn sha256_or<'a>(&'a self, other: &'a Self) -> &'a str {
        if self.sha256.is_empty() {
            &other.sha256
        } else {
            &self.sha256
        }
    }
}

fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("d/f"), "abc").unwrap();
        Manifest::create(folder.path(), BTreeMap::new(), BTreeMap::new()).unwrap();
        folder
    }

    #[test]
    fn an_unchanged_part_passes() {
        let folder = part();
        let manifest = Manifest::check(folder.path(), Care::Glance).unwrap();
        assert_eq!(
            Manifest::check(folder.path(), Care::Hash).unwrap(),
            manifest
        );
        assert_eq!(
            manifest.files.get("d/f").unwrap().sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    /// Sets another time of the last change.
    fn touch(folder: &Path) {
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(1000);
        let file = File::options()
            .append(true)
            .open(folder.join("d/f"))
            .unwrap();
        file.set_modified(then).unwrap();
    }

    #[test]
    fn a_copy_without_its_times_passes_and_is_hashed_once() {
        let folder = part();
        let first = Manifest::check(folder.path(), Care::Glance).unwrap();
        touch(folder.path());
        let second = Manifest::check(folder.path(), Care::Glance).unwrap();
        assert_ne!(first, second);
        assert_eq!(first.digest(), second.digest());
        let text = fs::read(folder.path().join(NAME)).unwrap();
        assert_eq!(serde_json::from_slice::<Manifest>(&text).unwrap(), second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        // Other bytes of the same number, and another time.
        fs::write(folder.path().join("d/f"), "abd").unwrap();
        touch(folder.path());
        assert!(matches!(
            Manifest::check(folder.path(), Care::Glance),
            Err(ManifestError::Changed { .. })
        ));
    }

    #[test]
    fn damage_is_found() {
        for care in [Care::Glance, Care::Hash] {
            let folder = part();
            fs::write(folder.path().join("d/f"), "abcd").unwrap();
            assert!(matches!(
                Manifest::check(folder.path(), care),
                Err(ManifestError::Changed { .. })
            ));
            fs::remove_file(folder.path().join("d/f")).unwrap();
            assert!(matches!(
                Manifest::check(folder.path(), care),
                Err(ManifestError::Changed { .. })
            ));
            fs::remove_file(folder.path().join(NAME)).unwrap();
            assert!(matches!(
                Manifest::check(folder.path(), care),
                Err(ManifestError::Missing { .. })
            ));
        }
        let folder = part();
        fs::write(folder.path().join("d/f"), "abd").unwrap();
        assert!(matches!(
            Manifest::check(folder.path(), Care::Hash),
            Err(ManifestError::Changed { .. })
        ));
    }
}
