//! CPUID as text, in the form of `cpuid -r`.
//!
//! One line for each leaf and sub-leaf. Empty lines and lines that start with `#` mean nothing. A
//! line `CPU 0:` may come before the first; at the next such line reading stops, because the leaves
//! of other processors tell nothing more here.
//!
//! `cpuid -r` writes `0x00` for sub-leaf 0 and for a leaf without sub-leaves. Here it is sub-leaf 0
//! where the leaf [has](has_subleaves) sub-leaves or there is a line for another one. An entry that
//! answers for every sub-leaf of such a leaf, which no processor has but a VMM's table can, is `*`.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use thiserror::Error;

use crate::table::{CpuidTable, Entry, Table, has_subleaves};

/// A table of the leaves that matter for AMX: a guest on Sapphire Rapids.
///
/// ```
/// use cpuid_amx::{CpuidTable, Table};
///
/// let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// assert_eq!(table.leaf(0xd, 18), [8192, 2816, 6, 0]);
/// assert_eq!(table.to_string(), cpuid_amx::dump::EXAMPLE);
/// # Ok::<(), cpuid_amx::dump::DumpError>(())
/// ```
pub const EXAMPLE: &str = "   \
   0x00000000 0x00: eax=0x00000020 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69
   0x00000001 0x00: eax=0x000806f8 ebx=0x00010800 ecx=0xfffa3223 edx=0x1f8bfbff
   0x00000007 0x00: eax=0x00000002 ebx=0xf1af27eb ecx=0x18415f7e edx=0xbfc04410
   0x00000007 0x01: eax=0x00001c30 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x00: eax=0x000602e7 ebx=0x00002b00 ecx=0x00002b00 edx=0x00000000
   0x0000000d 0x01: eax=0x0000001f ebx=0x00002a00 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x02: eax=0x00000100 ebx=0x00000240 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x05: eax=0x00000040 ebx=0x00000440 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x06: eax=0x00000200 ebx=0x00000480 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x07: eax=0x00000400 ebx=0x00000680 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x09: eax=0x00000008 ebx=0x00000a80 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x11: eax=0x00000040 ebx=0x00000ac0 ecx=0x00000002 edx=0x00000000
   0x0000000d 0x12: eax=0x00002000 ebx=0x00000b00 ecx=0x00000006 edx=0x00000000
   0x0000001d 0x00: eax=0x00000001 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x0000001d 0x01: eax=0x04002000 ebx=0x00080040 ecx=0x00000010 edx=0x00000000
   0x0000001e 0x00: eax=0x00000000 ebx=0x00004010 ecx=0x00000000 edx=0x00000000
   0x80000000 0x00: eax=0x80000008 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000001 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000121 edx=0x2c100800
";

impl fmt::Display for Table {
    /// What is read from it answers as this table does, except that the only entry of a leaf that has
    /// no sub-leaves answers for all of them, also if it is one for sub-leaf 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<Entry> = self.entries().collect();
        for entries in entries.chunk_by(|a, b| a.leaf == b.leaf) {
            for entry in entries {
                write!(f, "   {:#010x} ", entry.leaf)?;
                match entry.subleaf {
                    None if is_indexed(entries) => write!(f, "{:>4}", EVERY)?,
                    subleaf => write!(f, "{:#04x}", subleaf.unwrap_or(0))?,
                }
                let [eax, ebx, ecx, edx] = entry.value;
                writeln!(
                    f,
                    ": eax={eax:#010x} ebx={ebx:#010x} ecx={ecx:#010x} edx={edx:#010x}"
                )?;
            }
        }
        Ok(())
    }
}

/// In the place of a sub-leaf: all of them.
const EVERY: &str = "*";

/// Whether `0x00` is sub-leaf 0 in a leaf with these entries, and not all that there is of it.
fn is_indexed(entries: &[Entry]) -> bool {
    entries.len() > 1 || entries.iter().any(|entry| has_subleaves(entry.leaf))
}

impl FromStr for Table {
    type Err = DumpError;

    /// Reads a dump.
    ///
    /// # Errors
    ///
    /// See [`DumpError`].
    fn from_str(text: &str) -> Result<Self, DumpError> {
        let mut table = Self::new();
        for (line, text) in (1..).zip(text.lines().map(str::trim)) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            if text.starts_with("CPU") {
                if table.is_empty() {
                    continue;
                }
                break;
            }
            let entry = entry(text).ok_or_else(|| DumpError::NotALeaf {
                line,
                text: text.to_string(),
            })?;
            let before = table.len();
            // A sorted table has room for everything.
            let _ = table.push_entry(entry);
            if table.len() == before {
                return Err(DumpError::Duplicate {
                    line,
                    leaf: entry.leaf,
                    subleaf: entry.subleaf.unwrap_or(0),
                });
            }
        }
        let entries: Vec<Entry> = table.entries().collect();
        let leaves = entries.chunk_by(|a, b| a.leaf == b.leaf);
        Ok(leaves
            .flat_map(|entries| {
                let is_indexed = is_indexed(entries);
                entries.iter().map(move |&entry| Entry {
                    subleaf: entry.subleaf.filter(|&subleaf| is_indexed || subleaf != 0),
                    ..entry
                })
            })
            .collect())
    }
}

