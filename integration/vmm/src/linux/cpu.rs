//! The CPUID of each vCPU, and the registers of the first.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{Cap, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::errno;

use super::params::BOOT_PARAMS;
use crate::host::Host;
use crate::vm::flat;

/// The descriptor table that the kernel is entered with: it loads one of its own.
const SEGMENTS: u64 = 0x500;
/// Three page tables that map the first GiB to itself.
const PAGE_TABLES: [u64; 3] = [0x9000, 0xa000, 0xb000];
/// Top of the stack at the kernel's first instruction.
const STACK: u64 = 0x8ff0;

/// __BOOT_CS and __BOOT_DS of the boot protocol.
const BOOT_CODE: u16 = 0x10;
const BOOT_DATA: u16 = 0x18;

/// CPUID.01H:ECX[31]: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// CPUID.01H:ECX[5].
const VMX: u32 = 1 << 5;
/// CPUID.80000001H:ECX[2].
const SVM: u32 = 1 << 2;
/// AMD's leaf of SVM.
const SVM_LEAF: u32 = 0x8000_000a;

/// Sets a few MSRs of a vCPU that has its CPUID.
pub(super) fn set_msrs(
    vcpu: &VcpuFd,
    msrs: impl Iterator<Item = (u32, u64)>,
) -> Result<(), errno::Error> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = msrs.map(entry).collect();
    let list = Msrs::from_entries(&entries).map_err(|_| errno::Error::new(nix::libc::E2BIG))?;
    if vcpu.set_msrs(&list)? == entries.len() {
        Ok(())
    } else {
        Err(errno::Error::new(nix::libc::EINVAL))
    }
}
/// CPUID.01H:ECX[24].
const TSC_DEADLINE: u32 = 1 << 24;
/// CPUID.01H:EDX[28]: more than one logical processor.
const HTT: u32 = 1 << 28;
/// CPUID.01H:EDX[9].
const APIC: u32 = 1 << 9;

/// What vCPU `index` of `vcpus` sees: what is `supported`, its own number, and one core per vCPU.
/// `None` where the table is full.
pub(crate) fn cpuid(
    host: &Host,
    supported: &[kvm_cpuid_entry2],
    index: u8,
    vcpus: u8,
) -> Option<CpuId> {
    let deadline = host.kvm().check_extension(Cap::TscDeadlineTimer);
    let entries = with_topology(supported, index, vcpus, deadline);
    CpuId::from_entries(&entries).ok()
}

/// SDM vol. 3 §10.9: the APIC's number is in leaves 1 and 0BH, the number of cores in 1, 4 and 0BH.
fn with_topology(
    supported: &[kvm_cpuid_entry2],
    index: u8,
    vcpus: u8,
    deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    // As many identifiers as cores, rounded up to a power of two.
    let identifiers = u32::from(vcpus.next_power_of_two());
    let shift = identifiers.trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | SVM_LEAF))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(vcpus) << 16 | u32::from(index) << 24;
                // KVM implements the local APIC by itself; it does not report it where its own
                // host has none (kvm_cpu_cap_mask).
                entry.edx |= APIC | if vcpus > 1 { HTT } else { 0 };
                // Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID. No nested virtualisation: this
                // VMM does not move its state, and the capabilities in its MSRs differ between kernels.
                entry.ecx = entry.ecx & !VMX | HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
            }
            0x8000_0001 => entry.ecx &= !SVM,
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | identifiers.saturating_sub(1) << 26;
            }
            _ => {}
        }
    }
    if supported.iter().any(|entry| entry.function == 0xb) {
        // The levels: one thread per core, all cores.
        for (level, kind, shift, below) in [(0, 1, 0, 1), (1, 2, shift, u32::from(vcpus))] {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index: level,
                flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: below,
                ecx: level | kind << 8,
                edx: index.into(),
                ..Default::default()
            });
        }
    }
    entries
}

/// Writes descriptors and page tables.
pub(crate) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    // Null, unused, 64-bit code, data.
    let descriptors: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let mut next = GuestAddress(SEGMENTS);
    for descriptor in descriptors {
        memory.write_obj(descriptor, next)?;
        next.0 = next.0.saturating_add(8);
    }
    // Present, writable; 0x80: a page of 2 MiB.
    let [top, middle, bottom] = PAGE_TABLES;
    memory.write_obj(middle | 3, GuestAddress(top))?;
    memory.write_obj(bottom | 3, GuestAddress(middle))?;
    for page in 0..512u64 {
        let entry = bottom.saturating_add(page.saturating_mul(8));
        memory.write_obj(page << 21 | 0x83, GuestAddress(entry))?;
    }
    Ok(())
}

