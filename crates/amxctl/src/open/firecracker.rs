//! What Firecracker's `snapshot-editor info-vmstate vcpu-states` prints: for each vCPU a line
//! `vcpu N:` and its `VcpuState` as Rust's debugging output.
//!
//! The MSRs in it cannot be used: of each list only its own header is printed, read as something
//! else from the second on. So IA32_XFD is not known.

use std::str::Utf8Error;

use cpuid_amx::Entry;
use xsave_state::layout::MAX_AREA_BYTES;

use super::OpenError;
use super::debug_text::{Event, Line, events};
use crate::registers::{Listed, Xcrs};
use crate::vcpu::{Owner, Places, Vcpu};

/// Words of kvm_xsave.
const REGION_WORDS: usize = 1024;
/// KVM_MAX_CPUID_ENTRIES of recent kernels.
const MAX_CPUID_ENTRIES: usize = 256;
/// Those of kvm_xcrs.
const MAX_XCRS: usize = 16;
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
const SIGNIFICANT_INDEX: u32 = 1;

/// What is found of one vCPU.
#[derive(Default)]
struct Found {
    id: u32,
    cpuid: Vec<Entry>,
    flags: u32,
    region: Vec<u32>,
    extra: Vec<u32>,
    xcrs: Xcrs,
}

pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let text = std::str::from_utf8(bytes).map_err(|error| not_text(bytes, error))?;
    let mut vcpus = Vec::new();
    let mut found: Option<Found> = None;
    events(text, |path, event, line| {
        match event {
            Event::Title(title) => {
                if let Some(done) = found.replace(Found::new(title, line)?) {
                    vcpus.push(done.vcpu()?);
                }
            }
            _ => match &mut found {
                Some(found) => found.take(path, event, line)?,
                None => return Err(line.error("`vcpu 0:`")),
            },
        }
        Ok(())
    })?;
    if let Some(done) = found {
        vcpus.push(done.vcpu()?);
    }
    Ok(vcpus)
}

impl Found {
    fn new(title: &str, line: Line<'_>) -> Result<Self, OpenError> {
        let number = title
            .strip_prefix("vcpu ")
            .and_then(|t| t.strip_suffix(':'));
        let id = number
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| line.error("`vcpu N:`"))?;
        Ok(Self {
            id,
            ..Self::default()
        })
    }

    /// The first name in `path` is that of the structure itself, which is no field.
    fn take(&mut self, path: &[&str], event: Event<'_>, line: Line<'_>) -> Result<(), OpenError> {
        match (path, event) {
            (["", "cpuid", "entries"], Event::Open(None)) => {
                if self.cpuid.len() >= MAX_CPUID_ENTRIES {
                    return Err(line.error("at most 256 entries of CPUID"));
                }
                self.flags = 0;
                self.cpuid.push(Entry {
                    leaf: 0,
                    subleaf: None,
                    value: [0; 4],
                });
            }
            (["", "cpuid", "entries", ""], Event::Value(Some(field), value)) => {
                self.cpuid_field(field, number(value, line)?);
            }
            (["", "xcrs"], Event::Value(Some("nr_xcrs"), value)) => {
                self.xcrs.declared = number(value, line)?;
            }
            (["", "xcrs"], Event::Value(Some("flags"), value)) => {
                self.xcrs.flags = number(value, line)?;
            }
            (["", "xcrs", "xcrs", ""], Event::Value(Some("xcr"), value)) => {
                if self.xcrs.list.len() >= MAX_XCRS {
                    return Err(line.error("at most 16 extended control registers"));
                }
                self.xcrs.list.push((number(value, line)?, 0));
            }
            (["", "xcrs", "xcrs", ""], Event::Value(Some("value"), value)) => {
                let value = number(value, line)?;
                if let Some((_, last)) = self.xcrs.list.last_mut() {
                    *last = value;
                }
            }
            (["", "xsave", "fam_struct", "xsave", "region"], Event::Value(None, value)) => {
                push(&mut self.region, number(value, line)?, line)?;
            }
            (["", "xsave", "entries"], Event::Value(None, value)) => {
                push(&mut self.extra, number(value, line)?, line)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn cpuid_field(&mut self, field: &str, value: u32) {
        let Some(entry) = self.cpuid.last_mut() else {
            return;
        };
        let [eax, ebx, ecx, edx] = &mut entry.value;
        match field {
            "function" => entry.leaf = value,
            // The flags come behind it and say whether it counts.
            "index" => entry.subleaf = Some(value),
            "flags" if value & SIGNIFICANT_INDEX == 0 => entry.subleaf = None,
            "eax" => *eax = value,
            "ebx" => *ebx = value,
            "ecx" => *ecx = value,
            "edx" => *edx = value,
            _ => {}
        }
    }

    fn vcpu(self) -> Result<Vcpu, OpenError> {
        if self.region.len() != REGION_WORDS {
            return Err(OpenError::Field {
                vcpu: self.id,
                field: "words in xsave.region",
                expected: REGION_WORDS,
                found: self.region.len(),
            });
        }
        Ok(Vcpu {
            owner: Owner::Vcpu(self.id),
            area: self
                .region
                .iter()
                .chain(&self.extra)
                .flat_map(|word| word.to_le_bytes())
                .collect(),
            places: Places::Cpuid(self.cpuid.into()),
            listed: Listed {
                xcrs: Some(self.xcrs),
                ..Listed::default()
            },
        })
    }
}

fn push(words: &mut Vec<u32>, word: u32, line: Line<'_>) -> Result<(), OpenError> {
    if words.len() >= MAX_AREA_BYTES / 4 {
        return Err(line.error("an area of at most 65536 bytes"));
    }
    words.push(word);
    Ok(())
}

fn number<T: std::str::FromStr>(value: &str, line: Line<'_>) -> Result<T, OpenError> {
    value.parse().map_err(|_| line.error("a number"))
}

fn not_text(bytes: &[u8], error: Utf8Error) -> OpenError {
    let offset = error.valid_up_to();
    let before = bytes.get(..offset).unwrap_or_default();
    let line = before.iter().filter(|&&byte| byte == b'\n').count();
    OpenError::Text {
        offset,
        line: line.saturating_add(1),
        expected: "text in UTF-8",
        found: format!("{:#04x}", bytes.get(offset).copied().unwrap_or(0)),
    }
}
