//! The kernels of the lab: which there are, and how one is taken out of Debian's packages into the form that the emulator loads.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use object::LittleEndian;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::apt::{Apt, AptError};
use crate::manifest::Manifest;
use crate::tools::{self, ToolError};

/// A kernel that the lab can boot, by the name of the Debian suite that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
pub enum Kernel {
    /// Debian 13's.
    #[default]
    Trixie,
    /// Debian unstable's.
    Sid,
    /// Debian 12's.
    Bookworm,
}

/// No kernel has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no kernel is called {name:?}: there are trixie, sid and bookworm")]
pub struct UnknownKernel {
    /// The name that was given.
    pub name: String,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Trixie, Self::Sid, Self::Bookworm];

    /// The suite's name.
    #[must_use]
    pub const fn suite(self) -> &'static str {
        match self {
            Self::Trixie => "trixie",
            Self::Sid => "sid",
            Self::Bookworm => "bookworm",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.suite())
    }
}

impl FromStr for Kernel {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, UnknownKernel> {
        Self::ALL
            .into_iter()
            .find(|kernel| kernel.suite() == name)
            .ok_or_else(|| UnknownKernel {
                name: name.to_owned(),
            })
    }
}

/// The modules that make a host of it, in the order in which they are loaded, with their parameters.
pub(crate) const MODULES: [(&str, &str); 3] = [
    ("virt/lib/irqbypass", ""),
    ("arch/x86/kvm/kvm", ""),
    // Without virtual interrupt delivery: the emulator's is slow, and nothing here is about interrupts.
    ("arch/x86/kvm/kvm-intel", "enable_apicv=0"),
];

/// Modules that are kept for guests: the one that reads MSRs.
pub(crate) const GUEST_MODULES: [&str; 1] = ["arch/x86/kernel/msr"];

/// Names of the files of an unpacked kernel.
pub(crate) const IMAGE: &str = "kernel.bin";
pub(crate) const SETUP: &str = "setup.bin";
/// As it is in the package, for guests.
pub(crate) const PACKED: &str = "vmlinuz";

/// Names of the facts in its manifest.
pub(crate) const RELEASE: &str = "release";
pub(crate) const ENTRY: &str = "entry";
pub(crate) const END: &str = "end";

/// The physical address that Debian's kernels are linked to be loaded at.
pub(crate) const LOAD_ADDRESS: u64 = 0x100_0000;
const SETUP_BYTES: usize = 0x4000;

/// Why a kernel could not be made ready.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The packages could not be fetched.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A program failed.
    #[error("{0}")]
    Tool(Box<dyn std::error::Error + Send + Sync>),
    /// The packages lack a file that the lab needs.
    #[error("the kernel's packages have no {name}")]
    NoFile {
        /// The file.
        name: String,
    },
    /// The kernel image has a form that the lab does not know.
    #[error("{path}: {what}", path = path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What about it.
        what: String,
    },
    /// The file system refused.
    #[error("{path}", path = path.display())]
    Io {
        /// What was being used.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

impl From<ToolError> for KernelError {
    fn from(error: ToolError) -> Self {
        Self::Tool(error.into())
    }
}

/// What is known of an unpacked kernel: packages with versions, and facts.
pub(crate) type About = (BTreeMap<String, String>, BTreeMap<String, String>);

/// Fetches the suite's newest kernel into `work` and leaves what the lab needs of it in `to`.
pub(crate) fn unpack(
    kernel: Kernel,
    apt: &Apt,
    work: &Path,
    to: &Path,
) -> Result<About, KernelError> {
    let of_the_kernel = |name: &str| {
        ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            && name.ends_with("-cloud-amd64")
    };
    let packages = apt.packages("linux-image-cloud-amd64", of_the_kernel)?;
    let tree = work.join(format!("tree-{kernel}"));
    let mut versions = BTreeMap::new();
    for (name, package) in packages {
        tools::run(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&package.file)
                .arg(&tree),
        )?;
        versions.insert(name, package.version);
    }
    let image = find(&tree, |name| {
        name == "vmlinuz" || name.starts_with("vmlinuz-")
    })?
    .ok_or_else(|| no_file("vmlinuz"))?;
    let modules = find(&tree, |name| name == "kernel")?.ok_or_else(|| no_file("modules"))?;
    let release = modules
        .parent()
        .and_then(Path::file_name)
        .ok_or_else(|| no_file("modules"))?
        .to_string_lossy()
        .into_owned();
    let of_hosts = MODULES.iter().map(|(module, _)| module);
    for module in of_hosts.chain(&GUEST_MODULES) {
        unpack_module(&modules, module, to)?;
    }
    let io = |source| KernelError::Io {
        path: image.clone(),
        source,
    };
    let bytes = fs::read(&image).map_err(io)?;
    let bad = |what: &str| KernelError::Image {
        path: image.clone(),
        what: what.to_owned(),
    };
    let setup = bytes
        .get(..SETUP_BYTES)
        .ok_or_else(|| bad("too short for a kernel"))?;
    let vmlinux = decompress(&bytes).map_err(|what| bad(&what))?;
    let flat = flatten(&vmlinux).map_err(|what| bad(&what))?;
    for (name, bytes) in [
        (IMAGE, flat.bytes.as_slice()),
        (SETUP, setup),
        (PACKED, bytes.as_slice()),
    ] {
        let path = to.join(name);
        fs::write(&path, bytes).map_err(|source| KernelError::Io { path, source })?;
    }
    let facts = [
        (RELEASE, release),
        (ENTRY, flat.entry.to_string()),
        (END, flat.end.to_string()),
    ];
    Ok((
        versions,
        facts
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    ))
}