/// `0x0000000d 0x00: eax=0x000602e7 ebx=0x00002b00 ecx=0x00002b00 edx=0x00000000`
fn entry(line: &str) -> Option<Entry> {
    let (place, value) = line.split_once(':')?;
    let mut words = place.split_whitespace();
    let leaf = number(words.next()?)?;
    let subleaf = match words.next()? {
        EVERY => None,
        text => Some(number(text)?),
    };
    let mut end = words.next().is_none();

    let mut words = value.split_whitespace();
    let mut value = [0; 4];
    for (name, register) in ["eax=", "ebx=", "ecx=", "edx="].iter().zip(&mut value) {
        *register = number(words.next()?.strip_prefix(name)?)?;
    }
    end &= words.next().is_none();

    end.then_some(Entry {
        leaf,
        subleaf,
        value,
    })
}

fn number(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0x")?;
    // `from_str_radix` takes a sign as well.
    let first = digits.chars().next()?;
    first.is_ascii_hexdigit().then_some(())?;
    u32::from_str_radix(digits, 16).ok()
}

/// A text is not a dump of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DumpError {
    /// A line is not of the form `0x0000000d 0x00: eax=0x… ebx=0x… ecx=0x… edx=0x…`.
    #[error("line {line} is not a leaf of CPUID: {text:?}")]
    NotALeaf {
        /// Its number, from 1.
        line: usize,
        /// What it says.
        text: String,
    },
    /// A leaf and sub-leaf is there twice.
    #[error("line {line} gives leaf {leaf:#x} sub-leaf {subleaf:#x} a second time")]
    Duplicate {
        /// The number of the second line, from 1.
        line: usize,
        /// The leaf.
        leaf: u32,
        /// The sub-leaf.
        subleaf: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: &str =
        "0x0000000d 0x12: eax=0x00002000 ebx=0x00000b00 ecx=0x00000006 edx=0xffffffff";

    #[test]
    fn what_is_written_is_read() {
        let table: Table = LEAF.parse().unwrap();
        assert_eq!(table.leaf(0xd, 0x12), [0x2000, 0xb00, 6, u32::MAX]);
        assert_eq!(table.leaf(0xd, 0), [0; 4]);
        assert_eq!(table.to_string(), alloc::format!("   {LEAF}\n"));
        let example: Table = EXAMPLE.parse().unwrap();
        assert_eq!(example.to_string().parse(), Ok(example));
    }

    #[test]
    fn only_leaves_with_subleaves_have_them() {
        let table: Table = LEAF.replace("0d 0x12", "01 0x00").parse().unwrap();
        assert_eq!(table.leaf(1, 77)[0], 0x2000);
        let table: Table = LEAF.replace("0d 0x12", "99 0x05").parse().unwrap();
        assert_eq!(table.leaf(0x99, 77)[0], 0);
        let table: Table = LEAF.replace("0d 0x12", "07 0x00").parse().unwrap();
        assert_eq!(table.leaf(7, 77)[0], 0);
    }

    #[test]
    fn what_answers_for_every_subleaf_still_does() {
        let places = [Some(0), Some(1), None];
        for leaf in [1, 7, 0x1d, 0x99] {
            // Each set of entries of one leaf.
            for set in 0..8 {
                let there = [1, 2, 4]
                    .into_iter()
                    .zip(places)
                    .filter(|(bit, _)| set & bit != 0);
                let table: Table = there
                    .map(|(eax, subleaf)| Entry {
                        leaf,
                        subleaf,
                        value: [eax, 0, 0, 0],
                    })
                    .collect();
                let read: Table = table.to_string().parse().unwrap();
                if set == 1 && !has_subleaves(leaf) {
                    assert_eq!(read.leaf(leaf, 0), table.leaf(leaf, 0));
                } else {
                    assert_eq!(read, table, "{table}");
                }
            }
        }
    }

    #[test]
    fn the_first_processor_counts() {
        let other = LEAF.replace("0x00002000", "0x00000001");
        for text in [
            alloc::format!("CPU 0:\n{LEAF}\nCPU 1:\n{other}\n"),
            alloc::format!("# a comment\n\n{LEAF}\nCPU 1:\nnonsense"),
            alloc::format!("CPU:\n  {LEAF}\n"),
        ] {
            let table: Table = text.parse().unwrap();
            assert_eq!(table.len(), 1);
            assert_eq!(table.leaf(0xd, 0x12)[0], 0x2000);
        }
    }

    #[test]
    fn every_other_line_is_refused_by_number() {
        for (good, bad) in [
            ("eax=", "eax"),
            ("eax=", "ebx="),
            (" edx=0xffffffff", ""),
            ("0xffffffff", "0x1ffffffff"),
            ("0xffffffff", "0x"),
            ("0xffffffff", "0x+1"),
            ("0xffffffff", "ffffffff"),
            ("0xffffffff", "0xffffffff 0x0"),
            ("0x12:", "0x12"),
            ("0x12:", "0x12 0x00:"),
            ("0x12:", ":"),
            ("0x0000000d", "leaf"),
        ] {
            let line = LEAF.replacen(good, bad, 1);
            assert_ne!(line, LEAF);
            assert_eq!(
                alloc::format!("#\n{line}").parse::<Table>(),
                Err(DumpError::NotALeaf {
                    line: 2,
                    text: line.trim().to_string()
                })
            );
        }
    }

    #[test]
    fn a_leaf_given_twice_is_refused() {
        assert_eq!(
            alloc::format!("{LEAF}\n{LEAF}").parse::<Table>(),
            Err(DumpError::Duplicate {
                line: 2,
                leaf: 0xd,
                subleaf: 0x12
            })
        );
    }
}
