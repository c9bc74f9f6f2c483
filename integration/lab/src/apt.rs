//! Fetches packages by name through apt with a configuration of our own: nothing of the system is changed, and apt checks the signatures.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sources::{Mirror, find_mirror};
use crate::tools::{self, ToolError};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt for one suite, in a folder of its own.
#[derive(Debug)]
pub(crate) struct Apt {
    folder: PathBuf,
    suite: String,
}

/// Why packages could not be fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AptError {
    /// This machine's apt knows no mirror of Debian.
    #[error("apt's sources on this machine name no mirror of Debian; give one with --mirror")]
    NoMirror,
    /// The keys that Debian's lists are signed with are not on this machine.
    #[error("{path} is not there, so nothing from Debian could be checked; install the package debian-archive-keyring", path = path.display())]
    NoKeyring {
        /// Where the keys should be.
        path: PathBuf,
    },
    /// The suite has no such package.
    #[error("{suite} has no package {package}")]
    NoPackage {
        /// The package.
        package: String,
        /// The suite.
        suite: String,
    },
    /// apt failed.
    #[error("{suite}")]
    Tool {
        /// The suite.
        suite: String,
        /// How.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file system refused.
    #[error("{path}", path = path.display())]
    Io {
        /// What was being used.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// A package that was fetched.
#[derive(Debug, Clone)]
pub(crate) struct Fetched {
    pub(crate) file: PathBuf,
    pub(crate) version: String,
}

impl Apt {
    /// Sets up apt for this suite in `folder` and fetches the suite's lists. `mirror` overrides the machine's own.
    pub(crate) fn new(
        folder: &Path,
        suite: &str,
        mirror: Option<&str>,
        with_sources: bool,
    ) -> Result<Self, AptError> {
        let apt = Self {
            folder: folder.to_owned(),
            suite: suite.to_owned(),
        };
        for part in ["state/lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(|source| AptError::Io { path, source })?;
        }
        let mirror = choose_mirror(mirror, find_mirror(Path::new("/etc/apt")))?;
        let keyring = mirror.keyring.unwrap_or_else(|| KEYRING.into());
        if !keyring.is_file() {
            return Err(AptError::NoKeyring { path: keyring });
        }
        let mut sources = String::new();
        for kind in if with_sources {
            ["deb", "deb-src"].as_slice()
        } else {
            &["deb"]
        } {
            sources.push_str(&format!(
                "{kind} [signed-by={}] {} {suite} main\n",
                keyring.display(),
                mirror.address
            ));
        }
        apt.write("sources.list", &sources)?;
        apt.write("state/status", "")?;
        apt.write(
            "apt.conf",
            &configuration(folder, &apt.machine_network_settings()),
        )?;
        apt.get(&["update", "--error-on=any"])?;
        Ok(apt)
    }

    /// Fetches the upstream tarball of a source package. apt compares its hash with the signed list.
    pub(crate) fn source_tarball(&self, package: &str) -> Result<Fetched, AptError> {
        let folder = self.folder.join("source");
        let io = |source| AptError::Io {
            path: folder.clone(),
            source,
        };
        fs::create_dir_all(&folder).map_err(io)?;
        let version = self
            .cache(&["showsrc", package])?
            .lines()
            .find_map(|line| line.strip_prefix("Version: ").map(str::to_owned))
            .ok_or_else(|| self.no_package(package))?;
        // Only the tarball: the description file of an older version is not always there any more.
        let asked = format!("{package}={version}");
        self.run(
            self.command("apt-get")
                .args(["source", "--download-only", "--tar-only", &asked])
                .current_dir(&folder),
        )?;
        let file = files_in(&folder)
            .map_err(io)?
            .into_iter()
            .find(|path| path.to_string_lossy().contains(".orig.tar"));
        Ok(Fetched {
            file: file.ok_or_else(|| self.no_package(package))?,
            version,
        })
    }

    /// Fetches the newest packages that this one stands for: itself, and all that `wanted` says yes to among what it depends on.
    pub(crate) fn packages(
        &self,
        meta: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<(String, Fetched)>, AptError> {
        let mut fetched: Vec<(String, Fetched)> = Vec::new();
        let mut open = vec![meta.to_owned()];
        while let Some(package) = open.pop() {
            let about = self
                .cache(&["show", "--no-all-versions", &package])
                .map_err(|_| self.no_package(&package))?;
            let field = |name: &str| {
                about
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .unwrap_or_default()
            };
            for dependency in field("Depends: ").split([',', '|']) {
                let name = dependency.split_whitespace().next().unwrap_or_default();
                if wanted(name)
                    && name != meta
                    && !fetched.iter().any(|(have, _)| have == name)
                    && !open.iter().any(|have| have == name)
                {
                    open.push(name.to_owned());
                }
            }
            if package != meta {
                let version = field("Version: ").to_owned();
                let file = self.binary(&package, &version)?;
                fetched.push((package, Fetched { file, version }));
            }
        }
        if fetched.is_empty() {
            Err(self.no_package(meta))
        } else {
            Ok(fetched)
        }
    }

    /// Fetches the newest version of this package alone.
    pub(crate) fn package(&self, package: &str) -> Result<Fetched, AptError> {
        let about = self
            .cache(&["show", "--no-all-versions", package])
            .map_err(|_| self.no_package(package))?;
        let version = about
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))
            .ok_or_else(|| self.no_package(package))?
            .to_owned();
        Ok(Fetched {
            file: self.binary(package, &version)?,
            version,
        })
    }

    fn binary(&self, package: &str, version: &str) -> Result<PathBuf, AptError> {
        let folder = self.folder.join("binary").join(package);
        let io = |source| AptError::Io {
            path: folder.clone(),
            source,
        };
        fs::create_dir_all(&folder).map_err(io)?;
        self.run(
            self.command("apt-get")
                .args(["download", &format!("{package}={version}")])
                .current_dir(&folder),
        )?;
        files_in(&folder)
            .map_err(io)?
            .into_iter()
            .next()
            .ok_or_else(|| self.no_package(package))
    }

    fn no_package(&self, package: &str) -> AptError {
        AptError::NoPackage {
            package: package.to_owned(),
            suite: self.suite.clone(),
        }
    }

    fn write(&self, name: &str, text: &str) -> Result<(), AptError> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(|source| AptError::Io { path, source })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn get(&self, args: &[&str]) -> Result<String, AptError> {
        self.run(self.command("apt-get").args(args))
    }

    fn cache(&self, args: &[&str]) -> Result<String, AptError> {
        self.run(self.command("apt-cache").args(args))
    }

    fn run(&self, command: &mut Command) -> Result<String, AptError> {
        tools::run(command).map_err(|source: ToolError| AptError::Tool {
            suite: self.suite.clone(),
            source: source.into(),
        })
    }

    /// How this machine reaches its mirror, and how old its lists may be: a frozen mirror's are older than Debian allows, and whoever
    /// set the machine up has then said so. The rest of the machine's configuration stays out: it has hooks.
    fn machine_network_settings(&self) -> String {
        const PREFIXES: [&str; 5] = [
            "Acquire::http",
            "Acquire::https",
            "Acquire::Check-Valid-Until",
            "Acquire::Max-ValidTime",
            "Acquire::Check-Date",
        ];
        let dump = tools::run(Command::new("apt-config").arg("dump")).unwrap_or_default();
        let wanted = |line: &&str| PREFIXES.iter().any(|prefix| line.starts_with(prefix));
        dump.lines()
            .filter(wanted)
            .map(|line| format!("{line}\n"))
            .collect()
    }
}

fn choose_mirror(given: Option<&str>, found: Option<Mirror>) -> Result<Mirror, AptError> {
    match (given, found) {
        (Some(address), found) => Ok(Mirror {
            address: address.to_owned(),
            keyring: found.and_then(|mirror| mirror.keyring),
        }),
        (None, Some(mirror)) => Ok(mirror),
        (None, None) => Err(AptError::NoMirror),
    }
}

fn configuration(folder: &Path, network: &str) -> String {
    let folder = folder.display();
    format!(
        r#"Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::Main "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Get::AllowUnauthenticated "false";
APT::Sandbox::User "";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "60";
{network}"#
    )
}

fn files_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_mirror_wins_and_keeps_the_machines_keys() {
        let machine = Mirror {
            address: "http://m.example/debian".into(),
            keyring: Some("/k".into()),
        };
        let chosen = choose_mirror(Some("http://other.example/d"), Some(machine.clone())).unwrap();
        assert_eq!(
            chosen,
            Mirror {
                address: "http://other.example/d".into(),
                keyring: Some("/k".into())
            }
        );
        assert_eq!(choose_mirror(None, Some(machine.clone())).unwrap(), machine);
        assert!(matches!(choose_mirror(None, None), Err(AptError::NoMirror)));
    }

    #[test]
    fn nothing_of_the_system_is_in_the_configuration() {
        let text = configuration(Path::new("/f"), "");
        for line in text.lines().filter(|line| line.starts_with("Dir::")) {
            assert!(
                line.contains("\"/f/") || line.contains("\"/dev/null\"") || line.contains("\"/f"),
                "{line}"
            );
        }
    }
}
