//! The kernel as a guest's: what a VMM needs is in the files.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;

use amx_lab::{Kernel, guest_kernel};
use common::store;
use object::LittleEndian;
use object::elf::{FileHeader64, NoteType, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

/// XEN_ELFNOTE_PHYS32_ENTRY: where a VMM that boots by PVH enters (Xen's public/elfnote.h).
const PVH_ENTRY: NoteType = NoteType(18);

#[test]
fn each_kernel_says_where_pvh_and_where_64_bits_enter() {
    let store = store(&Kernel::ALL);
    for kernel in Kernel::ALL {
        let folder = tempfile::tempdir().unwrap();
        guest_kernel(&store, kernel, folder.path()).unwrap();
        let file = std::fs::read(folder.path().join("vmlinux")).unwrap();
        let header = FileHeader64::<LittleEndian>::parse(file.as_slice()).unwrap();
        let segments = header
            .program_headers(LittleEndian, file.as_slice())
            .unwrap();
        let loaded = |address: u64| {
            segments.iter().any(|segment| {
                let start = segment.p_paddr(LittleEndian);
                segment.p_type(LittleEndian) == PT_LOAD
                    && (start..start + segment.p_filesz(LittleEndian)).contains(&address)
            })
        };
        let mut entry = None;
        for segment in segments {
            let Some(mut notes) = segment.notes(LittleEndian, file.as_slice()).unwrap() else {
                continue;
            };
            while let Some(note) = notes.next().unwrap() {
                if note.name() == b"Xen" && note.n_type(LittleEndian) == PVH_ENTRY {
                    entry = note
                        .desc()
                        .first_chunk()
                        .map(|bytes| u32::from_le_bytes(*bytes));
                }
            }
        }
        assert!(
            entry.is_some_and(|entry| loaded(entry.into())),
            "{kernel}: {entry:x?}"
        );
        assert!(loaded(header.e_entry(LittleEndian)), "{kernel}");
        let packed = std::fs::read(folder.path().join("vmlinuz")).unwrap();
        assert_eq!(packed[0x202..0x206], *b"HdrS", "{kernel}");
        assert!(folder.path().join("msr.ko").is_file(), "{kernel}");
    }
}
