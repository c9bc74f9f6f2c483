//! A description as a versioned document, for the self-describing formats of serde (as JSON is;
//! not postcard or bincode); JSON is that of docs/host.schema.json.
//!
//! The types here are the document's own: what the crate uses can change, and a document of
//! version 1 stays what it is.

use std::borrow::Cow;

use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xsave_state::XFeatures;

use crate::document::{self, DocumentError, EntryDocument, Hex, entries, table, text};
use crate::host::{Capabilities, Host, KvmFacts, NoKvm, Permission, Processor};
use crate::kernel::{Kernel, Version};
use cpuid_amx::amx::AmxFeatures;
use cpuid_amx::permission::PermissionError;

/// What `format` says in every description of a host.
pub const FORMAT: &str = "amx-host";
/// What `version` says: the only version that there is.
pub const VERSION: u32 = 1;

/// The kind of document.
struct Description;

impl document::Kind for Description {
    const FORMAT: &'static str = FORMAT;
    const VERSION: u32 = VERSION;
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Document::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Document::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// `format` and `version` come first, then the name: see `baseline`, which looks for it there.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    format: document::Format<Description>,
    version: document::Version<Description>,
    name: Cow<'a, str>,
    processor: ProcessorDocument<'a>,
    kernel: Option<KernelDocument<'a>>,
    components: Option<Hex<u64>>,
    permission: PermissionDocument,
    kvm: KvmDocument,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProcessorDocument<'a> {
    vendor: Cow<'a, str>,
    name: Cow<'a, str>,
    family: u32,
    model: u32,
    stepping: u32,
    amx: Names,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelDocument<'a> {
    release: Cow<'a, str>,
    upstream: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case", deny_unknown_fields)]
enum PermissionDocument {
    NotAsked {},
    Granted { components: Hex<u64> },
    NotSupported { supported: Hex<u64> },
    KernelTooOld {},
    Locked { granted: Hex<u64> },
    Filtered { errno: i32 },
    NotGranted { granted: Hex<u64> },
    Other { errno: i32 },
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
enum KvmDocument {
    Usable {
        capabilities: Option<Capabilities>,
        guest_components: Option<Hex<u64>>,
        cpuid: Vec<EntryDocument>,
        rewritten: Option<Vec<EntryDocument>>,
    },
    NoDevice {},
    NoAccess {},
    NotKvm {
        version: i32,
    },
    Failed {
        call: String,
        errno: i32,
    },
}

impl<'a> From<&'a Host> for Document<'a> {
    fn from(host: &'a Host) -> Self {
        let processor = &host.processor;
        Self {
            format: document::Format::default(),
            version: document::Version::default(),
            name: Cow::Borrowed(&host.name),
            processor: ProcessorDocument {
                vendor: Cow::Borrowed(&processor.vendor),
                name: Cow::Borrowed(&processor.name),
                family: processor.family,
                model: processor.model,
                stepping: processor.stepping,
                amx: Names(processor.amx),
            },
            kernel: host.kernel.as_ref().map(|kernel| KernelDocument {
                release: Cow::Borrowed(&kernel.release),
                upstream: kernel.upstream.map(|version| format!("{version}")),
            }),
            components: host.components.map(bits),
            permission: host.permission.into(),
            kvm: (&host.kvm).into(),
        }
    }
}

impl Document<'_> {
    fn parse(self) -> Result<Host, DocumentError> {
        let processor = self.processor;
        Ok(Host {
            name: text("name", self.name.into_owned())?,
            processor: Processor {
                vendor: text("processor.vendor", processor.vendor.into_owned())?,
                name: text("processor.name", processor.name.into_owned())?,
                family: processor.family,
                model: processor.model,
                stepping: processor.stepping,
                amx: processor.amx.0,
            },
            kernel: self.kernel.map(KernelDocument::parse).transpose()?,
            components: self.components.map(features),
            permission: self.permission.into(),
            kvm: self.kvm.parse()?,
        })
    }
}

impl KernelDocument<'_> {
    fn parse(self) -> Result<Kernel, DocumentError> {
        let parse = |text: String| {
            text.parse::<Version>()
                .map_err(|_| DocumentError::Upstream { text })
        };
        Ok(Kernel {
            release: text("kernel.release", self.release.into_owned())?,
            upstream: self.upstream.map(parse).transpose()?,
        })
    }
}

