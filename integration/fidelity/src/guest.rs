//! A guest under KVM that runs trials, or a program of its own, at CPL 0.
//!
//! Long mode, one vCPU. The guest sees an arena at the same linear addresses as this process, through
//! page tables in the arena, and runs a copy of `trial.asm` in it.
#![allow(unsafe_code, reason = "a VM is given memory of this process")]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::arena::{Arena, Piece};
use crate::cpuid::Layout;
use crate::process;
use crate::trial::{self, Processor, Trial};

/// IA32_XFD.
pub const MSR_XFD: u32 = 0x1c4;
/// IA32_XFD_ERR.
pub const MSR_XFD_ERR: u32 = 0x1c5;
/// The port that a guest leaves through when its trials are done.
const DONE: u16 = 0x10;
/// Bytes behind the part of an area that `kvm_xsave` has.
const XSAVE_EXTRA: usize = (trial::AREA - 4096) / 4;
const PAGE: usize = 4096;

/// A VM with one vCPU.
#[derive(Debug)]
pub struct Vm {
    /// The vCPU.
    pub vcpu: VcpuFd,
    /// The VM.
    pub vm: VmFd,
}

/// How a guest left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// OUT to this port.
    Port(u16),
    /// HLT.
    Halt,
}

/// All of a vCPU that the guests here have.
#[derive(Clone)]
pub struct Saved {
    /// General registers.
    pub regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    /// IA32_XFD.
    pub xfd: u64,
    /// IA32_XFD_ERR.
    pub xfd_err: u64,
    /// The XSAVE area, in the standard format.
    pub area: Vec<u8>,
}

/// Opens /dev/kvm, with the permission for guests to have tiles; says why a test is skipped.
#[must_use]
pub fn kvm() -> Option<Kvm> {
    if !process::has_amx() {
        return None;
    }
    match Kvm::new() {
        Ok(kvm) => {
            process::permit_guests();
            Some(kvm)
        }
        Err(error) => {
            println!("skipped: /dev/kvm cannot be used: {error}");
            None
        }
    }
}

/// KVM_GET_SUPPORTED_CPUID.
#[must_use]
pub fn supported_cpuid(kvm: &Kvm) -> CpuId {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()
}

impl Vm {
    /// A new VM with a vCPU after reset, on the memory of `arena`.
    ///
    /// # Safety
    ///
    /// The arena outlives the VM.
    #[must_use]
    pub unsafe fn new(kvm: &Kvm, arena: &Arena) -> Self {
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: arena.size() as u64,
            userspace_addr: arena.address(),
            ..Default::default()
        };
        // SAFETY: The region is the arena's memory, which outlives the VM (the caller's promise).
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&supported_cpuid(kvm)).unwrap();
        Self { vcpu, vm }
    }

    /// Runs up to the next OUT or HLT and completes it, so that the vCPU can be saved.
    ///
    /// # Panics
    ///
    /// The guest left in another way.
    pub fn run(&mut self) -> Exit {
        let exit = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) => Exit::Port(port),
            Ok(VcpuExit::Hlt) => return Exit::Halt,
            other => {
                let why = format!("{other:?}");
                panic!("the guest left with {why}; {:x?}", self.vcpu.get_regs());
            }
        };
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        assert_eq!(completed.map_err(|error| error.errno()), Err(libc::EINTR));
        exit
    }

    /// A model-specific register.
    #[must_use]
    pub fn msr(&self, index: u32) -> u64 {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(
            self.vcpu.get_msrs(&mut msrs).unwrap(),
            1,
            "KVM_GET_MSRS {index:#x}"
        );
        msrs.as_slice()[0].data
    }

    /// Sets a model-specific register; gives whether KVM took the value.
    #[must_use]
    pub fn set_msr(&self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        self.vcpu
            .set_msrs(&Msrs::from_entries(&[entry]).unwrap())
            .unwrap()
            == 1
    }

    /// Enables components in XCR0.
    pub fn set_xcr0(&self, value: u64) {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = value;
        self.vcpu.set_xcrs(&xcrs).unwrap();
    }

    /// KVM_GET_XSAVE2.
    #[must_use]
    pub fn area(&self) -> Vec<u8> {
        let size = usize::try_from(self.vm.check_extension_raw(208)).unwrap_or(0);
        assert!(size <= trial::AREA, "KVM_CAP_XSAVE2 is {size}");
        let mut xsave = Xsave::new(XSAVE_EXTRA).unwrap();
        // SAFETY: The kernel writes at most KVM_CAP_XSAVE2 bytes, asked when the vCPU existed; the
        // buffer has `AREA`, which is not less.
        unsafe { self.vcpu.get_xsave2(&mut xsave) }.unwrap();
        let head = xsave.as_fam_struct_ref().xsave.region;
        head.iter()
            .chain(xsave.as_slice())
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// KVM_SET_XSAVE; the errno if it fails.
    ///
    /// # Errors
    ///
    /// The kernel's errno.
    pub fn set_area(&self, area: &[u8]) -> Result<(), i32> {
        assert_eq!(area.len(), trial::AREA);
        let mut xsave = Xsave::new(XSAVE_EXTRA).unwrap();
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let (head, tail) = area.split_at(4096);
        for (to, from) in xsave.as_mut_slice().iter_mut().zip(tail.chunks_exact(4)) {
            *to = word(from);
        }
        // SAFETY: Only the words of the fixed part are changed, not how many follow it.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        for (to, from) in fixed.xsave.region.iter_mut().zip(head.chunks_exact(4)) {
            *to = word(from);
        }
        // SAFETY: The kernel reads at most KVM_CAP_XSAVE2 bytes, and the buffer has `AREA`.
        unsafe { self.vcpu.set_xsave2(&xsave) }.map_err(|error| error.errno())
    }

    /// Saves the vCPU.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            regs: self.vcpu.get_regs().unwrap(),
            sregs: self.vcpu.get_sregs().unwrap(),
            xcrs: self.vcpu.get_xcrs().unwrap(),
            xfd: self.msr(MSR_XFD),
            xfd_err: self.msr(MSR_XFD_ERR),
            area: self.area(),
        }
    }

    /// Restores the vCPU: IA32_XFD comes before the area.
    pub fn restore(&self, saved: &Saved) {
        self.vcpu.set_sregs(&saved.sregs).unwrap();
        assert!(self.set_msr(MSR_XFD, saved.xfd));
        assert!(self.set_msr(MSR_XFD_ERR, saved.xfd_err));
        self.vcpu.set_xcrs(&saved.xcrs).unwrap();
        self.set_area(&saved.area).unwrap();
        self.vcpu.set_regs(&saved.regs).unwrap();
    }
}

