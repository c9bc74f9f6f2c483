//! The AMX lab: runs any static x86-64 program on a host with real KVM and with Intel AMX and XFD, on a machine that has neither.
//!
//! An emulated Sapphire Rapids boots an unmodified Debian kernel with kvm-intel. [`prepare`] builds the emulator and fetches the kernels once;
//! [`Lab`] starts a host of its own, in a fraction of a second, and [`Lab::run`] runs a program on it as if it were this machine.
//! Nothing here needs root, /dev/kvm or, once prepared, a network.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use amx_lab::{Job, Kernel, Lab, LabOptions, PrepareOptions, Quiet, Store, Streams, prepare};
//!
//! let store = Store::open()?;
//! prepare(&store, &PrepareOptions::default(), &Quiet)?;
//! let mut lab = Lab::start(&store, &LabOptions::default())?;
//! let ending = lab.run(&Job::new("target/x86_64-unknown-linux-gnu/debug/deps/some-test")?, Streams::inherit(), None)?;
//! std::process::exit(ending.status());
//! # }
//! ```
//!
//! What the emulator does is held to what the kernel and the manual require; nothing here has been compared with silicon.

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

mod acpi;
mod apt;
mod boot_image;
mod busybox;
mod console;
pub mod cpio;
mod cpu;
mod elf;
mod emulator;
mod events;
mod guest_kernel;
mod job;
mod kernel;
mod lab;
mod machine;
mod manifest;
mod out_folder;
mod patch_set;
mod prepare;
mod progress;
mod saved;
pub mod session;
mod show;
mod sources;
mod status;
mod store;
mod tools;
mod watchdog;
pub mod wire;

pub use busybox::busybox;
pub use cpu::{Cpu, UnknownCpu};
pub use elf::ElfError;
pub use guest_kernel::{MSR_MODULE, VMLINUX, VMLINUZ, guest_kernel};
pub use job::{Job, JobError};
pub use kernel::{Kernel, UnknownKernel};
pub use lab::{Ending, Lab, LabError, LabOptions, Streams};
pub use manifest::ManifestError;
pub use prepare::{PrepareError, PrepareOptions, clean, prepare};
pub use progress::{Progress, Quiet};
pub use show::Show;
pub use status::{Part, Status, status};
pub use store::{Lock, Store, StoreError};
