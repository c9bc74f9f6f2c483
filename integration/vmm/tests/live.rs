//! Guests on a live /dev/kvm.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::time::{Duration, Instant};

use amx_guest::Kind;
use amx_vmm::{Console, Vm};
use support::{finish, host, workloads};

#[test]
fn every_kind_computes_what_its_model_says() {
    let Some(host) = host() else { return };
    for kind in Kind::ALL {
        let xcr0 = host.layout().user().bits();
        if xcr0 & kind.xcr0() != kind.xcr0() {
            println!("skipped: {kind}: the host's guests have XCR0 {xcr0:#x}");
            continue;
        }
        for rounds in [1, 2, 3, kind.default_rounds()] {
            let workloads = workloads(kind, 2, rounds, rounds);
            let mut vm = Vm::boot(&host, kind, &workloads).expect("the guest boots");
            let start = Instant::now();
            let wrong = finish(&mut vm, &workloads);
            println!("{kind} {rounds} rounds: {:?}", start.elapsed());
            assert_eq!(wrong, [[""; 0]; 2], "{kind}, {rounds} rounds");
        }
    }
}