/// What a guest needs in its memory.
#[derive(Clone, Copy, Debug)]
pub struct World {
    cr3: u64,
    gdt: u64,
    idt: u64,
    code: u64,
    stack: u64,
}

impl World {
    /// Puts page tables, descriptor tables, a stack and the code of `trial.asm` into the arena, on pages
    /// of the supervisor or of the user.
    pub fn new(arena: &mut Arena, user_pages: bool) -> Self {
        let flags = if user_pages { 7 } else { 3 };
        let tables = arena.take_aligned(3 * PAGE, PAGE);
        let (at, physical) = (arena.address(), tables.offset());
        let index = |shift: u32| ((at >> shift) & 0x1ff) as usize;
        let first = index(21);
        let pages = arena.size() >> 21;
        assert!(first + pages <= 512, "the arena crosses a GiB");
        let mut entries = vec![
            (index(39), (physical + 0x1000) | flags),
            (512 + index(30), (physical + 0x2000) | flags),
        ];
        for page in 0..pages {
            entries.push((1024 + first + page, (page as u64) << 21 | 0x80 | flags));
        }
        for (index, entry) in entries {
            arena.bytes_mut(tables)[index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
        }

        let code = arena.take_aligned(trial::code().len(), PAGE);
        arena.bytes_mut(code).copy_from_slice(trial::code());
        let idt = arena.take_aligned(PAGE, PAGE);
        for vector in 0..32 {
            let handler = code.address() + trial::exception_entry(vector);
            let low = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            let gate = [low.to_le_bytes(), (handler >> 32).to_le_bytes()].concat();
            let at = usize::try_from(vector).unwrap() * 16;
            arena.bytes_mut(idt)[at..][..16].copy_from_slice(&gate);
        }
        let gdt = arena.take(64);
        let descriptors = [0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
        for (to, descriptor) in arena.bytes_mut(gdt).chunks_exact_mut(8).zip(descriptors) {
            to.copy_from_slice(&descriptor.to_le_bytes());
        }
        let stack = arena.take_aligned(4 * PAGE, PAGE);
        Self {
            cr3: tables.offset(),
            gdt: gdt.address(),
            idt: idt.address(),
            code: code.address(),
            stack: stack.address() + 4 * PAGE as u64 - 64,
        }
    }

    /// Enters the program that does what the kernel's selftest for AMX does: rdi is a configuration, rsi
    /// a tile in memory, r8 an area, r9 where it leaves notes. See `selftest.asm`.
    pub fn enter_selftest(&self, vm: &Vm, [rdi, rsi, r8, r9]: [u64; 4]) {
        self.enter(vm, self.code + trial::selftest_entry());
        let mut regs = vm.vcpu.get_regs().unwrap();
        (regs.rdi, regs.rsi, regs.r8, regs.r9) = (rdi, rsi, r8, r9);
        vm.vcpu.set_regs(&regs).unwrap();
    }

    /// Enters the program that goes to CPL 3 by SYSRET, with an odd stack segment.
    pub fn enter_sysret(&self, vm: &Vm) {
        const MSR_STAR: u32 = 0xc000_0081;
        self.enter(vm, self.code + trial::sysret_entry());
        let mut sregs = vm.vcpu.get_sregs().unwrap();
        sregs.efer |= 1;
        (sregs.ss.base, sregs.ss.limit, sregs.ss.g) = (0x1000, 0xfff, 0);
        vm.vcpu.set_sregs(&sregs).unwrap();
        assert!(vm.set_msr(MSR_STAR, 0x0010_0008 << 32));
    }

    /// Enters the program that counts rcx down from `turns` and rax up from 0, and then leaves through
    /// port 41H, with RFLAGS.IF as given.
    pub fn enter_count(&self, vm: &Vm, turns: u64, interrupts_enabled: bool) {
        self.enter(vm, self.code + trial::count_entry());
        let mut regs = vm.vcpu.get_regs().unwrap();
        (regs.rax, regs.rcx) = (0, turns);
        regs.rflags |= u64::from(interrupts_enabled) << 9;
        vm.vcpu.set_regs(&regs).unwrap();
    }

    /// Long mode at CPL 0, with all of XCR0 enabled, at this address.
    pub fn enter(&self, vm: &Vm, address: u64) {
        let segment = |selector, type_, long| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            present: 1,
            type_,
            s: 1,
            g: 1,
            l: long,
            db: 1 - long,
            ..Default::default()
        };
        let mut sregs = vm.vcpu.get_sregs().unwrap();
        sregs.cs = segment(8, 11, 1);
        let data = segment(16, 3, 0);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        // PG, WP, NE, ET, MP, PE; PKE, OSXSAVE, OSXMMEXCPT, OSFXSR, PAE; LMA, LME.
        (sregs.cr0, sregs.cr4, sregs.efer) = (0x8001_0033, 0x0044_0620, 0x500);
        sregs.cr3 = self.cr3;
        (sregs.gdt.base, sregs.gdt.limit) = (self.gdt, 63);
        (sregs.idt.base, sregs.idt.limit) = (self.idt, 511);
        vm.vcpu.set_sregs(&sregs).unwrap();
        vm.set_xcr0(Layout::here().user & supported_user());
        let regs = kvm_regs {
            rip: address,
            rsp: self.stack,
            rflags: 2,
            ..Default::default()
        };
        vm.vcpu.set_regs(&regs).unwrap();
    }
}

/// The components that trials are about: what else a processor has stays disabled in guests.
fn supported_user() -> u64 {
    crate::component::ALL_ENUMERATED | 3
}

/// A guest as a place where trials run.
#[derive(Debug)]
pub struct Guest {
    // Before the arena: the VM goes first.
    vm: Vm,
    arena: Arena,
    world: World,
    trials: Piece,
    initial: Piece,
}

/// How many trials go into a guest at once.
const BATCH: usize = 256;

impl Guest {
    /// A guest, or `None` where there is no AMX or no KVM.
    #[must_use]
    pub fn new() -> Option<Self> {
        let kvm = kvm()?;
        let mut arena = Arena::new(8);
        let world = World::new(&mut arena, false);
        let trials = arena.take(BATCH * size_of::<Trial>());
        let initial = trial::initial_area(&mut arena);
        // SAFETY: The arena is in the same structure, behind the VM, and so is dropped after it.
        let vm = unsafe { Vm::new(&kvm, &arena) };
        Some(Self {
            vm,
            arena,
            world,
            trials,
            initial,
        })
    }
}

impl Processor for Guest {
    fn privileged(&self) -> bool {
        true
    }

