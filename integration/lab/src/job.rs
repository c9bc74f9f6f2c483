//! A program that is to run in the lab, with all that goes along.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cpio::{self, Entry, Writer};
use crate::elf::{self, ElfError};
use crate::wire::JobHeader;

/// Tells a program that it runs in the lab; the value is `1`.
pub(crate) const IN_LAB: &str = "AMX_LAB";
/// Tells a program where its out folder is.
pub(crate) const OUT: &str = "AMX_LAB_OUT";
const OUT_FOLDER: &str = "/out";

/// Why a program cannot be sent to the lab.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// There is no such file.
    #[error("{path}: there is no such program", path = path.display())]
    NoProgram {
        /// The program.
        path: PathBuf,
    },
    /// It is no program that the lab can run.
    #[error("{path}", path = path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// Why.
        source: ElfError,
    },
    /// It is not a file that may be executed.
    #[error("{path}: {why}", path = path.display())]
    NotExecutable {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        why: &'static str,
    },
    /// A path cannot be used inside the lab.
    #[error("{path}: a path inside the lab is absolute, UTF-8 and without ..", path = path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A program, its arguments, environment and files.
#[derive(Debug, Clone)]
pub struct Job {
    program: PathBuf,
    name: OsString,
    args: Vec<OsString>,
    env: BTreeMap<OsString, OsString>,
    directory: String,
    files: Vec<(PathBuf, String)>,
    pub(crate) out: Option<PathBuf>,
}

impl Job {
    /// A job for this program, which must be static. It runs under its own path and in a directory of the same name as this process's.
    ///
    /// # Errors
    /// When it does not exist or cannot run in the lab.
    pub fn new(program: impl AsRef<Path>) -> Result<Self, JobError> {
        let given = program.as_ref();
        let io = |source| JobError::Io {
            path: given.to_owned(),
            source,
        };
        let path = match fs::canonicalize(given) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(JobError::NoProgram {
                    path: given.to_owned(),
                });
            }
            path => path.map_err(io)?,
        };
        let about = fs::metadata(&path).map_err(io)?;
        let not_executable = |why| JobError::NotExecutable {
            path: given.to_owned(),
            why,
        };
        // A device or a pipe would be read without end.
        if !about.is_file() {
            return Err(not_executable("not a file"));
        }
        if about.permissions().mode() & 0o111 == 0 {
            return Err(not_executable("not executable (chmod +x)"));
        }
        let bytes = fs::read(&path).map_err(io)?;
        elf::check_static(&bytes).map_err(|source| JobError::Program {
            path: given.to_owned(),
            source,
        })?;
        guest_path(&path)?;
        let directory = std::env::current_dir()
            .ok()
            .and_then(|path| guest_path(&path).ok())
            .unwrap_or_else(|| "/".to_owned());
        let env = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("HOME", "/tmp"),
            (IN_LAB, "1"),
            (OUT, OUT_FOLDER),
        ];
        let env = env
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        Ok(Self {
            program: path,
            name: given.into(),
            args: Vec::new(),
            env,
            directory,
            files: Vec::new(),
            out: None,
        })
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment, which is otherwise nearly empty.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Takes a file, or a folder with all that is in it, along to `inside`, or to its own path.
    ///
    /// # Errors
    /// When it does not exist or the path cannot be used inside the lab.
    pub fn file(mut self, host: impl AsRef<Path>, inside: Option<&Path>) -> Result<Self, JobError> {
        let host = host.as_ref();
        let found = fs::canonicalize(host).map_err(|source| JobError::Io {
            path: host.to_owned(),
            source,
        })?;
        let inside = match inside {
            Some(path) => guest_path(path)?,
            // As it was given, where that is possible: the program may know it by a link's name.
            None => std::path::absolute(host)
                .ok()
                .and_then(|path| guest_path(&path).ok())
                .map_or_else(|| guest_path(&found), Ok)?,
        };
        self.files.push((found, inside));
        Ok(self)
    }

    /// Brings what the program leaves in its out folder (`/out`, also in `$AMX_LAB_OUT`) back to this folder.
    #[must_use]
    pub fn out(mut self, folder: impl Into<PathBuf>) -> Self {
        self.out = Some(folder.into());
        self
    }

    /// The program's path on this machine.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Writes the job as the lab's init reads it.
    pub(crate) fn send(&self, out: &mut impl Write, stdin: bool) -> io::Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut seed = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut seed)?;
        let program = guest_path(&self.program).map_err(io::Error::other)?;
        let args = std::iter::once(&self.name)
            .chain(&self.args)
            .map(|arg| arg.as_bytes().to_vec())
            .collect();
        let env = self
            .env
            .iter()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
            .collect();
        let header = JobHeader {
            time: (now.as_secs(), now.subsec_nanos()),
            seed,
            stdin,
            out: self.out.is_some(),
            program: program.clone(),
            directory: self.directory.clone(),
            args,
            env,
        };
        header.write(out)?;
        let mut archive = Writer::new(out);
        for (host, inside) in &self.files {
            add(&mut archive, host, inside)?;
        }
        let file = File::open(&self.program)?;
        archive.add(
            &Entry::new(
                relative(&program),
                cpio::FILE | 0o755,
                file.metadata()?.len(),
            ),
            file,
        )?;
        archive.finish().map(drop)
    }
}

