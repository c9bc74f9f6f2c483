//! The vCPU phase of a move, while the guest stands still: all state of 1, 8 and 64 vCPUs read, written
//! as bytes, read from them, and set on vCPUs of another VM. Once with the container, once with the bare
//! ioctls and nothing between them, and once with areas of fixed length as VMMs store them today. All in
//! turns, on the /dev/kvm that is here; the vCPUs do not run.
//!
//! Ends with ratios and bytes: the times themselves are this machine's.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[expect(unsafe_code, reason = "the bare ioctls, to compare with")]
mod machine;
mod phase;
#[allow(dead_code, reason = "without goals")]
#[path = "../state/ratios.rs"]
mod ratios;
#[path = "../../tests/common/states.rs"]
mod states;

use std::time::Instant;

use machine::Machine;
use phase::{Blobs, Format, Ours};
use ratios::Ratio;
use xsave_state::wire;

fn main() {
    bytes();
    let Some(mut from) = Machine::new(64) else {
        eprintln!("the rest is left out: /dev/kvm cannot be used");
        return;
    };
    let mut to = Machine::new(64).unwrap();
    println!(
        "guests of this host have {} (areas of up to {} bytes)",
        from.layout.user(),
        from.layout.standard_size()
    );
    let mut measured = Vec::new();
    for (name, state) in from.states() {
        from.give(&state);
        // As many turns as make a second or so.
        for (vcpus, turns) in [(1, 1000), (8, 200), (64, 40)] {
            measured.extend(one(name, &mut from, &mut to, vcpus, turns));
        }
        measured.push(parallel(name, &from));
    }
    ratios::print(&measured);
}

/// What has to go over the wire, of states that are made up: a host with AMX is not needed.
fn bytes() {
    let layout = common::layout(states::AMX);
    println!("bytes for a vCPU of a guest with AMX, and how many times the container's:");
    for (name, state) in [
        ("idle", states::idle(&layout)),
        ("two of eight tiles", states::two_tiles(&layout)),
        ("full tiles", states::full_tiles(&layout)),
    ] {
        let bytes = wire::encode(&state);
        let ours = bytes.len();
        // What is initial is zero, as KVM_GET_XSAVE2 gives it (`copy_xstate_to_uabi_buf`).
        let state = wire::decode(&bytes).unwrap();
        let area = state.image().as_bytes();
        let registers = phase::registers(&state);
        let sizes = [
            ("area alone", area.len()),
            ("bitcode", Format::Bitcode.bytes_of(area, registers)),
            ("serde_json", Format::Json.bytes_of(area, registers)),
        ];
        print!("  {name:20} container {ours:6}");
        for (format, bytes) in sizes {
            print!("   {format} {bytes:6} ({:.1})", bytes as f64 / ours as f64);
        }
        println!();
    }
}

fn one(
    state: &str,
    from: &mut Machine,
    to: &mut Machine,
    vcpus: usize,
    turns: usize,
) -> Vec<Ratio> {
    let mut ours = Ours::new(&from.layout, from.size, vcpus);
    let mut blobs = Blobs::new(vcpus);
    // Everything is allocated, and what is moved is what was there.
    ours.phase(from, to);
    let start = Instant::now();
    ours.phase(from, to);
    println!(
        "{state}, {vcpus} vCPUs: here, noisy, {:.3} ms; {} bytes of extended state",
        start.elapsed().as_secs_f64() * 1e3,
        ours.bytes()
    );
    for format in Format::ALL {
        blobs.phase(from, to, format);
    }

    let name = |what: &str| format!("{state}, {vcpus} vCPUs: {what}");
    let mut bare = Blobs::new(vcpus);
    let mut ratio = |what: &str, measured: &mut dyn FnMut(&Machine, &Machine), turns| {
        let against = || bare.phase(from, to, Format::None);
        Ratio::in_turns_of(turns, &name(what), 1, || measured(from, to), 1, against)
    };
    let mut container = Ours::new(&from.layout, from.size, vcpus);
    container.phase(from, to);
    vec![
        ratio(
            "the container / the ioctls alone",
            &mut |from, to| ours.phase(from, to),
            turns,
        ),
        ratio(
            "to write the container and read it, no ioctl / the ioctls alone",
            &mut |_, _| container.there_and_back(),
            turns,
        ),
        ratio(
            "areas of 11,008 bytes as they are / the ioctls alone",
            &mut |from, to| blobs.phase(from, to, Format::Copy),
            turns,
        ),
        ratio(
            "areas of 11,008 bytes in bitcode / the ioctls alone",
            &mut |from, to| blobs.phase(from, to, Format::Bitcode),
            turns,
        ),
        ratio(
            "areas of 11,008 bytes in serde_json / the ioctls alone",
            &mut |from, to| blobs.phase(from, to, Format::Json),
            turns / 4,
        ),
        Ratio::in_turns_of(
            turns / 4,
            &name("to create a VM and its vCPUs with their CPUID / the ioctls alone"),
            1,
            || from.others(vcpus),
            1,
            || blobs.phase(from, to, Format::None),
        ),
    ]
}

/// Capture alone, on as many threads as there are processors, or on one.
fn parallel(state: &str, machine: &Machine) -> Ratio {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ratio::in_turns_of(
        40,
        &format!("{state}, 64 vCPUs: capture on {threads} threads / on one"),
        1,
        || phase::capture_on(machine, threads),
        1,
        || phase::capture_on(machine, 1),
    )
}
