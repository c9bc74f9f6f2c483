//! The products, for all tile shapes that fit each other.

use amx_fidelity::component::TILECFG;
use amx_fidelity::pattern::noise;
use amx_fidelity::sdm::tilecfg::{Config, config};
use amx_fidelity::sdm::tmul::{ROW, Shape, Signs, TILE, bf16, bytes, fp16, imaginary, real};
use amx_fidelity::trial::{Fault, Instruction, Trial};

use crate::machine::here;

type Model = dyn Fn(&[u8], Shape, &[u8], &[u8], usize) -> Vec<u8>;

/// Rows of the destination, dwords of its rows, rows of the second source.
fn shapes() -> impl Iterator<Item = (u8, u8, u8)> {
    let all = [1, 2, 5, 15, 16];
    all.into_iter().flat_map(move |m| {
        all.into_iter()
            .flat_map(move |n| all.into_iter().map(move |k| (m, n, k)))
    })
}

fn configured(m: u8, n: u8, k: u8) -> Config {
    config(&[(m, 4 * n), (m, 4 * k), (k, 4 * n)])
}

/// Compares floats by value where they are not NaN; a NaN only has to be one.
fn same_floats(actual: &[u8], expected: &[u8]) -> bool {
    let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    actual
        .chunks_exact(4)
        .zip(expected.chunks_exact(4))
        .all(|(a, b)| a == b || float(a).is_nan() && float(b).is_nan())
}

fn compare(instruction: Instruction, tiles: &[u8], model: &Model, same: fn(&[u8], &[u8]) -> bool) {
    let Some(mut machine) = here() else { return };
    for (m, n, k) in shapes() {
        let config = configured(m, n, k);
        let trial = machine.with_tiles(Trial::of(instruction), &config, tiles);
        let trial = machine.run(trial);
        if !instruction.is_here() {
            // What CPUID does not name is not there.
            assert_eq!(trial.fault(), Some(Fault::SIGILL), "{instruction:?}");
            return;
        }
        assert_eq!(trial.fault(), None, "{m} x {n}, depth {k}");
        let [to, first, second] = [0, 1, 2].map(|tile| &tiles[tile * TILE..][..TILE]);
        let shape = Shape {
            rows: m.into(),
            columns: 4 * usize::from(n),
        };
        let expected = model(to, shape, first, second, k.into());
        let actual = machine.tile(0);
        let wrong = (0..TILE / 4).find(|i| !same(&actual[i * 4..][..4], &expected[i * 4..][..4]));
        assert_eq!(
            wrong.map(|i| (
                i / (ROW / 4),
                i % (ROW / 4),
                actual[i * 4..][..4].to_vec(),
                expected[i * 4..][..4].to_vec()
            )),
            None,
            "{instruction:?} of {m} x {n}, depth {k}: row, column, result, model's result"
        );
        for tile in 1..8 {
            assert!(
                machine.tile(tile) == tiles[tile * TILE..][..TILE],
                "tile {tile} changes"
            );
        }
        assert_eq!(machine.component(TILECFG), config);
    }
}

fn compare_bytes(instruction: Instruction, first: bool, second: bool) {
    let mut tiles = noise(5, 1, 8192);
    // The extremes of both ranges, and zero, among the noise.
    for (i, byte) in tiles.iter_mut().enumerate().filter(|(i, _)| i % 7 == 0) {
        *byte = [0, 0x7f, 0x80, 0xff, 1][i / 7 % 5];
    }
    let model = move |to: &[u8], shape, x: &[u8], y: &[u8], depth| {
        bytes(Signs { first, second }, to, shape, x, y, depth)
    };
    compare(instruction, &tiles, &model, |a, b| a == b);
}

#[test]
fn tdpbssd() {
    compare_bytes(Instruction::Tdpbssd, true, true);
}

#[test]
fn tdpbsud() {
    compare_bytes(Instruction::Tdpbsud, true, false);
}

#[test]
fn tdpbusd() {
    compare_bytes(Instruction::Tdpbusd, false, true);
}

#[test]
fn tdpbuud() {
    compare_bytes(Instruction::Tdpbuud, false, false);
}

/// Tiles of halves (tiles 1 and 2) and of floats (tile 0), made by `element` from noise.
fn floats(element: impl Fn(u32) -> f32) -> Vec<u8> {
    let noise = noise(3, 2, 4 * 8192);
    let mut words = noise
        .chunks_exact(4)
        .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
    let mut next = || element(words.next().unwrap());
    let mut tiles: Vec<u8> = (0..256).flat_map(|_| next().to_le_bytes()).collect();
    tiles.extend((0..1024).flat_map(|_| {
        let [_, _, low, high] = next().to_le_bytes();
        [low, high]
    }));
    tiles.resize(8192, 0xcd);
    tiles
}

fn compare_floats(element: impl Fn(u32) -> f32) {
    compare(Instruction::Tdpbf16ps, &floats(element), &bf16, same_floats);
}

