//! Counts a fleet from JSON lines. Hosts of a kind differ only in their names, so that lines which
//! differ only there are parsed once.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use thiserror::Error;

use crate::baseline::{Fleet, Kind, Shared, Tally, TooManyKinds};
use crate::host::{Host, MAX_TEXT_BYTES};

/// The lines that are remembered have at most so many bytes.
const MAX_KNOWN_BYTES: usize = 64 << 20;

/// A fleet from JSON lines.
///
/// ```
/// use host_compat::baseline::Lines;
/// use cpuid_amx::Table;
/// use host_compat::Host;
///
/// let cpuid: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
/// let mut lines = Lines::new();
/// for name in ["node-1", "node-2"] {
///     let line = serde_json::to_string(&Host::from_cpuid(name, cpuid.clone())).unwrap();
///     lines.add(line.as_bytes()).unwrap();
/// }
/// assert_eq!(lines.into_fleet().hosts(), 2);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Lines {
    fleet: Fleet,
    /// By the bytes of the line without the name.
    known: HashMap<Box<[u8]>, (Kind, Tally)>,
    known_bytes: usize,
    /// The bytes of the last line without the name.
    nameless: Vec<u8>,
}

/// All that differs between hosts of a kind.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

impl Lines {
    /// Starts without lines.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts the host that a line describes. The fields may be in any order.
    ///
    /// # Errors
    ///
    /// The line is no description, or the fleet has too many kinds; nothing has changed.
    pub fn add(&mut self, line: &[u8]) -> Result<(), LineError> {
        let Some(name) = self.split(line) else {
            return Ok(self.fleet.add(&serde_json::from_slice(line)?)?);
        };
        if let Some((_, tally)) = self.known.get_mut(&*self.nameless) {
            tally.hosts = tally.hosts.saturating_add(1);
            tally.names.insert(name);
            return Ok(());
        }
        let host: Host = serde_json::from_slice(line)?;
        let known_bytes = self.known_bytes.saturating_add(self.nameless.len());
        if known_bytes > MAX_KNOWN_BYTES {
            return Ok(self.fleet.add(&host)?);
        }
        let kind = Kind::of(&host);
        // The kind counts from now on, its hosts at the end.
        self.fleet.tally(kind.clone())?;
        self.fleet.share(Shared::of(&host));
        let mut tally = Tally::default();
        tally.add(&host);
        self.known
            .insert(self.nameless.as_slice().into(), (kind, tally));
        self.known_bytes = known_bytes;
        Ok(())
    }

    /// Returns the fleet of all lines.
    #[must_use]
    pub fn into_fleet(self) -> Fleet {
        let mut fleet = self.fleet;
        for (kind, tally) in self.known.into_values() {
            fleet.kinds.entry(kind).or_default().merge(tally);
        }
        fleet
    }

    /// Returns the name of a description, and leaves all other bytes in `nameless`. `None` where the
    /// name has escapes or is too long, and where the line is no description.
    fn split<'a>(&mut self, line: &'a [u8]) -> Option<&'a str> {
        let Cow::Borrowed(name) = serde_json::from_slice::<Named<'_>>(line).ok()?.name else {
            return None;
        };
        if name.len() > MAX_TEXT_BYTES {
            return None;
        }
        let at = name.as_ptr().addr().checked_sub(line.as_ptr().addr())?;
        let (before, rest) = line.split_at_checked(at)?;
        let behind = rest.get(name.len()..)?;
        self.nameless.clear();
        self.nameless.extend_from_slice(before);
        self.nameless.extend_from_slice(behind.trim_ascii_end());
        Some(name)
    }
}

/// Why a line was not counted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LineError {
    /// It is no description of a host.
    #[error("{0}")]
    Parse(serde_json::Error),
    /// The fleet has too many kinds of hosts.
    #[error("{0}")]
    Kinds(TooManyKinds),
}

impl From<serde_json::Error> for LineError {
    fn from(error: serde_json::Error) -> Self {
        Self::Parse(error)
    }
}

impl From<TooManyKinds> for LineError {
    fn from(error: TooManyKinds) -> Self {
        Self::Kinds(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &[u8]) -> Option<(String, Vec<u8>)> {
        let mut lines = Lines::new();
        let name = lines.split(line)?.to_owned();
        Some((name, lines.nameless))
    }

    #[test]
    fn the_name_is_cut_out_wherever_it_is() {
        for (line, nameless) in [
            (r#"{"name":"node-17","x":1}"#, r#"{"name":"","x":1}"#),
            (
                r#"{ "x": {"name":"b"}, "name" : "node-17"}"#,
                r#"{ "x": {"name":"b"}, "name" : ""}"#,
            ),
            ("{\"name\":\"node-17\"}\r\n", r#"{"name":""}"#),
        ] {
            let expected = Some(("node-17".to_owned(), nameless.as_bytes().to_vec()));
            assert_eq!(split(line.as_bytes()), expected);
        }
        let long = |n| format!(r#"{{"name":"{}"}}"#, "x".repeat(n)).into_bytes();
        assert!(split(&long(256)).is_some());
        // These are parsed as a whole, which says what is wrong with them.
        for line in [
            &long(257),
            &br#"{"name":"a\"b"}"#[..],
            br#"{"name":"a\u0041"}"#,
            b"{\"name\":\"a\tb\"}",
            b"{\"name\":\"\xff\"}",
            br#"{"name":"a","name":"a"}"#,
            br#"{"name":1}"#,
            br#"{"name":"a"} x"#,
            b"{}",
            b"",
        ] {
            assert_eq!(split(line), None, "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn lines_that_differ_only_in_the_name_are_parsed_once() {
        let cpuid: cpuid_amx::Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        let mut lines = Lines::new();
        for name in ["a", "b", "c"] {
            let host = Host::from_cpuid(name, cpuid.clone());
            lines.add(&serde_json::to_vec(&host).unwrap()).unwrap();
            // A value has its fields in the order of the alphabet.
            let value = serde_json::to_value(&host).unwrap();
            lines.add(&serde_json::to_vec(&value).unwrap()).unwrap();
        }
        assert_eq!(lines.known.len(), 2);
        assert_eq!(lines.into_fleet().hosts(), 6);
    }
}
