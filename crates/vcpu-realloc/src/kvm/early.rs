//! IA32_XFD passed through from the start.

use kvm_ioctls::VcpuFd;
use xsave_state::kvm::{WriteXfdError, XsaveBuffer, write_xfd};
use xsave_state::{Layout, XFeatures};

/// Makes KVM pass IA32_XFD through for a vCPU from its first run on, instead of from the guest's first
/// write that is not zero. For a vCPU that has its CPUID and has not run; `buffer` is scratch space.
/// Without features to disable in `layout`, nothing is done.
///
/// Hardening for kernels before the fix for CVE-2026-23005 (b45f72177594, in 6.19, 6.18.7, 6.12.67 and
/// 6.1.162), and a VMM that does not use the gate. There the guest's first write that is not zero exits,
/// and an interrupt of the host that uses the FPU before KVM has taken the value saves tiles which the
/// host then cannot load. With the register passed through there is no such exit.
///
/// It writes the register with everything that can be disabled, and then with 0, its reset value. KVM
/// stops intercepting at the former, whoever writes it (arch/x86/kvm/vmx/vmx.c, `vmx_set_msr`). Seen in
/// the AMX lab on Linux 6.1, 6.12 and 7.2: 1,000 writes by a new guest come with 15 VM exits after this, and
/// with more than 1,000 without it or after a host's write of 0 alone. The race itself has not been
/// provoked.
///
/// The price is what every guest with AMX pays from its first write on: KVM reads IA32_XFD back after
/// each exit of the vCPU, and intercepts #NM. With the gate it is not needed: a trapped write is
/// performed by the VMM, outside that window, and the trap stays in force after this.
///
/// # Errors
///
/// As [`write_xfd`].
pub fn pass_through_early(
    vcpu: &VcpuFd,
    layout: &Layout,
    buffer: &mut XsaveBuffer,
) -> Result<(), WriteXfdError> {
    if layout.xfd().is_empty() {
        return Ok(());
    }
    write_xfd(vcpu, layout.xfd(), buffer)?;
    write_xfd(vcpu, XFeatures::empty(), buffer)?;
    Ok(())
}