/// Whether all that [`unpack`] keeps of a kernel is there: earlier versions of the lab kept less.
pub(crate) fn is_whole(kept: &Manifest) -> bool {
    let of_hosts = MODULES.iter().map(|(module, _)| module);
    let modules = of_hosts.chain(&GUEST_MODULES).copied().map(module_file);
    [IMAGE, SETUP, PACKED]
        .map(str::to_owned)
        .into_iter()
        .chain(modules)
        .all(|name| kept.has(&name))
}

fn no_file(name: &str) -> KernelError {
    KernelError::NoFile {
        name: name.to_owned(),
    }
}

/// The first file or folder below `tree` whose name is wanted. Links are not followed: /lib can be one.
fn find(tree: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, KernelError> {
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        let io = |source| KernelError::Io {
            path: folder.clone(),
            source,
        };
        for entry in fs::read_dir(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            if wanted(&entry.file_name().to_string_lossy()) {
                return Ok(Some(entry.path()));
            }
            if entry.file_type().map_err(io)?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(None)
}

/// The file's name of a module.
pub(crate) fn module_file(module: &str) -> String {
    format!("{}.ko", module.rsplit('/').next().unwrap_or(module))
}

/// Module files are compressed in some suites. The kernel takes them as they are only if it was built so, so they are unpacked here.
fn unpack_module(modules: &Path, module: &str, to: &Path) -> Result<(), KernelError> {
    let name = module_file(module);
    let target = to.join(&name);
    let io = |source| KernelError::Io {
        path: target.clone(),
        source,
    };
    let plain = modules.join(format!("{module}.ko"));
    let compressed = modules.join(format!("{module}.ko.xz"));
    if plain.is_file() {
        fs::copy(&plain, &target).map_err(io)?;
    } else if compressed.is_file() {
        let copy = to.join(format!("{name}.xz"));
        fs::copy(&compressed, &copy).map_err(io)?;
        tools::run(
            Command::new("xz")
                .args(["--decompress", "--force"])
                .arg(&copy),
        )?;
    } else {
        return Err(no_file(&name));
    }
    Ok(())
}

/// The ELF file inside a bzImage, where its header says it is (Documentation/arch/x86/boot.rst, payload_offset and payload_length).
pub(crate) fn decompress(image: &[u8]) -> Result<Vec<u8>, String> {
    let number = |at: usize| {
        image
            .get(at..)
            .and_then(|rest| rest.first_chunk::<4>())
            .map(|bytes| u32::from_le_bytes(*bytes) as usize)
    };
    let header = || {
        let setup_sectors = usize::from(*image.get(0x1f1)?);
        let (offset, length) = (number(0x248)?, number(0x24c)?);
        let start = setup_sectors
            .checked_add(1)?
            .checked_mul(512)?
            .checked_add(offset)?;
        image.get(start..start.checked_add(length)?)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("not a kernel".into());
    }
    let payload = header().ok_or("its header points outside")?;
    match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut bytes = Vec::new();
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| format!("zstd: {error}"))?;
            decoder
                .read_to_end(&mut bytes)
                .map_err(|error| format!("zstd: {error}"))?;
            Ok(bytes)
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => decompress_lz4(blocks),
        _ => Err("compressed in a way that the lab does not know (it knows zstd and lz4)".into()),
    }
}

