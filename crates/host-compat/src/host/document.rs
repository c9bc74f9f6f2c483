//! A description as a versioned document, for the self-describing formats of serde (as JSON is;
//! not postcard or bincode); JSON is that of docs/host.schema.json.
//!
//! The types here are the document's own: what the crate uses can change, and a document of a
//! version stays what it is. Fields and names that a newer version has are read over, and named in
//! [`Host::unknown`].

use std::borrow::Cow;
use std::ops::RangeInclusive;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xsave_state::XFeatures;

use crate::document::{
    self, DocumentError, EntryDocument, Hex, MAX_TEXT_BYTES, entries, table, text,
};
use crate::host::{Capabilities, Host, KvmFacts, NoKvm, Permission, Processor, Tsc};
use crate::kernel::{Kernel, Version};
use crate::msrs::FeatureMsrs;
use cpuid_amx::amx::AmxFeatures;
use cpuid_amx::permission::PermissionError;

/// What `format` says in every description of a host.
pub const FORMAT: &str = "amx-host";
/// What `version` says. Version 1 has neither `feature_msrs` nor `tsc`.
pub const VERSION: u32 = 2;
/// So many fields that are not known are named.
const MAX_UNKNOWN: usize = 16;

/// The kind of document.
struct Description;

impl document::Kind for Description {
    const FORMAT: &'static str = FORMAT;
    const VERSION: u32 = VERSION;
    const READS: RangeInclusive<u32> = 1..=u32::MAX;
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Document::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut unknown = Vec::new();
        let mut note = |path: serde_ignored::Path<'_>| {
            if unknown.len() < MAX_UNKNOWN {
                let path: String = path.to_string().chars().take(MAX_TEXT_BYTES / 4).collect();
                unknown.push(path);
            }
        };
        let document: Document = serde_ignored::deserialize(deserializer, &mut note)?;
        document.parse(unknown).map_err(D::Error::custom)
    }
}

#[derive(Serialize, Deserialize)]
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
struct ProcessorDocument<'a> {
    vendor: Cow<'a, str>,
    name: Cow<'a, str>,
    family: u32,
    model: u32,
    stepping: u32,
    amx: Vec<Cow<'a, str>>,
}

#[derive(Serialize, Deserialize)]
struct KernelDocument<'a> {
    release: Cow<'a, str>,
    upstream: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    NotAsked,
    Granted,
    NotSupported,
    KernelTooOld,
    Locked,
    Filtered,
    NotGranted,
    Other,
}

/// Which of the fields there are depends on the outcome.
#[derive(Serialize, Deserialize)]
struct PermissionDocument {
    outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    components: Option<Hex<u64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    supported: Option<Hex<u64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    granted: Option<Hex<u64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Usable,
    NoDevice,
    NoAccess,
    NotKvm,
    Failed,
}

/// Which of the fields there are depends on the state. A field that is `null` is there.
#[derive(Serialize, Deserialize)]
struct KvmDocument {
    state: State,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "is_there"
    )]
    capabilities: Option<Option<Capabilities>>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "is_there"
    )]
    guest_components: Option<Option<Hex<u64>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpuid: Option<Vec<EntryDocument>>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "is_there"
    )]
    rewritten: Option<Option<Vec<EntryDocument>>>,
    /// From version 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    feature_msrs: Option<FeatureMsrsDocument>,
    /// From version 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tsc: Option<TscDocument>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    call: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
}

fn is_there<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

#[derive(Serialize, Deserialize)]
struct FeatureMsrsDocument {
    arch_capabilities: Option<Hex<u64>>,
    perf_capabilities: Option<Hex<u64>>,
}

