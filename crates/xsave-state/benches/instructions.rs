//! Instructions of one call of each operation, counted by callgrind: a number that repeats, where
//! times depend on what else the machine does. Prints the table of docs/performance.md.
//!
//! Valgrind's processor has no AVX-512: the checksum takes its SSE path here.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/states.rs"]
mod states;

use std::hint::black_box;
use std::process::Command;

use xsave_state::wire::{self, Buffer, Codec};
use xsave_state::{ExtendedState, Image};

const STATES: [&str; 3] = ["idle", "two of eight tiles", "full tiles"];
const OPERATIONS: [&str; 4] = ["memcpy of the area", "parse and check", "encode", "decode"];

fn main() {
    // `cargo bench` passes --bench; a run under callgrind is told what to do.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if let [operation, state, calls] = &arguments[..] {
        return run(operation, state, calls.parse().unwrap());
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: there is no valgrind");
        return;
    }
    println!("| instructions | {} |", STATES.join(" | "));
    println!("|---|---|---|---|");
    for operation in OPERATIONS {
        let counts = STATES.map(|state| {
            // What a call costs: that of 101 less that of one, which allocates.
            let count = instructions(operation, state, 101) - instructions(operation, state, 1);
            (count / 100).to_string()
        });
        println!("| {operation} | {} |", counts.join(" | "));
    }
}

fn instructions(operation: &str, state: &str, calls: u32) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args([operation, state, &calls.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected : "));
    collected
        .unwrap_or_else(|| panic!("{text}"))
        .1
        .parse()
        .unwrap()
}

fn run(operation: &str, state: &str, calls: u32) {
    let layout = common::layout(states::AMX);
    let state = match state {
        "idle" => states::idle(&layout),
        "full tiles" => states::full_tiles(&layout),
        _ => states::two_tiles(&layout),
    };
    let area = state.image().as_bytes();
    let registers = state.registers();
    let codec = Codec::new(&layout);
    let encoded = wire::encode(0, &state);
    let (mut copy, mut out, mut buffer) = (area.to_vec(), Vec::new(), Buffer::new());
    for _ in 0..calls {
        match operation {
            "memcpy of the area" => black_box(&mut copy).copy_from_slice(black_box(area)),
            "parse and check" => {
                let image = Image::parse(black_box(area), black_box(&layout)).unwrap();
                drop(ExtendedState::new(image, black_box(registers)).unwrap());
            }
            "encode" => {
                out.clear();
                codec
                    .encode(0, black_box(&state), black_box(&mut out))
                    .unwrap();
            }
            _ => drop(
                codec
                    .decode(black_box(&encoded), black_box(&mut buffer))
                    .unwrap(),
            ),
        }
    }
}
