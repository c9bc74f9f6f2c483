//! A VM of one or more vCPUs that do what they are told, on the /dev/kvm that is here.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod guest;
pub(crate) mod stats;
pub(crate) mod watch;

use std::sync::Once;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vcpu_realloc::kvm::{
    ExitHandler, HandleError, Handled, ObserveError, Options, Seen, VmGate, complete,
};
use vcpu_realloc::{Grow, SavedGrant};
use xsave_state::kvm::{self, HostArea, VcpuLayout, XsaveBuffer};
use xsave_state::{Component, ComponentId, ExtendedState, Layout, Palette, XFeatures};

pub(crate) use guest::Command;
use guest::{AREA_BYTES, COMMANDS, ENTRY_BYTES, START};

pub(crate) const MSR_IA32_XFD: u32 = 0x1c4;
pub(crate) const TILES: XFeatures = XFeatures::XTILEDATA;
pub(crate) const NONE: XFeatures = XFeatures::empty();
pub(crate) const ARMED: u64 = 1 << 18;

const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
const XTILEDATA: libc::c_long = 18;

const PAGE_TABLES: usize = 0x1000;
const GDT: usize = 0x4000;
const IDT: usize = 0x5000;
const CODE: usize = 0x8000;
const AREAS: usize = 0x10000;
const MAX_VCPUS: usize = 4;
const MEMORY_BYTES: usize = AREAS + MAX_VCPUS * AREA_BYTES;

#[repr(align(4096))]
struct Memory([u8; MEMORY_BYTES]);

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It writes to an MSR that is trapped, and has not been handled.
    Wrmsr {
        index: u32,
        value: u64,
    },
    /// It reads an MSR that is trapped.
    Rdmsr(u32),
    /// It said a number.
    Bell(u32),
    /// It took an exception that it does not handle.
    Vector(u8),
    Halted,
}

pub(crate) struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) gate: VmGate,
    /// The layout that the gate knows.
    pub(crate) layout: Layout,
    pub(crate) host: HostArea,
    pub(crate) buffer: XsaveBuffer,
    pub(crate) vm: VmFd,
    /// The guest's memory; the VM goes first.
    memory: Box<Memory>,
}

pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) layout: VcpuLayout,
    pub(crate) handler: ExitHandler,
    /// How often KVM_RUN came back with a trapped MSR write.
    pub(crate) exits: u64,
}

/// What there is of a stopped vCPU.
pub(crate) struct Saved {
    regs: kvm_regs,
    sregs: kvm_sregs,
    pub(crate) state: ExtendedState<'static>,
    /// `None`: its VMM has saved none.
    pub(crate) grant: Option<SavedGrant>,
}

/// /dev/kvm and the guest's CPUID, or `None` and why.
pub(crate) fn host() -> Option<(Kvm, CpuId, Layout)> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: /dev/kvm cannot be used: {error}");
            return None;
        }
    };
    static PERMISSION: Once = Once::new();
    PERMISSION.call_once(|| {
        // SAFETY: arch_prctl with this operation takes two numbers and touches no memory. Where the
        // host has no AMX it fails, and the tests go on without.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, XTILEDATA) };
    });
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let layout = Layout::from_kvm_cpuid(cpuid.as_slice()).unwrap();
    Some((kvm, cpuid, layout))
}

/// The same, where the host has AMX.
pub(crate) fn amx_host() -> Option<(Kvm, CpuId, Layout)> {
    let host = host()?;
    if host.2.xfd().is_empty() {
        println!("skipped: this host's KVM has no AMX");
        return None;
    }
    Some(host)
}

