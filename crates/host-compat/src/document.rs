//! What all documents of this crate have in common: registers as hexadecimal text, CPUID tables,
//! limits, and a format with a version.

use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Error as _, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use cpuid_amx::table::{CpuidTable, Entry, Table};

/// No name and no other text of a document is longer.
pub const MAX_TEXT_BYTES: usize = 256;

/// No CPUID table of a document has more entries: KVM's limit, KVM_MAX_CPUID_ENTRIES.
pub const MAX_ENTRIES: usize = 256;

/// What kind of document it is, and which version of it: the first two fields.
pub(crate) trait Kind {
    const FORMAT: &'static str;
    const VERSION: u32;
    /// The versions that are read.
    const READS: RangeInclusive<u32>;
}

/// The format of `K`, and nothing else.
pub(crate) struct Format<K>(std::marker::PhantomData<K>);

impl<K> Default for Format<K> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<K: Kind> Serialize for Format<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(K::FORMAT)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Format<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = Cow::<str>::deserialize(deserializer)?;
        if found != K::FORMAT {
            return Err(D::Error::custom(format!(
                "the format is {found:?}, and expected is {:?}",
                K::FORMAT
            )));
        }
        Ok(Self::default())
    }
}

/// A version of `K` that is read; what is written is the newest that is known.
pub(crate) struct Version<K>(std::marker::PhantomData<K>);

impl<K> Default for Version<K> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<K: Kind> Serialize for Version<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(K::VERSION)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Version<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = u32::deserialize(deserializer)?;
        if !K::READS.contains(&found) {
            return Err(D::Error::custom(format!(
                "{} of version {found}: this program reads version {}",
                K::FORMAT,
                K::VERSION
            )));
        }
        Ok(Self::default())
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct EntryDocument {
    leaf: Hex<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subleaf: Option<Hex<u32>>,
    eax: Hex<u32>,
    ebx: Hex<u32>,
    ecx: Hex<u32>,
    edx: Hex<u32>,
}

pub(crate) fn entries(table: &Table) -> Vec<EntryDocument> {
    table
        .entries()
        .map(|entry| {
            let [eax, ebx, ecx, edx] = entry.value.map(Hex);
            EntryDocument {
                leaf: Hex(entry.leaf),
                subleaf: entry.subleaf.map(Hex),
                eax,
                ebx,
                ecx,
                edx,
            }
        })
        .collect()
}

pub(crate) fn table(
    field: &'static str,
    entries: Vec<EntryDocument>,
) -> Result<Table, DocumentError> {
    let actual = entries.len();
    if actual > MAX_ENTRIES {
        return Err(DocumentError::TooManyEntries { field, actual });
    }
    let table: Table = entries
        .iter()
        .map(|entry| Entry {
            leaf: entry.leaf.0,
            subleaf: entry.subleaf.as_ref().map(|subleaf| subleaf.0),
            value: [entry.eax.0, entry.ebx.0, entry.ecx.0, entry.edx.0],
        })
        .collect();
    if table.len() != actual {
        return Err(DocumentError::Duplicate { field });
    }
    Ok(table)
}

pub(crate) fn text(field: &'static str, text: String) -> Result<String, DocumentError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(DocumentError::TooLong {
            field,
            actual_bytes: text.len(),
        });
    }
    Ok(text)
}

/// A document that serde could read, but that is no description.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum DocumentError {
    #[error("{field} has {actual_bytes} bytes; the limit is {MAX_TEXT_BYTES}")]
    TooLong {
        field: &'static str,
        actual_bytes: usize,
    },
    #[error("{field} has {actual} entries; the limit is {MAX_ENTRIES}")]
    TooManyEntries { field: &'static str, actual: usize },
    #[error("{field} has two entries for the same leaf and sub-leaf")]
    Duplicate { field: &'static str },
    #[error("missing field `{field}`")]
    Missing { field: &'static str },
    #[error("kernel.upstream is {text:?}, which is not a version such as 6.12.67 or 6.19-rc3")]
    Upstream { text: String },
}

/// A register or a bitmap as `0x602e7`: JSON's numbers are decimal, and lose bits above 2^53 in
/// many readers.
pub(crate) struct Hex<T>(pub(crate) T);

impl<T: fmt::LowerHex> Serialize for Hex<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de, T: TryFrom<u64>> Deserialize<'de> for Hex<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bits = deserializer.deserialize_str(HexVisitor)?;
        T::try_from(bits)
            .map(Self)
            .map_err(|_| D::Error::invalid_value(Unexpected::Unsigned(bits), &"a 32-bit register"))
    }
}

struct HexVisitor;

impl Visitor<'_> for HexVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a hexadecimal number such as 0x602e7")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<u64, E> {
        text.strip_prefix("0x")
            // `from_str_radix` takes a sign as well.
            .filter(|digits| digits.starts_with(|c: char| c.is_ascii_hexdigit()))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}