    fn arena(&mut self) -> &mut Arena {
        &mut self.arena
    }

    fn run(&mut self, trials: &mut [Trial]) {
        for batch in trials.chunks_mut(BATCH) {
            trial::prepare_for_guest(batch, self.initial);
            write_trials(self.arena.bytes_mut(self.trials), batch);
            self.world
                .enter(&self.vm, self.world.code + trial::guest_entry());
            let mut regs = self.vm.vcpu.get_regs().unwrap();
            (regs.rdi, regs.rsi) = (self.trials.address(), batch.len() as u64);
            self.vm.vcpu.set_regs(&regs).unwrap();
            let exit = self.vm.run();
            assert_eq!(
                exit,
                Exit::Port(DONE),
                "an exception outside of the instruction under test: rax is its vector, rcx where; {:x?}",
                self.vm.vcpu.get_regs()
            );
            read_trials(self.arena.bytes(self.trials), batch);
        }
    }
}

fn write_trials(to: &mut [u8], trials: &[Trial]) {
    // SAFETY: `Trial` is thirteen u64 without padding, so that all its bytes are initialised.
    let bytes = unsafe { std::slice::from_raw_parts(trials.as_ptr().cast(), size_of_val(trials)) };
    to[..bytes.len()].copy_from_slice(bytes);
}

fn read_trials(from: &[u8], trials: &mut [Trial]) {
    let size = size_of_val(trials);
    // SAFETY: Any bytes are valid for thirteen u64; the slice is borrowed mutably.
    let bytes = unsafe { std::slice::from_raw_parts_mut(trials.as_mut_ptr().cast(), size) };
    bytes.copy_from_slice(&from[..size]);
}
