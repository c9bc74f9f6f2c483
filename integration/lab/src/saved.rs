//! Machines that are ready to start: the boot files of one kernel and memory size, and the state of the machine just after it has booted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::boot_image::{self, LEAST_MEMORY_MIB, MOST_CPUS, MOST_MEMORY_MIB, Recipe};
use crate::cpu::Cpu;
use crate::emulator;
use crate::events::Event;
use crate::kernel::{Kernel, RELEASE};
use crate::lab::{LabError, LabOptions};
use crate::machine::{Machine, Start};
use crate::manifest::{Care, Manifest, ManifestError};
use crate::patch_set;
use crate::progress::Progress;
use crate::store::{self, Lock, Store, key};
use crate::watchdog::Watchdog;

/// A boot that takes longer has failed. It takes 6 s on two cores of 2026 that do nothing else.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Machines of one kernel and memory size that stay: each version of the lab makes its own, and more than one can be in use.
const MACHINES_KEPT: usize = 3;

/// The emulator's name for the configuration in a saved state.
const SAVED_CONFIGURATION: &str = "config";

/// Where the parts of a machine are.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub(crate) emulator: PathBuf,
    pub(crate) folder: PathBuf,
}

/// Name of the part that holds an unpacked kernel.
pub(crate) fn kernel_part(kernel: Kernel) -> String {
    format!("kernel-{kernel}")
}

/// Beginning of the names of machines that differ only in the versions of their parts. Those of other processors than the usual one, or
/// of several, are families of their own.
pub(crate) fn machine_family(options: &LabOptions) -> String {
    let LabOptions {
        kernel,
        cpu,
        cpus,
        memory_mib,
        ..
    } = options;
    let mut family = "machine-".to_owned();
    if *cpu != Cpu::default() {
        family.push_str(&format!("{cpu}-"));
    }
    if *cpus != 1 {
        family.push_str(&format!("{cpus}-cpus-"));
    }
    family.push_str(&format!("{kernel}-{memory_mib}-"));
    family
}

/// The machine that is made of these parts, if it has been made.
pub(crate) fn find(store: &Store, options: &LabOptions, care: Care) -> Result<Ready, LabError> {
    let plan = plan(store, options, care)?;
    let folder = store.part(&plan.name);
    Manifest::check(&folder, care)?;
    Ok(Ready {
        emulator: store.part(&plan.recipe.emulator),
        folder,
    })
}

/// The machine that is made of these parts; makes it, if need be, which takes a boot.
pub(crate) fn find_or_make(
    store: &Store,
    options: &LabOptions,
    progress: &dyn Progress,
) -> Result<Ready, LabError> {
    match find(store, options, Care::Glance) {
        Err(LabError::Part(ManifestError::Missing { .. } | ManifestError::Changed { .. })) => {}
        other => return other,
    }
    // A part that this one is made from may be what is missing: then this fails again, and says so.
    let lock = store.lock(|| progress.step("waiting for another prepare to end", None))?;
    if let Ok(ready) = find(store, options, Care::Glance) {
        return Ok(ready);
    }
    let plan = plan(store, options, Care::Glance)?;
    let LabOptions {
        kernel,
        cpu,
        memory_mib,
        ..
    } = options;
    progress.step(
        &format!("booting {kernel} on {cpu} with {memory_mib} MiB (once)"),
        None,
    );
    let work = store.unfinished(&lock, &plan.name)?;
    let kernel_manifest = write_boot_files(store, &plan.recipe, &work)?;
    let state = work.join(crate::machine::STATE);
    fs::create_dir(&state).map_err(|source| ManifestError::Io {
        path: state,
        source,
    })?;
    let machine = Machine::start(
        &store.part(&plan.recipe.emulator),
        &work,
        Start::Save,
        |_| {},
    )
    .map_err(LabError::start)?;
    wait_for_end(&machine)?;
    drop(machine);
    keep_configuration(&work)?;
    let facts = BTreeMap::from([
        (RELEASE.to_owned(), plan.release.clone()),
        ("memory_mib".to_owned(), memory_mib.to_string()),
    ]);
    Manifest::create(&work, kernel_manifest.packages, facts)?;
    let folder = store.publish(&lock, &work, &plan.name)?;
    store.keep_newest(&lock, &machine_family(options), MACHINES_KEPT)?;
    progress.done();
    Ok(Ready {
        emulator: store.part(&plan.recipe.emulator),
        folder,
    })
}

