//! A VM with its memory and its vCPUs, while they do not run.

use std::sync::Arc;
use std::time::Duration;

use amx_guest::machine::{self, Boot, MEMORY_BYTES, Segment};
use amx_guest::{Kind, Workload, code, workload};
use cpuid_amx::kvm::SetCpuidError;
use kvm_bindings::{
    CpuId, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::errno;
use xsave_state::Layout;
use xsave_state::kvm::{VcpuLayout, VcpuLayoutError, XsaveBuffer};

use crate::bus::Bus;
use crate::first_use::FirstUse;
use crate::host::Host;
use crate::memory::{self, MemoryError};
use crate::run::{self, Ended, RunError};

/// The most vCPUs of one VM.
pub const MAX_VCPUS: u8 = machine::MAX_VCPUS;
/// Where KVM may put its own three pages for the task state of real mode (KVM_SET_TSS_ADDR): at the
/// end of the 32-bit address space, where no guest of this VMM has memory.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// And its page for the page tables of real mode (KVM_SET_IDENTITY_MAP_ADDR): below.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A VM that is not running. [`run`](Self::run) lets it run for a while.
pub struct Vm {
    // Before `memory`: the vCPUs are gone when the mapping goes, and without one nobody is in the guest.
    pub(crate) vcpus: Vec<Vcpu>,
    /// For the extended state of one vCPU after the other.
    pub(crate) buffer: XsaveBuffer,
    // Shared with the devices that raise interrupts, which may outlive the mapping.
    pub(crate) fd: Arc<VmFd>,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) memory_bytes: u64,
}

/// A vCPU that has its CPUID.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    /// Where the components of its extended state lie, here as in its CPUID.
    pub(crate) layout: VcpuLayout,
}

