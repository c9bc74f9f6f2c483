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
//! | [`host`] | a description of a host, as data and as a document |
//! | [`kernel`] | which known fixes the kernel of a host has |
//! | [`compat`] | whether a guest runs on a host, or every reason why not |
//! | [`baseline`] | what a fleet shares, and which hosts lack what |
//! | [`guest_cpu`] | the CPU of a guest that runs on every host of a fleet |
//! | [`render`] | that CPU as Firecracker, QEMU and `cpuid` read it |
//! | [`restrict()`] | what a guest may see that is to run on several hosts |
//! | [`update`] | what an update did to a host, and which running guests it would strand |
//! | `probe` | describes the machine that is here (feature `kvm`) |

pub mod baseline;
pub mod compat;
mod document;
pub mod guest_cpu;
pub mod host;
pub mod kernel;
mod msrs;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod probe;
mod registers;
pub mod render;
mod restrict;
pub mod update;

pub use baseline::{Baseline, Fleet};
pub use compat::{Compatibility, Guest, Verdict};
pub use guest_cpu::GuestCpu;
pub use host::Host;
pub use msrs::FeatureMsrs;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub use probe::{probe, probe_at, xcomp_guest_supp};
pub use restrict::{RestrictError, restrict};
