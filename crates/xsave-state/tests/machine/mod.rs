//! A VM with one vCPU that halts at once, on the /dev/kvm that is here.

pub(crate) mod program;

use std::sync::Once;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use xsave_state::ExtendedState;
use xsave_state::kvm::{self, Capture, HostArea, RestoreError, VcpuLayout, XsaveBuffer};

const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
const XTILEDATA: libc::c_long = 18;
const HLT: u8 = 0xf4;

#[repr(align(4096))]
struct Memory([u8; program::MEMORY_BYTES]);

pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) vcpu: VcpuFd,
    pub(crate) host: HostArea,
    pub(crate) layout: VcpuLayout,
    pub(crate) buffer: XsaveBuffer,
    /// The guest's memory; the VM goes first.
    memory: Box<Memory>,
}

/// A new VM, or `None` (and why) where there is no /dev/kvm. With AMX where the host has it.
pub(crate) fn machine() -> Option<Machine> {
    machine_with(|_| {})
}

/// The same with a CPUID that `change` has changed, entry by entry.
pub(crate) fn machine_with(change: impl Fn(&mut kvm_cpuid_entry2)) -> Option<Machine> {
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

    let vm = kvm.create_vm().unwrap();
    let mut memory = Box::new(Memory([0; program::MEMORY_BYTES]));
    memory.0[0] = HLT;
    let region = kvm_userspace_memory_region {
        memory_size: memory.0.len() as u64,
        userspace_addr: memory.0.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: The memory is page-aligned and lives in the `Machine` for as long as the VM.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&cpuid(&kvm, change)).unwrap();
    let host = HostArea::query(&vm, &vcpu).unwrap();
    let layout = VcpuLayout::query(&mut vcpu, &host).unwrap();
    let buffer = XsaveBuffer::new(&host);
    Some(Machine {
        vm,
        vcpu,
        host,
        layout,
        buffer,
        memory,
    })
}

/// What KVM supports, after `change`.
pub(crate) fn cpuid(kvm: &Kvm, change: impl Fn(&mut kvm_cpuid_entry2)) -> CpuId {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    cpuid.as_mut_slice().iter_mut().for_each(change);
    cpuid
}

impl Machine {
    pub(crate) fn capture(&mut self) -> Capture<'_> {
        kvm::capture(&mut self.vcpu, &self.layout, &mut self.buffer).unwrap()
    }

    pub(crate) fn restore(&mut self, state: &ExtendedState<'_>) -> Result<(), RestoreError> {
        kvm::restore(&mut self.vcpu, state, &self.layout, &mut self.buffer)
    }

    /// KVM_SET_MSRS of IA32_XFD alone, which leaves live tiles in use.
    pub(crate) fn write_xfd_naively(&mut self, value: u64) {
        let entry = kvm_msr_entry {
            index: kvm::MSR_IA32_XFD,
            data: value,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(self.vcpu.set_msrs(&msrs).unwrap(), 1);
    }

    /// Runs the guest, which loads its extended state into the processor, up to its HLT.
    pub(crate) fn run_to_halt(&mut self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (0, 2);
        self.vcpu.set_regs(&regs).unwrap();
        assert!(matches!(self.vcpu.run(), Ok(VcpuExit::Hlt)));
    }

    /// Runs a program on this data, and gives the data as it is afterwards.
    pub(crate) fn run_program(&mut self, instructions: &[[u8; 8]], data: &[u8]) -> Vec<u8> {
        let memory = &mut self.memory.0;
        program::load(memory, instructions);
        memory[program::DATA..][..data.len()].copy_from_slice(data);
        program::run(&mut self.vcpu);
        self.memory.0[program::DATA..][..data.len()].to_vec()
    }

    /// Runs the guest to its HLT from a thread whose own PKRU is 0.
    pub(crate) fn run_to_halt_with_pkru_0(&mut self) {
        let own = pkru();
        set_pkru(0);
        self.run_to_halt();
        set_pkru(own);
    }

    /// Gives an area to KVM as it is.
    pub(crate) fn set_xsave(&self, area: &[u8]) {
        let mut xsave = kvm_bindings::Xsave::new((1 << 16) / 4).unwrap();
        let words = area.chunks_exact(4);
        let mut words = words.map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        // SAFETY: The length is not changed.
        let head = unsafe { xsave.as_mut_fam_struct() };
        head.xsave.region = [0; 1024].map(|_: u32| words.next().unwrap_or(0));
        for (to, word) in xsave.as_mut_slice().iter_mut().zip(words) {
            *to = word;
        }
        // SAFETY: The buffer has 68 KiB; no area has more than 64.
        unsafe { self.vcpu.set_xsave2(&xsave) }.unwrap();
    }

    /// How far KVM_GET_XSAVE2 writes into a buffer that is far larger than any area.
    pub(crate) fn bytes_written_by_get_xsave2(&self) -> usize {
        let written_over = |fill: u8| {
            let mut area = vec![fill; 1 << 17];
            let mut xsave = kvm_bindings::Xsave::new((area.len() - 4096) / 4).unwrap();
            xsave.as_mut_slice().fill(u32::from_ne_bytes([fill; 4]));
            // SAFETY: The buffer has 128 KiB; no area has more than 64.
            unsafe { self.vcpu.get_xsave2(&mut xsave) }.unwrap();
            for (to, word) in area[4096..].chunks_exact_mut(4).zip(xsave.as_slice()) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            area.iter()
                .rposition(|&byte| byte != fill)
                .map_or(4096, |last| last + 1)
        };
        // A byte that the kernel wrote differs from one of the two.
        written_over(0).max(written_over(0xff))
    }
}

/// PKRU of this thread. Only where the host's kernel has protection keys.
fn pkru() -> u32 {
    let value;
    // SAFETY: RDPKRU with ECX = 0 reads PKRU and clears EDX. It is there where the guest has PKRU, which
    // its callers have seen.
    unsafe {
        std::arch::asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _);
    }
    value
}

/// Sets PKRU of this thread.
fn set_pkru(value: u32) {
    // SAFETY: WRPKRU with ECX = EDX = 0 writes PKRU. 0 allows everything, and any other value that comes
    // here is the one that this thread had.
    unsafe {
        std::arch::asm!("wrpkru", in("ecx") 0, in("edx") 0, in("eax") value);
    }
}