fn add(archive: &mut Writer<impl Write>, host: &Path, inside: &str) -> io::Result<()> {
    let about = fs::symlink_metadata(host)?;
    let mode = about.permissions().mode();
    let name = relative(inside);
    if about.is_dir() {
        archive.add(&Entry::new(name, mode, 0), io::empty())?;
        let mut members = fs::read_dir(host)?.collect::<io::Result<Vec<_>>>()?;
        members.sort_by_key(fs::DirEntry::file_name);
        for member in members {
            let member_name = member.file_name();
            let member_name = member_name.to_str().ok_or_else(|| {
                io::Error::other(format!("{}: not UTF-8", member.path().display()))
            })?;
            add(archive, &member.path(), &format!("{inside}/{member_name}"))?;
        }
        Ok(())
    } else if about.is_symlink() {
        let target = fs::read_link(host)?;
        let target = target.as_os_str().as_bytes();
        archive.add(&Entry::new(name, mode, target.len() as u64), target)
    } else if about.is_file() {
        archive.add(&Entry::new(name, mode, about.len()), File::open(host)?)
    } else {
        // Sockets, pipes and devices have no content to take along.
        Ok(())
    }
}

fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// A path that can be used inside the lab.
fn guest_path(path: &Path) -> Result<String, JobError> {
    let plain = path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    match (plain, path.to_str()) {
        (true, Some(text)) => Ok(text.to_owned()),
        _ => Err(JobError::Path {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_carries_its_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("d/f"), "data").unwrap();
        std::os::unix::fs::symlink("f", folder.path().join("d/l")).unwrap();
        let program = folder.path().join("program");
        fs::write(&program, crate::boot_image::INIT).unwrap();
        assert!(matches!(
            Job::new(&program),
            Err(JobError::NotExecutable { .. })
        ));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let job = Job::new(&program)
            .unwrap()
            .args(["a", "b"])
            .env("K", "V")
            .file(folder.path().join("d"), Some(Path::new("/in")))
            .unwrap();
        let mut bytes = Vec::new();
        job.send(&mut bytes, true).unwrap();
        let mut input = bytes.as_slice();
        let header = JobHeader::read(&mut input).unwrap();
        assert_eq!(header.args[1..], [b"a".to_vec(), b"b".to_vec()]);
        assert!(
            header.env.contains(&b"K=V".to_vec()) && header.env.contains(&b"AMX_LAB=1".to_vec())
        );
        assert!(header.stdin && !header.out);
        let mut archive = cpio::Reader::new(input);
        let mut names = Vec::new();
        while let Some(entry) = archive.next_entry().unwrap() {
            names.push(entry.name);
        }
        assert_eq!(names[..3], ["in", "in/f", "in/l"]);
        assert_eq!(format!("/{}", names[3]), header.program);
    }

    #[test]
    fn what_cannot_run_is_refused_at_once() {
        assert!(matches!(
            Job::new("/nonexistent"),
            Err(JobError::NoProgram { .. })
        ));
        for other in ["/", "/dev/zero"] {
            assert!(matches!(
                Job::new(other),
                Err(JobError::NotExecutable { .. })
            ));
        }
        assert!(matches!(
            Job::new("/bin/sh"),
            Err(JobError::Program {
                source: ElfError::NotStatic { .. },
                ..
            })
        ));
        assert!(matches!(
            guest_path(Path::new("/a/../b")),
            Err(JobError::Path { .. })
        ));
        assert!(matches!(
            guest_path(Path::new("a")),
            Err(JobError::Path { .. })
        ));
    }
}
