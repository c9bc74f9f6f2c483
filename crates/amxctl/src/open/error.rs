//! What a file can be wrong with.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use xsave_state::wire::Unreadable;

use super::Format;
use crate::vcpu::Owner;

/// A file that cannot be opened as saved state.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path of the file that cannot be read.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A folder, but not of a snapshot.
    #[error("{}: a folder without state.json: not a Cloud Hypervisor snapshot", path.display())]
    Folder {
        /// The path of the folder without state.json.
        path: PathBuf,
    },
    /// A format that is known by its first bytes, but not read.
    #[error("this is {what}: {instead}")]
    Known {
        /// What it is.
        what: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// None of the formats.
    #[error(
        "unknown format: expected at byte 0 one of \"{{\" (Cloud Hypervisor's state.json), \
         \"vcpu \" (Firecracker's snapshot-editor), 89 \"XSTATE\" (vmm-amx), 7f \
         \"ELF\" (core dump), or a raw area of 576 to 65536 bytes; found {file_bytes} bytes that \
         begin with {first:02x?}"
    )]
    Unknown {
        /// The first bytes; zeros for what is not there.
        first: [u8; 8],
        /// Length in bytes.
        file_bytes: u64,
    },
    /// None of the formats, and no raw area although it could be by its length.
    #[error(
        "unknown format: it begins like none that is known here, and its {file_bytes} bytes are no \
         raw area: MXCSR, bytes 24 to 27, would be {mxcsr:#x}, which no processor writes"
    )]
    NotAnArea {
        /// Length in bytes.
        file_bytes: usize,
        /// Bytes 24 to 27.
        mxcsr: u32,
    },
    /// A state of ours that is damaged.
    #[error("not a valid state: {0}")]
    State(Unreadable),
    /// Two states of ours have the same number: nobody knows which is the vCPU's.
    #[error("{owner} is in the file twice: only one of the two states can be its own")]
    Twice {
        /// Whose they say they are.
        owner: Owner,
    },
    /// It is not JSON, or not of that shape.
    #[error("byte {offset} of {place}: {message}")]
    Json {
        /// Offset of the byte that is wrong, or that is missing.
        offset: usize,
        /// The file, or the string in it that is JSON again.
        place: String,
        /// What was expected and what was found.
        message: String,
    },
    /// A description of a host, not a state.
    #[error(
        "this describes a host, and is no saved state: `amxctl describe` wrote it; `amxctl check \
         --host`, `compat` and `baseline` take it"
    )]
    HostDescription,
    /// CPUID, not a state.
    #[error(
        "this is CPUID as `cpuid -r` prints it, and no saved state: --cpuid, --layout and `amxctl \
         compat` take it"
    )]
    CpuidDump,
    /// JSON of something else.
    #[error(
        "this is JSON, but not the state.json of a Cloud Hypervisor snapshot: expected \
         .snapshots[\"cpu-manager\"], found the keys {keys:?}"
    )]
    OtherJson {
        /// The first keys that are there.
        keys: Vec<String>,
    },
    /// The text ends, or a line is not as the debugging output of Rust is.
    #[error("byte {offset} (line {line}): expected {expected}, found {found:?}")]
    Text {
        /// Offset of the line in the file.
        offset: usize,
        /// Its number, from 1.
        line: usize,
        /// What would be right.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A field that has to be there, as many as it has to have.
    #[error("vCPU {vcpu}: expected {expected} {field}, found {found}")]
    Field {
        /// The vCPU.
        vcpu: u32,
        /// The field's name in the file.
        field: &'static str,
        /// How many there have to be.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// An ELF file that is broken.
    #[error("not a valid ELF core: {what} at byte {offset}: {message}")]
    Elf {
        /// The offset in the file, in bytes.
        offset: u64,
        /// The part of the ELF file that is broken.
        what: &'static str,
        /// What is wrong.
        message: String,
    },
    /// An ELF file of another kind.
    #[error("byte {offset}: expected an ELF core dump of x86-64 ({expected}), found {found}")]
    ElfKind {
        /// Where in the header.
        offset: u64,
        /// What it would be in a core dump.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// All is well, but there is no state in it.
    #[error("{format}: there is no vCPU's XSAVE state in it")]
    NoVcpu {
        /// What it is.
        format: Format,
    },
}
