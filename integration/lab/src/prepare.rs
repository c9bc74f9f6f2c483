//! Makes the lab's parts: the emulator, the kernels, and a machine of each that has booted. Does only what is missing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::apt::{Apt, AptError};
use crate::cpu::Cpu;
use crate::emulator::{self, EmulatorError};
use crate::kernel::{self, Kernel, KernelError};
use crate::lab::{LabError, LabOptions};
use crate::manifest::{Care, Manifest, ManifestError};
use crate::patch_set::{self, PatchError};
use crate::progress::Progress;
use crate::saved;
use crate::status::disk_bytes;
use crate::store::{Lock, Store, StoreError, remove};
use crate::tools;

/// What is to be prepared.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Kernels; the emulator is needed for any.
    pub kernels: Vec<Kernel>,
    /// Processor of the machines that are booted in advance.
    pub cpu: Cpu,
    /// How many processors the machines have that are booted in advance.
    pub cpus: u32,
    /// Memory of the machines that are booted in advance.
    pub memory_mib: u32,
    /// Boot no machines in advance: only make what they boot from.
    pub cold: bool,
    /// Where Debian's packages come from, if not from where this machine gets its own.
    pub mirror: Option<String>,
    /// Fetch the kernels anew: Debian may have newer ones.
    pub update: bool,
    /// Read every byte of what is there already, and make anew what has changed.
    pub verify: bool,
    /// Names of patches that the emulator is to lack.
    pub without_patches: Vec<String>,
}

impl PrepareOptions {
    /// The machine with this kernel.
    fn lab(&self, kernel: Kernel) -> LabOptions {
        LabOptions {
            kernel,
            cpu: self.cpu,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            cold: self.cold,
            without_patches: self.without_patches.clone(),
        }
    }
}

impl Default for PrepareOptions {
    fn default() -> Self {
        let lab = LabOptions::default();
        Self {
            kernels: vec![lab.kernel],
            cpu: lab.cpu,
            cpus: lab.cpus,
            memory_mib: lab.memory_mib,
            cold: lab.cold,
            mirror: None,
            update: false,
            verify: false,
            without_patches: Vec::new(),
        }
    }
}

