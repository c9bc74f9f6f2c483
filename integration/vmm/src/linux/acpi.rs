//! The tables that tell the kernel of its processors, serial port and switch.
//!
//! Hardware-reduced ACPI: no SMI, no PM timer, no fixed events; the machine is switched off by a write
//! to the sleep control register, and reset by one to the keyboard controller's port.

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path, ZERO};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use amx_guest::area::SERIAL_PORT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Where the root pointer lies: in what was the BIOS's memory.
pub(crate) const RSDP: u64 = 0xe_0000;
/// The tables lie behind it.
const TABLES: u64 = 0xe_0040;
/// Port of the sleep control register; the sleep status register is behind it.
pub const SLEEP_PORT: u16 = 0x600;
/// SLP_TYP of S5, by the DSDT's _S5.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The keyboard controller's command port.
pub const RESET_PORT: u16 = 0x64;
/// The command that resets the machine.
pub const RESET_VALUE: u8 = 0xfe;
/// The serial port's interrupt.
pub const SERIAL_GSI: u32 = 4;

/// In-kernel interrupt controllers are where a PC has them.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

const OEM: [u8; 6] = *b"VMMAMX";
const OEM_TABLE: [u8; 8] = *b"AMXGUEST";
const REVISION: u32 = 1;
/// Signature, length, revision, checksum, OEM, creator.
const HEADER_BYTES: u32 = 36;

/// Writes all tables.
pub(crate) fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), GuestMemoryError> {
    let (tables, root) = build(vcpus);
    memory.write_slice(&tables, GuestAddress(TABLES))?;
    memory.write_slice(&root, GuestAddress(RSDP))
}

/// The tables from [`TABLES`] on, and the root pointer.
fn build(vcpus: u8) -> (Vec<u8>, Vec<u8>) {
    let mut tables = Vec::new();
    let mut add = |table: Vec<u8>| {
        let address = TABLES.saturating_add(tables.len() as u64);
        tables.extend(table);
        tables.resize(tables.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = add(dsdt().as_slice().to_vec());
    let fadt = add(bytes(&fadt(dsdt)));
    let madt = add(bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(bytes(&xsdt));
    (tables, bytes(&Rsdp::new(OEM, xsdt)))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The serial port, and the value that switches the machine off.
fn dsdt() -> Sdt {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, REVISION);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_GSI);
    let ports = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let resources = aml::ResourceTemplate::new(vec![&interrupt, &ports]);
    let id = aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501"));
    let number = aml::Name::new(Path::new("_UID"), &ZERO);
    let resources = aml::Name::new(Path::new("_CRS"), &resources);
    let serial = aml::Device::new(Path::new("_SB_.COM1"), vec![&id, &number, &resources]);
    let off = aml::Name::new(
        Path::new("_S5_"),
        &aml::Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]),
    );
    table.append_slice(&bytes(&serial));
    table.append_slice(&bytes(&off));
    table
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    // No VGA, no CMOS clock; and bit 1 clear: no keyboard controller to be probed.
    table.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    table.sleep_control_reg = port(SLEEP_PORT);
    table.sleep_status_reg = port(SLEEP_PORT.saturating_add(1));
    table.reset_reg = port(RESET_PORT);
    table.reset_value = RESET_VALUE;
    table.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut table = MADT::new(
        OEM,
        OEM_TABLE,
        REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for vcpu in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IO_APIC, 0));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables as a kernel finds them: by address, each with its signature and bytes.
    fn read(vcpus: u8) -> Vec<(String, Vec<u8>)> {
        let (tables, root) = build(vcpus);
        let number =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let table = |address: u64| {
            let at = usize::try_from(address - TABLES).unwrap();
            let length = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap());
            let bytes = tables[at..at + length as usize].to_vec();
            assert_eq!(
                bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
                0
            );
            (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
        };
        assert_eq!(&root[..8], b"RSD PTR ");
        let xsdt = table(number(&root, 24));
        let mut all = vec![];
        for entry in xsdt.1[36..].chunks_exact(8) {
            all.push(table(number(entry, 0)));
        }
        let fadt = &all.iter().find(|(name, _)| name == "FACP").unwrap().1;
        all.push(table(number(fadt, 140)));
        all
    }

    #[test]
    fn all_tables_are_found_from_the_root_with_right_checksums() {
        let names: Vec<String> = read(2).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["FACP", "APIC", "DSDT"]);
        let (tables, _) = build(8);
        assert!(TABLES + (tables.len() as u64) < 0x10_0000);
    }

    #[test]
    fn there_is_one_local_apic_per_vcpu() {
        for vcpus in 1..=8 {
            let madt = read(vcpus).swap_remove(1).1;
            let mut rest = &madt[44..];
            let mut ids = vec![];
            let mut io_apics = 0;
            while let [kind, length, ..] = rest {
                match kind {
                    0 => ids.push((rest[3], rest[4])),
                    1 => io_apics += 1,
                    other => panic!("a structure of type {other}"),
                }
                rest = &rest[usize::from(*length)..];
            }
            assert_eq!(ids, (0..vcpus).map(|id| (id, 1)).collect::<Vec<_>>());
            assert_eq!(io_apics, 1);
        }
    }

    #[test]
    fn the_switch_and_the_reset_are_where_the_devices_are() {
        let fadt = read(1).swap_remove(0).1;
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags, 1 << 20 | 1 << 10);
        assert_eq!(fadt[116], 1, "the reset register is a port");
        assert_eq!(fadt[120..122], RESET_PORT.to_le_bytes());
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(fadt[244], 1, "the sleep control register is a port");
        assert_eq!(fadt[248..250], SLEEP_PORT.to_le_bytes());
    }
}
