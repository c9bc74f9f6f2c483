//! What the gate takes per event, and per exit on the /dev/kvm that is here beside an exit that nobody
//! handles. Compare within one run.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[expect(unsafe_code, reason = "a system call, a VM and its guest need it")]
#[path = "../tests/machine/mod.rs"]
mod machine;

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use machine::{Command, MSR_IA32_XFD, Machine, NONE, Stop, TILES};
use vcpu_realloc::kvm::Options;
use vcpu_realloc::{Action, Answer, Event, Gate};
use xsave_state::XFeatures;

fn events(c: &mut Criterion) {
    let Some((_, _, layout)) = machine::host() else {
        return;
    };
    let layout = machine::claimed_layout(&layout);
    let mut armed = Gate::new(&layout);
    let amx = Event::WriteXcr0(XFeatures::from_bits_retain(0x60003));
    assert_eq!(armed.on(Event::WriteXfd(TILES)), Action::Complete);
    assert_eq!(armed.on(amx), Action::Complete);
    let mut passed = armed.clone();
    assert_eq!(passed.on(Event::Grant(TILES)), Action::PassThrough);

    let mut group = c.benchmark_group("gate");
    group.bench_function("a write after the first use", |b| {
        b.iter(|| passed.on(black_box(Event::WriteXfd(NONE))));
    });
    group.bench_function("the first use, and its grant", |b| {
        b.iter_batched_ref(
            || armed.clone(),
            |gate| {
                let asked = gate.on(black_box(Event::WriteXfd(NONE)));
                assert!(matches!(asked, Action::Grow(_)));
                gate.on(Event::Grant(TILES))
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn exits(c: &mut Criterion) {
    let Some(mut machine) = Machine::new(1, Options::default()) else {
        return;
    };
    let mut group = c.benchmark_group("exit");
    machine.tell(0, &[Command::Bell(1), Command::Again]);
    group.bench_function("OUT", |b| {
        b.iter(|| assert_eq!(machine.step(0), Stop::Bell(1)));
    });
    let zero = Stop::Wrmsr {
        index: MSR_IA32_XFD,
        value: 0,
    };
    machine.tell(0, &[Command::WriteXfd(0), Command::Again]);
    group.bench_function("WRMSR of IA32_XFD, not performed", |b| {
        b.iter(|| assert_eq!(machine.step(0), zero));
    });
    group.bench_function("WRMSR of IA32_XFD, handled", |b| {
        b.iter(|| {
            assert_eq!(machine.step(0), zero);
            machine.handle(0, 0, &mut Answer::Grant).unwrap()
        });
    });
    group.finish();
}

fn quick() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
}

criterion_group! {
    name = benches;
    config = quick();
    targets = events, exits
}
criterion_main!(benches);