/// Why the lab could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// Programs or files that the preparation needs are not on this machine.
    #[error("the lab needs {} to be built; install what is missing with:\n  {command}", names.join(", "))]
    MissingTools {
        /// What is missing.
        names: Vec<&'static str>,
        /// The one command that installs them.
        command: String,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part could not be described or read back.
    #[error(transparent)]
    Part(#[from] ManifestError),
    /// There is no such patch.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// Packages could not be fetched.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// The emulator could not be built.
    #[error("the emulator could not be built")]
    Emulator(#[from] EmulatorError),
    /// A kernel could not be made ready.
    #[error("{kernel}")]
    Kernel {
        /// The kernel.
        kernel: Kernel,
        /// Why.
        source: KernelError,
    },
    /// The shell could not be unpacked.
    #[error("the shell could not be unpacked")]
    Shell {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A prepared machine does not boot.
    #[error("{kernel} does not boot in the lab")]
    Boot {
        /// The kernel.
        kernel: Kernel,
        /// Why.
        source: LabError,
    },
}

/// Prepares the lab. What is there already is kept; with nothing to do, this takes a moment and no network.
///
/// # Errors
/// When a part cannot be made. What had been made stays.
pub fn prepare(
    store: &Store,
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<(), PrepareError> {
    let work = Work {
        store,
        options,
        progress,
        care: if options.verify {
            Care::Hash
        } else {
            Care::Glance
        },
    };
    let missing = |kernel: &Kernel| {
        let lab = options.lab(*kernel);
        let there = if options.cold {
            saved::has_parts(store, &lab, work.care)
        } else {
            saved::find(store, &lab, work.care).map(drop)
        };
        work.lacks_kernel(*kernel) || there.is_err()
    };
    if !options.update && !options.kernels.iter().any(missing) {
        return Ok(());
    }
    {
        let lock = store.lock(|| progress.step("waiting for another prepare to end", None))?;
        store.remove_unfinished(&lock)?;
        work.make_parts(&lock)?;
    }
    if options.cold {
        return Ok(());
    }
    for kernel in &options.kernels {
        if options.verify && missing(kernel) {
            work.forget_machines(*kernel)?;
        }
        saved::find_or_make(store, &options.lab(*kernel), progress).map_err(|source| {
            PrepareError::Boot {
                kernel: *kernel,
                source,
            }
        })?;
    }
    Ok(())
}

/// Removes everything that prepare has made.
///
/// # Errors
/// When the file system refuses.
pub fn clean(store: &Store) -> Result<u64, StoreError> {
    let lock = store.lock(|| {})?;
    let mut bytes: u64 = 0;
    for (name, path) in store.members()? {
        if ["emulator-", "kernel-", "machine-", "shell"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            bytes = bytes.saturating_add(disk_bytes(&path));
            remove(&path).map_err(|source| StoreError::Io { path, source })?;
        }
    }
    store.remove_unfinished(&lock)?;
    Ok(bytes)
}

struct Work<'a> {
    store: &'a Store,
    options: &'a PrepareOptions,
    progress: &'a dyn Progress,
    care: Care,
}

impl Work<'_> {
    fn make_parts(&self, lock: &Lock) -> Result<(), PrepareError> {
        let patches = patch_set::without(&self.options.without_patches)?;
        let emulator_part = emulator::part_name(&patches);
        let needs_emulator = self.is_missing(&emulator_part);
        let kernels: Vec<_> = self
            .options
            .kernels
            .iter()
            .filter(|kernel| self.options.update || self.lacks_kernel(**kernel))
            .collect();
        if !needs_emulator && kernels.is_empty() {
            return Ok(());
        }
        if let Some((names, command)) = tools::missing() {
            return Err(PrepareError::MissingTools { names, command });
        }
        let scratch = self.store.unfinished(lock, "scratch")?;
        let mut suites = BTreeMap::new();
        if needs_emulator {
            let apt = self.apt(&scratch, emulator::SUITE, &mut suites)?;
            let folder = self.store.unfinished(lock, &emulator_part)?;
            let (packages, facts) = emulator::build(
                &patches,
                apt,
                &scratch.join("emulator"),
                &folder,
                self.progress,
            )?;
            Manifest::create(&folder, packages, facts)?;
            self.store.publish(lock, &folder, &emulator_part)?;
        }
        for kernel in kernels {
            let apt = self.apt(&scratch, kernel.suite(), &mut suites)?;
            self.progress
                .step(&format!("fetching the kernel of {kernel}"), None);
            let part = saved::kernel_part(*kernel);
            let folder = self.store.unfinished(lock, &part)?;
            let (packages, facts) =
                kernel::unpack(*kernel, apt, &scratch, &folder).map_err(|source| {
                    PrepareError::Kernel {
                        kernel: *kernel,
                        source,
                    }
                })?;
            Manifest::create(&folder, packages, facts)?;
            self.store.publish(lock, &folder, &part)?;
            self.progress.done();
        }
        // What stays is removed by the next prepare.
        let _ = remove(&scratch);
        Ok(())
    }

    fn is_missing(&self, part: &str) -> bool {
        Manifest::check(&self.store.part(part), self.care).is_err()
    }

    /// The kernel is missing, or an older version of the lab has kept less of it.
    fn lacks_kernel(&self, kernel: Kernel) -> bool {
        let part = self.store.part(&saved::kernel_part(kernel));
        Manifest::check(&part, self.care).map_or(true, |kept| !kernel::is_whole(&kept))
    }

    fn apt<'s>(
        &self,
        scratch: &Path,
        suite: &str,
        suites: &'s mut BTreeMap<String, Apt>,
    ) -> Result<&'s Apt, PrepareError> {
        if !suites.contains_key(suite) {
            self.progress
                .step(&format!("fetching the package lists of {suite}"), None);
            let folder = scratch.join(format!("apt-{suite}"));
            fs::create_dir_all(&folder).map_err(|source| StoreError::Io {
                path: folder.clone(),
                source,
            })?;
            let apt = Apt::new(
                &folder,
                suite,
                self.options.mirror.as_deref(),
                suite == emulator::SUITE,
            )?;
            suites.insert(suite.to_owned(), apt);
            self.progress.done();
        }
        suites.get(suite).ok_or_else(|| {
            AptError::NoPackage {
                package: "any".into(),
                suite: suite.into(),
            }
            .into()
        })
    }

    /// A machine whose bytes have changed without its sizes and times doing so passes a glance, so it has to go.
    fn forget_machines(&self, kernel: Kernel) -> Result<(), StoreError> {
        let _lock = self.store.lock(|| {})?;
        let prefix = saved::machine_family(&self.options.lab(kernel));
        for (name, path) in self.store.members()? {
            if name.starts_with(&prefix) {
                remove(&path).map_err(|source| StoreError::Io { path, source })?;
            }
        }
        Ok(())
    }
}
