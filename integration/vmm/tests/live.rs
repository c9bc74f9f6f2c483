//! Guests on a live /dev/kvm: computed, stopped, moved, and what happens when something is lost.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::time::Duration;

use amx_guest::{Kind, workload};
use amx_vmm::{Console, Ended, Host, Snapshot, Vm};
use support::{LONG, finish, host, stopped, workloads};
use xsave_state::{ExtendedState, Image, XFeatures};

/// The kinds that guests can run on this host; the others are named as skipped.
fn kinds(host: &Host) -> Vec<Kind> {
    let xcr0 = host.layout().user().bits();
    let (can, cannot): (Vec<_>, Vec<_>) = Kind::ALL
        .into_iter()
        .partition(|kind| xcr0 & kind.xcr0() == kind.xcr0());
    for kind in cannot {
        println!(
            "skipped: {kind} needs XCR0 {:#x}; guests of this host have {xcr0:#x}",
            kind.xcr0()
        );
    }
    can
}

#[test]
fn every_kind_computes_what_its_model_says() {
    let Some(host) = host() else { return };
    for kind in kinds(&host) {
        for rounds in [1, 2, 3, kind.default_rounds()] {
            let workloads = workloads(kind, 2, rounds, rounds);
            let mut vm = Vm::boot(&host, kind, &workloads).expect("the guest boots");
            let console = Console::default();
            assert_eq!(vm.run(&console, LONG).expect("it runs"), Ended::Halted);
            for (index, workload) in (0..).zip(&workloads) {
                let area = vm.read_area(index).expect("it is in memory");
                assert_eq!(workload.check(&area), [], "{kind}, {rounds} rounds");
                assert!(console.text().contains(char::from(b'0' + index)));
            }
            assert_eq!(console.text().len(), 2 * workload::message(0).len());
        }
    }
}

#[test]
fn a_stopped_guest_goes_on_in_another_vm_again_and_again() {
    let Some(host) = host() else { return };
    for kind in kinds(&host) {
        for vcpus in [1, 2, 3] {
            let rounds = kind.default_rounds();
            let workloads = workloads(kind, vcpus, 77, rounds);
            let mut vm = Vm::boot(&host, kind, &workloads).expect("the guest boots");
            let console = Console::default();
            let mut moves = 0;
            while vm.run(&console, Duration::from_millis(4)).expect("it runs") == Ended::Stopped {
                let bytes = vm.capture(&host).expect("it is captured").to_bytes();
                drop(vm);
                let snapshot = Snapshot::from_bytes(&bytes).expect("it is read");
                assert_eq!(snapshot.to_bytes(), bytes, "the same bytes again");
                vm = Vm::restore(&host, &snapshot).expect("it is restored");
                assert_eq!(
                    vm.capture(&host).expect("again").vcpus().len(),
                    usize::from(vcpus)
                );
                moves += 1;
            }
            assert!(moves > 1, "{kind}: {moves} moves");
            assert_eq!(
                finish(&mut vm, &workloads),
                vec![[""; 0]; usize::from(vcpus)]
            );
            println!("{kind}, {vcpus} vCPUs: {moves} moves");
        }
    }
}

#[test]
fn restored_and_captured_again_is_the_same_state() {
    let Some(host) = host() else { return };
    for kind in kinds(&host) {
        let (snapshot, _) = stopped(&host, kind, 2, 5);
        let vm = Vm::restore(&host, &snapshot).expect("it is restored");
        let again = vm.capture(&host).expect("it is captured");
        assert_eq!(again.memory(), snapshot.memory());
        for (again, before) in again.vcpus().iter().zip(snapshot.vcpus()) {
            assert_eq!(again.extended(), before.extended(), "{kind}");
            assert_eq!(again.general(), before.general(), "{kind}");
            assert_eq!(again.cpuid(), before.cpuid(), "{kind}");
        }
    }
}

/// Restores `snapshot` with `lost` in its initial state, and gives the wrong registers of vCPU 0.
fn run_without(
    host: &Host,
    snapshot: &Snapshot,
    workloads: &[amx_guest::Workload],
    lose: impl Fn(Image<'static>) -> Image<'static>,
) -> Vec<String> {
    let damaged = snapshot.clone().map_extended(|extended| {
        let image = lose(extended.image().clone());
        ExtendedState::new(image, extended.registers()).expect("less in use is never worse")
    });
    let mut vm = Vm::restore(host, &damaged).expect("it is restored");
    finish(&mut vm, workloads).swap_remove(0)
}

/// The same image with MXCSR as after reset.
fn without_mxcsr(image: Image<'static>) -> Image<'static> {
    let mut area = image.as_bytes().to_vec();
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    Image::parse(&area, image.layout())
        .expect("MXCSR after reset is valid")
        .into_owned()
}

#[test]
fn each_component_that_is_lost_makes_the_result_wrong() {
    let Some(host) = host() else { return };
    for kind in kinds(&host) {
        let (snapshot, workloads) = stopped(&host, kind, 1, 9);
        assert_eq!(
            run_without(&host, &snapshot, &workloads, |image| image),
            [""; 0],
            "{kind}: nothing lost"
        );
        let in_use = snapshot.vcpus()[0].extended().image().xstate_bv();
        let expected = XFeatures::from_bits_retain(kind.xcr0());
        assert!(in_use.contains(expected), "{kind}: {in_use} is in use");
        for component in expected.components() {
            let vectors_unused = kind == Kind::Tiles && component.number() < 17;
            if vectors_unused && component.number() != 0 {
                continue;
            }
            let wrong = run_without(&host, &snapshot, &workloads, |image| {
                image.without(component.bit())
            });
            println!(
                "{kind} without {component}: {} wrong registers",
                wrong.len()
            );
            assert_ne!(wrong, [""; 0], "{kind} without {component}");
        }
        let wrong = run_without(&host, &snapshot, &workloads, without_mxcsr);
        println!("{kind} without MXCSR: {} wrong registers", wrong.len());
        assert_ne!(wrong, [""; 0], "{kind} without MXCSR");
        assert!(wrong.contains(&"MXCSR".to_owned()), "{kind}: {wrong:?}");
    }
}

#[test]
fn the_control_without_any_extended_state_is_wrong() {
    let Some(host) = host() else { return };
    let Some(kind) = host.best_kind() else {
        println!("skipped: no payload runs with the CPUID of this host's guests");
        return;
    };
    for seed in 0..4 {
        let (snapshot, workloads) = stopped(&host, kind, 2, seed);
        let damaged = snapshot.map_extended(|extended| {
            let image = Image::initial(extended.layout());
            ExtendedState::new(image, extended.registers()).expect("nothing is in use")
        });
        let mut vm = Vm::restore(&host, &damaged).expect("it is restored");
        for wrong in finish(&mut vm, &workloads) {
            assert_ne!(wrong, [""; 0], "seed {seed}");
        }
    }
}
