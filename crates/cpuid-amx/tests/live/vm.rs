//! VMs, and the tables that they get.

use cpuid_amx::{AmxFeatures, CpuidTable, Policy, permission};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use xsave_state::XFeatures;

/// KVM with one VM, or why not.
pub(crate) fn vm() -> Option<(Kvm, VmFd)> {
    match Kvm::new() {
        Ok(kvm) => {
            let vm = kvm.create_vm().unwrap();
            Some((kvm, vm))
        }
        Err(error) => {
            println!("skipped: no KVM here: {error}");
            None
        }
    }
}

pub(crate) fn supported(kvm: &Kvm) -> CpuId {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()
}

/// For a guest that needs no permission. Without AMX it is KVM's own: there are kinds of KVM whose
/// leaf 1 lacks XSAVE, and a policy would carry that through.
pub(crate) fn without_amx(kvm: &Kvm) -> CpuId {
    let mut cpuid = supported(kvm);
    let amx = AmxFeatures::from_cpuid(|leaf, subleaf| cpuid.leaf(leaf, subleaf));
    if !amx.is_empty() {
        Policy::hide_amx().apply(&mut cpuid).unwrap();
    }
    cpuid
}

pub(crate) fn user_components(cpuid: &CpuId) -> XFeatures {
    let [low, _, _, high] = cpuid.leaf(0xd, 0);
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

pub(crate) fn changed(cpuid: &CpuId, leaf: u32, subleaf: u32, register: usize, xor: u32) -> CpuId {
    let mut cpuid = cpuid.clone();
    let mut value = cpuid.leaf(leaf, subleaf);
    value[register] ^= xor;
    cpuid.set_leaf(leaf, subleaf, value).unwrap();
    cpuid
}

/// Runs a guest that executes HLT and nothing else.
pub(crate) fn run_to_halt(vm: &VmFd, vcpu: &mut VcpuFd) {
    vm.set_tss_address(0xfffb_d000).unwrap();
    // SAFETY: a new private mapping at an address of the kernel's choice; it replaces nothing.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: `memory` is a writable mapping of 4096 bytes that nothing else refers to.
    unsafe { memory.cast::<u8>().write(0xf4) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: memory as u64,
    };
    // SAFETY: the region is a mapping of that size which is never unmapped.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
}

pub(crate) fn has_amx() -> bool {
    permission::supported().is_ok_and(|supported| supported.contains(XFeatures::XTILEDATA))
}