impl Vm {
    /// A VM with one vCPU per workload. They start in the stub and run the body of `kind`.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn boot(host: &Host, kind: Kind, workloads: &[Workload]) -> Result<Self, VmError> {
        let vm = Self::boot_with(host, kind.body(), workloads.len(), false)?;
        for (index, workload) in (0..).zip(workloads) {
            vm.write_area(index, &workload.area(index, kind.xcr0()))?;
        }
        Ok(vm)
    }

    /// A VM with `vcpus` vCPUs that each run the counting payload up to `counts`.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn boot_counter(host: &Host, vcpus: u8, counts: u64) -> Result<Self, VmError> {
        let vm = Self::boot_with(host, code::counter(), usize::from(vcpus), true)?;
        for index in 0..vcpus {
            vm.write_area(index, &workload::counter_area(index, counts))?;
        }
        Ok(vm)
    }

    /// A VM with one vCPU that runs the XFD payload.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn boot_armed(host: &Host) -> Result<Self, VmError> {
        let vm = Self::boot_with(host, code::armed(), 1, true)?;
        vm.write_area(0, &workload::armed_area(Kind::Tiles.xcr0()))?;
        Ok(vm)
    }

    /// A VM with one vCPU that runs the payload with the kernel's cases, which tells its stage at the
    /// doorbell.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn boot_kernel_cases(host: &Host) -> Result<Self, VmError> {
        let vm = Self::boot_with(host, code::kernel_cases(), 1, true)?;
        vm.write_area(0, &workload::kernel_cases_area(Kind::Tiles.xcr0()))?;
        Ok(vm)
    }

    fn boot_with(host: &Host, body: &[u8], vcpus: usize, cpl0: bool) -> Result<Self, VmError> {
        let mut vm = Self::new(host, MEMORY_BYTES)?;
        for Segment { address, bytes } in machine::image(code::stub(), body) {
            vm.memory
                .write_slice(&bytes, GuestAddress(address))
                .map_err(MemoryError::from)?;
        }
        for index in 0..checked_vcpus(vcpus)? {
            vm.add_vcpu(host, index, host.cpuid())?;
        }
        for (index, vcpu) in (0..).zip(&vm.vcpus) {
            set_boot(&vcpu.fd, &machine::boot(index, cpl0))
                .map_err(|error| VmError::Boot { vcpu: index, error })?;
        }
        Ok(vm)
    }

    /// A VM with memory and no vCPUs.
    pub(crate) fn new(host: &Host, memory_bytes: u64) -> Result<Self, VmError> {
        let fd = host.kvm().create_vm().map_err(VmError::Create)?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(VmError::TssAddress)?;
        let memory = memory::allocate(memory_bytes)?;
        set_memory(&fd, &memory, memory_bytes, 0)?;
        Ok(Self {
            vcpus: Vec::new(),
            buffer: XsaveBuffer::new(host.area()),
            fd: Arc::new(fd),
            memory,
            memory_bytes,
        })
    }

    /// A VM with memory, interrupt controllers and timer in the kernel, and no vCPUs.
    pub(crate) fn with_platform(host: &Host, memory_bytes: u64) -> Result<Self, VmError> {
        let vm = Self::new(host, memory_bytes)?;
        vm.fd
            .set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(VmError::IdentityMap)?;
        vm.fd.create_irq_chip().map_err(VmError::IrqChip)?;
        let timer = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.fd.create_pit2(timer).map_err(VmError::Pit)?;
        Ok(vm)
    }

    /// A vCPU with its CPUID, which must be set before anything else. It is compared with the host: a guest
    /// that ran with components elsewhere could not be saved.
    pub(crate) fn add_vcpu(
        &mut self,
        host: &Host,
        index: u8,
        cpuid: &CpuId,
    ) -> Result<(), VmError> {
        let elsewhere = |error| VmError::Layout { vcpu: index, error };
        // Some kinds of KVM give a vCPU the processor's CPUID: what the guest has read before counts too.
        let guest = Layout::from_kvm_cpuid(cpuid.as_slice())
            .map_err(VcpuLayoutError::Layout)
            .map_err(elsewhere)?;
        VcpuLayout::new(&guest, host.area()).map_err(elsewhere)?;
        let mut fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(|error| VmError::Vcpu { vcpu: index, error })?;
        // What KVM made of it is what GET_CPUID2 gives when the vCPU is captured.
        let _ = cpuid_amx::kvm::set_cpuid(&fd, cpuid, host.permission().ok())
            .map_err(|error| VmError::Cpuid { vcpu: index, error })?;
        let layout = VcpuLayout::query(&mut fd, host.area()).map_err(elsewhere)?;
        self.vcpus.push(Vcpu { fd, layout });
        Ok(())
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        u8::try_from(self.vcpus.len()).unwrap_or(MAX_VCPUS)
    }

    /// Bytes of guest memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Lets all vCPUs run until they halt or `limit` is over. Afterwards none has an exit left to
    /// complete.
    ///
    /// # Errors
    ///
    /// A vCPU cannot go on. All are stopped.
    pub fn run(&mut self, bus: &impl Bus, limit: Duration) -> Result<Ended, RunError> {
        run::run(&mut self.vcpus, None, bus, limit)
    }

    /// The same, with the moment of first use watched.
    ///
    /// # Errors
    ///
    /// A vCPU cannot go on. All are stopped.
    pub fn run_watched(
        &mut self,
        first_use: &mut FirstUse,
        bus: &impl Bus,
        limit: Duration,
    ) -> Result<Ended, RunError> {
        run::run(&mut self.vcpus, Some(first_use), bus, limit)
    }

    /// The frequency of the guest's TSC in kHz; `None` where KVM does not know it.
    pub(crate) fn tsc_khz(&self) -> Option<u32> {
        self.vcpus.first()?.fd.get_tsc_khz().ok()
    }

    /// KVM notes which pages change from now on, or no longer.
    pub(crate) fn log_dirty_pages(&self, on: bool) -> Result<(), errno::Error> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        match set_memory(&self.fd, &self.memory, self.memory_bytes, flags) {
            Err(VmError::MemoryRegion(error)) => Err(error),
            // The memory is mapped, so its address is known.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The numbers of the pages that have changed since this was last asked.
    pub(crate) fn dirty_pages(&self) -> Result<Vec<u32>, errno::Error> {
        let bytes = usize::try_from(self.memory_bytes).unwrap_or(usize::MAX);
        let bitmap = self.fd.get_dirty_log(0, bytes)?;
        let mut pages = Vec::new();
        for (first, bits) in (0..).step_by(64).zip(bitmap) {
            let changed = (0..64).filter(|bit| bits >> bit & 1 != 0);
            pages.extend(changed.map(|bit: u32| bit.saturating_add(first)));
        }
        Ok(pages)
    }

    /// What vCPU `index` has in its area of guest memory.
    ///
    /// # Errors
    ///
    /// There is no such vCPU's area.
    pub fn read_area(&self, index: u8) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; amx_guest::area::AREA_BYTES];
        self.memory
            .read_slice(&mut bytes, GuestAddress(machine::area(index)))?;
        Ok(bytes)
    }

    fn write_area(&self, index: u8, bytes: &[u8]) -> Result<(), MemoryError> {
        Ok(self
            .memory
            .write_slice(bytes, GuestAddress(machine::area(index)))?)
    }
}

