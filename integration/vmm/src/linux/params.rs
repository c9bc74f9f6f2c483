//! boot_params: memory map, command line, initial file system.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::PAGE_BYTES;

/// Where boot_params lies.
pub(crate) const BOOT_PARAMS: u64 = 0x7000;
/// End of the memory below the place of the extended BIOS data area.
const LOW_END: u64 = 0x9_fc00;
/// Here memory goes on.
const HIGH_START: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number.
const UNKNOWN_LOADER: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

/// Where everything lies that a kernel must be told of.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The command line, without its end.
    pub command_line: Place,
    /// The initial file system.
    pub initramfs: Place,
    /// The root of the ACPI tables.
    pub rsdp: u64,
    /// Memory in all.
    pub memory_bytes: u64,
}

/// The initial file system lies at the end of memory, on a page of its own.
#[must_use]
pub fn initramfs_place(memory_bytes: u64, bytes: u64) -> Option<Place> {
    let page = PAGE_BYTES as u64;
    let address = memory_bytes.checked_sub(bytes)? & !page.saturating_sub(1);
    // The protocol has 32 bits for both.
    (address >= HIGH_START && memory_bytes <= u32::MAX.into()).then_some(Place { address, bytes })
}

/// The memory map of a guest with `memory_bytes` of memory: (address, bytes, kind).
fn e820(memory_bytes: u64) -> [(u64, u64, u32); 3] {
    [
        (0, LOW_END, E820_RAM),
        (LOW_END, HIGH_START.saturating_sub(LOW_END), E820_RESERVED),
        (
            HIGH_START,
            memory_bytes.saturating_sub(HIGH_START),
            E820_RAM,
        ),
    ]
}

/// What the kernel gets. A bzImage has a header to begin with.
fn build(header: Option<setup_header>, places: &Places) -> boot_params {
    let mut params = boot_params {
        hdr: header.unwrap_or_default(),
        acpi_rsdp_addr: places.rsdp,
        ..boot_params::default()
    };
    if header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    params.hdr.type_of_loader = UNKNOWN_LOADER;
    params.hdr.cmd_line_ptr = low(places.command_line.address);
    params.hdr.cmdline_size = low(places.command_line.bytes);
    params.hdr.ramdisk_image = low(places.initramfs.address);
    params.hdr.ramdisk_size = low(places.initramfs.bytes);
    let map = e820(places.memory_bytes);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
    params.e820_entries = 3;
    params
}

/// Writes them.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    header: Option<setup_header>,
    places: &Places,
) -> Result<(), GuestMemoryError> {
    let params = build(header, places);
    memory.write_slice(params.as_slice(), GuestAddress(BOOT_PARAMS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            command_line: Place {
                address: 0x2_0000,
                bytes: 17,
            },
            initramfs: Place {
                address: 0x700_0000,
                bytes: 0x12_3456,
            },
            rsdp: 0xe_0000,
            memory_bytes: 128 << 20,
        }
    }

    fn number(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_field_is_where_the_protocol_has_it() {
        let params = build(None, &places());
        let bytes = params.as_slice();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(bytes[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(&bytes[0x202..0x206], b"HdrS");
        assert_eq!(bytes[0x210], 0xff, "type_of_loader");
        assert_eq!(number(bytes, 0x218), 0x700_0000, "ramdisk_image");
        assert_eq!(number(bytes, 0x21c), 0x12_3456, "ramdisk_size");
        assert_eq!(number(bytes, 0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!(number(bytes, 0x238), 17, "cmdline_size");
        assert_eq!(number(bytes, 0x070), 0xe_0000, "acpi_rsdp_addr");
        assert_eq!(bytes[0x1e8], 3, "e820_entries");
        assert_eq!(number(bytes, 0x2d0 + 40), 0x10_0000, "the third entry");
        assert_eq!(number(bytes, 0x2d0 + 48), 127 << 20, "and its size");
    }

    #[test]
    fn the_header_of_a_bzimage_is_kept() {
        let header = setup_header {
            version: 0x20f,
            kernel_alignment: 0x20_0000,
            ..Default::default()
        };
        let params = build(Some(header), &places());
        assert_eq!(number(params.as_slice(), 0x230), 0x20_0000);
        assert_eq!(params.as_slice()[0x206..0x208], [0xf, 2]);
    }

    #[test]
    fn the_memory_map_has_no_gaps_and_no_overlaps() {
        for memory in [1 << 20, 128 << 20, 256 << 20] {
            let mut next = 0;
            for (address, bytes, _) in e820(memory) {
                assert_eq!(address, next);
                next = address + bytes;
            }
            assert_eq!(next, memory);
        }
    }

    #[test]
    fn the_initial_file_system_ends_with_memory_or_does_not_fit() {
        let place = initramfs_place(128 << 20, 5000).unwrap();
        assert_eq!(place.address, (128 << 20) - 8192);
        assert_eq!(initramfs_place(4096, 5000), None);
        assert_eq!(
            initramfs_place(2 << 20, 2 << 20),
            None,
            "not over the kernel's first MiB"
        );
        assert_eq!(initramfs_place(1 << 33, 1), None, "not beyond 32 bits");
    }
}