/// The layout of a guest with AMX: this host's, or where it has none, one that is made up.
pub(crate) fn claimed_layout(layout: &Layout) -> Layout {
    if !layout.xfd().is_empty() {
        return layout.clone();
    }
    Layout::from_parts(
        [
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )
    .unwrap()
}

impl Machine {
    /// A VM on any host. Where that has no AMX, the gate believes in a guest with it, which KVM does
    /// not: it refuses to arm IA32_XFD, and takes 0.
    pub(crate) fn new(vcpus: usize, options: Options) -> Option<Self> {
        let (kvm, cpuid, layout) = host()?;
        Some(Self::on(
            &kvm,
            &cpuid,
            &claimed_layout(&layout),
            vcpus,
            options,
        ))
    }

    /// A VM whose guest has AMX.
    pub(crate) fn with_amx(vcpus: usize, options: Options) -> Option<Self> {
        Self::with_amx_and(vcpus, options, |_| {})
    }

    /// A VM whose guest has AMX, and a CPUID that `change` has changed.
    pub(crate) fn with_amx_and(
        vcpus: usize,
        options: Options,
        change: impl FnOnce(&mut CpuId),
    ) -> Option<Self> {
        let (kvm, mut cpuid, _) = amx_host()?;
        change(&mut cpuid);
        let layout = Layout::from_kvm_cpuid(cpuid.as_slice()).unwrap();
        Some(Self::on(&kvm, &cpuid, &layout, vcpus, options))
    }

    fn on(kvm: &Kvm, cpuid: &CpuId, layout: &Layout, vcpus: usize, options: Options) -> Self {
        let vm = kvm.create_vm().unwrap();
        let mut memory = Box::new(Memory([0; MEMORY_BYTES]));
        write_tables(&mut memory.0);
        memory.0[CODE..][..guest::code().len()].copy_from_slice(guest::code());
        let region = kvm_userspace_memory_region {
            memory_size: memory.0.len() as u64,
            userspace_addr: memory.0.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: The memory is page-aligned and lives in the `Machine` for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let gate = VmGate::install(&vm, layout, options).unwrap();
        let mut host = None;
        let vcpus: Vec<_> = (0..vcpus as u64)
            .map(|id| {
                let mut fd = vm.create_vcpu(id).unwrap();
                let host = host.get_or_insert_with(|| HostArea::query(&vm, &fd).unwrap());
                let never = &mut |_: &vcpu_realloc::Request| -> Result<_, ()> { unreachable!() };
                let handler = gate.vcpu(id, never).unwrap();
                fd.set_cpuid2(cpuid).unwrap();
                enter_long_mode(&fd, cpuid, id as usize);
                Vcpu {
                    layout: VcpuLayout::query(&mut fd, host).unwrap(),
                    fd,
                    handler,
                    exits: 0,
                }
            })
            .collect();
        let host = host.unwrap();
        let mut machine = Self {
            vcpus,
            gate,
            layout: layout.clone(),
            buffer: XsaveBuffer::new(&host),
            host,
            vm,
            memory,
        };
        for n in 0..machine.vcpus.len() {
            machine.write_tile_input(n);
        }
        machine
    }

    /// What a vCPU does next, from the first command on.
    pub(crate) fn tell(&mut self, n: usize, commands: &[Command]) {
        assert!(commands.len() <= 200);
        let area = self.area_mut(n);
        area[guest::PC..][..8].fill(0);
        for (i, command) in commands.iter().chain([&Command::Halt]).enumerate() {
            for (j, word) in command.words().into_iter().enumerate() {
                area[COMMANDS + i * 16 + j * 8..][..8].copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Runs a vCPU to its next stop, with trapped writes as one of these.
    pub(crate) fn step(&mut self, n: usize) -> Stop {
        let vcpu = &mut self.vcpus[n];
        let stop = match vcpu.fd.run().unwrap() {
            VcpuExit::X86Wrmsr(exit) => Stop::Wrmsr {
                index: exit.index,
                value: exit.data,
            },
            VcpuExit::X86Rdmsr(exit) => Stop::Rdmsr(exit.index),
            VcpuExit::IoOut(guest::BELL_PORT, number) => {
                Stop::Bell(u32::from_le_bytes(number.try_into().unwrap()))
            }
            VcpuExit::IoOut(guest::VECTOR_PORT, &[vector]) => Stop::Vector(vector),
            VcpuExit::Hlt => Stop::Halted,
            exit => panic!("{exit:?}"),
        };
        if matches!(stop, Stop::Wrmsr { .. }) {
            vcpu.exits += 1;
        }
        stop
    }

    /// Lets an MSR access that has left be #GP, as a VMM does with one that is not its own.
    pub(crate) fn refuse(&mut self, n: usize) {
        self.vcpus[n].fd.get_kvm_run().__bindgen_anon_1.msr.error = 1;
    }

    /// Handles a write that has left.
    pub(crate) fn handle<V: Grow>(
        &mut self,
        n: usize,
        value: u64,
        vmm: &mut V,
    ) -> Result<Handled, HandleError<V::Error>> {
        let Vcpu { fd, handler, .. } = &mut self.vcpus[n];
        handler.handle(MSR_IA32_XFD, value, fd, &mut self.buffer, vmm)
    }

    /// Goes on with a write that waits.
    pub(crate) fn resume<V: Grow>(
        &mut self,
        n: usize,
        vmm: &mut V,
    ) -> Result<Handled, HandleError<V::Error>> {
        let Vcpu { fd, handler, .. } = &mut self.vcpus[n];
        handler.resume(fd, &mut self.buffer, vmm)
    }

    /// Runs a vCPU to a stop that is not a write of IA32_XFD; these are handled.
    pub(crate) fn run<V: Grow>(&mut self, n: usize, vmm: &mut V) -> Stop
    where
        V::Error: std::fmt::Debug,
    {
        loop {
            match self.step(n) {
                Stop::Wrmsr {
                    index: MSR_IA32_XFD,
                    value,
                } => {
                    let handled = self.handle(n, value, vmm).unwrap();
                    assert!(
                        matches!(handled, Handled::Written { .. } | Handled::Faulted(_)),
                        "{handled:?}"
                    );
                }
                stop => return stop,
            }
        }
    }

    /// The vCPU that was the first to be granted something.
    pub(crate) fn first_use(&self) -> Option<u64> {
        Some(self.gate.first_uses().first()?.vcpu)
    }

    /// A number that the guest keeps.
    pub(crate) fn word(&self, n: usize, offset: usize) -> u64 {
        let bytes = &self.area(n)[offset..][..8];
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    /// Whether the tiles that the guest stored are those that it loaded; forgets them.
    pub(crate) fn tiles_are_right(&mut self, n: usize) -> bool {
        let area = self.area(n);
        let right = area[guest::OUT..][..8192] == area[guest::IN..][..8192];
        self.forget_tiles(n);
        right
    }

    /// Puts what are no tiles where the guest stores them.
    pub(crate) fn forget_tiles(&mut self, n: usize) {
        self.area_mut(n)[guest::OUT..][..8192].fill(0xaa);
    }

    /// Whether all tiles that the guest stored are zero.
    pub(crate) fn tiles_are_zero(&self, n: usize) -> bool {
        self.area(n)[guest::OUT..][..8192]
            .iter()
            .all(|&byte| byte == 0)
    }

    /// Reads a vCPU that stands between two instructions, and shows it to its gate.
    pub(crate) fn save<V: Grow>(&mut self, n: usize, vmm: &mut V) -> Saved
    where
        V::Error: std::fmt::Debug,
    {
        let vcpu = &mut self.vcpus[n];
        let (fd, handler) = (&mut vcpu.fd, &mut vcpu.handler);
        // Completes an OUT or HLT that is pending.
        complete(fd, |exit| Err(format!("{exit:?}"))).unwrap();
        let capture = kvm::capture(fd, &vcpu.layout, &mut self.buffer).unwrap();
        let state = capture.state.into_owned();
        let _ = handler.observe(&state, vmm).unwrap();
        Saved {
            regs: fd.get_regs().unwrap(),
            sregs: fd.get_sregs().unwrap(),
            state,
            grant: Some(self.gate.saved_grant()),
        }
    }

    /// Puts it into a vCPU of this VM, which has not run.
    pub(crate) fn restore<V: Grow>(&mut self, n: usize, saved: &Saved, vmm: &mut V)
    where
        V::Error: std::fmt::Debug,
    {
        let _ = self.try_restore(n, saved, vmm).unwrap();
    }

    /// The same with a VMM that may refuse.
    pub(crate) fn try_restore<V: Grow>(
        &mut self,
        n: usize,
        saved: &Saved,
        vmm: &mut V,
    ) -> Result<Seen, ObserveError<V::Error>> {
        let Vcpu {
            fd,
            handler,
            layout,
            ..
        } = &mut self.vcpus[n];
        fd.set_sregs(&saved.sregs).unwrap();
        fd.set_regs(&saved.regs).unwrap();
        kvm::restore(fd, &saved.state, layout, &mut self.buffer).unwrap();
        handler.restored(&saved.state, saved.grant, vmm)
    }

    /// Takes over the memory of another VM.
    pub(crate) fn copy_memory(&mut self, other: &Self) {
        self.memory.0.copy_from_slice(&other.memory.0);
    }

    pub(crate) fn capture(&mut self, n: usize) -> ExtendedState<'static> {
        let Vcpu { fd, layout, .. } = &mut self.vcpus[n];
        let capture = kvm::capture(fd, layout, &mut self.buffer).unwrap();
        capture.state.into_owned()
    }

    /// Whether a vCPU stands at the WRMSR of its #NM handler.
    pub(crate) fn is_in_nm_handler(&self, n: usize) -> bool {
        let rip = self.vcpus[n].fd.get_regs().unwrap().rip;
        rip == (CODE + guest::nm_wrmsr()) as u64
    }

    pub(crate) fn rip(&self, n: usize) -> u64 {
        self.vcpus[n].fd.get_regs().unwrap().rip
    }

    /// Other tiles for each vCPU.
    fn write_tile_input(&mut self, n: usize) {
        let area = self.area_mut(n);
        area[guest::CONFIG] = 1;
        for tile in 0..8 {
            area[guest::CONFIG + 16 + 2 * tile] = 64;
            area[guest::CONFIG + 48 + tile] = 16;
        }
        for (i, byte) in area[guest::IN..][..8192].iter_mut().enumerate() {
            *byte = (i * 7 + i / 256 + n * 13 + 1) as u8;
        }
    }

    fn area(&self, n: usize) -> &[u8] {
        &self.memory.0[AREAS + n * AREA_BYTES..][..AREA_BYTES]
    }

    fn area_mut(&mut self, n: usize) -> &mut [u8] {
        &mut self.memory.0[AREAS + n * AREA_BYTES..][..AREA_BYTES]
    }
}

/// The first 2 MiB mapped to themselves, flat segments, and an entry for each exception.
fn write_tables(memory: &mut [u8]) {
    let mut write = |at: usize, value: u64| memory[at..][..8].copy_from_slice(&value.to_le_bytes());
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    write(
        PAGE_TABLES,
        (PAGE_TABLES as u64 + 0x1000) | PRESENT_WRITABLE,
    );
    write(
        PAGE_TABLES + 0x1000,
        (PAGE_TABLES as u64 + 0x2000) | PRESENT_WRITABLE,
    );
    write(PAGE_TABLES + 0x2000, PRESENT_WRITABLE | LARGE);
    write(GDT + 8, 0x00af_9b00_0000_ffff);
    write(GDT + 16, 0x00cf_9300_0000_ffff);
    for vector in 0..32 {
        let handler = (CODE + vector * ENTRY_BYTES) as u64;
        // A present interrupt gate of code segment 8; the handlers are below 64 KiB.
        write(IDT + vector * 16, handler & 0xffff | 8 << 16 | 0x8e00 << 32);
    }
}

fn enter_long_mode(vcpu: &VcpuFd, cpuid: &CpuId, n: usize) {
    let segment = |selector, type_| kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = kvm_segment {
        l: 1,
        ..segment(8, 11)
    };
    let data = kvm_segment {
        db: 1,
        ..segment(16, 3)
    };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT as u64, 32 * 16 - 1);
    sregs.cr3 = PAGE_TABLES as u64;
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.cr4 = 0x620; // OSXMMEXCPT, OSFXSR, PAE
    sregs.efer = 0x500; // LMA, LME
    let leaf_1 = cpuid.as_slice().iter().find(|e| e.function == 1).unwrap();
    if leaf_1.ecx & 1 << 26 != 0 {
        sregs.cr4 |= 1 << 18; // OSXSAVE
    }
    vcpu.set_sregs(&sregs).unwrap();
    let area = (AREAS + n * AREA_BYTES) as u64;
    vcpu.set_regs(&kvm_regs {
        rip: (CODE + START) as u64,
        rsp: area + guest::STACK as u64,
        rdi: area,
        rflags: 2,
        ..Default::default()
    })
    .unwrap();
}
