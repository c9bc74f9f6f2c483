//! What of the lab is there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::emulator;
use crate::kernel::{Kernel, RELEASE};
use crate::manifest::{Care, Manifest, ManifestError};
use crate::patch_set;
use crate::saved;
use crate::store::{Store, StoreError, is_unfinished};

/// One part of the lab.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// Bytes that it takes on the disk; `None` if it is not there, or damaged.
    pub bytes: Option<u64>,
    /// The release of a kernel, or the packages that it came from; or why it cannot be used.
    pub about: String,
}

/// All parts of the lab.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// What a lab needs: the emulator, then the kernels.
    pub parts: Vec<Part>,
    /// Machines that have booted and resume at once; and what older versions left.
    pub others: Vec<Part>,
}

/// Looks at what is there.
///
/// # Errors
/// When the store cannot be read.
pub fn status(store: &Store, verify: bool) -> Result<Status, StoreError> {
    let care = if verify { Care::Hash } else { Care::Glance };
    let needed = std::iter::once(("emulator".to_owned(), emulator::part_name(patch_set::ALL)))
        .chain(Kernel::ALL.map(|kernel| (kernel.to_string(), saved::kernel_part(kernel))));
    let needed: Vec<_> = needed.collect();
    let parts = needed
        .iter()
        .map(|(name, part)| describe(store, name, part, care))
        .collect();
    let mut others = Vec::new();
    for (name, path) in store.members()? {
        if is_unfinished(&name) {
            others.push(Part {
                bytes: Some(disk_bytes(&path)),
                name,
                about: "unfinished: of a prepare that runs now, or else removed by the next one"
                    .to_owned(),
            });
        } else if path.is_dir() && !needed.iter().any(|(_, part)| *part == name) {
            others.push(describe(store, &name, &name, care));
        }
    }
    Ok(Status { parts, others })
}

fn describe(store: &Store, name: &str, part: &str, care: Care) -> Part {
    match Manifest::check(&store.part(part), care) {
        Err(ManifestError::Missing { .. }) => Part {
            name: name.to_owned(),
            bytes: None,
            about: match name.parse::<Kernel>() {
                Ok(kernel) => format!("not there: amx-lab prepare --kernel {kernel}"),
                Err(_) => "not there: amx-lab prepare".to_owned(),
            },
        },
        Err(error) => Part {
            name: name.to_owned(),
            bytes: None,
            about: error.to_string(),
        },
        Ok(manifest) => {
            let release = manifest
                .facts
                .get(RELEASE)
                .map(|release| format!("Linux {release}"));
            let packages = manifest
                .packages
                .iter()
                .map(|(package, version)| format!("{package} {version}"));
            // A kernel says its release, which its packages' names repeat.
            let about = match release {
                Some(release) => release,
                None => packages.collect::<Vec<_>>().join(", "),
            };
            Part {
                name: name.to_owned(),
                bytes: Some(disk_bytes(&store.part(part))),
                about,
            }
        }
    }
}

/// What a tree takes on the disk. Saved RAM is mostly holes, so lengths of files say little.
pub(crate) fn disk_bytes(folder: &Path) -> u64 {
    const BLOCK: u64 = 512;
    let Ok(members) = fs::read_dir(folder) else {
        return 0;
    };
    members.flatten().fold(0, |sum: u64, member| {
        let bytes = match member.metadata() {
            Ok(about) if about.is_dir() => disk_bytes(&member.path()),
            Ok(about) => about.blocks().saturating_mul(BLOCK),
            Err(_) => 0,
        };
        sum.saturating_add(bytes)
    })
}
