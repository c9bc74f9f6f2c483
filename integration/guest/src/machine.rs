//! The bare machine under a payload: where things lie, page tables, segments, exceptions.
//!
//! Two MiB of memory, mapped one to one by 4 KiB pages. CPL3 may reach the body and the areas only.

use crate::area::AREA_BYTES;
use crate::code::{VECTOR_BYTES, VECTORS_OFFSET};

/// Bytes of guest memory.
pub const MEMORY_BYTES: u64 = 0x20_0000;
/// The most vCPUs that this memory map has room for.
pub const MAX_VCPUS: u8 = 16;
/// A page that is mapped and has no memory behind it, and another one after it.
pub const MMIO: u64 = 0x1f_0000;
/// Where the guest's page tables send [`MMIO`].
pub const MMIO_PHYSICAL: u64 = 0x8000_0000;

/// Selector of the CPL0 code segment.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of the CPL0 data segment.
pub const KERNEL_DATA: u16 = 0x10;
/// Selector of the CPL3 data segment.
pub const USER_DATA: u16 = 0x1b;
/// Selector of the CPL3 code segment.
pub const USER_CODE: u16 = 0x23;
const FIRST_TASK: u16 = 0x28;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
/// The gate of #NM, whose handler a payload at CPL0 may replace.
pub(crate) const DEVICE_NOT_AVAILABLE_GATE: u64 = IDT + 7 * 16;
const STUB: u64 = 0x8000;
const BODY: u64 = 0x9000;
const TASKS: u64 = 0xc000;
const STACKS: u64 = 0x1_0000;
const AREAS: u64 = 0x4_0000;
const AREAS_END: u64 = AREAS + AREA_BYTES as u64 * MAX_VCPUS as u64;
const PAGE: u64 = 0x1000;
const TASK_BYTES: u16 = 0x80;
const GDT_LIMIT: u16 = FIRST_TASK + 16 * MAX_VCPUS as u16 - 1;

/// Room for the stub in bytes.
pub const STUB_BYTES: usize = 0x1000;
/// Room for a body in bytes.
pub const BODY_BYTES: usize = 0x3000;
const _: () = assert!(STUB + STUB_BYTES as u64 == BODY && BODY + BODY_BYTES as u64 == TASKS);

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;

/// Bytes for guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of the first byte.
    pub address: u64,
    /// What goes there.
    pub bytes: Vec<u8>,
}

/// What a vCPU's registers hold before its first instruction, apart from reset values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Boot {
    /// First instruction, at CPL0.
    pub rip: u64,
    /// Top of the CPL0 stack.
    pub rsp: u64,
    /// Address of the vCPU's area.
    pub rdi: u64,
    /// Paging and protection on.
    pub cr0: u64,
    /// Page tables.
    pub cr3: u64,
    /// PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    pub cr4: u64,
    /// Long mode.
    pub efer: u64,
    /// Base and limit of the GDT.
    pub gdt: (u64, u16),
    /// Base and limit of the IDT.
    pub idt: (u64, u16),
    /// Selector, base and limit of the TSS.
    pub task: (u16, u64, u16),
}

/// Guest address of the area of vCPU `index`.
#[must_use]
pub fn area(index: u8) -> u64 {
    AREAS.saturating_add(u64::from(index).saturating_mul(AREA_BYTES as u64))
}

/// Guest address of the body.
#[must_use]
pub const fn body() -> u64 {
    BODY
}

/// The registers of vCPU `index`. It starts in the stub, or in the body for a payload that runs at
/// CPL0 itself.
#[must_use]
pub fn boot(index: u8, at_cpl0: bool) -> Boot {
    let index64 = u64::from(index);
    Boot {
        rip: if at_cpl0 { BODY } else { STUB },
        rsp: stack_top(index),
        rdi: area(index),
        // PE, MP, ET, NE, PG
        cr0: 0x8000_0033,
        cr3: PML4,
        // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        cr4: 0x4_0620,
        // LME, LMA
        efer: 0x500,
        gdt: (GDT, GDT_LIMIT),
        idt: (IDT, 32 * 16 - 1),
        task: (
            FIRST_TASK.saturating_add(u16::from(index).saturating_mul(16)),
            TASKS.saturating_add(index64.saturating_mul(u64::from(TASK_BYTES))),
            TASK_BYTES - 1,
        ),
    }
}

