//! The CPU of a guest as the tools that start guests read it: [`firecracker`], [`qemu`], [`cpuid`].
//!
//! No format holds all of it. What a format cannot hold is [named](NotHeld), so that nobody takes a
//! template for more than it is.

use cpuid_amx::Bits;
use serde::Serialize;
use thiserror::Error;

use crate::guest_cpu::GuestCpu;

mod dump;
mod firecracker;
mod qemu;

pub use dump::cpuid;
pub use firecracker::firecracker;
pub use qemu::qemu;

/// A CPU in a format of another tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// What the tool reads.
    pub text: String,
    /// What the format cannot hold.
    pub not_held: Vec<NotHeld>,
}

/// Something that a format cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotHeld {
    /// What it is.
    pub what: What,
    /// What happens to it, in words.
    pub why: String,
}

/// What a format may not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum What {
    /// The permission to use AMX, ARCH_REQ_XCOMP_GUEST_PERM.
    AmxPermission,
    /// The places of components in the XSAVE area.
    XsaveLayout,
    /// Sub-leaf 1 of leaf 1EH.
    #[serde(rename = "leaf_1eh_1")]
    Leaf1eh1,
    /// MSRs that say what the processor can do.
    FeatureMsrs,
    /// The frequency of the time stamp counter.
    Tsc,
    /// Model, name, caches and topology.
    Model,
    /// Bits and numbers of CPUID.
    Cpuid,
}

impl What {
    fn because(self, why: impl Into<String>) -> NotHeld {
        let why = why.into();
        NotHeld { what: self, why }
    }
}

/// The format has no form for this CPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RenderError {
    /// Firecracker refuses a template that names a leaf which a host lacks, and the leaf cannot stay as
    /// it is where it is there.
    #[error(
        "no single template fits all hosts: CPUID.{leaf:X}H.{subleaf} has to change where it is, and \
         is not reported on every host, where Firecracker would refuse the template; make one for \
         each kind of host"
    )]
    LeafOfSomeHosts {
        /// The leaf.
        leaf: u32,
        /// The sub-leaf.
        subleaf: u32,
    },
}

/// The registers that some host keeps to itself.
fn untold(cpu: &GuestCpu) -> Option<NotHeld> {
    let leaves: Vec<String> = cpu
        .leaves
        .iter()
        .filter(|(_, found)| found.untold)
        .map(|((leaf, subleaf), _)| format!("CPUID.{leaf:X}H.{subleaf}"))
        .collect();
    (!leaves.is_empty()).then(|| {
        What::Cpuid.because(format!(
            "not known of every host, because the dump of some has no such leaf: {}",
            leaves.join(", ")
        ))
    })
}

/// IA32_ARCH_CAPABILITIES where the guest sees it and its value is not known of every host.
fn unknown_msr(cpu: &GuestCpu, so: &str) -> Option<NotHeld> {
    let is_unknown = cpu.sees_arch_capabilities() && cpu.arch_capabilities.is_none();
    is_unknown.then(|| {
        let why = format!("IA32_ARCH_CAPABILITIES is not known of every host: {so}");
        What::FeatureMsrs.because(why)
    })
}

fn names(bits: &[Bits]) -> String {
    let names: Vec<String> = bits.iter().map(ToString::to_string).collect();
    names.join(", ")
}
