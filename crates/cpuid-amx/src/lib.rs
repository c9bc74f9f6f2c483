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
//! | [`coherence`] | every way in which leaves contradict each other |
//! | [`baseline`] | what a fleet shares, and which hosts took what away |
//! | [`compat`] | whether a guest runs on a host, or every reason why not |
//! | [`features`] | XSAVE and AMX features as a set |
//! | [`host`] | a description of a host |
//! | [`policy`] | hide AMX, or expose what may be seen: all leaves at once |
//! | [`permission`] | proof that the host grants tile data to guests (the request: feature `kvm`) |
//! | `kvm` | KVM_SET_CPUID2 with errors that say what to do (feature `kvm`) |

extern crate alloc;
#[cfg(feature = "kvm")]
extern crate std;

pub mod amx;
pub mod baseline;
pub mod coherence;
pub mod compat;
#[cfg(feature = "serde")]
mod document;
pub mod dump;
pub mod features;
pub mod host;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
pub mod permission;
pub mod policy;
pub mod table;

pub use amx::{Amx, AmxFeatures, TmulLimits, Unusable};
pub use baseline::{Baseline, Fleet};
pub use coherence::Contradiction;
pub use features::{Feature, FeatureSet};
pub use host::Host;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub use permission::GuestPermission;
pub use permission::PermissionError;
pub use policy::{Level, Policy, PolicyError};
pub use table::{CpuidEntry, CpuidTable, Entry, Table, TableFull};
