//! Costs of parsing, checking, encoding and decoding, against a copy of the same bytes and against other
//! formats, in the same run. Ends with the ratios, because the times themselves depend on the machine.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../ratios/mod.rs"]
mod ratios;
#[path = "../../tests/common/states.rs"]
mod states;
mod wire;

use std::hint::black_box;

use criterion::Criterion;
use ratios::Ratio;
use xsave_state::{ExtendedState, Image};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut measured = parse(&mut criterion);
    measured.extend(wire::encode_and_decode(&mut criterion));
    criterion.final_summary();
    ratios::print(&measured);
}

fn parse(criterion: &mut Criterion) -> Vec<Ratio> {
    let layout = common::amx();
    let area = common::LIVE_TILES.to_vec();
    let registers = common::registers(0x602e7, 0, 0);

    let mut copy = area.clone();
    let mut memcpy = || black_box(&mut copy).copy_from_slice(black_box(&area));
    let parse = || drop(Image::parse(black_box(&area), black_box(&layout)).unwrap());
    let check = || {
        let image = Image::parse(black_box(&area), black_box(&layout)).unwrap();
        drop(ExtendedState::new(image, black_box(registers)).unwrap());
    };

    let mut group = criterion.benchmark_group("11008 bytes");
    group.bench_function("memcpy", |bencher| bencher.iter(&mut memcpy));
    group.bench_function("parse", |bencher| bencher.iter(parse));
    group.bench_function("parse and all checks", |bencher| bencher.iter(check));
    group.finish();
    vec![
        Ratio::in_turns("parse / memcpy", 100, parse, &mut memcpy),
        Ratio::in_turns("parse and all checks / memcpy", 100, check, &mut memcpy).at_most(0.25),
    ]
}
