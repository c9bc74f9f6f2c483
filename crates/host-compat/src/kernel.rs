//! Which kernel a host runs, and which of the known fixes it has, judged by its version alone.
//!
//! Distributions take fixes into kernels whose numbers do not change, so that a version is evidence,
//! not proof. [`State::Absent`] means that upstream's kernel of that version does not have the fix.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The kernel of a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// What `uname -r` says.
    pub release: String,
    /// The upstream version that it is built from; `None` where the distribution does not say.
    pub upstream: Option<Version>,
}

impl Kernel {
    /// From the three places that tell: `uname -r`, `uname -v`, and /proc/version_signature, which
    /// Ubuntu's kernels have.
    ///
    /// ```
    /// use host_compat::kernel::Kernel;
    ///
    /// // Debian's stable releases name an ABI in -r, and the version in -v.
    /// let kernel = Kernel::from_names(
    ///     "6.1.0-44-amd64",
    ///     "#1 SMP PREEMPT_DYNAMIC Debian 6.1.162-1 (2026-02-01)",
    ///     None,
    /// );
    /// assert_eq!(kernel.upstream, "6.1.162".parse().ok());
    /// // A distribution which counts for itself.
    /// let kernel = Kernel::from_names("5.14.0-503.11.1.el9_5.x86_64", "#1 SMP", None);
    /// assert_eq!(kernel.upstream, None);
    /// ```
    #[must_use]
    pub fn from_names(release: &str, version: &str, signature: Option<&str>) -> Self {
        let upstream = signature
            // Ubuntu 6.8.0-45.45-generic 6.8.12
            .and_then(|text| text.split_whitespace().last()?.parse().ok())
            .or_else(|| debian(version))
            .or_else(|| upstream(release));
        Self {
            release: release.to_string(),
            upstream,
        }
    }

    /// Each known fix, and whether this kernel has it, by its version alone.
    /// [`Host::fixes`](crate::Host::fixes) knows of backports.
    pub(crate) fn fixes(&self) -> impl Iterator<Item = (&'static Fix, State)> {
        let upstream = self.upstream;
        FIXES.iter().map(move |fix| {
            let state = upstream.map_or(State::Unknown, |version| fix.state(version));
            (fix, state)
        })
    }
}

/// `... Debian 6.1.162-1 (2026-02-01)`
fn debian(version: &str) -> Option<Version> {
    let (_, after) = version.split_once("Debian ")?;
    let word = after.split_whitespace().next()?;
    // A revision can have hyphens and tildes of its own: 6.12.9-1~bpo12+1, 7.0~rc4-1~exp1.
    let (number, _revision) = word.split_once('-')?;
    match number.split_once('~') {
        None => number.parse().ok(),
        Some((number, rest)) => {
            let mut version: Version = number.parse().ok()?;
            version.candidate = candidate(rest);
            Some(version)
        }
    }
}

/// The number of a release candidate behind `rc`: in `rc4`, `-0.rc3.20.fc44`, `-061900rc3-generic`.
fn candidate(text: &str) -> Option<u16> {
    let (_, number) = text.split_once("rc")?;
    let end = number.find(|c: char| !c.is_ascii_digit());
    number.get(..end.unwrap_or(number.len()))?.parse().ok()
}

/// The number of a release that counts as upstream does: `6.12.107+deb13-amd64`, `6.18.44`,
/// `6.19.0-rc3`, `6.19~rc3`, and with a fourth part that counts builds `6.6.51.1-5.azl3`,
/// `5.15.167.4-microsoft-standard-WSL2`. A patch level of 0 with something else behind it is a
/// distribution's own count, unless it names a release candidate (`6.19.0-0.rc3.20.fc44`).
fn upstream(release: &str) -> Option<Version> {
    let end = release
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(release.len());
    let (number, rest) = release.split_at_checked(end)?;
    let parts = number.split('.').count();
    let number = match number.rsplit_once('.') {
        Some((upstream, _build)) if parts == 4 => upstream,
        _ => number,
    };
    let mut version: Version = number.parse().ok()?;
    if version.patch == 0
        && let Some(candidate) = candidate(rest)
    {
        version.candidate = Some(candidate);
        return Some(version);
    }
    (rest.is_empty() || parts >= 3 && version.patch != 0).then_some(version)
}

