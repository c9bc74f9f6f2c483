//! What the emulator loads instead of firmware and a boot loader: boot parameters, page tables, the initial file system, its configuration.

use std::fs;
use std::io;
use std::path::Path;

use crate::acpi;
use crate::cpio::{DEVICE, DIRECTORY, Entry, FILE, Writer};
use crate::cpu::Cpu;
use crate::kernel::{END, ENTRY, IMAGE, LOAD_ADDRESS, MODULES, SETUP};
use crate::manifest::{Manifest, ManifestError};

/// The lab's first process, compiled by build.rs.
pub(crate) const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/amx-lab-init"));

/// Names of the files.
pub(crate) const CONFIGURATION: &str = "bochsrc";
const BOOT_PAGES: &str = "boot.bin";
const INITIAL_FILES: &str = "initrd.bin";

/// The most processors of a lab. They take turns, so more are only slower.
pub(crate) const MOST_CPUS: u32 = 8;
/// A machine of at least this much memory boots.
pub(crate) const LEAST_MEMORY_MIB: u32 = 256;
/// The channel lies above this.
pub(crate) const MOST_MEMORY_MIB: u32 = 3072;

/// Words of the kernel's command line.
///
/// - quiet: each line on the serial console costs time.
/// - nokaslr, pci=off: there is nothing to look for.
/// - idle=halt: the emulator passes over the time of a processor that waits so.
/// - mitigations=off, no_timer_check, cryptomgr.notests, nowatchdog, audit=0: nothing here is about them, and they take time.
/// - tsc=reliable: the emulated processor's counter is exact, and its rate is the one that CPUID leaf 15H tells.
/// - random.trust_cpu=on: entropy is there at once; each run gets its own from the host on top.
/// - clearcpuid=smap: with it, each copy between kernel and user drops the emulator's cached translations.
/// - oops=panic, panic=0: a kernel that is damaged stops, with its report on the console, where the host program looks for it.
const COMMAND_LINE: &str = "console=ttyS0,115200 quiet nokaslr mitigations=off tsc=reliable no_timer_check cryptomgr.notests \
    random.trust_cpu=on pci=off idle=halt clearcpuid=smap audit=0 rcupdate.rcu_expedited=1 nowatchdog \
    oops=panic panic=0";

/// The emulator's configuration. It runs in the lab's folder; names in @ are replaced.
///
/// ips is the rate of CPUID leaf 15H. LA57 is left out of the processor because the emulator does not switch it at VM entry.
/// Console output goes to descriptor 6.
const CONFIGURATION_TEXT: &str = r#"# A saved machine is resumed with this file as well.
config_interface: textconfig
display_library: nogui
plugin_ctrl: unmapped=1, biosdev=0, speaker=0, extfpuirq=1, parallel=0, serial=1
memory: guest=@MEMORY@, host=@MEMORY@, block_size=2048
romimage: file=../@EMULATOR@/bios.rom
vgaromimage: file=../@EMULATOR@/vga.rom
optramimage1: file=boot.bin, address=0x100000
optramimage2: file=../@KERNEL@/kernel.bin, address=0x1000000
optramimage3: file=initrd.bin, address=@FILES@
cpu: model=@CPU@, count=1:@CPUS@:1, ips=2200000000, reset_on_triple_fault=0, ignore_bad_msrs=1, msrs=../@EMULATOR@/msrs.def, exclude_features="la57"
clock: sync=none, time0=1700000000
com1: enabled=1, mode=file, dev=/dev/fd/6
boot: disk
ata0: enabled=0
ata1: enabled=0
log: -
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"#;

/// What a machine is made of: names of parts in the store, and its memory.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) emulator: String,
    pub(crate) kernel: String,
    pub(crate) cpu: Cpu,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
}

impl Recipe {
    /// All of this module that goes into a machine, for the key of the machine's part.
    pub(crate) fn ingredients(&self) -> [Vec<u8>; 8] {
        [
            self.emulator.clone().into(),
            self.kernel.clone().into(),
            self.cpu.model().into(),
            self.cpus.to_le_bytes().into(),
            self.memory_mib.to_le_bytes().into(),
            COMMAND_LINE.into(),
            CONFIGURATION_TEXT.into(),
            INIT.into(),
        ]
    }
}

