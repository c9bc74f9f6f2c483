//! A program at CPL 3 in 64-bit mode, that ends with UD2: where KVM emulates what a guest's kernel
//! does, instructions of SSE and XSAVE run here only.

use kvm_bindings::kvm_segment;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::HLT;

const PAGE_TABLES: usize = 0x1000;
const GDT: usize = 0x4000;
const IDT: usize = 0x4100;
const TSS: usize = 0x4200;
const HANDLER: usize = 0x4300;
const STACK: usize = 0x4c00;
const CODE: usize = 0x5000;
/// Where programs have their data.
pub(crate) const DATA: usize = 0x6000;
pub(crate) const MEMORY_BYTES: usize = 0x8000;

const INVALID_OPCODE: usize = 6;

/// An instruction of 0F AE with REX.W, by the digit of its ModR/M byte, on data at `DATA` plus
/// `offset`.
pub(crate) fn instruction(digit: u8, offset: usize) -> [u8; 8] {
    let [a, b, c, d] = ((DATA + offset) as u32).to_le_bytes();
    [0x48, 0x0f, 0xae, 0x87 | digit << 3, a, b, c, d] // of RDI + disp32
}
pub(crate) const LDMXCSR: u8 = 2;
pub(crate) const STMXCSR: u8 = 3;
pub(crate) const XSAVE: u8 = 4;
pub(crate) const XRSTOR: u8 = 5;

/// Puts the program and what it needs into the guest's memory.
pub(crate) fn load(memory: &mut [u8], instructions: &[[u8; 8]]) {
    let mut write = |at: usize, value: u64| memory[at..][..8].copy_from_slice(&value.to_le_bytes());
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    for level in [PAGE_TABLES, PAGE_TABLES + 0x1000] {
        write(level, (level as u64 + 0x1000) | PRESENT_WRITABLE_USER);
    }
    write(PAGE_TABLES + 0x2000, PRESENT_WRITABLE_USER | LARGE);
    write(GDT + 0x08, 0x00af_9b00_0000_ffff);
    write(GDT + 0x10, 0x00cf_9300_0000_ffff);
    write(GDT + 0x18, 0x00af_fb00_0000_ffff);
    write(GDT + 0x20, 0x00cf_f300_0000_ffff);
    write(GDT + 0x28, 0x0000_8b00_0000_0067 | (TSS as u64) << 16);
    write(TSS + 4, STACK as u64); // RSP0
    write(
        IDT + 16 * INVALID_OPCODE,
        HANDLER as u64 | 8 << 16 | 0x8e00 << 32,
    );
    memory[HANDLER] = HLT;
    for (at, instruction) in (CODE..).step_by(8).zip(instructions) {
        memory[at..][..8].copy_from_slice(instruction);
    }
    memory[CODE + 8 * instructions.len()..][..2].copy_from_slice(&[0x0f, 0x0b]);
}

/// Runs it to its end.
pub(crate) fn run(vcpu: &mut VcpuFd) {
    let segment = |selector: u16, type_, dpl, l| kvm_segment {
        selector,
        type_,
        dpl,
        l,
        db: 1 - l,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = segment(0x23, 3, 3, 0);
    sregs.cs = segment(0x1b, 11, 3, 1);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS as u64,
        limit: 0x67,
        selector: 0x28,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 0x37);
    (sregs.idt.base, sregs.idt.limit) = (IDT as u64, 7 * 16 - 1);
    sregs.cr3 = PAGE_TABLES as u64;
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.cr4 = 0x40620; // OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (CODE as u64, 2, STACK as u64);
    regs.rdi = 0; // see `instruction`
    (regs.rax, regs.rdx) = (3, 0); // XSAVE and XRSTOR: x87 and SSE
    vcpu.set_regs(&regs).unwrap();
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::Hlt), "{exit:?}");
}