/// What a machine boots from.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) ready: Ready,
    /// Held until it has booted: then nobody needs the files any more.
    _made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    folder: PathBuf,
    _lock: Lock,
}

impl Drop for Made {
    fn drop(&mut self) {
        // What stays is removed by the next prepare.
        let _ = store::remove(&self.folder);
    }
}

/// The files that a machine boots from: those of the one that was saved, or, where none was, files that are made for this boot.
pub(crate) fn find_or_make_boot(
    store: &Store,
    options: &LabOptions,
    progress: &dyn Progress,
) -> Result<Boot, LabError> {
    if let Ok(ready) = find(store, options, Care::Glance) {
        return Ok(Boot { ready, _made: None });
    }
    let lock = store.lock(|| progress.step("waiting for another prepare to end", None))?;
    let plan = plan(store, options, Care::Glance)?;
    let folder = store.unfinished(&lock, &plan.name)?;
    let made = Made {
        folder: folder.clone(),
        _lock: lock,
    };
    write_boot_files(store, &plan.recipe, &folder)?;
    Ok(Boot {
        ready: Ready {
            emulator: store.part(&plan.recipe.emulator),
            folder,
        },
        _made: Some(made),
    })
}

/// Whether the parts are there that a machine boots from.
pub(crate) fn has_parts(store: &Store, options: &LabOptions, care: Care) -> Result<(), LabError> {
    plan(store, options, care).map(drop)
}

fn write_boot_files(store: &Store, recipe: &Recipe, to: &Path) -> Result<Manifest, ManifestError> {
    let kernel_folder = store.part(&recipe.kernel);
    let kernel_manifest = Manifest::check(&kernel_folder, Care::Glance)?;
    boot_image::create(recipe, &kernel_folder, &kernel_manifest, to)?;
    Ok(kernel_manifest)
}

struct Plan {
    name: String,
    recipe: Recipe,
    release: String,
}

fn plan(store: &Store, options: &LabOptions, care: Care) -> Result<Plan, LabError> {
    let mib = options.memory_mib;
    if !(LEAST_MEMORY_MIB..=MOST_MEMORY_MIB).contains(&mib) {
        return Err(LabError::Memory { mib });
    }
    let cpus = options.cpus;
    if !(1..=MOST_CPUS).contains(&cpus) {
        return Err(LabError::Cpus { cpus });
    }
    let patches = patch_set::without(&options.without_patches)?;
    let recipe = Recipe {
        emulator: emulator::part_name(&patches),
        kernel: kernel_part(options.kernel),
        cpu: options.cpu,
        cpus,
        memory_mib: mib,
    };
    let emulator = Manifest::check(&store.part(&recipe.emulator), care)?;
    let kernel_folder = store.part(&recipe.kernel);
    let kernel_manifest = Manifest::check(&kernel_folder, care)?;
    let release = kernel_manifest.fact(&kernel_folder, RELEASE)?.to_owned();
    let parts = [
        emulator.digest().into_bytes(),
        kernel_manifest.digest().into_bytes(),
    ];
    let ingredients = recipe.ingredients();
    let key = key(ingredients.iter().chain(&parts).map(Vec::as_slice));
    Ok(Plan {
        name: format!("{}{key}", machine_family(options)),
        recipe,
        release,
    })
}

/// A machine that is resumed is configured as the one that was booted, by the same file. The emulator writes one of its own when it
/// saves, which leaves out options that it has: with that, a resumed processor has what was excluded from it.
fn keep_configuration(folder: &Path) -> Result<(), ManifestError> {
    let path = folder.join(crate::machine::STATE).join(SAVED_CONFIGURATION);
    fs::copy(folder.join(boot_image::CONFIGURATION), &path)
        .map(drop)
        .map_err(|source| ManifestError::Io { path, source })
}

/// A machine that saves itself says nothing and ends.
fn wait_for_end(machine: &Machine) -> Result<(), LabError> {
    let killer = machine.killer();
    let watchdog = Watchdog::start(BOOT_LIMIT, move || killer.kill());
    loop {
        match machine.next() {
            Event::Gone(how) if how.contains("exit status 0") => return Ok(()),
            Event::Gone(_) if !watchdog.call_off() => {
                return Err(LabError::TimedOut { limit: BOOT_LIMIT });
            }
            Event::Gone(how) => return Err(LabError::Emulator { how }),
            Event::Crash(report) => return Err(LabError::HostPanic { report }),
            Event::CrashBegins | Event::Frame(..) | Event::SendFailed(_) => {}
        }
    }
}
