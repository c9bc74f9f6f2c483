//! Files of several VMMs, and core dumps, as vCPUs with their bytes.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::wire;

use crate::bytes;
use crate::vcpu::Vcpu;

mod cloud_hypervisor;
mod debug_text;
mod elf_core;
mod error;
mod firecracker;
mod own;
mod raw;

pub use error::OpenError;

/// No file that has to be read whole may have more bytes. A Cloud Hypervisor snapshot has about
/// 40 KB per vCPU, of which KVM allows 4,096, and a state of ours less. Of core dumps only the notes
/// are read.
pub const MAX_FILE_BYTES: u64 = 256 << 20;
/// CPUID as `cpuid -r` prints it has about 5 KB per processor.
pub const MAX_DUMP_BYTES: u64 = 16 << 20;
/// The notes of a core dump may have at most this many bytes.
pub const MAX_NOTE_BYTES: u64 = 256 << 20;

/// So many say what it is.
const START_BYTES: u64 = 64;
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// So long a FIFO may have nobody who writes.
const FIFO_PATIENCE: Duration = Duration::from_secs(5);

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// States in the format of xsave-state.
    State,
    /// The bytes of KVM_GET_XSAVE2, or of an XSAVE instruction.
    Raw,
    /// state.json of a Cloud Hypervisor snapshot.
    CloudHypervisor,
    /// What Firecracker's snapshot-editor prints.
    Firecracker,
    /// A core dump: the NT_X86_XSTATE note of each thread.
    ElfCore,
}

impl Format {
    /// Its name for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Raw => "raw",
            Self::CloudHypervisor => "cloud_hypervisor",
            Self::Firecracker => "firecracker",
            Self::ElfCore => "elf_core",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => "vmm-amx state",
            Self::Raw => "raw XSAVE area",
            Self::CloudHypervisor => "Cloud Hypervisor snapshot",
            Self::Firecracker => "text of Firecracker's snapshot-editor",
            Self::ElfCore => "ELF core dump",
        })
    }
}

/// What a file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What kind of file it is.
    pub format: Format,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// Its vCPUs or threads, by ascending identifier. There is at least one.
    pub vcpus: Vec<Vcpu>,
}

/// What a file has in it, read once and from its beginning to its end, so that a pipe will do.
///
/// How much is read, and kept in memory, depends on what the first bytes say it is: of what is not
/// recognised only the start, of a core dump in a file the headers and notes.
pub struct Content(Kind);

enum Kind {
    /// The file and its length in bytes.
    Core(File, u64),
    /// What was read, and the length in bytes, as far as it is known.
    Bytes(Vec<u8>, u64),
}

impl Content {
    /// Reads a file, or state.json in the folder of a Cloud Hypervisor snapshot. `progress(done, all)` is
    /// called with bytes read, for files that take a while; of a pipe nobody knows `all`, and it is 0.
    ///
    /// # Errors
    ///
    /// [`OpenError::Io`], [`OpenError::Folder`].
    pub fn read(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, OpenError> {
        let path = file_in(path)?;
        let io = |source| OpenError::Io {
            path: path.clone(),
            source,
        };
        let mut file = open_file(&path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        // A pipe has no length of its own, but an end.
        let stated = metadata.is_file().then_some(metadata.len());
        let start = start_of(&mut file).map_err(io)?;
        if let (true, Some(file_bytes)) = (start.starts_with(ELF_MAGIC), stated) {
            file.rewind().map_err(io)?;
            return Ok(Self(Kind::Core(file, file_bytes)));
        }
        let bytes = read_all(start, file, stated, progress).map_err(io)?;
        let file_bytes = stated.unwrap_or(0).max(length(&bytes));
        Ok(Self(Kind::Bytes(bytes, file_bytes)))
    }

    /// Reads a stream, such as standard input. `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`OpenError::Io`].
    pub fn of_stream(mut stream: impl Read, name: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            path: name.to_owned(),
            source,
        };
        let start = start_of(&mut stream).map_err(io)?;
        let bytes = read_all(start, stream, None, &mut |_, _| {}).map_err(io)?;
        let file_bytes = length(&bytes);
        Ok(Self(Kind::Bytes(bytes, file_bytes)))
    }

    /// Returns what was read; nothing for a core dump in a file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Kind::Bytes(bytes, _) => bytes,
            Kind::Core(..) => &[],
        }
    }

    /// Opens it as saved state. Nothing of the state itself is checked, so that what is invalid can be
    /// looked at.
    ///
    /// # Errors
    ///
    /// It is none of the formats, or a broken one: see [`OpenError`].
    pub fn open(&self) -> Result<Snapshot, OpenError> {
        match &self.0 {
            Kind::Core(file, file_bytes) => {
                not_empty(Format::ElfCore, *file_bytes, elf_core::read(file)?)
            }
            Kind::Bytes(bytes, file_bytes) => open_known(bytes, *file_bytes),
        }
    }
}

