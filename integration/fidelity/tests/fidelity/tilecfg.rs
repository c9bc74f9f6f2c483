//! LDTILECFG, STTILECFG and TILERELEASE.

use amx_fidelity::component::{AMX, TILECFG, TILEDATA};
use amx_fidelity::pattern::noise;
use amx_fidelity::sdm::tilecfg::{Config, Palette, check, config, stored};
use amx_fidelity::trial::{Fault, Instruction, Processor, Trial};

use crate::machine::{Machine, guest, here};

const FULL: [(u8, u8); 8] = [(16, 64); 8];
const MIXED: [(u8, u8); 8] = [
    (1, 4),
    (16, 64),
    (2, 8),
    (0, 0),
    (7, 28),
    (16, 4),
    (1, 64),
    (9, 60),
];

/// Loads a configuration over another one with tiles in use, and compares all that is to be seen.
fn load<P: Processor>(machine: &mut Machine<P>, gp: Fault, new: &Config) {
    let old = config(&MIXED);
    let tiles = noise(9, 0, 8192);
    let trial = machine.with_tiles(Trial::of(Instruction::Ldtilecfg), &old, &tiles);
    machine.set_operand(new);
    let trial = machine.run(trial.on(machine.operand));
    let outcome = check(new, Palette::here());
    assert_eq!(
        trial.fault(),
        outcome.err().map(|_| gp),
        "{outcome:?}: {new:x?}"
    );
    if outcome.is_ok() {
        assert_eq!(machine.component(TILECFG), stored(new), "{new:x?}");
        assert!(
            machine.component(TILEDATA).iter().all(|&byte| byte == 0),
            "tiles are zeroed: {new:x?}"
        );
        assert_eq!(
            machine.in_use() & AMX,
            u64::from(new[0] != 0) << TILECFG,
            "{new:x?}"
        );
    } else {
        assert_eq!(
            machine.component(TILECFG),
            old,
            "{outcome:?}: nothing changes"
        );
        assert_eq!(
            machine.component(TILEDATA),
            tiles,
            "{outcome:?}: nothing changes"
        );
    }
}

/// A configuration with one byte changed.
fn changed(mut base: Config, at: usize, value: u8) -> Config {
    base[at] = value;
    base
}

fn palettes() -> impl Iterator<Item = Config> {
    (0..=255).map(|palette| changed(config(&MIXED), 0, palette))
}

fn reserved() -> impl Iterator<Item = Config> {
    let places = (2..16).chain(32..48).chain(56..64);
    places.flat_map(|at| [1, 0x80].map(|value| changed(config(&MIXED), at, value)))
}

fn columns() -> impl Iterator<Item = Config> {
    let values = [
        (63, 0),
        (64, 0),
        (65, 0),
        (128, 0),
        (255, 0),
        (0, 1),
        (4, 1),
        (0, 0x80),
    ];
    (0..8).flat_map(move |tile| {
        values.map(|(low, high)| {
            changed(
                changed(config(&FULL), 16 + 2 * tile, low),
                17 + 2 * tile,
                high,
            )
        })
    })
}

fn rows() -> impl Iterator<Item = Config> {
    (0..8).flat_map(|tile| {
        [1, 16, 17, 32, 128, 255].map(|rows| changed(config(&FULL), 48 + tile, rows))
    })
}

fn halves() -> impl Iterator<Item = Config> {
    (0..8).flat_map(|tile| {
        [16 + 2 * tile, 48 + tile]
            .map(|at| changed(config(&FULL), at, 0))
            .into_iter()
            .chain([changed(
                changed(config(&FULL), 48 + tile, 0),
                16 + 2 * tile,
                0,
            )])
    })
}

fn everywhere(configs: impl Fn() -> Box<dyn Iterator<Item = Config>>) {
    if let Some(mut machine) = here() {
        configs().for_each(|config| load(&mut machine, Fault::SIGSEGV, &config));
    }
    if let Some(mut machine) = guest() {
        configs().for_each(|config| load(&mut machine, Fault::GP, &config));
    }
}

#[test]
fn ldtilecfg_refuses_palettes_that_do_not_exist() {
    everywhere(|| Box::new(palettes()));
}

#[test]
fn ldtilecfg_refuses_reserved_bytes() {
    everywhere(|| Box::new(reserved()));
}

#[test]
fn ldtilecfg_refuses_rows_that_are_too_long() {
    everywhere(|| Box::new(columns()));
}

#[test]
fn ldtilecfg_refuses_too_many_rows() {
    everywhere(|| Box::new(rows()));
}

#[test]
fn ldtilecfg_refuses_a_tile_with_only_one_of_rows_and_bytes() {
    everywhere(|| Box::new(halves()));
}

#[test]
fn ldtilecfg_takes_any_start_row() {
    everywhere(|| Box::new((0..=255).map(|row| changed(config(&MIXED), 1, row))));
}

#[test]
fn ldtilecfg_ignores_the_rest_of_palette_0() {
    everywhere(|| {
        Box::new(
            (1..64)
                .map(|at| changed([0; 64], at, 0xff))
                .chain([[0; 64]]),
        )
    });
}

#[test]
fn sttilecfg_gives_back_what_ldtilecfg_loaded() {
    let Some(mut machine) = here() else { return };
    for shapes in [FULL, MIXED, [(3, 12); 8]] {
        for row in [0, 1, 200] {
            let config = changed(config(&shapes), 1, row);
            let trial = machine.with_tiles(Trial::of(Instruction::Sttilecfg), &config, &[0; 8192]);
            machine.set_operand(&[0xee; 128]);
            let trial = machine.run(trial.on(machine.operand));
            assert_eq!(trial.fault(), None);
            assert_eq!(machine.operand()[..64], config);
            assert_eq!(machine.operand()[64..128], [0xee; 64]);
        }
    }
}

#[test]
fn sttilecfg_stores_zeros_when_tiles_are_not_configured() {
    let Some(mut machine) = here() else { return };
    machine.set_operand(&[0xee; 64]);
    let trial = Trial::of(Instruction::Sttilecfg).starting_from(machine.load, 0);
    machine.processor.arena().bytes_mut(machine.load)[24..28]
        .copy_from_slice(&0x1f80_u32.to_le_bytes());
    let trial = machine.run(trial.on(machine.operand));
    assert_eq!(trial.fault(), None);
    assert_eq!(machine.operand()[..64], [0; 64]);
}

#[test]
fn tilerelease_initializes_both_components() {
    let Some(mut machine) = here() else { return };
    let trial = machine.with_tiles(
        Trial::of(Instruction::Tilerelease),
        &config(&FULL),
        &[7; 8192],
    );
    let trial = machine.run(trial);
    assert_eq!(trial.fault(), None);
    assert_eq!(trial.xinuse() & AMX, 0);
    assert_eq!(machine.in_use() & AMX, 0);
    assert!(
        machine
            .component(TILECFG)
            .iter()
            .chain(&machine.component(TILEDATA))
            .all(|&byte| byte == 0)
    );
}
