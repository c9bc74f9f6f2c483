//! The driver on the /dev/kvm that is here: a guest writes IA32_XFD, and the write leaves to us.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[expect(unsafe_code, reason = "a system call and a VM need it")]
mod machine;

use machine::{GP_VECTOR, Machine, Stop};
use vcpu_realloc::kvm::{Answer, HandleError, Handled, release_xfd_writes, trap_xfd_writes};
use vcpu_realloc::{Fault, Growth};
use xsave_state::XFeatures;
use xsave_state::kvm::WriteXfdError;

const TILES: XFeatures = XFeatures::XTILEDATA;

fn never(_: Growth) -> Answer {
    panic!("nothing was used for the first time")
}

#[test]
fn a_write_of_zero_leaves_and_is_performed() {
    let Some(mut machine) = Machine::new(&[0]) else {
        return;
    };
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(0));
    let handled = machine.handle(0, never).unwrap();
    let released = XFeatures::empty();
    assert_eq!(handled, Handled::Written { released });
    assert_eq!(machine.run(), Stop::Halted);
    assert_eq!(machine.driver.gate().xfd(), XFeatures::empty());
}

#[test]
fn a_reserved_bit_is_gp_in_the_guest() {
    let Some(mut machine) = Machine::new(&[1]) else {
        return;
    };
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(1));
    let handled = machine.handle(1, never).unwrap();
    assert!(matches!(
        handled,
        Handled::Faulted(Fault::ReservedXfd { .. })
    ));
    assert_eq!(machine.run(), Stop::Vector(GP_VECTOR));
}

#[test]
fn ten_thousand_writes_leave_ten_thousand_times() {
    let Some(mut machine) = Machine::endless() else {
        return;
    };
    trap_xfd_writes(&machine.vm).unwrap();
    for _ in 0..10_000 {
        assert_eq!(machine.run(), Stop::WroteXfd(0));
        let _ = machine.handle(0, never).unwrap();
    }
}

#[test]
fn other_registers_are_not_ours() {
    let Some(mut machine) = Machine::new(&[0]) else {
        return;
    };
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(0));
    let Machine {
        driver,
        vcpu,
        buffer,
        ..
    } = &mut machine;
    let handled = driver.handle(vcpu, 0x1c5, 0, buffer, never).unwrap();
    assert_eq!(handled, Handled::NotOurs);
}

/// The control of the tests above: without the filter no write leaves.
#[test]
fn without_the_filter_no_write_leaves() {
    let Some(mut machine) = Machine::new(&[0, 0]) else {
        return;
    };
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(0));
    let _ = machine.handle(0, never).unwrap();
    release_xfd_writes(&machine.vm).unwrap();
    // KVM performs the second write itself: with XFD in CPUID it passes, without it is #GP.
    let stop = machine.run();
    assert!(
        matches!(stop, Stop::Halted | Stop::Vector(GP_VECTOR)),
        "{stop:?}"
    );
}

/// A failure reaches the VMM, changes nothing, and the same exit can be handled again.
#[test]
fn a_failed_write_reaches_the_vmm_and_can_be_repeated() {
    let Some(mut machine) = Machine::new(&[1 << 18]) else {
        return;
    };
    if !machine.layout.xfd().is_empty() {
        println!("skipped: this host has XFD, so KVM takes the write");
        return;
    }
    // The guest's CPUID claims AMX, which this host's KVM then does not accept.
    machine.claim_amx();
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(1 << 18));
    for _ in 0..2 {
        let error = machine.handle(1 << 18, never).unwrap_err();
        assert_eq!(
            error,
            HandleError::Write(WriteXfdError::Refused { xfd: TILES })
        );
        assert_eq!(machine.driver.gate().xfd(), XFeatures::empty());
    }
    // The VMM gives up with a fault that the guest can take.
    machine.unclaim_amx();
    let handled = machine.handle(1 << 18, never).unwrap();
    assert!(matches!(
        handled,
        Handled::Faulted(Fault::ReservedXfd { .. })
    ));
    assert_eq!(machine.run(), Stop::Vector(GP_VECTOR));
}

#[test]
fn the_first_use_of_amx_is_asked_for_once() {
    let Some(mut machine) = Machine::new(&[1 << 18, 0, 1 << 18, 0]) else {
        return;
    };
    if !machine.has_amx() {
        return;
    }
    machine.enable_amx();
    trap_xfd_writes(&machine.vm).unwrap();
    let mut asked = Vec::new();
    while let Stop::WroteXfd(value) = machine.run() {
        let grant = |growth: Growth| {
            asked.push((value, growth.features()));
            Answer::Grant
        };
        assert!(matches!(
            machine.handle(value, grant).unwrap(),
            Handled::Written { .. }
        ));
    }
    assert_eq!(asked, [(0, TILES)]);
    assert_eq!(machine.driver.gate().granted(), TILES);
}

#[test]
fn a_denied_first_use_is_gp_in_the_guest_and_leaves_xfd_armed() {
    let Some(mut machine) = Machine::new(&[1 << 18, 0]) else {
        return;
    };
    if !machine.has_amx() {
        return;
    }
    machine.enable_amx();
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(1 << 18));
    let _ = machine.handle(1 << 18, never).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(0));
    let handled = machine.handle(0, |_| Answer::Deny).unwrap();
    assert_eq!(handled, Handled::Faulted(Fault::Denied { features: TILES }));
    assert_eq!(machine.run(), Stop::Vector(GP_VECTOR));
    let captured = machine.capture();
    assert_eq!(captured.registers().xfd, TILES);
}

/// Live tiles, and the guest arms XFD: performed naively, the host could not load the vCPU again.
#[test]
fn arming_xfd_with_live_tiles_releases_them_and_the_host_lives() {
    let Some(mut machine) = Machine::new(&[1 << 18]) else {
        return;
    };
    if !machine.has_amx() {
        return;
    }
    machine.enable_amx();
    machine.fill_tiles();
    trap_xfd_writes(&machine.vm).unwrap();
    assert_eq!(machine.run(), Stop::WroteXfd(1 << 18));
    let handled = machine.handle(1 << 18, never).unwrap();
    assert_eq!(handled, Handled::Written { released: TILES });
    assert_eq!(machine.run(), Stop::Halted);
    let captured = machine.capture();
    assert_eq!(captured.registers().xfd, TILES);
    assert!(!captured.image().xstate_bv().contains(TILES));
}