/// Reads a file and opens it as saved state: [`Content::read`] and [`Content::open`].
///
/// # Errors
///
/// Those of the two.
pub fn open(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Snapshot, OpenError> {
    Content::read(path, progress)?.open()
}

/// Opens a file for reading. Another process has to open a FIFO for writing first: that is waited for, but not
/// without end.
///
/// # Errors
///
/// Those of [`File::open`], and `TimedOut` for a FIFO that nobody writes to.
pub fn open_file(path: &Path) -> std::io::Result<File> {
    if !path.metadata()?.file_type().is_fifo() {
        return File::open(path);
    }
    let (send, receive) = mpsc::channel();
    let own = path.to_owned();
    // Where nobody writes, the thread stays where it is until the process ends.
    thread::spawn(move || send.send(File::open(own)));
    receive.recv_timeout(FIFO_PATIENCE).unwrap_or_else(|_| {
        let why = format!(
            "no process has opened this FIFO for writing within {} s",
            FIFO_PATIENCE.as_secs()
        );
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why))
    })
}

/// The same for bytes that are in memory.
///
/// # Errors
///
/// As [`open`].
pub fn open_bytes(bytes: &[u8]) -> Result<Snapshot, OpenError> {
    open_known(bytes, length(bytes))
}

fn open_known(bytes: &[u8], file_bytes: u64) -> Result<Snapshot, OpenError> {
    if bytes.starts_with(ELF_MAGIC) {
        let vcpus = elf_core::read(std::io::Cursor::new(bytes))?;
        return not_empty(Format::ElfCore, file_bytes, vcpus);
    }
    parse(recognise(bytes, file_bytes)?, bytes)
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn parse(format: Format, bytes: &[u8]) -> Result<Snapshot, OpenError> {
    let vcpus = match format {
        Format::State => own::parse(bytes)?,
        Format::CloudHypervisor => cloud_hypervisor::parse(bytes)?,
        Format::Firecracker => firecracker::parse(bytes)?,
        Format::Raw | Format::ElfCore => raw::parse(bytes)?,
    };
    not_empty(format, length(bytes), vcpus)
}

fn not_empty(format: Format, file_bytes: u64, mut vcpus: Vec<Vcpu>) -> Result<Snapshot, OpenError> {
    if vcpus.is_empty() {
        return Err(OpenError::NoVcpu { format });
    }
    vcpus.sort_by_key(|vcpu| vcpu.owner);
    Ok(Snapshot {
        format,
        file_bytes,
        vcpus,
    })
}

/// The file itself, or that of a snapshot's folder.
fn file_in(path: &Path) -> Result<PathBuf, OpenError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let state = path.join("state.json");
    if state.is_file() {
        return Ok(state);
    }
    Err(OpenError::Folder {
        path: path.to_owned(),
    })
}

/// What the first bytes say. A raw area has no beginning of its own; its length has to do.
fn recognise(start: &[u8], file_bytes: u64) -> Result<Format, OpenError> {
    let text = start.trim_ascii_start();
    if start.starts_with(&wire::MAGIC) {
        return Ok(Format::State);
    }
    if text.starts_with(b"{") {
        return Ok(Format::CloudHypervisor);
    }
    if text.starts_with(b"vcpu ") {
        return Ok(Format::Firecracker);
    }
    if [&b"CPU"[..], b"0x0000", b"# "]
        .iter()
        .any(|first| text.starts_with(first))
    {
        return Err(OpenError::CpuidDump);
    }
    if let Some(hint) = known_elsewhere(start) {
        return Err(OpenError::Known {
            what: hint.0,
            instead: hint.1,
        });
    }
    if (raw::MIN_BYTES..=largest_area()).contains(&file_bytes) {
        return Ok(Format::Raw);
    }
    let mut first = [0; 8];
    for (to, &from) in first.iter_mut().zip(start) {
        *to = from;
    }
    Err(OpenError::Unknown { first, file_bytes })
}

fn largest_area() -> u64 {
    u64::try_from(MAX_AREA_BYTES).unwrap_or(u64::MAX)
}