#[test]
fn tdpbf16ps_of_ordinary_numbers() {
    // Signs, and exponents of so different sizes that every sum is rounded.
    compare_floats(|noise| {
        f32::from_bits(noise & 0x807f_ffff | (0x70 + (noise >> 8 & 0x1f)) << 23)
    });
}

#[test]
fn tdpbf16ps_takes_denormals_as_zero() {
    compare_floats(|noise| {
        let bits = if noise >> 9 & 1 == 0 {
            noise & 0x807f_ffff
        } else {
            noise & 0x807f_ffff | 0x80 << 23
        };
        f32::from_bits(bits)
    });
}

#[test]
fn tdpbf16ps_flushes_tiny_results_to_zero() {
    // Products around 2^-140: far below what is normal.
    compare_floats(|noise| f32::from_bits(noise & 0x807f_ffff | 0x3a << 23));
}

#[test]
fn tdpbf16ps_handles_infinities_and_overflow() {
    compare_floats(|noise| match noise >> 8 & 7 {
        0 => f32::INFINITY.copysign(f32::from_bits(noise)),
        1 => 0.0,
        _ => f32::from_bits(noise & 0x807f_ffff | 0xc0 << 23),
    });
}

/// Tiles 1 and 2 of half-precision numbers that `element` makes from noise; tile 0 of ordinary floats.
fn fp16_tiles(element: impl Fn(u16) -> u16) -> Vec<u8> {
    let mut tiles =
        floats(|noise| f32::from_bits(noise & 0x807f_ffff | (0x70 + (noise >> 8 & 0x1f)) << 23));
    let noise = noise(11, 3, 2 * TILE);
    for (half, noise) in tiles[TILE..3 * TILE]
        .chunks_exact_mut(2)
        .zip(noise.chunks_exact(2))
    {
        let noise = u16::from_le_bytes([noise[0], noise[1]]);
        half.copy_from_slice(&element(noise).to_le_bytes());
    }
    tiles
}

fn compare_fp16(element: impl Fn(u16) -> u16) {
    let tiles = fp16_tiles(element);
    let cases: [(Instruction, &Model); 3] = [
        (Instruction::Tdpfp16ps, &fp16),
        (Instruction::Tcmmrlfp16ps, &real),
        (Instruction::Tcmmimfp16ps, &imaginary),
    ];
    for (instruction, model) in cases {
        compare(instruction, &tiles, model, same_floats);
    }
}

#[test]
fn products_of_fp16_of_ordinary_numbers() {
    // Signs and exponents of all sizes, but neither denormals nor infinities.
    compare_fp16(|noise| noise & 0x83ff | (1 + (noise >> 10 & 0x1f) % 30) << 10);
}

#[test]
fn products_of_fp16_count_its_denormals() {
    compare_fp16(|noise| match noise >> 10 & 1 {
        0 => noise & 0x83ff,
        _ => noise & 0x83ff | 0x0f << 10,
    });
}

#[test]
fn products_of_fp16_handle_infinities_and_nan() {
    compare_fp16(|noise| match noise >> 10 & 15 {
        0 => noise & 0x8000 | 0x7c00,
        1 => 0,
        2 => noise & 0x8000 | 0x7e01,
        _ => noise & 0x83ff | 0x0e << 10,
    });
}

#[test]
fn products_refuse_tiles_that_do_not_fit() {
    let Some(mut machine) = here() else { return };
    let cases: [(&str, [(u8, u8); 3]); 9] = [
        (
            "the destination is not configured",
            [(0, 0), (4, 16), (4, 32)],
        ),
        (
            "the first source is not configured",
            [(4, 32), (0, 0), (4, 32)],
        ),
        (
            "the second source is not configured",
            [(4, 32), (4, 16), (0, 0)],
        ),
        (
            "columns of destination and second source",
            [(4, 32), (4, 16), (4, 28)],
        ),
        (
            "rows of destination and first source",
            [(4, 32), (5, 16), (4, 32)],
        ),
        ("depth", [(4, 32), (4, 12), (4, 32)]),
        (
            "half a dword in the destination",
            [(4, 30), (4, 16), (4, 32)],
        ),
        (
            "half a dword in the first source",
            [(4, 32), (4, 18), (4, 32)],
        ),
        (
            "half a dword in the second source",
            [(4, 32), (4, 16), (4, 34)],
        ),
    ];
    let tiles = noise(5, 1, 8192);
    for instruction in Instruction::products() {
        for (why, shapes) in cases {
            let trial = machine.with_tiles(Trial::of(instruction), &config(&shapes), &tiles);
            assert_eq!(
                machine.run(trial).fault(),
                Some(Fault::SIGILL),
                "{instruction:?}: {why}"
            );
        }
    }
    let trial = machine.with_tiles(
        Trial::of(Instruction::TdpbssdSame),
        &configured(4, 4, 4),
        &tiles,
    );
    assert_eq!(
        machine.run(trial).fault(),
        Some(Fault::SIGILL),
        "the same tile twice"
    );
}
