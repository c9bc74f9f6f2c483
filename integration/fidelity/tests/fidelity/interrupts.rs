//! A guest is left for its host's interrupts, whatever its RFLAGS.IF: with "external-interrupt exiting", which
//! KVM uses, the guest's flag does not block them (SDM vol. 3, 26.3, "RFLAGS.IF").

use std::time::Duration;

use amx_fidelity::arena::Arena;
use amx_fidelity::guest::{self, World};
use amx_fidelity::ticks::Ticks;
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Three instructions each. Some twenty ticks on a processor that is as fast as the lab's says it is.
const TURNS: u64 = 20_000_000;
const TICK: Duration = Duration::from_millis(1);

#[test]
fn a_guest_is_left_for_interrupts_that_it_has_disabled() {
    leaves_midway(false);
}

#[test]
fn a_guest_is_left_for_interrupts_that_it_has_enabled() {
    leaves_midway(true);
}

/// The guest counts for many ticks of a timer of this thread. One of them must end KVM_RUN midway, and what
/// it has counted by then must not be lost.
fn leaves_midway(interrupts_enabled: bool) {
    let Some(kvm) = guest::kvm() else { return };
    let mut arena = Arena::new(1);
    let world = World::new(&mut arena, false);
    let mut vm = crate::kernel_cases::new_vm(&kvm, &arena);
    world.enter_count(&vm, TURNS, interrupts_enabled);

    let ticks = Ticks::start(TICK);
    // A tick that comes before the guest has begun also ends KVM_RUN: then it is entered again.
    let left_midway = loop {
        if runs_to_its_end(&mut vm.vcpu) {
            break false;
        }
        if counted(&vm.vcpu) > 0 {
            break true;
        }
    };
    drop(ticks);
    assert!(
        left_midway,
        "no interrupt of the host left the guest, which ran to its end"
    );

    // The last tick may still be on its way.
    while !runs_to_its_end(&mut vm.vcpu) {}
    assert_eq!(counted(&vm.vcpu), TURNS);
    drop(vm);
}

/// Runs until the guest leaves at its end (true) or is left for a signal (false).
fn runs_to_its_end(vcpu: &mut VcpuFd) -> bool {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(0x41, _)) => true,
        Ok(other) => panic!("the guest left with {other:?}"),
        Err(error) => {
            assert_eq!(error.errno(), libc::EINTR);
            false
        }
    }
}

/// The turns that the guest has counted.
fn counted(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().unwrap().rax
}