/// Files that people try, what they are and what to do with them.
fn known_elsewhere(start: &[u8]) -> Option<(&'static str, &'static str)> {
    if is_firecracker(start) {
        return Some((
            "a Firecracker vmstate, which does not describe itself",
            "run the `snapshot-editor info-vmstate vcpu-states` of the Firecracker that wrote it, \
             and open what it prints",
        ));
    }
    let libvirt = (
        "a save file of libvirt, with a QEMU migration stream in it",
        "libvirt's own `virsh save-image-dumpxml` shows the guest's CPU; its registers are not opened",
    );
    let kdump = (
        "a kdump of a guest's memory, compressed",
        "it has no XSAVE areas; take a snapshot, or a core dump of the process",
    );
    let vmware = (
        "a suspended state or snapshot of VMware",
        "its registers are not opened",
    );
    let known: &[(&[u8], &str, &str)] = &[
        (b"LibvirtQemudSave", libvirt.0, libvirt.1),
        (b"LibvirtQemudPart", libvirt.0, libvirt.1),
        (b"KDUMP   ", kdump.0, kdump.1),
        (b"DISKDUMP", kdump.0, kdump.1),
        (b"makedumpfile", kdump.0, kdump.1),
        (
            b"QEVM",
            "a QEMU migration stream",
            "QEMU's own scripts/analyze-migration.py prints it",
        ),
        (
            b"\x19\x43\x56\x54",
            "an image of CRIU, whose format has no place for tiles",
            "CRIU's own coredump tool makes a core dump of it, which can be opened",
        ),
        (
            b"QFI\xfb",
            "a qcow2 image, in which QEMU can keep snapshots of its own",
            "its registers are not opened",
        ),
        (b"\xd0\xbe\xd2\xbe", vmware.0, vmware.1),
        (b"\xd1\xba\xd1\xba", vmware.0, vmware.1),
        (b"\xd2\xbe\xd2\xbe", vmware.0, vmware.1),
        (b"\xd3\xbe\xd3\xbe", vmware.0, vmware.1),
        (
            b"\x7fVirtualBox SavedState",
            "a saved state of VirtualBox",
            "its registers are not opened",
        ),
        (b"\x1f\x8b", "compressed by gzip", "unpack it first"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first"),
        (b"\xfd7zXZ", "compressed by xz", "unpack it first"),
        (b"BZh", "compressed by bzip2", "unpack it first"),
        (b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it first"),
        (b"\x89LZO", "compressed by lzop", "unpack it first"),
        (b"PK\x03\x04", "a zip archive", "unpack it first"),
    ];
    let found = known.iter().find(|(magic, ..)| start.starts_with(magic));
    found.map(|&(_, what, instead)| (what, instead))
}

/// Its magic number, little endian: 0x07101984, the architecture and a version. It is at byte 0, and
/// behind a byte of bitcode since Firecracker 1.12.
fn is_firecracker(start: &[u8]) -> bool {
    const MAGIC: [u8; 4] = [0x84, 0x19, 0x10, 0x07];
    const ARCHITECTURES: [[u8; 2]; 2] = [[0x64, 0x86], [0xaa, 0xaa]];
    (0..=1).any(|at| {
        let number: [u8; 8] = bytes::array(start, at);
        let [_, _, architecture @ .., a, b, c, d] = number;
        [a, b, c, d] == MAGIC && ARCHITECTURES.contains(&architecture)
    })
}

fn start_of(source: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::new();
    source.take(START_BYTES).read_to_end(&mut start)?;
    Ok(start)
}

/// The most that is read of a file with this start; of one that is longer than this the rest is not needed
/// to say so, or it is too long.
fn most(start: &[u8], stated: Option<u64>) -> (u64, bool) {
    if start.starts_with(ELF_MAGIC) {
        return (MAX_FILE_BYTES, true);
    }
    match recognise(start, stated.unwrap_or(raw::MIN_BYTES)) {
        Ok(Format::Raw) => (largest_area(), false),
        Ok(_) => (MAX_FILE_BYTES, true),
        Err(OpenError::CpuidDump) => (MAX_DUMP_BYTES, true),
        Err(_) => (largest_area(), false),
    }
}

/// Reads what is behind the `start` that has been read: as much as there can be of what it is, and one byte
/// more where there is more. Never more than that is allocated.
fn read_all(
    start: Vec<u8>,
    mut source: impl Read,
    stated: Option<u64>,
    progress: &mut dyn FnMut(u64, u64),
) -> std::io::Result<Vec<u8>> {
    const PIECE: u64 = 4 << 20;
    let (most, refuses_more) = most(&start, stated);
    let mut bytes = start;
    let mut done = length(&bytes);
    loop {
        let found = stated.unwrap_or(0).max(done);
        if refuses_more && found > most {
            return Err(std::io::Error::new(
                std::io::ErrorKind::FileTooLarge,
                format!("it has at least {found} bytes; at most {most} are read of this format"),
            ));
        }
        let left = most.saturating_add(1).saturating_sub(done);
        // A quarter more each time: the sum of all copies stays linear.
        let room = usize::try_from(left.min(PIECE.max(done / 4))).unwrap_or(0);
        bytes.try_reserve_exact(room)?;
        let read = (&mut source)
            .take(left.min(PIECE))
            .read_to_end(&mut bytes)?;
        if read == 0 {
            return Ok(bytes);
        }
        done = length(&bytes);
        progress(done, stated.map_or(0, |stated| stated.max(done)));
    }
}