/// `count` as a number of vCPUs that a VM can have.
pub(crate) fn checked_vcpus(count: usize) -> Result<u8, VmError> {
    u8::try_from(count)
        .ok()
        .filter(|count| (1..=MAX_VCPUS).contains(count))
        .ok_or(VmError::VcpuCount {
            vcpus: count,
            limit: MAX_VCPUS,
        })
}

#[allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address")]
fn set_memory(
    fd: &VmFd,
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    flags: u32,
) -> Result<(), VmError> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags,
        guest_phys_addr: 0,
        memory_size: memory_bytes,
        userspace_addr: memory::host_address(memory)?,
    };
    // SAFETY: `memory` maps `memory_bytes` bytes at that address, for guests only: this process
    // reads and writes them through vm-memory, which expects them to change. Only vCPUs, and ioctls of
    // this `Vm`, make the kernel use a slot, and `Vm` drops its vCPUs before the mapping: a VM that devices
    // keep open longer only takes interrupts, which go to no memory. Another call for the same mapping
    // changes the flags, or fails and leaves them.
    unsafe { fd.set_user_memory_region(region) }.map_err(VmError::MemoryRegion)
}

fn set_boot(vcpu: &VcpuFd, boot: &Boot) -> Result<(), errno::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = flat(machine::KERNEL_DATA, 0x3, false);
    sregs.cs = flat(machine::KERNEL_CODE, 0xb, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let (selector, base, limit) = boot.task;
    sregs.tr = kvm_segment {
        base,
        limit: u32::from(limit),
        selector,
        // A busy 64-bit TSS.
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = boot.gdt;
    (sregs.idt.base, sregs.idt.limit) = boot.idt;
    sregs.cr0 = boot.cr0;
    sregs.cr3 = boot.cr3;
    sregs.cr4 = boot.cr4;
    sregs.efer = boot.efer;
    vcpu.set_sregs(&sregs)?;

    let mut regs = vcpu.get_regs()?;
    regs.rip = boot.rip;
    regs.rsp = boot.rsp;
    regs.rdi = boot.rdi;
    // Bit 1 is always set (SDM Vol. 1 §3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs)
}

/// A flat segment at CPL0.
pub(crate) fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

/// A VM could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// KVM_CREATE_VM failed.
    #[error("KVM_CREATE_VM: {0}")]
    Create(#[source] errno::Error),
    /// KVM_SET_TSS_ADDR failed.
    #[error("KVM_SET_TSS_ADDR: {0}")]
    TssAddress(#[source] errno::Error),
    /// KVM_SET_IDENTITY_MAP_ADDR failed.
    #[error("KVM_SET_IDENTITY_MAP_ADDR: {0}")]
    IdentityMap(#[source] errno::Error),
    /// KVM_CREATE_IRQCHIP failed.
    #[error("KVM_CREATE_IRQCHIP: {0}")]
    IrqChip(#[source] errno::Error),
    /// KVM_CREATE_PIT2 failed.
    #[error("KVM_CREATE_PIT2: {0}")]
    Pit(#[source] errno::Error),
    /// KVM_SET_USER_MEMORY_REGION failed.
    #[error("KVM_SET_USER_MEMORY_REGION: {0}")]
    MemoryRegion(#[source] errno::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// None, or more than the limit.
    #[error("a VM of {vcpus} vCPUs; it has 1 to {limit}")]
    VcpuCount {
        /// Asked for.
        vcpus: usize,
        /// [`MAX_VCPUS`].
        limit: u8,
    },
    /// KVM_CREATE_VCPU failed.
    #[error("KVM_CREATE_VCPU of vCPU {vcpu}: {error}")]
    Vcpu {
        /// The vCPU.
        vcpu: u8,
        /// By the kernel.
        error: errno::Error,
    },
    /// A vCPU has not got its CPUID.
    #[error("the CPUID of vCPU {vcpu}: {error}")]
    Cpuid {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        error: SetCpuidError,
    },
    /// The CPUID of a vCPU places the extended state where this host does not have it.
    #[error("vCPU {vcpu}: {error}")]
    Layout {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        error: VcpuLayoutError,
    },
    /// The registers of the first instruction were refused.
    #[error("the first registers of vCPU {vcpu}: {error}")]
    Boot {
        /// The vCPU.
        vcpu: u8,
        /// By the kernel.
        error: errno::Error,
    },
}
