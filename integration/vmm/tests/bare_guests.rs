//! Guests on a live /dev/kvm: computed, stopped, moved, and what happens when something is lost.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::time::Duration;

use amx_guest::{Kind, Workload, workload};
use amx_vmm::{BusError, Console, Ended, Host, RunError, Snapshot, Vm};
use cpuid_amx::CpuidTable;
use support::lab::skip;
use support::midway::{doubled, slower};
use support::{LONG, finish, host, stopped, workloads};
use xsave_state::{ExtendedState, Image, XFeatures};

/// Each test once for each kind of payload, so that a kind which cannot run here is counted.
macro_rules! for_each_kind {
    ($($test:ident),* $(,)?) => {
        for_each_kind!(@ tiles, Tiles, $($test),*);
        for_each_kind!(@ avx512, Avx512, $($test),*);
        for_each_kind!(@ avx2, Avx2, $($test),*);
        for_each_kind!(@ sse, Sse, $($test),*);
    };
    (@ $module:ident, $kind:ident, $($test:ident),*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    if let Some(host) = super::host_of(super::Kind::$kind) {
                        super::$test(&host, super::Kind::$kind);
                    }
                }
            )*
        }
    };
}

for_each_kind!(
    computes_what_its_model_says,
    goes_on_in_another_vm_again_and_again,
    restored_and_captured_again_is_the_same_state,
    each_component_that_is_lost_makes_the_result_wrong,
    the_control_without_any_extended_state_is_wrong,
);

/// The host, if its guests can run `kind`.
fn host_of(kind: Kind) -> Option<Host> {
    let host = host()?;
    let xcr0 = host.layout().user().bits();
    let guest_cpuid = host.guest_cpuid();
    if kind.runs_with(xcr0, |leaf, subleaf| guest_cpuid.leaf(leaf, subleaf)) {
        return Some(host);
    }
    skip(&format!(
        "guests of this host have XCR0 {xcr0:#x}, and {kind} needs {:#x} and its instructions",
        kind.xcr0()
    ));
    None
}