impl From<Permission> for PermissionDocument {
    fn from(permission: Permission) -> Self {
        match permission {
            Permission::NotAsked => Self::NotAsked {},
            Permission::Granted(components) => Self::Granted {
                components: bits(components),
            },
            Permission::Refused(error) => match error {
                PermissionError::NotSupported { supported } => Self::NotSupported {
                    supported: bits(supported),
                },
                PermissionError::KernelTooOld => Self::KernelTooOld {},
                PermissionError::Locked { granted } => Self::Locked {
                    granted: bits(granted),
                },
                PermissionError::Filtered { errno } => Self::Filtered { errno },
                PermissionError::NotGranted { granted } => Self::NotGranted {
                    granted: bits(granted),
                },
                PermissionError::Other { errno } => Self::Other { errno },
                // One that this version of the format has no name for.
                _ => Self::Other { errno: 0 },
            },
        }
    }
}

impl From<PermissionDocument> for Permission {
    fn from(document: PermissionDocument) -> Self {
        Self::Refused(match document {
            PermissionDocument::NotAsked {} => return Self::NotAsked,
            PermissionDocument::Granted { components } => {
                return Self::Granted(features(components));
            }
            PermissionDocument::NotSupported { supported } => PermissionError::NotSupported {
                supported: features(supported),
            },
            PermissionDocument::KernelTooOld {} => PermissionError::KernelTooOld,
            PermissionDocument::Locked { granted } => PermissionError::Locked {
                granted: features(granted),
            },
            PermissionDocument::Filtered { errno } => PermissionError::Filtered { errno },
            PermissionDocument::NotGranted { granted } => PermissionError::NotGranted {
                granted: features(granted),
            },
            PermissionDocument::Other { errno } => PermissionError::Other { errno },
        })
    }
}

impl From<&Result<KvmFacts, NoKvm>> for KvmDocument {
    fn from(kvm: &Result<KvmFacts, NoKvm>) -> Self {
        match kvm {
            Ok(facts) => Self::Usable {
                capabilities: facts.capabilities,
                guest_components: facts.guest_components.map(bits),
                cpuid: entries(&facts.cpuid),
                rewritten: facts.rewritten.as_ref().map(entries),
            },
            Err(NoKvm::NoDevice) => Self::NoDevice {},
            Err(NoKvm::NoAccess) => Self::NoAccess {},
            Err(NoKvm::NotKvm { version }) => Self::NotKvm { version: *version },
            Err(NoKvm::Failed { call, errno }) => Self::Failed {
                call: call.clone(),
                errno: *errno,
            },
        }
    }
}

impl KvmDocument {
    fn parse(self) -> Result<Result<KvmFacts, NoKvm>, DocumentError> {
        Ok(match self {
            Self::Usable {
                capabilities,
                guest_components,
                cpuid,
                rewritten,
            } => Ok(KvmFacts {
                capabilities,
                guest_components: guest_components.map(features),
                cpuid: table("kvm.cpuid", cpuid)?,
                rewritten: rewritten
                    .map(|entries| table("kvm.rewritten", entries))
                    .transpose()?,
            }),
            Self::NoDevice {} => Err(NoKvm::NoDevice),
            Self::NoAccess {} => Err(NoKvm::NoAccess),
            Self::NotKvm { version } => Err(NoKvm::NotKvm { version }),
            Self::Failed { call, errno } => Err(NoKvm::Failed {
                call: text("kvm.call", call)?,
                errno,
            }),
        })
    }
}

fn bits(features: XFeatures) -> Hex<u64> {
    Hex(features.bits())
}

fn features(bits: Hex<u64>) -> XFeatures {
    XFeatures::from_bits_retain(bits.0)
}

/// The names of AMX features.
struct Names(AmxFeatures);

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.names())
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<Cow<str>>::deserialize(deserializer)?;
        names
            .iter()
            .map(|name| {
                let known = AmxFeatures::by_name(name);
                known.ok_or_else(|| {
                    D::Error::invalid_value(Unexpected::Str(name), &"the name of an AMX feature")
                })
            })
            .collect::<Result<AmxFeatures, D::Error>>()
            .map(Self)
    }
}
