//! Core dumps: NT_PRSTATUS says which thread, NT_X86_XSTATE has its area, and NT_X86_XSAVE_LAYOUT,
//! where the kernel writes it (Linux 6.12 and later), where the components lie.
//!
//! Only the headers and the notes are read, whatever the length of the file.

use object::elf::{
    EM_X86_64, ET_CORE, FileHeader64, NT_PRSTATUS, NT_X86_XSTATE, NoteType, PT_NOTE,
};
use object::read::elf::{FileHeader, ProgramHeader};
use object::read::{ReadCache, ReadCacheOps};
use object::{Endianness, ReadRef};
use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::{Layout, XFeatures};

use super::{MAX_NOTE_BYTES, OpenError};
use crate::bytes;
use crate::guess;
use crate::registers::{Listed, Xcrs};
use crate::vcpu::{Owner, Places, Vcpu};

/// include/uapi/linux/elf.h. Not among `object`'s.
const NT_X86_XSAVE_LAYOUT: u32 = 0x205;
/// `pr_pid` of elf_prstatus on x86-64.
const PR_PID: usize = 32;
/// One for each mapping, of which a process has at most 65,530 unless vm.max_map_count says otherwise;
/// databases set it to 262,144. They are kept in memory, 56 bytes for each.
const MAX_PROGRAM_HEADERS: u32 = 1 << 20;
/// Bytes of x86_xfeat_component: type, size, offset and flags.
const COMPONENT_BYTES: usize = 16;

pub(super) fn read(file: impl ReadCacheOps) -> Result<Vec<Vcpu>, OpenError> {
    let cache = ReadCache::new(file);
    let data = &cache;
    let mut ident = [0; 20];
    let start = data.read_bytes_at(0, 20).unwrap_or_default();
    for (to, &from) in ident.iter_mut().zip(start) {
        *to = from;
    }
    let [_, _, _, _, class, ..] = ident;
    if class != 2 {
        return Err(kind(4, "64-bit, 2", format!("class {class}")));
    }
    let at = |offset, what| {
        move |error: object::read::Error| OpenError::Elf {
            offset,
            what,
            message: error.to_string(),
        }
    };
    let header = FileHeader64::<Endianness>::parse(data).map_err(at(0, "the header"))?;
    let endian = header.endian().map_err(at(5, "the byte order"))?;
    if header.e_type(endian) != ET_CORE {
        return Err(kind(
            16,
            "type 4",
            format!("type {:?}", header.e_type(endian)),
        ));
    }
    if header.e_machine(endian) != EM_X86_64 {
        let machine = header.e_machine(endian);
        return Err(kind(18, "machine 62", format!("machine {machine:?}")));
    }
    let table_at = header.e_phoff(endian);
    // PN_XNUM: a count that e_phnum has no place for is in the first section header.
    let headers = header
        .phnum(endian, data)
        .map_err(at(table_at, "the number of program headers"))?;
    if headers > MAX_PROGRAM_HEADERS {
        return Err(OpenError::Elf {
            offset: table_at,
            what: "the program headers",
            message: format!("there are {headers}; at most {MAX_PROGRAM_HEADERS} are read"),
        });
    }
    let segments = header
        .program_headers(endian, data)
        .map_err(at(table_at, "the program headers"))?;

    let mut left = MAX_NOTE_BYTES;
    let mut vcpus = Vec::new();
    let mut thread = 0;
    let mut layout: Option<Layout> = None;
    for segment in segments {
        if segment.p_type(endian) != PT_NOTE {
            continue;
        }
        let offset = segment.p_offset(endian);
        let too_many = OpenError::Elf {
            offset,
            what: "the notes",
            message: format!("there are more than {MAX_NOTE_BYTES} bytes of them"),
        };
        left = left.checked_sub(segment.p_filesz(endian)).ok_or(too_many)?;
        let Some(mut notes) = segment
            .notes(endian, data)
            .map_err(at(offset, "the notes"))?
        else {
            continue;
        };
        while let Some(note) = notes.next().map_err(at(offset, "a note"))? {
            let content = note.desc();
            let kind = note.n_type(endian);
            if kind == NT_PRSTATUS && note.name() == b"CORE" {
                thread = bytes::u32_at(content, PR_PID);
            } else if kind == NT_X86_XSTATE && note.name() == b"LINUX" {
                if content.len() > MAX_AREA_BYTES {
                    return Err(OpenError::Elf {
                        offset,
                        what: "NT_X86_XSTATE",
                        message: format!(
                            "thread {thread} has {} bytes; at most {MAX_AREA_BYTES} are possible",
                            content.len()
                        ),
                    });
                }
                vcpus.push(vcpu(thread, content));
            } else if kind == NoteType(NT_X86_XSAVE_LAYOUT) && note.name() == b"LINUX" {
                layout = places(content);
            }
        }
    }
    if let Some(layout) = layout {
        for vcpu in &mut vcpus {
            vcpu.places = Places::Layout(layout.clone());
        }
    }
    Ok(vcpus)
}

fn vcpu(thread: u32, area: &[u8]) -> Vcpu {
    // Linux writes the components that it saves for the process (arch/x86/kernel/fpu/xstate.c).
    let saved = bytes::u64_at(area, 464);
    Vcpu {
        owner: Owner::Thread(thread),
        area: area.to_vec(),
        places: Places::Unknown,
        listed: Listed {
            xcrs: (saved & 3 == 3).then(|| Xcrs::of_xcr0(XFeatures::from_bits_retain(saved))),
            ..Listed::default()
        },
    }
}

/// The kernel's own list. `None` where it is none that could be.
fn places(content: &[u8]) -> Option<Layout> {
    let mut user = XFeatures::LEGACY;
    let mut places = Vec::new();
    for entry in content.chunks_exact(COMPONENT_BYTES).take(64) {
        let id = u8::try_from(bytes::u32_at(entry, 0)).ok()?;
        let id = xsave_state::ComponentId::new(id)?;
        let (size, offset) = (bytes::u32_at(entry, 4), bytes::u32_at(entry, 8));
        user |= id.bit();
        // What CPUID has beyond place and size is not in the note: its flags are 0.
        places.push((id.number(), size, offset, guess::flags(id)));
    }
    let table = guess::places(&places, user).ok()?;
    guess::of(&table).ok()
}

fn kind(offset: u64, expected: &'static str, found: String) -> OpenError {
    OpenError::ElfKind {
        offset,
        expected,
        found,
    }
}