/// An upstream version: `6.12.67`, `6.19-rc3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// The first number.
    pub major: u16,
    /// The second.
    pub minor: u16,
    /// The third, 0 where there is none.
    pub patch: u16,
    /// The number of a release candidate.
    pub candidate: Option<u16>,
}

impl Version {
    const fn branch(self) -> (u16, u16) {
        (self.major, self.minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch != 0 {
            write!(f, ".{}", self.patch)?;
        }
        if let Some(candidate) = self.candidate {
            write!(f, "-rc{candidate}")?;
        }
        Ok(())
    }
}

impl FromStr for Version {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let parse = || {
            let (number, candidate) = match text.split_once("-rc") {
                Some((number, candidate)) => (number, Some(decimal(candidate)?)),
                None => (text, None),
            };
            let mut parts = number.split('.');
            let version = Self {
                major: decimal(parts.next()?)?,
                minor: decimal(parts.next()?)?,
                patch: parts.next().map_or(Some(0), decimal)?,
                candidate,
            };
            parts.next().is_none().then_some(version)
        };
        parse().ok_or_else(|| NotAVersion {
            text: text.to_string(),
        })
    }
}

fn decimal(text: &str) -> Option<u16> {
    // `parse` takes a sign as well.
    text.starts_with(|c: char| c.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// A text is not an upstream version.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not a version of Linux such as 6.12.67 or 6.19-rc3")]
pub struct NotAVersion {
    /// The text.
    pub text: String,
}

/// Whether a kernel has a fix, by its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Upstream's kernel of that version has it.
    Present,
    /// Upstream's kernel of that version does not have it.
    Absent,
    /// The kernel is older than what is fixed.
    NotAffected,
    /// The version does not tell.
    Unknown,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Present => "fixed, by its version",
            Self::Absent => "not fixed, by its version",
            Self::NotAffected => "not affected, by its version",
            Self::Unknown => "its version does not tell",
        })
    }
}

/// How bad it is to lack a fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// A VMM has to know of it, and can do without.
    Notable,
    /// A guest, or a program on the host, can find wrong state.
    State,
    /// The host can go down.
    Host,
}

impl Severity {
    /// Whether a host needs the fix before it has guests with AMX.
    #[must_use]
    pub const fn is_serious(self) -> bool {
        !matches!(self, Self::Notable)
    }

    /// Its name for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Notable => "notable",
            Self::State => "state",
            Self::Host => "host",
        }
    }
}

/// A fix that guests with AMX need, or that a VMM has to know of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fix {
    /// The CVE, or the upstream commit where there is none.
    pub id: &'static str,
    /// How bad it is to lack it.
    pub severity: Severity,
    /// What goes wrong without it.
    pub without: &'static str,
    /// The first kernel with the defect.
    since: (u16, u16),
    /// The first kernel of Linus with the fix.
    mainline: (u16, u16),
    /// The first of each stable series with the fix.
    stable: &'static [(u16, u16, u16)],
    /// Series of which it is not known here.
    unknown: &'static [(u16, u16)],
}

impl Fix {
    /// Whether upstream's kernel of that version has it.
    #[must_use]
    pub fn state(&self, version: Version) -> State {
        let branch = version.branch();
        if self.unknown.contains(&branch) {
            return State::Unknown;
        }
        if branch < self.since {
            return State::NotAffected;
        }
        if branch == self.mainline && version.candidate.is_some() {
            // It came with one of the candidates.
            return State::Unknown;
        }
        if branch >= self.mainline {
            return State::Present;
        }
        let first = self
            .stable
            .iter()
            .find(|(major, minor, _)| (*major, *minor) == branch);
        match first {
            Some((.., patch)) if version.candidate.is_none() && version.patch >= *patch => {
                State::Present
            }
            _ => State::Absent,
        }
    }
}

