//! A fleet from descriptions line by line, each kind of line read once.
//!
//! Hosts of a kind differ in their names only. What stands behind the name is compared as bytes with
//! what was read before: only what is new has to be parsed.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::baseline::{Fleet, Kind, Tally, TooManyKinds};
use crate::host::{Host, MAX_TEXT_BYTES};

/// How a description of version 1 starts, as this crate writes it: the name follows.
const START: &[u8] = br#"{"format":"amx-host","version":2,"name":""#;
/// So many bytes of lines are remembered.
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
///     lines.add(line.as_bytes(), |line| serde_json::from_slice(line)).unwrap();
/// }
/// assert_eq!(lines.into_fleet().hosts(), 2);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Lines {
    fleet: Fleet,
    /// By the length of what stands behind the name, which differs between most kinds.
    known: BTreeMap<usize, KnownLines>,
    known_bytes: usize,
}

/// What stands behind the name in lines of one length.
type KnownLines = BTreeMap<Box<[u8]>, (Kind, Tally)>;

impl Lines {
    /// No lines yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            fleet: Fleet::new(),
            known: BTreeMap::new(),
            known_bytes: 0,
        }
    }

    /// Counts the host that a line describes. `parse` reads a description, as
    /// `serde_json::from_slice` does, and is asked for every line that is like none before, names
    /// aside. The line may end with a line feed. It need not be written by this crate, but then each
    /// is parsed.
    ///
    /// # Errors
    ///
    /// What `parse` says, or that the fleet has too many kinds; nothing has changed.
    pub fn add<E>(
        &mut self,
        line: &[u8],
        parse: impl FnOnce(&[u8]) -> Result<Host, E>,
    ) -> Result<(), LineError<E>> {
        let Some((name, rest)) = split(line) else {
            let host = parse(line).map_err(LineError::Parse)?;
            return Ok(self.fleet.add(&host)?);
        };
        let known = self.known.get_mut(&rest.len());
        if let Some((_, tally)) = known.and_then(|known| known.get_mut(rest)) {
            tally.hosts = tally.hosts.saturating_add(1);
            tally.names.insert(name);
            return Ok(());
        }
        let host = parse(line).map_err(LineError::Parse)?;
        let known_bytes = self.known_bytes.saturating_add(rest.len());
        if known_bytes > MAX_KNOWN_BYTES {
            return Ok(self.fleet.add(&host)?);
        }
        let kind = Kind::of(&host);
        // The kind counts from now on, its hosts at the end.
        self.fleet.tally(kind.clone())?;
        let mut tally = Tally::default();
        tally.add(&host);
        self.known
            .entry(rest.len())
            .or_default()
            .insert(rest.into(), (kind, tally));
        self.known_bytes = known_bytes;
        Ok(())
    }

    /// The fleet of all lines.
    #[must_use]
    pub fn into_fleet(self) -> Fleet {
        let mut fleet = self.fleet;
        let known: Vec<_> = self.known.into_values().flatten().collect();
        for (_, (kind, tally)) in known {
            fleet.kinds.entry(kind).or_default().merge(tally);
        }
        fleet
    }
}

/// The name of a description as this crate writes it, and what stands behind it. `None` where that
/// needs a closer look: every line for which it gives something is a description exactly if another
/// one with the same rest is.
fn split(line: &[u8]) -> Option<(&str, &[u8])> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let text = line.strip_prefix(START)?;
    let longest = text.get(..MAX_TEXT_BYTES.saturating_add(1)).unwrap_or(text);
    // JSON wants control characters escaped.
    let end = longest
        .iter()
        .position(|&byte| byte == b'"' || byte == b'\\' || byte < b' ')?;
    let (name, rest) = text.split_at_checked(end)?;
    if rest.first() != Some(&b'"') {
        return None;
    }
    Some((std::str::from_utf8(name).ok()?, rest))
}

/// A line does not count.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LineError<E> {
    /// It is not a description.
    #[error(transparent)]
    Parse(E),
    /// The fleet has too many kinds of hosts.
    #[error(transparent)]
    Kinds(#[from] TooManyKinds),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_split_off_where_that_is_safe() {
        let line =
            |name: &str| format!(r#"{{"format":"amx-host","version":2,"name":"{name}","x":1}}"#);
        let name = |text: &str| {
            let line = line(text);
            split(line.as_bytes()).map(|(name, rest)| (String::from(name), rest.len()))
        };
        assert_eq!(name("node-17"), Some(("node-17".into(), 8)));
        assert_eq!(name(""), Some(("".into(), 8)));
        assert_eq!(name("näme"), Some(("näme".into(), 8)));
        assert_eq!(name(&"x".repeat(256)).unwrap().1, 8);
        // A closer look is needed.
        assert_eq!(name(&"x".repeat(257)), None);
        assert_eq!(name(r#"a\"b"#), None);
        assert_eq!(name(r"a\u0041"), None);
        assert_eq!(name("a\tb"), None);
        let mut broken = line("abc").into_bytes();
        let at = START.len() + 1;
        broken[at] = 0xff;
        assert_eq!(split(&broken), None);
        for other in ["", "{}", r#"{"version":1,"format":"amx-host","name":"a"}"#] {
            assert_eq!(split(other.as_bytes()), None);
        }
        assert_eq!(split(START), None);
        let mut fed = line("a").into_bytes();
        fed.push(b'\n');
        assert_eq!(split(&fed), split(line("a").as_bytes()));
    }
}