/// A vCPU after reset, whose local APIC is wired as firmware leaves it; with `entry`, at the first
/// instruction of a kernel.
pub(crate) fn set_registers(vcpu: &VcpuFd, entry: Option<u64>) -> Result<(), errno::Error> {
    let mut lapic = vcpu.get_lapic()?;
    wire(&mut lapic);
    vcpu.set_lapic(&lapic)?;
    let Some(entry) = entry else {
        return Ok(());
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = flat(BOOT_DATA, 0x3, false);
    sregs.cs = flat(BOOT_CODE, 0xb, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (SEGMENTS, 31);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    // PE, MP, ET, NE, PG; PAE; LME, LMA.
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x8000_0033, 0x20, 0x500);
    let [top, ..] = PAGE_TABLES;
    sregs.cr3 = top;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS,
        rsp: STACK,
        // Bit 1 is always set (SDM vol. 1 §3.4.3).
        rflags: 2,
        ..Default::default()
    })
}

/// LINT0 takes the interrupts of the PIC, LINT1 is the NMI (Intel MP Specification 1.4, 3.6.2.2).
fn wire(lapic: &mut kvm_lapic_state) {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    /// Delivery modes, in bits 8 to 10.
    const NMI: u8 = 4;
    const EXTERNAL: u8 = 7;
    for (register, mode) in [(LINT0, EXTERNAL), (LINT1, NMI)] {
        // The second byte of a register has the delivery mode and, above it, no bits that reset sets;
        // the third has the mask.
        if let Some([_, delivery, mask]) = lapic
            .regs
            .get_mut(register..register.saturating_add(3))
            .and_then(|bytes| <&mut [_; 3]>::try_from(bytes).ok())
        {
            *delivery = mode.cast_signed();
            *mask = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        [
            (
                1,
                0,
                [0x806f4, 0x0800, 0x8000_0000 | VMX, 0x1783_f9ff & !APIC],
            ),
            (4, 0, [0x1c00_4121, 0, 0, 0]),
            (4, 3, [0, 0, 0, 0]),
            (7, 0, [2, 0, 0, 0]),
            (0xb, 0, [0, 1, 0x100, 9]),
            (0x1f, 0, [0, 1, 0x100, 9]),
            (0x8000_0001, 0, [0, 0, SVM | 1, 0]),
            (SVM_LEAF, 0, [1, 8, 0, 1]),
        ]
        .into_iter()
        .map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index,
            flags: u32::from(matches!(function, 4 | 7 | 0xb | 0x1f)),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        })
        .collect()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found: Vec<_> = entries
            .iter()
            .filter(|entry| entry.function == function && entry.index == index)
            .collect();
        assert!(found.len() < 2, "{function:#x}.{index} twice");
        found
            .first()
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    #[test]
    fn each_vcpu_has_its_own_number_in_all_leaves() {
        for vcpus in 1..=8u8 {
            for index in 0..vcpus {
                let entries = with_topology(&supported(), index, vcpus, true);
                let [_, ebx, ecx, edx] = leaf(&entries, 1, 0);
                assert_eq!(
                    ebx,
                    0x0800 | u32::from(vcpus) << 16 | u32::from(index) << 24
                );
                assert_eq!(edx & HTT != 0, vcpus > 1 || supported()[0].edx & HTT != 0);
                assert_eq!(edx & APIC, APIC);
                assert_eq!(ecx & (TSC_DEADLINE | VMX), TSC_DEADLINE);
                for level in 0..2 {
                    assert_eq!(leaf(&entries, 0xb, level)[3], u32::from(index));
                }
                // All numbers fit below the shift, and the shift is not larger than needed.
                let shift = leaf(&entries, 0xb, 1)[0];
                assert!(vcpus <= 1 << shift && (shift == 0 || vcpus > 1 << (shift - 1)));
                assert_eq!(leaf(&entries, 4, 0)[0] >> 26, (1 << shift) - 1);
                assert_eq!(leaf(&entries, 4, 3)[0], 0, "no cache, no cores");
                assert_eq!(leaf(&entries, 0x1f, 0), [0; 4]);
                assert_eq!(leaf(&entries, 7, 0), [2, 0, 0, 0]);
                assert_eq!(leaf(&entries, 0x8000_0001, 0), [0, 0, 1, 0]);
                assert_eq!(leaf(&entries, SVM_LEAF, 0), [0; 4]);
            }
        }
    }

    #[test]
    fn the_interrupts_of_the_pic_come_through_lint0() {
        let mut lapic = kvm_lapic_state::default();
        // Masked, as after reset.
        lapic.regs[0x352] = 1;
        lapic.regs[0x362] = 1;
        wire(&mut lapic);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = crate::memory::allocate(1 << 20).unwrap();
        write_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0, 0x10_0000, 0x12_3456, 0x3fff_ffff_u64] {
            let table = read(PAGE_TABLES[0] + (address >> 39) * 8) & !0xfff;
            let table = read(table + (address >> 30) * 8) & !0xfff;
            let entry = read(table + (address >> 21) * 8);
            assert_eq!(entry & 0x83, 0x83);
            assert_eq!((entry & !0xfff) + (address & 0x1f_ffff), address);
        }
    }
}
