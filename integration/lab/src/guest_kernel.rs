//! The kernel of a lab as files that a VMM inside the lab boots as its guest.

use std::fs;
use std::path::Path;

use crate::kernel::{self, GUEST_MODULES, Kernel, PACKED, module_file};
use crate::lab::LabError;
use crate::manifest::{Care, Manifest, ManifestError};
use crate::saved::kernel_part;
use crate::store::Store;

/// Name of the kernel's file.
pub const VMLINUX: &str = "vmlinux";
/// Name of the same kernel as Debian has it: a bzImage.
pub const VMLINUZ: &str = "vmlinuz";
/// Name of the module that gives a guest's processes its processors' MSRs.
pub const MSR_MODULE: &str = "msr.ko";
/// Writes the kernel of a prepared lab to `folder`: as a bzImage, `vmlinuz`, as Debian has it; as the ELF file that is packed in it,
/// `vmlinux`, with the note that says where PVH enters; and the module that a guest may want, `msr.ko`.
///
/// # Errors
/// When that kernel has not been prepared, or by a version of the lab that kept less of it ([`prepare`](crate::prepare()) then fetches
/// it anew); or the folder cannot be written.
pub fn guest_kernel(store: &Store, kernel: Kernel, folder: &Path) -> Result<(), LabError> {
    let part = store.part(&kernel_part(kernel));
    let manifest = Manifest::check(&part, Care::Glance)?;
    if !kernel::is_whole(&manifest) {
        return Err(ManifestError::Incomplete { path: part }.into());
    }
    let io = |source| {
        LabError::from(ManifestError::Io {
            path: folder.to_owned(),
            source,
        })
    };
    let packed = fs::read(part.join(PACKED)).map_err(io)?;
    let elf = kernel::decompress(&packed).map_err(|_| ManifestError::Changed {
        path: part.join(PACKED),
    })?;
    fs::create_dir_all(folder).map_err(io)?;
    fs::write(folder.join(VMLINUX), elf).map_err(io)?;
    fs::write(folder.join(VMLINUZ), packed).map_err(io)?;
    for module in GUEST_MODULES {
        let name = module_file(module);
        fs::copy(part.join(&name), folder.join(&name)).map_err(io)?;
    }
    Ok(())
}
