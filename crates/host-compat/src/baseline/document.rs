//! A tally as a versioned document: a part of a fleet, to be merged with others. For the
//! self-describing formats of serde (as JSON is; not postcard or bincode).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::baseline::shared::places;
use crate::baseline::{Fleet, Kind, Leaf, MAX_KINDS, ObstacleKind, Shared, Smallest, Tally};
use crate::document::{self, EntryDocument, Hex, entries, table, text};
use crate::registers::features;

/// What `format` says in every tally.
pub const FORMAT: &str = "amx-fleet";
/// What `version` says: the only version that is read. Version 2 has no `shared`.
pub const VERSION: u32 = 3;

/// The kind of document.
struct Part;

impl document::Kind for Part {
    const FORMAT: &'static str = FORMAT;
    const VERSION: u32 = VERSION;
    const READS: RangeInclusive<u32> = VERSION..=VERSION;
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    format: document::Format<Part>,
    version: document::Version<Part>,
    shared: Option<SharedDocument<'a>>,
    kinds: Vec<KindDocument<'a>>,
}

/// What all described hosts have in common beside XSAVE and AMX.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SharedDocument<'a> {
    vendors: Vec<Cow<'a, str>>,
    signature: Hex<u32>,
    arch_capabilities: Option<Hex<u64>>,
    arch_capabilities_unknown: bool,
    leaves: Vec<LeafDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeafDocument {
    leaf: Hex<u32>,
    subleaf: Hex<u32>,
    /// EAX, EBX, ECX and EDX.
    value: Option<[Hex<u32>; 4]>,
    somewhere: bool,
    everywhere: bool,
    untold: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KindDocument<'a> {
    hosts: u64,
    names: Vec<Cow<'a, str>>,
    processors: Vec<Cow<'a, str>>,
    kernels: Vec<Cow<'a, str>>,
    described: bool,
    obstacle: Option<ObstacleKind>,
    cpuid: Vec<EntryDocument>,
}

impl Serialize for Fleet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let kinds = self.kinds.iter().map(|(kind, tally)| KindDocument {
            hosts: tally.hosts,
            names: borrowed(&tally.names),
            processors: borrowed(&tally.processors),
            kernels: borrowed(&tally.kernels),
            described: kind.described,
            obstacle: kind.obstacle,
            cpuid: entries(&kind.registers),
        });
        Document {
            format: document::Format::default(),
            version: document::Version::default(),
            shared: self.shared.as_ref().map(SharedDocument::from),
            kinds: kinds.collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fleet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let document = Document::deserialize(deserializer)?;
        parse(document).map_err(D::Error::custom)
    }
}

fn parse(document: Document<'_>) -> Result<Fleet, String> {
    let mut kinds = BTreeMap::new();
    let count = document.kinds.len();
    if count > MAX_KINDS {
        return Err(format!("{count} kinds; the limit is {MAX_KINDS}"));
    }
    for (index, kind) in document.kinds.into_iter().enumerate() {
        let (kind, tally) = kind
            .parse()
            .map_err(|why| format!("kinds[{index}]: {why}"))?;
        if kinds.insert(kind, tally).is_some() {
            return Err(format!("kinds[{index}] is there twice"));
        }
    }
    let shared = document.shared.map(SharedDocument::parse).transpose()?;
    if shared.is_some() != kinds.keys().any(|kind| kind.described) {
        return Err("shared is there exactly where some hosts are described".into());
    }
    Ok(Fleet { kinds, shared })
}

impl<'a> From<&'a Shared> for SharedDocument<'a> {
    fn from(shared: &'a Shared) -> Self {
        let leaves = shared
            .leaves
            .iter()
            .map(|((leaf, subleaf), found)| LeafDocument {
                leaf: Hex(*leaf),
                subleaf: Hex(*subleaf),
                value: found.value.map(|value| value.map(Hex)),
                somewhere: found.somewhere,
                everywhere: found.everywhere,
                untold: found.untold,
            });
        Self {
            vendors: borrowed(&shared.vendors),
            signature: Hex(shared.signature),
            arch_capabilities: shared.arch_capabilities.map(Hex),
            arch_capabilities_unknown: shared.arch_capabilities_unknown,
            leaves: leaves.collect(),
        }
    }
}

impl SharedDocument<'_> {
    fn parse(self) -> Result<Shared, String> {
        let mut leaves = BTreeMap::new();
        for document in self.leaves {
            let (leaf, subleaf) = (document.leaf.0, document.subleaf.0);
            let value = document.value.map(|value| value.map(|register| register.0));
            let found = Leaf {
                value,
                somewhere: document.somewhere,
                everywhere: document.everywhere,
                untold: document.untold,
            };
            let is_feature = value.is_none_or(|value| features(leaf, subleaf, value) == value);
            let agrees = found.somewhere || !found.everywhere;
            if !is_feature || !agrees || leaves.insert((leaf, subleaf), found).is_some() {
                return Err(format!(
                    "shared.leaves: {leaf:#x}.{subleaf:#x} is not what hosts share"
                ));
            }
        }
        if !leaves.keys().copied().eq(places().collect::<BTreeSet<_>>()) {
            return Err("shared.leaves are not those that are compared".into());
        }
        Ok(Shared {
            vendors: smallest("shared.vendors", self.vendors)?,
            signature: self.signature.0,
            arch_capabilities: self.arch_capabilities.map(|value| value.0),
            arch_capabilities_unknown: self.arch_capabilities_unknown,
            leaves,
        })
    }
}

impl KindDocument<'_> {
    fn parse(self) -> Result<(Kind, Tally), String> {
        let kind = Kind {
            registers: table("cpuid", self.cpuid).map_err(|error| format!("{error}"))?,
            obstacle: self.obstacle,
            described: self.described,
        };
        let features = kind.features();
        if !features.is_closed() || features.to_table() != kind.registers {
            return Err("cpuid is not what a coherent set of features makes".into());
        }
        if self.hosts == 0 {
            return Err("hosts is 0".into());
        }
        Ok((
            kind,
            Tally {
                hosts: self.hosts,
                names: smallest("names", self.names)?,
                processors: smallest("processors", self.processors)?,
                kernels: smallest("kernels", self.kernels)?,
            },
        ))
    }
}

fn borrowed<const LIMIT: usize>(texts: &Smallest<LIMIT>) -> Vec<Cow<'_, str>> {
    texts.0.iter().map(|text| Cow::Borrowed(&**text)).collect()
}

fn smallest<const LIMIT: usize>(
    field: &'static str,
    texts: Vec<Cow<'_, str>>,
) -> Result<Smallest<LIMIT>, String> {
    let count = texts.len();
    if count > LIMIT {
        return Err(format!("{count} {field}; the limit is {LIMIT}"));
    }
    let mut smallest = Smallest::default();
    for name in texts {
        let name = text(field, name.into_owned()).map_err(|error| format!("{error}"))?;
        smallest.insert(&name);
    }
    if smallest.0.len() != count {
        return Err(format!("{field} has empty ones, or the same twice"));
    }
    Ok(smallest)
}
