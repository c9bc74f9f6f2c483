//! Saves a vCPU's extended state into a file and restores it into a vCPU of another VM, as before and
//! after a move to another process.
//!
//!     cargo run -p xsave-state --features kvm-ioctls --example save_and_restore

use std::error::Error;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use xsave_state::kvm::{self, HostArea, VcpuLayout, XsaveBuffer};
use xsave_state::wire;

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("this example needs /dev/kvm: {error}");
            return Ok(());
        }
    };

    // The source. A guest would run here, and be stopped.
    let (vm, mut vcpu) = machine(&kvm)?;
    let host = HostArea::query(&vm, &vcpu)?;
    let layout = VcpuLayout::query(&mut vcpu, &host)?;
    let mut buffer = XsaveBuffer::new(&host);
    let captured = kvm::capture(&mut vcpu, &layout, &mut buffer)?;
    if !captured.disabled.is_empty() {
        // The guest cannot notice, but this vCPU must not run again.
        eprintln!(
            "not saved, because IA32_XFD disables it: {}",
            captured.disabled
        );
    }
    let bytes = wire::encode(0, &captured.state);
    println!(
        "{} of {} bytes for {}",
        bytes.len(),
        host.bytes(),
        captured.state.layout().user()
    );

    // The destination: another VM, here in the same process. CPUID comes first.
    let (vm, mut vcpu) = machine(&kvm)?;
    let host = HostArea::query(&vm, &vcpu)?;
    let layout = VcpuLayout::query(&mut vcpu, &host)?;
    let state = wire::decode(&bytes)?;
    for reason in state.misfits(layout.layout()) {
        eprintln!("does not fit: {reason}");
    }
    kvm::restore(&mut vcpu, &state, &layout, &mut buffer)?;
    println!("restored: {}", state.registers());
    Ok(())
}

/// Creates a VM with one vCPU that has its CPUID.
fn machine(kvm: &Kvm) -> Result<(VmFd, VcpuFd), Box<dyn Error>> {
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    Ok((vm, vcpu))
}