/// The legacy frame format of lz4: blocks of 8 MiB, each with its compressed size. The kernel's build adds four bytes at the end.
fn decompress_lz4(mut blocks: &[u8]) -> Result<Vec<u8>, String> {
    const BLOCK: usize = 8 << 20;
    let mut bytes = Vec::new();
    while let Some((size, rest)) = blocks.split_first_chunk::<4>() {
        let Some((block, rest)) = rest.split_at_checked(u32::from_le_bytes(*size) as usize) else {
            break;
        };
        bytes.extend(
            lz4_flex::block::decompress(block, BLOCK).map_err(|error| format!("lz4: {error}"))?,
        );
        blocks = rest;
    }
    Ok(bytes)
}

struct Flat {
    bytes: Vec<u8>,
    entry: u64,
    end: u64,
}

/// The loadable segments of a kernel as they lie in memory from [`LOAD_ADDRESS`] on.
fn flatten(vmlinux: &[u8]) -> Result<Flat, String> {
    let elf = |error: object::read::Error| format!("the kernel's ELF file: {error}");
    let header = FileHeader64::<LittleEndian>::parse(vmlinux).map_err(elf)?;
    let endian = LittleEndian;
    let mut flat = Flat {
        bytes: Vec::new(),
        entry: header.e_entry(endian),
        end: 0,
    };
    for segment in header.program_headers(endian, vmlinux).map_err(elf)? {
        if segment.p_type(endian) != PT_LOAD {
            continue;
        }
        let data = segment
            .data(endian, vmlinux)
            .map_err(|()| "a segment lies outside the file")?;
        let place = || {
            let start = usize::try_from(segment.p_paddr(endian).checked_sub(LOAD_ADDRESS)?).ok()?;
            Some((
                start,
                start.checked_add(data.len())?,
                segment
                    .p_paddr(endian)
                    .checked_add(segment.p_memsz(endian))?,
            ))
        };
        let (start, after, end) = place().ok_or("a segment lies below the kernel's address")?;
        if after > 1 << 30 {
            return Err("a segment lies more than 1 GiB above the kernel's address".into());
        }
        if flat.bytes.len() < after {
            flat.bytes.resize(after, 0);
        }
        flat.bytes
            .get_mut(start..after)
            .ok_or("a segment lies outside")?
            .copy_from_slice(data);
        flat.end = flat.end.max(end);
    }
    if flat.bytes.is_empty() {
        Err("it has nothing to load".into())
    } else {
        Ok(flat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_what_guests_need_is_not_whole() {
        let names = [
            "kernel.bin",
            "setup.bin",
            "irqbypass.ko",
            "kvm.ko",
            "kvm-intel.ko",
            "msr.ko",
            "vmlinuz",
        ];
        for kept in 0..=names.len() {
            let folder = tempfile::tempdir().unwrap();
            for name in &names[..kept] {
                fs::write(folder.path().join(name), name).unwrap();
            }
            let manifest =
                Manifest::create(folder.path(), BTreeMap::new(), BTreeMap::new()).unwrap();
            assert_eq!(is_whole(&manifest), kept == names.len(), "{kept}");
        }
    }

    #[test]
    fn names_are_read_back() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.to_string().parse::<Kernel>().unwrap(), kernel);
        }
        assert!(
            "jammy"
                .parse::<Kernel>()
                .unwrap_err()
                .to_string()
                .contains("trixie")
        );
    }

    #[test]
    fn lz4_blocks_are_joined() {
        let mut stream = Vec::new();
        for part in [b"first".as_slice(), b"second"] {
            let block = lz4_flex::block::compress(part);
            stream.extend_from_slice(&(block.len() as u32).to_le_bytes());
            stream.extend_from_slice(&block);
        }
        stream.extend_from_slice(&11_u32.to_le_bytes());
        assert_eq!(decompress_lz4(&stream).unwrap(), b"firstsecond");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(decompress(&[0; 100]).is_err());
        assert!(decompress(&[0; 0x5000]).is_err());
        assert!(flatten(b"\x7fELF").is_err());
    }
}