fn computes_what_its_model_says(host: &Host, kind: Kind) {
    for rounds in [1, 2, 3, kind.default_rounds()] {
        let workloads = workloads(kind, 2, rounds, rounds);
        let mut vm = Vm::boot(host, kind, &workloads).expect("the guest boots");
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

fn goes_on_in_another_vm_again_and_again(host: &Host, kind: Kind) {
    for vcpus in [1, 3] {
        let workloads = workloads(kind, vcpus, 77, kind.default_rounds());
        for workload in &workloads {
            // The model computes once: it is as slow as the guest where both are emulated.
            assert_ne!(workload.check(&[]), []);
        }
        let moves = doubled(|factor| {
            let moves = moved_to_its_end(host, &slower(&workloads, factor));
            (moves > 1).then_some(moves)
        });
        println!("{kind}, {vcpus} vCPUs: {moves} moves");
    }
}

/// How often a guest was moved that computes right in the end.
fn moved_to_its_end(host: &Host, workloads: &[Workload]) -> u32 {
    let mut vm = Vm::boot(host, workloads[0].kind(), workloads).expect("the guest boots");
    let console = Console::default();
    let mut moves = 0;
    while vm.run(&console, Duration::from_millis(4)).expect("it runs") == Ended::Stopped {
        let bytes = vm.capture(host).expect("it is captured").to_bytes();
        drop(vm);
        let snapshot = Snapshot::from_bytes(&bytes).expect("it is read");
        assert_eq!(snapshot.to_bytes(), bytes, "the same bytes again");
        vm = Vm::restore(host, &snapshot).expect("it is restored");
        assert_eq!(
            vm.capture(host).expect("again").vcpus().len(),
            workloads.len()
        );
        moves += 1;
        assert!(moves < 10_000, "the guest makes no progress");
    }
    assert_eq!(finish(&mut vm, workloads), vec![[""; 0]; workloads.len()]);
    moves
}

fn restored_and_captured_again_is_the_same_state(host: &Host, kind: Kind) {
    let (snapshot, _) = stopped(host, kind, 2, 5);
    let mut vm = Vm::restore(host, &snapshot).expect("it is restored");
    let again = vm.capture(host).expect("it is captured");
    assert_eq!(again.memory(), snapshot.memory());
    for (again, before) in again.vcpus().iter().zip(snapshot.vcpus()) {
        assert_eq!(again.extended(), before.extended(), "{kind}");
        assert_eq!(again.general(), before.general(), "{kind}");
        assert_eq!(again.cpuid(), before.cpuid(), "{kind}");
    }
}

/// Restores `snapshot` with `lost` in its initial state, and gives the wrong registers of vCPU 0.
fn run_without(
    host: &Host,
    snapshot: &Snapshot,
    workloads: &[Workload],
    lose: impl Fn(Image<'static>) -> Image<'static>,
) -> Vec<String> {
    let damaged = snapshot.clone().map_extended(|extended| {
        let image = lose(extended.image().clone());
        ExtendedState::new(image, extended.registers()).expect("less in use is never worse")
    });
    finish_damaged(host, &damaged, workloads).swap_remove(0)
}

/// As [`finish`], where the guest may also take an exception: without TILECFG no tile instruction
/// works.
fn finish_damaged(host: &Host, damaged: &Snapshot, workloads: &[Workload]) -> Vec<Vec<String>> {
    let mut vm = Vm::restore(host, damaged).expect("it is restored");
    let console = Console::default();
    match vm.run(&console, LONG) {
        Ok(ended) => {
            assert_eq!(ended, Ended::Halted);
            finish(&mut vm, workloads)
        }
        Err(RunError::Bus(BusError::GuestFault { vector, .. })) => {
            vec![vec![format!("exception {vector}")]; workloads.len()]
        }
        Err(error) => panic!("{error}"),
    }
}

/// The same image with MXCSR as after reset.
fn without_mxcsr(image: Image<'static>) -> Image<'static> {
    let mut area = image.as_bytes().to_vec();
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    Image::parse(&area, image.layout())
        .expect("MXCSR after reset is valid")
        .into_owned()
}

fn each_component_that_is_lost_makes_the_result_wrong(host: &Host, kind: Kind) {
    let (snapshot, workloads) = stopped(host, kind, 1, 9);
    assert_eq!(
        run_without(host, &snapshot, &workloads, |image| image),
        [""; 0],
        "{kind}: nothing lost"
    );
    let in_use = snapshot.vcpus()[0].extended().image().xstate_bv();
    let expected = XFeatures::from_bits_retain(kind.components());
    assert!(in_use.contains(expected), "{kind}: {in_use} is in use");
    for component in expected.components() {
        let wrong = run_without(host, &snapshot, &workloads, |image| {
            image.without(component.bit())
        });
        println!(
            "{kind} without {component}: {} wrong registers",
            wrong.len()
        );
        assert_ne!(wrong, [""; 0], "{kind} without {component}");
    }
    let wrong = run_without(host, &snapshot, &workloads, without_mxcsr);
    println!("{kind} without MXCSR: {} wrong registers", wrong.len());
    assert_ne!(wrong, [""; 0], "{kind} without MXCSR");
    assert!(wrong.contains(&"MXCSR".to_owned()), "{kind}: {wrong:?}");
}

fn the_control_without_any_extended_state_is_wrong(host: &Host, kind: Kind) {
    for seed in 0..2 {
        let (snapshot, workloads) = stopped(host, kind, 2, seed);
        let damaged = snapshot.map_extended(|extended| {
            let image = Image::initial(extended.layout());
            ExtendedState::new(image, extended.registers()).expect("nothing is in use")
        });
        for wrong in finish_damaged(host, &damaged, &workloads) {
            assert_ne!(wrong, [""; 0], "seed {seed}");
        }
    }
}