/// Makes all files that a cold start needs, in `to`, from the unpacked kernel in `kernel_folder`.
pub(crate) fn create(
    recipe: &Recipe,
    kernel_folder: &Path,
    kernel: &Manifest,
    to: &Path,
) -> Result<(), ManifestError> {
    let fact = |name| {
        kernel
            .fact(kernel_folder, name)?
            .parse::<u64>()
            .map_err(|_| ManifestError::Changed {
                path: kernel_folder.join(name),
            })
    };
    let (entry, end) = (fact(ENTRY)?, fact(END)?);
    let write = |name: &str, bytes: &[u8]| {
        let path = to.join(name);
        fs::write(&path, bytes).map_err(|source| ManifestError::Io { path, source })
    };
    let files = initial_files(kernel_folder).map_err(|source| ManifestError::Io {
        path: kernel_folder.to_owned(),
        source,
    })?;
    write(INITIAL_FILES, &files)?;
    // Behind the kernel, with room for what it puts there while it starts.
    let files_at = end.saturating_add(0x200_0000) & !0xf_ffff;
    let setup_path = kernel_folder.join(SETUP);
    let setup = fs::read(&setup_path).map_err(|source| ManifestError::Io {
        path: setup_path.clone(),
        source,
    })?;
    let pages = boot_pages(&setup, entry, files_at, files.len() as u64, recipe)
        .ok_or(ManifestError::Changed { path: setup_path })?;
    write(BOOT_PAGES, &pages)?;
    let text = CONFIGURATION_TEXT
        .replace("@CPU@", recipe.cpu.model())
        .replace("@CPUS@", &recipe.cpus.to_string())
        .replace("@MEMORY@", &recipe.memory_mib.to_string())
        .replace("@EMULATOR@", &recipe.emulator)
        .replace("@KERNEL@", &recipe.kernel)
        .replace("@FILES@", &format!("{files_at:#x}"));
    debug_assert!(
        text.contains(IMAGE) && text.contains(BOOT_PAGES) && text.contains(INITIAL_FILES)
    );
    write(CONFIGURATION, text.as_bytes())
}

/// The initial file system: init, the kernel's modules, and the two devices that the kernel itself opens.
fn initial_files(kernel_folder: &Path) -> io::Result<Vec<u8>> {
    let mut archive = Writer::new(Vec::new());
    for folder in ["dev", "proc", "sys", "tmp", "lab"] {
        archive.add(&Entry::new(folder, DIRECTORY | 0o755, 0), io::empty())?;
    }
    for (name, device) in [("dev/console", (5, 1)), ("dev/null", (1, 3))] {
        archive.add(
            &Entry {
                device,
                ..Entry::new(name, DEVICE | 0o666, 0)
            },
            io::empty(),
        )?;
    }
    archive.add(&Entry::new("init", FILE | 0o755, INIT.len() as u64), INIT)?;
    let mut list = String::new();
    for (module, parameters) in MODULES {
        let name = format!("{}.ko", module.rsplit('/').next().unwrap_or(module));
        let bytes = fs::read(kernel_folder.join(&name))?;
        archive.add(
            &Entry::new(format!("lab/{name}"), FILE | 0o644, bytes.len() as u64),
            bytes.as_slice(),
        )?;
        list.push_str(format!("/lab/{name} {parameters}").trim_end());
        list.push('\n');
    }
    archive.add(
        &Entry::new("lab/modules", FILE | 0o644, list.len() as u64),
        list.as_bytes(),
    )?;
    archive.finish()
}

/// Physical addresses, fixed in boot/bios.S as well. Page tables follow the last one.
const BOOT_PARAMETERS: u64 = 0x10_0000;
const COMMAND_LINE_AT: u64 = 0x10_1000;
const SEGMENTS_AT: u64 = 0x10_2000;
const ENTRY_AT: u64 = 0x10_2100;
const TABLES_AT: u64 = 0x10_3000;
const ACPI_AT: u64 = 0x10_9000;
const ACPI_BYTES: usize = 0x1000;
const BOOT_PAGES_BYTES: usize = 0xa000;

/// The memory map's types (Documentation/arch/x86/boot.rst).
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_TABLES: u32 = 3;