/// The fixes that are known here, the newest first. The versions of those with a CVE are those of
/// the kernel's CVE records.
pub const FIXES: &[Fix] = &[
    Fix {
        id: "CVE-2026-23005",
        severity: Severity::Host,
        without: "a guest's WRMSR of IA32_XFD that meets an interrupt, or KVM_SET_XSAVE of a \
                  component that IA32_XFD disables, panics the host; no kernel is protected from \
                  a VMM that disables it only after KVM_SET_XSAVE",
        since: (5, 17),
        mainline: (6, 19),
        stable: &[(6, 1, 162), (6, 6, 122), (6, 12, 67), (6, 18, 7)],
        unknown: &[],
    },
    Fix {
        id: "CVE-2025-68171",
        severity: Severity::State,
        without: "IA32_XFD can be stale when a signal is delivered",
        since: (5, 16),
        mainline: (6, 18),
        stable: &[(6, 1, 159), (6, 6, 117), (6, 12, 58), (6, 17, 8)],
        unknown: &[],
    },
    Fix {
        id: "3ef0df3f760f",
        severity: Severity::State,
        without: "a guest's IA32_XFD_ERR is overwritten at a #NM that CR0.TS has caused",
        since: (5, 17),
        mainline: (6, 15),
        stable: &[],
        unknown: &[],
    },
    Fix {
        id: "CVE-2024-35801",
        severity: Severity::Host,
        without: "a processor that was offline can panic the host: its IA32_XFD is not what the \
                  kernel remembers",
        since: (5, 16),
        mainline: (6, 9),
        stable: &[(6, 1, 84), (6, 6, 24), (6, 7, 12), (6, 8, 3)],
        unknown: &[],
    },
    Fix {
        id: "8647c52e9504",
        severity: Severity::Notable,
        without: "KVM_GET_XSAVE2 reports components that the guest does not have, or KVM_SET_XSAVE \
                  refuses such an area: sanitize states from here with the guest's components",
        since: (5, 17),
        mainline: (6, 6),
        stable: &[(6, 5, 9)],
        // Not checked, and the defect came to them late.
        unknown: &[(6, 1), (5, 15), (5, 10)],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn names(release: &str, version: &str, signature: Option<&str>) -> Option<String> {
        Kernel::from_names(release, version, signature)
            .upstream
            .map(|version| version.to_string())
    }

    #[test]
    fn upstream_versions_of_real_kernels() {
        let plain = "#1 SMP PREEMPT_DYNAMIC";
        for (release, version, signature, expected) in [
            // Debian 13 and sid, 12
            (
                "6.12.107+deb13-amd64",
                "#1 SMP PREEMPT_DYNAMIC Debian 6.12.107-1 (2026-11-01)",
                None,
                Some("6.12.107"),
            ),
            (
                "6.1.0-44-amd64",
                "#1 SMP PREEMPT_DYNAMIC Debian 6.1.164-1 (2026-03-09)",
                None,
                Some("6.1.164"),
            ),
            (
                "7.0-amd64",
                "#1 SMP PREEMPT_DYNAMIC Debian 7.0~rc4-1~exp1 (2026-03-09)",
                None,
                Some("7.0-rc4"),
            ),
            (
                "6.12.9+bpo-amd64",
                "#1 SMP PREEMPT_DYNAMIC Debian 6.12.9-1~bpo12+1 (2025-01-19)",
                None,
                Some("6.12.9"),
            ),
            ("6.19~rc3", plain, None, Some("6.19-rc3")),
            // Fedora, and Ubuntu's builds of candidates
            ("6.19.0-0.rc3.20.fc44.x86_64", plain, None, Some("6.19-rc3")),
            ("6.19.0-061900rc3-generic", plain, None, Some("6.19-rc3")),
            // Azure Linux and WSL count builds in a fourth part.
            ("6.6.51.1-5.azl3", plain, None, Some("6.6.51")),
            (
                "5.15.167.4-microsoft-standard-WSL2",
                plain,
                None,
                Some("5.15.167"),
            ),
            ("6.6.0.1-5.azl3", plain, None, None),
            // Ubuntu, with and without the signature
            (
                "6.8.0-45-generic",
                "#45-Ubuntu SMP",
                Some("Ubuntu 6.8.0-45.45-generic 6.8.12"),
                Some("6.8.12"),
            ),
            ("6.8.0-45-generic", "#45-Ubuntu SMP", None, None),
            // RHEL, SUSE, Amazon Linux, upstream
            ("5.14.0-503.11.1.el9_5.x86_64", plain, None, None),
            ("6.4.0-150600.23.7-default", plain, None, None),
            (
                "6.1.102-108.177.amzn2023.x86_64",
                plain,
                None,
                Some("6.1.102"),
            ),
            ("6.18.44", plain, None, Some("6.18.44")),
            ("6.19.0", plain, None, Some("6.19")),
            ("6.19.0-rc3+", plain, None, Some("6.19-rc3")),
            ("7.0.0-rc12-next", plain, None, Some("7.0-rc12")),
            ("nonsense", plain, None, None),
            ("", "", Some(""), None),
            ("99999.1", plain, None, None),
            ("6", plain, None, None),
        ] {
            assert_eq!(
                names(release, version, signature).as_deref(),
                expected,
                "{release}"
            );
        }
    }

    #[test]
    fn versions_are_read_as_they_are_written() {
        for text in ["6.12.67", "6.19", "6.19-rc3", "5.17.1"] {
            let version: Version = text.parse().unwrap();
            assert_eq!(version.to_string(), text);
        }
        for text in [
            "", "6", "6.", "6.1.2.3", "+6.1", "6.+1", "6.1-rc", "6.1-rcx", "6.1.x", "70000.1",
        ] {
            assert_eq!(
                text.parse::<Version>(),
                Err(NotAVersion { text: text.into() })
            );
        }
    }

    #[test]
    fn a_fix_is_there_from_its_version_on() {
        let fix = FIXES.iter().find(|fix| fix.id == "CVE-2026-23005").unwrap();
        for (version, state) in [
            ("5.16.20", State::NotAffected),
            ("5.17", State::Absent),
            ("6.1.161", State::Absent),
            ("6.1.162", State::Present),
            ("6.6.121", State::Absent),
            ("6.6.122", State::Present),
            ("6.12.66", State::Absent),
            ("6.12.67", State::Present),
            ("6.17.99", State::Absent),
            ("6.18", State::Absent),
            ("6.18-rc1", State::Absent),
            ("6.18.7", State::Present),
            ("6.19-rc8", State::Unknown),
            ("6.19", State::Present),
            ("7.2.13", State::Present),
        ] {
            assert_eq!(fix.state(version.parse().unwrap()), state, "{version}");
        }
    }

    #[test]
    fn what_was_not_checked_is_not_claimed() {
        let fix = FIXES.iter().find(|fix| fix.id == "8647c52e9504").unwrap();
        assert_eq!(fix.state("6.1.100".parse().unwrap()), State::Unknown);
        assert_eq!(fix.state("6.5.8".parse().unwrap()), State::Absent);
        assert_eq!(fix.state("6.5.9".parse().unwrap()), State::Present);

        let unknown = Kernel::from_names("6.8.0-45-generic", "", None);
        assert!(unknown.fixes().all(|(_, state)| state == State::Unknown));
        assert_eq!(unknown.fixes().count(), FIXES.len());
    }

    #[test]
    fn every_series_is_between_the_defect_and_the_fix() {
        for fix in FIXES {
            assert!(fix.since < fix.mainline);
            for &(major, minor, _) in fix.stable {
                assert!(fix.since <= (major, minor) && (major, minor) < fix.mainline);
            }
            assert!(fix.unknown.iter().all(|branch| *branch < fix.mainline));
        }
    }
}
