//! state.json of a Cloud Hypervisor snapshot: JSON, and in it one string of JSON per vCPU.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use cpuid_amx::Entry;
use serde::Deserialize;
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use xsave_state::layout::MAX_AREA_BYTES;

use super::OpenError;
use crate::bytes;
use crate::registers::{Listed, Xcrs};
use crate::vcpu::{Owner, Places, Vcpu};

/// Bytes of kvm_xcrs, which kvm-bindings fills up with zeros, and of kvm_sregs; CR4 in the latter.
const XCRS_BYTES: usize = 392;
const SREGS_BYTES: usize = 312;
const CR4: usize = 248;
/// Words of kvm_xsave.
const REGION_WORDS: usize = 1024;
/// Words that an area may have behind them.
const EXTRA_WORDS: usize = MAX_AREA_BYTES / 4 - REGION_WORDS;
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
const SIGNIFICANT_INDEX: u32 = 1;

/// CONFIG_KVM_MAX_NR_VCPUS is at most 4,096.
const MAX_VCPUS: usize = 4096;

/// The snapshot of all vCPUs.
#[derive(Deserialize)]
struct Manager {
    #[serde(default)]
    snapshots: States,
}

/// That of each vCPU, by its number.
#[derive(Default)]
struct States(BTreeMap<u32, String>);

/// One of them. What may be below it is not read.
#[derive(Deserialize)]
struct Node {
    #[serde(default)]
    snapshot_data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    state: String,
}

/// Of the tree only the branch of the vCPUs is read.
struct Root {
    cpu_manager: Option<Manager>,
}

#[derive(Deserialize)]
struct VcpuState {
    #[serde(rename = "Kvm")]
    kvm: KvmState,
}

#[derive(Deserialize)]
struct KvmState {
    cpuid: Vec<CpuidEntry>,
    msrs: Vec<Msr>,
    xsave: Xsave,
    xcrs: List<u8, XCRS_BYTES>,
    #[serde(default)]
    sregs: Option<List<u8, SREGS_BYTES>>,
    #[serde(default)]
    tsc_khz: Option<u32>,
}

#[derive(Deserialize)]
struct CpuidEntry {
    function: u32,
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

#[derive(Deserialize)]
struct Msr {
    index: u32,
    data: u64,
}

#[derive(Deserialize)]
struct Xsave {
    region: List<u32, REGION_WORDS>,
    #[serde(default)]
    extra: List<u32, EXTRA_WORDS>,
}

/// At most so many numbers.
struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let top: Top = serde_json::from_slice(bytes).map_err(|e| json(&e, bytes, "the file".into()))?;
    let Some(manager) = top.root.and_then(|root| root.cpu_manager) else {
        if top.keys.iter().any(|key| key == "format") {
            return Err(OpenError::HostDescription);
        }
        return Err(OpenError::OtherJson { keys: top.keys });
    };
    let mut vcpus = Vec::new();
    for (id, text) in manager.snapshots.0 {
        let state: VcpuState = serde_json::from_str(&text)
            .map_err(|e| json(&e, text.as_bytes(), format!("the state of vCPU {id}")))?;
        vcpus.push(vcpu(id, &state.kvm)?);
    }
    Ok(vcpus)
}

fn vcpu(id: u32, state: &KvmState) -> Result<Vcpu, OpenError> {
    let xsave = &state.xsave;
    if xsave.region.0.len() != REGION_WORDS {
        return Err(OpenError::Field {
            vcpu: id,
            field: "words in xsave.region",
            expected: REGION_WORDS,
            found: xsave.region.0.len(),
        });
    }
    let words = xsave.region.0.iter().chain(&xsave.extra.0);
    let area = words.flat_map(|word| word.to_le_bytes()).collect();
    let entries: Vec<Entry> = state.cpuid.iter().map(CpuidEntry::entry).collect();
    // One that is cut says nothing of CR4.
    let sregs = state
        .sregs
        .as_ref()
        .filter(|sregs| sregs.0.len() == SREGS_BYTES);
    Ok(Vcpu {
        owner: Owner::Vcpu(id),
        area,
        places: Places::Cpuid(entries.into()),
        listed: Listed {
            xcrs: Some(Xcrs::from_bytes(&state.xcrs.0)),
            msrs: state.msrs.iter().map(|msr| (msr.index, msr.data)).collect(),
            is_complete: true,
            cr4: sregs.map(|sregs| bytes::u64_at(&sregs.0, CR4)),
            tsc_khz: state.tsc_khz,
        },
    })
}

impl CpuidEntry {
    fn entry(&self) -> Entry {
        Entry {
            leaf: self.function,
            subleaf: (self.flags & SIGNIFICANT_INDEX != 0).then_some(self.index),
            value: [self.eax, self.ebx, self.ecx, self.edx],
        }
    }
}

/// The file: `snapshots`, and the names of the other keys for the error.
struct Top {
    root: Option<Root>,
    keys: Vec<String>,
}

impl<'de> Deserialize<'de> for Top {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopVisitor;
        impl<'de> Visitor<'de> for TopVisitor {
            type Value = Top;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a Cloud Hypervisor snapshot")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Top, A::Error> {
                let mut top = Top {
                    root: None,
                    keys: Vec::new(),
                };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "snapshots" {
                        top.root = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                    if top.keys.len() < 8 {
                        top.keys.push(key.chars().take(40).collect());
                    }
                }
                Ok(top)
            }
        }
        deserializer.deserialize_map(TopVisitor)
    }
}

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RootVisitor;
        impl<'de> Visitor<'de> for RootVisitor {
            type Value = Root;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the snapshots of Cloud Hypervisor's components")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Root, A::Error> {
                let mut root = Root { cpu_manager: None };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "cpu-manager" {
                        root.cpu_manager = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(root)
            }
        }
        deserializer.deserialize_map(RootVisitor)
    }
}

impl<'de> Deserialize<'de> for States {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StatesVisitor;
        impl<'de> Visitor<'de> for StatesVisitor {
            type Value = States;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the snapshots of vCPUs")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<States, A::Error> {
                let mut states = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let Ok(id) = name.parse() else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    if let Some(data) = map.next_value::<Node>()?.snapshot_data {
                        states.insert(id, data.state);
                    }
                    if states.len() > MAX_VCPUS {
                        let message = format!("expected at most {MAX_VCPUS} vCPUs");
                        return Err(A::Error::custom(message));
                    }
                }
                Ok(States(states))
            }
        }
        deserializer.deserialize_map(StatesVisitor)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for ListVisitor<T, MAX> {
            type Value = List<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut numbers = Vec::new();
                while let Some(number) = list.next_element()? {
                    if numbers.len() >= MAX {
                        let found = numbers.len().saturating_add(1);
                        return Err(A::Error::invalid_length(found, &self));
                    }
                    numbers.push(number);
                }
                Ok(List(numbers))
            }
        }
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

/// serde_json counts lines and columns; files like these are one line, or few.
fn json(error: &serde_json::Error, text: &[u8], place: String) -> OpenError {
    let before: usize = text
        .split_inclusive(|&byte| byte == b'\n')
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .fold(0, usize::saturating_add);
    let mut message = error.to_string();
    if let Some(at) = message.rfind(" at line ") {
        message.truncate(at);
    }
    // The column counts from 1: it is that of the byte that is wrong, or of the last one there.
    let column = if error.is_syntax() {
        error.column().saturating_sub(1)
    } else {
        error.column()
    };
    OpenError::Json {
        offset: before.saturating_add(column),
        place,
        message,
    }
}
