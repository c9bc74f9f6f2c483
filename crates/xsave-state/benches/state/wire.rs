//! Encoding and decoding, against a copy of the area and against the formats that VMMs use today.

use std::hint::black_box;

use criterion::Criterion;
use serde::{Deserialize, Serialize};
use xsave_state::wire::{self, Buffer, Codec};
use xsave_state::{ExtendedState, Layout};

use super::ratios::{Goal, Ratio};
use super::{common, states};

/// As Cloud Hypervisor stores it in JSON: numbers, `extra` beyond the first 4,096 bytes.
#[derive(Serialize, Deserialize)]
struct Numbers {
    region: Vec<u32>,
    extra: Vec<u32>,
    registers: [u64; 3],
}

/// As Firecracker stores it with bitcode: the bytes as they are.
#[derive(Serialize, Deserialize)]
struct Bytes {
    area: Vec<u8>,
    registers: [u64; 3],
}

fn registers(state: &ExtendedState<'_>) -> [u64; 3] {
    let registers = state.registers();
    [registers.xcr0, registers.xfd, registers.xfd_err].map(|features| features.bits())
}

/// What is initial is zero (arch/x86/kernel/fpu/xstate.c, `__copy_xstate_to_uabi_buf`): formats that store the
/// whole area are not to suffer from bytes that no VMM has.
fn as_kvm_gives(state: &ExtendedState<'_>) -> ExtendedState<'static> {
    wire::decode(&wire::encode(0, state)).unwrap()
}

fn numbers(state: &ExtendedState<'_>) -> Numbers {
    let (words, _) = state.image().as_bytes().as_chunks();
    let mut region: Vec<u32> = words.iter().map(|&w| u32::from_le_bytes(w)).collect();
    Numbers {
        extra: region.split_off(1024),
        region,
        registers: registers(state),
    }
}

fn bytes(state: &ExtendedState<'_>) -> Bytes {
    Bytes {
        area: state.image().as_bytes().to_vec(),
        registers: registers(state),
    }
}

pub(crate) fn encode_and_decode(criterion: &mut Criterion) -> Vec<Ratio> {
    let layout = common::layout(states::AMX);
    let mut measured = Vec::new();
    let idle = as_kvm_gives(&states::idle(&layout));
    let full = as_kvm_gives(&states::full_tiles(&layout));
    let tiles = as_kvm_gives(&states::two_tiles(&layout));
    measured.extend(one(
        criterion,
        "idle",
        &idle,
        Some(1.0),
        Some(1.0),
        [200.0, 30.0],
    ));
    measured.extend(one(
        criterion,
        "two of eight tiles",
        &tiles,
        None,
        None,
        [0.0; 2],
    ));
    measured.extend(one(
        criterion,
        "full tiles",
        &full,
        Some(4.0),
        Some(4.0),
        [80.0, 10.0],
    ));
    measured.extend(many(criterion, &layout, &idle));

    println!(
        "\nbytes: idle {}, two of eight tiles {}, full tiles {}; area 11008",
        wire::encode(0, &idle).len(),
        wire::encode(0, &tiles).len(),
        wire::encode(0, &full).len()
    );
    let ours = wire::encode(0, &idle).len() as f64;
    let json = serde_json::to_vec(&numbers(&idle)).unwrap().len();
    let bitcode = bitcode::serialize(&bytes(&idle)).unwrap().len();
    println!("bytes when idle: serde_json {json}, bitcode {bitcode}");
    measured.push(Ratio::of(
        "idle bytes, serde_json / ours",
        json as f64 / ours,
        Goal::AtLeast(4.0),
    ));
    measured.push(Ratio::of(
        "idle bytes, bitcode / ours",
        bitcode as f64 / ours,
        Goal::AtLeast(4.0),
    ));
    measured
}

fn one(
    criterion: &mut Criterion,
    name: &str,
    state: &ExtendedState<'_>,
    encode_goal: Option<f64>,
    decode_goal: Option<f64>,
    [json_goal, bitcode_goal]: [f64; 2],
) -> Vec<Ratio> {
    let codec = Codec::new(state.layout());
    let from = state.image().as_bytes().to_vec();
    let mut copy = from.clone();
    let mut memcpy = || black_box(&mut copy).copy_from_slice(black_box(&from));
    let mut encoded = Vec::new();
    let mut encode = || {
        encoded.clear();
        codec
            .encode(0, black_box(state), black_box(&mut encoded))
            .unwrap();
    };
    encode();
    let written = wire::encode(0, state);
    let mut buffer = Buffer::new();
    let mut decode = || {
        drop(
            codec
                .decode(black_box(&written), black_box(&mut buffer))
                .unwrap(),
        )
    };

    let mut group = criterion.benchmark_group(name);
    group.bench_function("encode", |bencher| bencher.iter(&mut encode));
    group.bench_function("decode", |bencher| bencher.iter(&mut decode));
    group.finish();

    let goal = |goal: Option<f64>| goal.map_or(Goal::None, Goal::AtMost);
    let mut ratios = vec![
        Ratio::in_turns(
            &format!("{name}: encode / memcpy"),
            100,
            &mut encode,
            &mut memcpy,
        )
        .with(goal(encode_goal)),
        Ratio::in_turns(
            &format!("{name}: decode with all checks / memcpy"),
            100,
            &mut decode,
            &mut memcpy,
        )
        .with(goal(decode_goal)),
    ];
    if json_goal == 0.0 {
        return ratios;
    }
    // There and back, each from and to what its VMM has in memory.
    let mut ours = || {
        encode();
        decode();
    };
    let stored = numbers(state);
    let mut json = Vec::new();
    let serde_json = || {
        json.clear();
        serde_json::to_writer(&mut json, black_box(&stored)).unwrap();
        drop(serde_json::from_slice::<Numbers>(black_box(&json)).unwrap());
    };
    let name_of = |other: &str| format!("{name}: {other} there and back / ours");
    ratios.push(
        Ratio::in_turns_of(300, &name_of("serde_json"), 1, serde_json, 10, &mut ours)
            .with(Goal::AtLeast(json_goal)),
    );
    let stored = bytes(state);
    let bitcode = || {
        let bytes = bitcode::serialize(black_box(&stored)).unwrap();
        drop(bitcode::deserialize::<Bytes>(black_box(&bytes)).unwrap());
    };
    ratios.push(
        Ratio::in_turns_of(500, &name_of("bitcode"), 2, bitcode, 10, &mut ours)
            .with(Goal::AtLeast(bitcode_goal)),
    );
    ratios
}

/// 1,024 vCPUs in a row, against a copy of their areas.
fn many(criterion: &mut Criterion, layout: &Layout, idle: &ExtendedState<'_>) -> Vec<Ratio> {
    const VCPUS: u32 = 1024;
    let codec = Codec::new(layout);
    let (mut file, mut buffer) = (Vec::new(), Buffer::new());
    let mut write = || {
        file.clear();
        for vcpu in 0..VCPUS {
            codec.encode(vcpu, black_box(idle), &mut file).unwrap();
        }
    };
    write();
    let mut group = criterion.benchmark_group("1024 idle vCPUs");
    group.sample_size(20);
    group.bench_function("write", |bencher| bencher.iter(&mut write));
    let areas = vec![0x5au8; 1024 * 11_008];
    let mut copy = areas.clone();
    let mut memcpy = || black_box(&mut copy).copy_from_slice(black_box(&areas));
    let mut ratios = vec![Ratio::in_turns_of(
        100,
        "1024 idle vCPUs: write / memcpy of their areas",
        1,
        &mut write,
        1,
        &mut memcpy,
    )];
    let written = file.clone();
    let mut read = || {
        for encoded in wire::states(black_box(&written)) {
            drop(encoded.unwrap().decode(&codec, &mut buffer).unwrap());
        }
    };
    group.bench_function("read", |bencher| bencher.iter(&mut read));
    group.finish();
    ratios.push(Ratio::in_turns_of(
        100,
        "1024 idle vCPUs: read / memcpy of their areas",
        1,
        &mut read,
        1,
        &mut memcpy,
    ));
    ratios
}
