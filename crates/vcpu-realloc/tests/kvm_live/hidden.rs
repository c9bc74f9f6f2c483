//! CPUIDs that hide what IA32_XFD can disable: KVM goes by the component's number, and so does the gate.

use kvm_bindings::CpuId;
use vcpu_realloc::kvm::{Mode, Options};

use crate::boot::{AMX, boot};
use crate::machine::{ARMED, Command, Machine, NONE, Stop, TILES};
use crate::vmm::{Grants, never};

/// Clears EAX\[4\] of 0DH.1, or ECX\[2\] of 0DH.18.
fn hide(cpuid: &mut CpuId, subleaf: u32) {
    let mut entries = cpuid.as_mut_slice().iter_mut();
    let entry = entries.find(|e| (e.function, e.index) == (0xd, subleaf));
    match entry.unwrap() {
        entry if subleaf == 1 => entry.eax &= !(1 << 4),
        entry => entry.ecx &= !(1 << 2),
    }
}

#[test]
fn a_guest_whose_cpuid_hides_xfd_is_watched_and_can_be_captured() {
    for hidden in [&[1][..], &[18], &[1, 18]] {
        let machine = Machine::with_amx_and(1, Options::default(), |cpuid| {
            for subleaf in hidden {
                hide(cpuid, *subleaf);
            }
        });
        let Some(mut machine) = machine else { return };
        assert_eq!(machine.gate.mode(), Mode::Trapping, "{hidden:?}");
        boot(&mut machine, 0, &mut never);
        let armed = machine.capture(0);
        assert_eq!(armed.registers().xfd, TILES, "{hidden:?}");
        assert!(!armed.image().xstate_bv().contains(TILES));

        let mut vmm = Grants::default();
        machine.tell(0, &[AMX[0], Command::Bell(2), AMX[1], Command::Bell(3)]);
        assert_eq!(machine.run(0, &mut vmm), Stop::Bell(2), "{hidden:?}");
        assert_eq!(vmm.0.len(), 1);
        let live = machine.capture(0);
        assert_eq!(live.registers().xfd, NONE);
        assert!(live.image().xstate_bv().contains(TILES), "{hidden:?}");
        assert_eq!(machine.run(0, &mut never), Stop::Bell(3));
        assert!(machine.tiles_are_right(0));
        if hidden.contains(&1) {
            // The guest's own write of IA32_XFD, which KVM handles now, is #GP.
            continue;
        }
        machine.tell(0, &[Command::WriteXfd(ARMED), Command::Bell(4)]);
        assert_eq!(machine.run(0, &mut never), Stop::Bell(4));
        let armed = machine.capture(0);
        assert_eq!(armed.registers().xfd, TILES, "{hidden:?}");
    }
}
