//! A VM with one vCPU that halts at once, on the /dev/kvm that is here.

pub(crate) mod program;

use std::sync::Once;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use xsave_state::kvm::{self, Capture, RestoreError, XsaveBuffer, XsaveSize};
use xsave_state::{ExtendedState, Layout};

const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
const XTILEDATA: libc::c_long = 18;
const HLT: u8 = 0xf4;

#[repr(align(4096))]
struct Memory([u8; program::MEMORY_BYTES]);

pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) vcpu: VcpuFd,
    pub(crate) layout: Layout,
    pub(crate) buffer: XsaveBuffer,
    /// The guest's memory; the VM goes first.
    memory: Box<Memory>,
}

/// A new VM, or `None` (and why) where there is no /dev/kvm. With AMX where the host has it.
pub(crate) fn machine() -> Option<Machine> {
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
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&supported).unwrap();
    let layout = layout_of(&vcpu, |_, _| {});
    let buffer = XsaveBuffer::new(XsaveSize::query(&vm, &vcpu).unwrap());
    Some(Machine {
        vm,
        vcpu,
        layout,
        buffer,
        memory,
    })
}

/// The layout of the vCPU's CPUID, after `change` has seen each leaf and sub-leaf.
fn layout_of(vcpu: &VcpuFd, change: impl Fn((u32, u32), &mut [u32; 4])) -> Layout {
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    Layout::from_cpuid(|leaf, subleaf| {
        let entries = cpuid.as_slice().iter();
        let mut same = entries.filter(|e| e.function == leaf && e.index == subleaf);
        let mut registers = same.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        change((leaf, subleaf), &mut registers);
        registers
    })
    .unwrap()
}

impl Machine {
    /// As of a guest whose CPUID hides XFD.
    pub(crate) fn layout_without_xfd(&self) -> Layout {
        layout_of(&self.vcpu, |leaf, registers| {
            if leaf == (0xd, 1) {
                registers[0] &= !(1 << 4);
            }
        })
    }

    pub(crate) fn capture(&mut self) -> Capture<'_> {
        kvm::capture(&self.vcpu, &self.layout, &mut self.buffer).unwrap()
    }

    pub(crate) fn restore(&mut self, state: &ExtendedState<'_>) -> Result<(), RestoreError> {
        kvm::restore(&self.vcpu, state, &mut self.buffer)
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