/// Boot parameters, command line, segment descriptors, the kernel's entry for the BIOS, page tables that map 4 GiB one to one, and ACPI's
/// tables.
/// `None` if the kernel's setup header is not one.
fn boot_pages(
    setup: &[u8],
    entry: u64,
    files_at: u64,
    files_bytes: u64,
    recipe: &Recipe,
) -> Option<Vec<u8>> {
    let mut pages = Pages(vec![0; BOOT_PAGES_BYTES]);
    // The setup header goes where it was in the kernel's first sectors.
    let header_end = 0x202_usize.checked_add(usize::from(*setup.get(0x201)?))?;
    pages
        .0
        .get_mut(0x1f1..header_end)?
        .copy_from_slice(setup.get(0x1f1..header_end)?);
    const LOADED_HIGH: u8 = 1;
    let load_flags = setup.get(0x211)? | LOADED_HIGH;
    pages.put(BOOT_PARAMETERS, 0x210, &[0xff, load_flags])?;
    for (offset, value) in [
        (0x214, LOAD_ADDRESS),
        (0x218, files_at),
        (0x21c, files_bytes),
        (0x228, COMMAND_LINE_AT),
    ] {
        pages.put(
            BOOT_PARAMETERS,
            offset,
            &u32::try_from(value).ok()?.to_le_bytes(),
        )?;
    }
    const ACPI_ROOT_POINTER: u64 = 0x70;
    pages.put(BOOT_PARAMETERS, ACPI_ROOT_POINTER, &ACPI_AT.to_le_bytes())?;
    pages.put(ACPI_AT, 0, &acpi::tables(ACPI_AT, ACPI_BYTES, recipe.cpus)?)?;
    let memory = u64::from(recipe.memory_mib) << 20;
    if files_at.checked_add(files_bytes)? > memory {
        return None;
    }
    let acpi_end = ACPI_AT.checked_add(ACPI_BYTES as u64)?;
    let map: [(u64, u64, u32); 6] = [
        (0, 0x9_fc00, RAM),
        (0x9_fc00, 0x400, RESERVED),
        (0xe_0000, 0x2_0000, RESERVED),
        (BOOT_PARAMETERS, ACPI_AT.checked_sub(BOOT_PARAMETERS)?, RAM),
        (ACPI_AT, ACPI_BYTES as u64, ACPI_TABLES),
        (acpi_end, memory.checked_sub(acpi_end)?, RAM),
    ];
    pages.put(BOOT_PARAMETERS, 0x1e8, &[u8::try_from(map.len()).ok()?])?;
    for (index, (start, bytes, kind)) in (0_u64..).zip(map) {
        let at = index.checked_mul(20)?.checked_add(0x2d0)?;
        pages.put(BOOT_PARAMETERS, at, &start.to_le_bytes())?;
        pages.put(BOOT_PARAMETERS, at.checked_add(8)?, &bytes.to_le_bytes())?;
        pages.put(BOOT_PARAMETERS, at.checked_add(16)?, &kind.to_le_bytes())?;
    }
    pages.put(COMMAND_LINE_AT, 0, COMMAND_LINE.as_bytes())?;
    // Null, 32-bit code, 64-bit code, data.
    let segments = [
        0_u64,
        0x00cf_9a00_0000_ffff,
        0x00af_9a00_0000_ffff,
        0x00cf_9200_0000_ffff,
    ];
    for (index, segment) in (0_u64..).zip(segments) {
        pages.put(SEGMENTS_AT, index.checked_mul(8)?, &segment.to_le_bytes())?;
    }
    pages.put(ENTRY_AT, 0, &entry.to_le_bytes())?;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let directory = TABLES_AT.checked_add(0x1000)?;
    pages.put(TABLES_AT, 0, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4_u64 {
        let table = gib
            .checked_mul(0x1000)?
            .checked_add(directory)?
            .checked_add(0x1000)?;
        pages.put(
            directory,
            gib.checked_mul(8)?,
            &(table | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        for piece in 0..512_u64 {
            let address = (gib << 30) | (piece << 21);
            pages.put(
                table,
                piece.checked_mul(8)?,
                &(address | LARGE | PRESENT_WRITABLE).to_le_bytes(),
            )?;
        }
    }
    Some(pages.0)
}

/// The memory from [`BOOT_PARAMETERS`] on.
struct Pages(Vec<u8>);

impl Pages {
    fn put(&mut self, base: u64, offset: u64, bytes: &[u8]) -> Option<()> {
        let at = usize::try_from(base.checked_add(offset)?.checked_sub(BOOT_PARAMETERS)?).ok()?;
        self.0
            .get_mut(at..at.checked_add(bytes.len())?)?
            .copy_from_slice(bytes);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(pages: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(pages[at..at + 8].try_into().unwrap())
    }

    fn recipe() -> Recipe {
        Recipe {
            emulator: "emulator".to_owned(),
            kernel: "kernel".to_owned(),
            cpu: Cpu::default(),
            cpus: 2,
            memory_mib: LEAST_MEMORY_MIB,
        }
    }

    #[test]
    fn four_gigabytes_are_mapped_one_to_one() {
        let pages = boot_pages(&[0x20; 0x4000], 0x1234, 0x600_0000, 5, &recipe()).unwrap();
        assert_eq!(word(&pages, 0x2100), 0x1234);
        assert_eq!(word(&pages, 0x70), 0x10_9000);
        assert_eq!(&pages[0x9000..0x9008], b"RSD PTR ");
        assert_eq!(word(&pages, 0x3000), 0x10_4003);
        for gib in 0..4 {
            let table = word(&pages, 0x4000 + gib * 8) & !0xfff;
            let last = word(&pages, table as usize - 0x10_0000 + 511 * 8);
            assert_eq!(last, ((gib as u64) << 30) + (511 << 21) + 0x83);
        }
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        assert!(boot_pages(&[0x20; 0x4000], 0, 0x1000_0000, 1, &recipe()).is_none());
        assert!(boot_pages(&[0x20; 16], 0, 0, 0, &recipe()).is_none());
    }

    #[test]
    fn the_command_line_fits_its_page() {
        assert!(COMMAND_LINE.len() < 0x1000 && !COMMAND_LINE.contains("  "));
    }

    #[test]
    fn init_is_a_static_program() {
        crate::elf::check_static(INIT).unwrap();
    }
}