/// Everything that guest memory holds before the first instruction, the areas apart.
#[must_use]
pub fn image(stub: &[u8], body: &[u8]) -> Vec<Segment> {
    let mut segments = vec![
        table(PML4, &[PDPT | PRESENT | WRITABLE | USER]),
        table(PDPT, &[PD | PRESENT | WRITABLE | USER]),
        table(PD, &[PT | PRESENT | WRITABLE | USER]),
        table(PT, &pages()),
        table(GDT, &descriptors()),
        table(IDT, &gates()),
    ];
    for (address, bytes) in [(STUB, stub), (BODY, body)] {
        segments.push(Segment {
            address,
            bytes: bytes.to_vec(),
        });
    }
    for index in 0..MAX_VCPUS {
        segments.push(task(index));
    }
    segments
}

fn stack_top(index: u8) -> u64 {
    STACKS.saturating_add(u64::from(index).saturating_add(1).saturating_mul(PAGE))
}

fn table(address: u64, entries: &[u64]) -> Segment {
    Segment {
        address,
        bytes: entries.iter().flat_map(|e| e.to_le_bytes()).collect(),
    }
}

fn pages() -> Vec<u64> {
    (0..MEMORY_BYTES)
        .step_by(4096)
        .map(|address| {
            let user = (BODY..TASKS).contains(&address) || (AREAS..AREAS_END).contains(&address);
            let target = match address.checked_sub(MMIO) {
                Some(offset) if offset < 2 * PAGE => MMIO_PHYSICAL.saturating_add(offset),
                _ => address,
            };
            target | PRESENT | WRITABLE | if user { USER } else { 0 }
        })
        .collect()
}

/// SDM Vol. 3 §3.4.5 and §8.2.3: flat segments, then one 16-byte TSS descriptor per vCPU.
fn descriptors() -> Vec<u64> {
    let mut entries = vec![
        0,
        0x00af_9b00_0000_ffff, // code, DPL 0, 64-bit
        0x00cf_9300_0000_ffff, // data, DPL 0
        0x00cf_f300_0000_ffff, // data, DPL 3
        0x00af_fb00_0000_ffff, // code, DPL 3, 64-bit
    ];
    for index in 0..MAX_VCPUS {
        let (_, base, limit) = boot(index, false).task;
        // Present, 64-bit TSS, busy as the loaded TR has it.
        entries.push(0x8b << 40 | (base & 0xff_ffff) << 16 | u64::from(limit));
        entries.push(0);
    }
    entries
}

/// SDM Vol. 3 §6.14.1: interrupt gates to the stub's entries; DPL 3, so INT3 is one of them.
fn gates() -> Vec<u64> {
    let first = STUB.saturating_add(VECTORS_OFFSET as u64);
    (0..32u64)
        .flat_map(|vector| {
            let target = first.saturating_add(vector.saturating_mul(VECTOR_BYTES as u64));
            let low = target & 0xffff
                | u64::from(KERNEL_CODE) << 16
                | 0xee00 << 32
                | (target >> 16 & 0xffff) << 48;
            [low, target >> 32]
        })
        .collect()
}

/// SDM Vol. 3 §8.7: the stack for CPL0 at offset 4, no I/O permission map.
fn task(index: u8) -> Segment {
    let (_, address, _) = boot(index, false).task;
    let mut bytes = vec![0; usize::from(TASK_BYTES)];
    for (slot, byte) in bytes.iter_mut().skip(4).zip(stack_top(index).to_le_bytes()) {
        *slot = byte;
    }
    for (slot, byte) in bytes.iter_mut().skip(102).zip(TASK_BYTES.to_le_bytes()) {
        *slot = byte;
    }
    Segment { address, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_all_is_within_memory() {
        let mut spans: Vec<(u64, u64)> = image(crate::code::stub(), crate::code::avx512())
            .iter()
            .map(|s| (s.address, s.address + s.bytes.len() as u64))
            .chain((0..MAX_VCPUS).map(|i| (area(i), area(i + 1))))
            .chain((0..MAX_VCPUS).map(|i| (stack_top(i) - PAGE, stack_top(i))))
            .collect();
        spans.sort_unstable();
        for pair in spans.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(spans.last().unwrap().1 <= MMIO);
    }

    #[test]
    fn the_body_and_the_areas_are_the_only_user_pages() {
        let pages = pages();
        assert_eq!(pages.len(), 512);
        assert_eq!(pages[8] & USER, 0);
        assert_eq!(pages[9], 0x9007);
        assert_eq!(pages[0x40] & USER, USER);
        assert_eq!(pages[0x3f] & USER, 0);
        assert_eq!(pages[0x1f0], MMIO_PHYSICAL | 3);
    }
}
