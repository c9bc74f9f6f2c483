//! The bodies, run by this very process: they need no KVM, only a processor that has the
//! instructions. So the tile body and its model meet real hardware also where KVM has no AMX for
//! guests.

#![allow(
    unsafe_code,
    reason = "machine code in memory, called with an area that it may write"
)]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::ptr;

use amx_guest::area::AREA_BYTES;
use amx_guest::{Kind, Workload, code};

const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
const XTILEDATA: i32 = 18;
const CODE_BYTES: usize = 0x4000;

/// Memory of its own, page-aligned.
struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize, protection: i32) -> Self {
        // SAFETY: A new private mapping at an address that the kernel chooses; no memory of this
        // process changes.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "memory for a body");
        Self {
            start: start.cast(),
            len,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes from `start` are mapped readable and writable, zero or written by
        // this program, and borrowed through `self` only.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: The mapping is this value's own, and nothing borrows it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Runs the body of `workload` in this thread, and gives its area as it is then.
fn run(workload: &Workload) -> Vec<u8> {
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let mut body = Mapping::new(CODE_BYTES, all);
    for (slot, byte) in body.bytes().iter_mut().zip(workload.kind().body()) {
        *slot = *byte;
    }
    // UD2 at the end becomes RET.
    let end = workload.kind().body().len();
    for (slot, byte) in body.bytes().iter_mut().take(end).rev().zip([0x90, 0xc3]) {
        *slot = byte;
    }
    let mut area = Mapping::new(AREA_BYTES, libc::PROT_READ | libc::PROT_WRITE);
    area.bytes()
        .copy_from_slice(&workload.area(0, workload.kind().xcr0()));
    // SAFETY: The body is complete and ends with RET. It reads and writes only the area at RDI,
    // uses no stack, and changes RBX, R12, R13, all caller-saved registers, MXCSR and the x87 unit,
    // which are saved or declared here. Tiles are released by the caller.
    unsafe {
        asm!(
            "push rbx",
            "sub rsp, 16",
            "stmxcsr [rsp]",
            "call {body}",
            "fninit",
            "ldmxcsr [rsp]",
            "add rsp, 16",
            "pop rbx",
            body = in(reg) body.start,
            inout("rdi") area.start => _,
            out("r12") _,
            out("r13") _,
            clobber_abi("sysv64"),
        );
    }
    if workload.kind() == Kind::Tiles {
        // SAFETY: The body has just used tiles, so the instruction is there; nobody else in this
        // thread does.
        unsafe { asm!("tilerelease") };
    }
    area.bytes().to_vec()
}

/// XCR0 as the operating system has set it.
fn xcr0() -> u64 {
    // CPUID.1:ECX.OSXSAVE[27]
    if __cpuid_count(1, 0).ecx >> 27 & 1 == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV is there with OSXSAVE, and XCR0 always exists.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

/// Why this process cannot run `kind`, if it cannot.
fn missing(kind: Kind) -> Option<String> {
    let cpuid = |leaf, subleaf| {
        let result = __cpuid_count(leaf, subleaf);
        [result.eax, result.ebx, result.ecx, result.edx]
    };
    if !kind.runs_with(xcr0(), cpuid) {
        return Some(format!("the processor or XCR0 {:#x} lacks it", xcr0()));
    }
    if kind == Kind::Tiles {
        // SAFETY: arch_prctl with these arguments takes no pointer.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) };
        if result != 0 {
            return Some("the kernel does not permit tiles".to_owned());
        }
    }
    None
}

fn computes_what_its_model_says(kind: Kind) {
    if let Some(reason) = missing(kind) {
        println!("skipped: {kind}: {reason}");
        return;
    }
    for seed in 0..8 {
        for rounds in [1, 2, 7, 40] {
            let workload = Workload::new(kind, seed, rounds);
            let area = run(&workload);
            assert_eq!(
                workload.check(&area),
                [],
                "{kind}, seed {seed}, {rounds} rounds"
            );
        }
    }
}

#[test]
fn tiles_compute_what_their_model_says() {
    computes_what_its_model_says(Kind::Tiles);
}

#[test]
fn avx512_computes_what_its_model_says() {
    computes_what_its_model_says(Kind::Avx512);
}

#[test]
fn avx2_computes_what_its_model_says() {
    computes_what_its_model_says(Kind::Avx2);
}

#[test]
fn sse_computes_what_its_model_says() {
    computes_what_its_model_says(Kind::Sse);
}

#[test]
fn a_wrong_register_is_named() {
    if let Some(reason) = missing(Kind::Sse) {
        println!("skipped: {reason}");
        return;
    }
    let workload = Workload::new(Kind::Sse, 1, 5);
    let mut area = run(&workload);
    let at = amx_guest::area::OUT_VECTORS.saturating_add(64 * 3);
    if let Some(byte) = area.get_mut(at) {
        *byte ^= 1;
    }
    let differences = workload.check(&area);
    let names: Vec<&str> = differences.iter().map(|d| d.register.as_str()).collect();
    assert_eq!(names, ["XMM3"]);
    assert!(code::sse().len() < CODE_BYTES);
}
