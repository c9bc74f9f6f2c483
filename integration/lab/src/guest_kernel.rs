//! The kernel of a lab as files that a VMM inside the lab boots as its guest.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::kernel::{
    self, END, ENTRY, GUEST_MODULES, IMAGE, Kernel, LOAD_ADDRESS, PACKED, module_file,
};
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
/// The image begins on a page of the file.
const IMAGE_AT: u64 = 0x1000;

/// Writes the kernel of a prepared lab to `folder`: as an ELF file, `vmlinux`, with one segment and the entry of the 64-bit boot
/// protocol; as a bzImage, `vmlinuz`; and the module that a guest may want, `msr.ko`.
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
    let number = |name| {
        manifest
            .fact(&part, name)?
            .parse::<u64>()
            .map_err(|_| ManifestError::Changed {
                path: part.join(name),
            })
    };
    let (entry, end) = (number(ENTRY)?, number(END)?);
    let io = |source| {
        LabError::from(ManifestError::Io {
            path: folder.to_owned(),
            source,
        })
    };
    let image = fs::File::open(part.join(IMAGE)).map_err(io)?;
    fs::create_dir_all(folder).map_err(io)?;
    write_elf(image, entry, end, &folder.join(VMLINUX)).map_err(io)?;
    fs::copy(part.join(PACKED), folder.join(VMLINUZ)).map_err(io)?;
    for module in GUEST_MODULES {
        let name = module_file(module);
        fs::copy(part.join(&name), folder.join(&name)).map_err(io)?;
    }
    Ok(())
}

fn write_elf(mut image: fs::File, entry: u64, end: u64, path: &Path) -> io::Result<()> {
    let bytes = image.metadata()?.len();
    let mut file = fs::File::create(path)?;
    file.write_all(&headers(bytes, entry, end.saturating_sub(LOAD_ADDRESS)))?;
    io::copy(&mut image, &mut file)?;
    Ok(())
}

/// An ELF header and one program header, up to the image.
fn headers(file_bytes: u64, entry: u64, memory_bytes: u64) -> Vec<u8> {
    const HEADER_BYTES: u16 = 64;
    const PROGRAM_HEADER_BYTES: u16 = 56;
    let mut bytes = Vec::with_capacity(0x1000);
    // 64 bits, little-endian, version 1.
    bytes.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable file for x86-64.
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [entry, HEADER_BYTES.into(), 0] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    for value in [HEADER_BYTES, PROGRAM_HEADER_BYTES, 1, 0, 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    // PT_LOAD, readable, writable and executable.
    bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for value in [
        IMAGE_AT,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        file_bytes,
        memory_bytes.max(file_bytes),
        IMAGE_AT,
    ] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.resize(0x1000, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use object::LittleEndian;
    use object::elf::{FileHeader64, PT_LOAD};
    use object::read::elf::{FileHeader, ProgramHeader};

    use super::*;

    #[test]
    fn it_is_an_elf_file_with_the_image_at_its_address() {
        let mut file = headers(5, 0x123_4567, 100);
        file.extend(b"image");
        let header = FileHeader64::<LittleEndian>::parse(file.as_slice()).unwrap();
        assert_eq!(header.e_entry(LittleEndian), 0x123_4567);
        let segments = header
            .program_headers(LittleEndian, file.as_slice())
            .unwrap();
        let [segment] = segments else {
            panic!("{} segments", segments.len())
        };
        assert_eq!(segment.p_type(LittleEndian), PT_LOAD);
        assert_eq!(segment.p_paddr(LittleEndian), LOAD_ADDRESS);
        assert_eq!(segment.p_memsz(LittleEndian), 100);
        assert_eq!(
            segment.data(LittleEndian, file.as_slice()).unwrap(),
            b"image"
        );
    }
}