#[derive(Serialize, Deserialize)]
struct TscDocument {
    khz: u32,
    scales: bool,
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
                amx: processor.amx.names().map(Cow::Borrowed).collect(),
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
    fn parse(self, mut unknown: Vec<String>) -> Result<Host, DocumentError> {
        let processor = self.processor;
        let mut amx = AmxFeatures::empty();
        for name in &processor.amx {
            match AmxFeatures::by_name(name) {
                Some(feature) => amx |= feature,
                None if unknown.len() < MAX_UNKNOWN => {
                    unknown.push(text("processor.amx", name.clone().into_owned())?);
                }
                None => {}
            }
        }
        Ok(Host {
            name: text("name", self.name.into_owned())?,
            processor: Processor {
                vendor: text("processor.vendor", processor.vendor.into_owned())?,
                name: text("processor.name", processor.name.into_owned())?,
                family: processor.family,
                model: processor.model,
                stepping: processor.stepping,
                amx,
            },
            kernel: self.kernel.map(KernelDocument::parse).transpose()?,
            components: self.components.map(features),
            permission: self.permission.parse()?,
            kvm: self.kvm.parse()?,
            unknown,
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

impl PermissionDocument {
    const fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            components: None,
            supported: None,
            granted: None,
            errno: None,
        }
    }

    fn parse(self) -> Result<Permission, DocumentError> {
        let need = |field, mask: Option<Hex<u64>>| {
            mask.map(features).ok_or(DocumentError::Missing { field })
        };
        let errno = || {
            let field = "permission.errno";
            self.errno.ok_or(DocumentError::Missing { field })
        };
        let granted = "permission.granted";
        Ok(Permission::Refused(match self.outcome {
            Outcome::NotAsked => return Ok(Permission::NotAsked),
            Outcome::Granted => {
                let components = need("permission.components", self.components)?;
                return Ok(Permission::Granted(components));
            }
            Outcome::NotSupported => PermissionError::NotSupported {
                supported: need("permission.supported", self.supported)?,
            },
            Outcome::KernelTooOld => PermissionError::KernelTooOld,
            Outcome::Locked => PermissionError::Locked {
                granted: need(granted, self.granted)?,
            },
            Outcome::Filtered => PermissionError::Filtered { errno: errno()? },
            Outcome::NotGranted => PermissionError::NotGranted {
                granted: need(granted, self.granted)?,
            },
            Outcome::Other => PermissionError::Other { errno: errno()? },
        }))
    }
}

impl From<Permission> for PermissionDocument {
    fn from(permission: Permission) -> Self {
        let error = match permission {
            Permission::NotAsked => return Self::of(Outcome::NotAsked),
            Permission::Granted(components) => {
                return Self {
                    components: Some(bits(components)),
                    ..Self::of(Outcome::Granted)
                };
            }
            Permission::Refused(error) => error,
        };
        match error {
            PermissionError::NotSupported { supported } => Self {
                supported: Some(bits(supported)),
                ..Self::of(Outcome::NotSupported)
            },
            PermissionError::KernelTooOld => Self::of(Outcome::KernelTooOld),
            PermissionError::Locked { granted } => Self {
                granted: Some(bits(granted)),
                ..Self::of(Outcome::Locked)
            },
            PermissionError::NotGranted { granted } => Self {
                granted: Some(bits(granted)),
                ..Self::of(Outcome::NotGranted)
            },
            PermissionError::Filtered { errno } => Self {
                errno: Some(errno),
                ..Self::of(Outcome::Filtered)
            },
            PermissionError::Other { errno } => Self {
                errno: Some(errno),
                ..Self::of(Outcome::Other)
            },
            // One that this version of the format has no name for.
            _ => Self {
                errno: Some(0),
                ..Self::of(Outcome::Other)
            },
        }
    }
}

impl KvmDocument {
    const fn of(state: State) -> Self {
        Self {
            state,
            capabilities: None,
            guest_components: None,
            cpuid: None,
            rewritten: None,
            feature_msrs: None,
            tsc: None,
            version: None,
            call: None,
            errno: None,
        }
    }

    fn parse(self) -> Result<Result<KvmFacts, NoKvm>, DocumentError> {
        fn need<T>(field: &'static str, value: Option<T>) -> Result<T, DocumentError> {
            value.ok_or(DocumentError::Missing { field })
        }
        Ok(match self.state {
            State::Usable => Ok(KvmFacts {
                capabilities: need("kvm.capabilities", self.capabilities)?,
                guest_components: need("kvm.guest_components", self.guest_components)?
                    .map(features),
                cpuid: table("kvm.cpuid", need("kvm.cpuid", self.cpuid)?)?,
                rewritten: need("kvm.rewritten", self.rewritten)?
                    .map(|entries| table("kvm.rewritten", entries))
                    .transpose()?,
                feature_msrs: self.feature_msrs.map_or(FeatureMsrs::default(), |msrs| {
                    FeatureMsrs {
                        arch_capabilities: msrs.arch_capabilities.map(|value| value.0),
                        perf_capabilities: msrs.perf_capabilities.map(|value| value.0),
                    }
                }),
                tsc: self.tsc.map(|tsc| Tsc {
                    khz: tsc.khz,
                    scales: tsc.scales,
                }),
            }),
            State::NoDevice => Err(NoKvm::NoDevice),
            State::NoAccess => Err(NoKvm::NoAccess),
            State::NotKvm => Err(NoKvm::NotKvm {
                version: need("kvm.version", self.version)?,
            }),
            State::Failed => Err(NoKvm::Failed {
                call: text("kvm.call", need("kvm.call", self.call)?)?,
                errno: need("kvm.errno", self.errno)?,
            }),
        })
    }
}

impl From<&Result<KvmFacts, NoKvm>> for KvmDocument {
    fn from(kvm: &Result<KvmFacts, NoKvm>) -> Self {
        match kvm {
            Ok(facts) => Self {
                capabilities: Some(facts.capabilities),
                guest_components: Some(facts.guest_components.map(bits)),
                cpuid: Some(entries(&facts.cpuid)),
                rewritten: Some(facts.rewritten.as_ref().map(entries)),
                feature_msrs: (facts.feature_msrs != FeatureMsrs::default()).then(|| {
                    FeatureMsrsDocument {
                        arch_capabilities: facts.feature_msrs.arch_capabilities.map(Hex),
                        perf_capabilities: facts.feature_msrs.perf_capabilities.map(Hex),
                    }
                }),
                tsc: facts.tsc.map(|tsc| TscDocument {
                    khz: tsc.khz,
                    scales: tsc.scales,
                }),
                ..Self::of(State::Usable)
            },
            Err(NoKvm::NoDevice) => Self::of(State::NoDevice),
            Err(NoKvm::NoAccess) => Self::of(State::NoAccess),
            Err(NoKvm::NotKvm { version }) => Self {
                version: Some(*version),
                ..Self::of(State::NotKvm)
            },
            Err(NoKvm::Failed { call, errno }) => Self {
                call: Some(call.clone()),
                errno: Some(*errno),
                ..Self::of(State::Failed)
            },
        }
    }
}

fn bits(features: XFeatures) -> Hex<u64> {
    Hex(features.bits())
}

fn features(bits: Hex<u64>) -> XFeatures {
    XFeatures::from_bits_retain(bits.0)
}
