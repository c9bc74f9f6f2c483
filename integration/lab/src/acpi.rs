//! The ACPI tables of the lab: what a kernel needs to find its processors and its interrupt controllers, and nothing to manage.

use crate::boot_image::MOST_CPUS;

/// Physical addresses of the controllers that the emulator has.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// An I/O port range where the emulator has nothing: reads give ones, writes go nowhere. ACPI's fixed hardware is said to be there.
const NO_HARDWARE: u32 = 0x600;

/// All tables, as they lie in memory from `at` on; the root pointer comes first. `None` if there is no room for them.
pub(crate) fn tables(at: u64, room: usize, cpus: u32) -> Option<Vec<u8>> {
    let mut memory = Memory {
        at,
        bytes: Vec::new(),
    };
    // The root pointer names what follows it, so its place is kept.
    let root = memory.add(&[0; 36])?;
    let dsdt = memory.add(&table(*b"DSDT", 2, &[]))?;
    let fadt = memory.add(&fixed(dsdt)?)?;
    let madt = memory.add(&processors(cpus)?)?;
    let pointers: Vec<u8> = [fadt, madt]
        .iter()
        .flat_map(|table| table.to_le_bytes())
        .collect();
    let xsdt = memory.add(&table(*b"XSDT", 1, &pointers))?;
    debug_assert_eq!(root, at);
    memory
        .bytes
        .get_mut(..36)?
        .copy_from_slice(&root_pointer(xsdt));
    (memory.bytes.len() <= room).then_some(memory.bytes)
}

struct Memory {
    at: u64,
    bytes: Vec<u8>,
}

impl Memory {
    /// Where it lies now.
    fn add(&mut self, table: &[u8]) -> Option<u64> {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(table);
        self.at.checked_add(u64::try_from(start).ok()?)
    }
}

/// Makes the sum of all bytes zero.
fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
    bytes
}

/// The Root System Description Pointer, revision 2 (ACPI 6.5, 5.2.5.3).
fn root_pointer(xsdt: u64) -> [u8; 36] {
    let mut first = b"RSD PTR \0AMXLAB\x02\0\0\0\0".to_vec();
    first = with_checksum(first, 8);
    first.extend_from_slice(&36_u32.to_le_bytes());
    first.extend_from_slice(&xsdt.to_le_bytes());
    first.extend_from_slice(&[0; 4]);
    let whole = with_checksum(first, 32);
    let mut root = [0; 36];
    root.copy_from_slice(&whole);
    root
}

/// A table with its header (ACPI 6.5, 5.2.6).
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    let length = u32::try_from(body.len())
        .unwrap_or(u32::MAX)
        .saturating_add(36);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[revision, 0]);
    bytes.extend_from_slice(b"AMXLABAMX-LAB \x01\0\0\0AMXL\x01\0\0\0");
    bytes.extend_from_slice(body);
    with_checksum(bytes, 9)
}

/// The Fixed ACPI Description Table (ACPI 6.5, 5.2.9): the machine is in ACPI mode, and has no hardware for it.
fn fixed(dsdt: u64) -> Option<Vec<u8>> {
    const BYTES: usize = 276;
    const HEADER: usize = 36;
    let mut body = vec![0; BYTES.checked_sub(HEADER)?];
    let mut put = |at: usize, bytes: &[u8]| {
        let at = at.checked_sub(HEADER)?;
        body.get_mut(at..at.checked_add(bytes.len())?)?
            .copy_from_slice(bytes);
        Some(())
    };
    put(40, &u32::try_from(dsdt).ok()?.to_le_bytes())?;
    put(140, &dsdt.to_le_bytes())?;
    // The system control interrupt, which nothing raises.
    put(46, &9_u16.to_le_bytes())?;
    // PM1a event block, four bytes, and control block, two.
    put(56, &NO_HARDWARE.to_le_bytes())?;
    put(64, &NO_HARDWARE.saturating_add(4).to_le_bytes())?;
    put(88, &[4, 2])?;
    // No VGA, no MSI, no CMOS clock are to be looked for; there are devices on the ISA bus: the serial line.
    put(109, &(1_u16 | 1 << 2 | 1 << 3 | 1 << 5).to_le_bytes())?;
    // WBINVD works; there are neither a power nor a sleep button among the fixed hardware.
    put(112, &(1_u32 | 1 << 4 | 1 << 5).to_le_bytes())?;
    Some(table(*b"FACP", 6, &body))
}

/// The Multiple APIC Description Table (ACPI 6.5, 5.2.12).
fn processors(cpus: u32) -> Option<Vec<u8>> {
    const PC_AT_PICS: u32 = 1;
    let cpus = u8::try_from(cpus.min(MOST_CPUS)).ok()?;
    let mut body = LOCAL_APIC.to_le_bytes().to_vec();
    body.extend_from_slice(&PC_AT_PICS.to_le_bytes());
    for cpu in 0..cpus {
        body.extend_from_slice(&[0, 8, cpu, cpu]);
        body.extend_from_slice(&1_u32.to_le_bytes());
    }
    // The emulator gives the I/O APIC the number behind the processors'.
    body.extend_from_slice(&[1, 12, cpus, 0]);
    body.extend_from_slice(&IO_APIC.to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    // The timer's interrupt 0 is wired to input 2.
    body.extend_from_slice(&[2, 10, 0, 0]);
    body.extend_from_slice(&2_u32.to_le_bytes());
    body.extend_from_slice(&0_u16.to_le_bytes());
    Some(table(*b"APIC", 5, &body))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x12_3000;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// The table at this address.
    fn at(memory: &[u8], address: usize) -> &[u8] {
        let rest = &memory[address - AT as usize..];
        &rest[..word(rest, 4)]
    }

    #[test]
    fn every_table_is_found_and_adds_up() {
        let memory = tables(AT, 4096, 3).unwrap();
        assert_eq!(
            (&memory[..8], sum(&memory[..20]), sum(&memory[..36])),
            (b"RSD PTR ".as_slice(), 0, 0)
        );
        let xsdt = at(&memory, word(&memory, 24));
        let fadt = at(&memory, word(xsdt, 36));
        let madt = at(&memory, word(xsdt, 44));
        let dsdt = at(&memory, word(fadt, 140));
        for (table, name) in [
            (xsdt, b"XSDT"),
            (fadt, b"FACP"),
            (madt, b"APIC"),
            (dsdt, b"DSDT"),
        ] {
            assert_eq!((&table[..4], sum(table)), (name.as_slice(), 0));
        }
        assert_eq!(fadt.len(), 276);
    }

    #[test]
    fn each_processor_has_an_entry() {
        for cpus in [1, 2, MOST_CPUS] {
            let madt = processors(cpus).unwrap();
            let (mut rest, mut numbers) = (&madt[44..], Vec::new());
            while let [kind, length, number, ..] = *rest {
                numbers.extend((kind == 0).then_some(u32::from(number)));
                rest = &rest[usize::from(length)..];
            }
            assert_eq!(numbers, (0..cpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(tables(AT, 100, 1).is_none());
    }
}
