#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]
//!
//! | module | its one job |
//! |---|---|
//! | [`table`] | leaves and sub-leaves, whatever type holds them |
//! | [`dump`] | the same as text |
//! | [`amx`] | features, palettes and TMUL limits |
//! | [`features`] | XSAVE and AMX features as a set that is closed over what they need |
//! | [`coherence`] | every way in which leaves contradict each other |
//! | [`policy`] | hide AMX, or expose what may be seen: all leaves at once |
//! | [`permission`] | proof that the host grants tile data to guests (the request: feature `permission`) |
//! | `kvm` | KVM_SET_CPUID2 with errors that say what to do (feature `kvm`) |

extern crate alloc;
#[cfg(feature = "permission")]
extern crate std;

pub mod amx;
mod bits;
pub mod coherence;
pub mod dump;
pub mod features;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
pub mod permission;
pub mod policy;
pub mod table;

pub use amx::{Amx, AmxFeatures, TmulLimits, Unusable};
pub use bits::{Bits, Register};
pub use coherence::Contradiction;
pub use features::{Feature, FeatureSet};
#[cfg(all(feature = "permission", target_os = "linux", target_arch = "x86_64"))]
pub use permission::GuestPermission;
pub use permission::PermissionError;
pub use policy::{Level, Policy, PolicyError};
pub use table::{CpuidEntry, CpuidTable, Entry, Table, TableFull};
