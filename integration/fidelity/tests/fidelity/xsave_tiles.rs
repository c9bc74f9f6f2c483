//! What the XSAVE instructions do with tiles: the cases one by one that the enumerations have among others.

use amx_fidelity::component::{ALL_ENUMERATED, AMX, TILECFG, TILEDATA, TILEDATA_BIT, subset};
use amx_fidelity::pattern::noise;
use amx_fidelity::process;
use amx_fidelity::sdm::restore::Header;
use amx_fidelity::sdm::tilecfg::config;
use amx_fidelity::trial::{Here, Instruction, Trial};

use crate::bench::Bench;
use crate::machine::here;
use crate::xrstor::{self, Case};

const SHAPES: [(u8, u8); 8] = [
    (1, 64),
    (16, 4),
    (2, 60),
    (15, 8),
    (3, 56),
    (14, 12),
    (4, 52),
    (13, 16),
];

#[test]
fn xsave_of_tilecfg_equals_sttilecfg() {
    let Some(mut machine) = here() else { return };
    let config = config(&SHAPES);
    let trial = machine.with_tiles(Trial::of(Instruction::Ldtilecfg), &[0; 64], &[]);
    machine.set_operand(&config);
    let trial = machine.run(trial.starting_from(machine.load, 0).on(machine.operand));
    assert_eq!(trial.fault(), None);
    assert_eq!(machine.component(TILECFG), config, "XSAVE, after LDTILECFG");
    let trial = machine.with_tiles(Trial::of(Instruction::Sttilecfg), &config, &[]);
    let trial = machine.run(trial.on(machine.operand));
    assert_eq!(trial.fault(), None);
    assert_eq!(machine.operand()[..64], config, "STTILECFG, after XRSTOR");
}

#[test]
fn xsave_of_tiledata_holds_every_row() {
    let Some(mut machine) = here() else { return };
    let full = config(&[(16, 64); 8]);
    let memory = noise(8, 8, 1024);
    let trial = machine.with_tiles(Trial::of(Instruction::Tileloadd5), &full, &[0; 8192]);
    machine.set_operand(&memory);
    let trial = machine.run(trial.on_address(machine.operand.address(), 64));
    assert_eq!(trial.fault(), None);
    for (row, expected) in memory.chunks_exact(64).enumerate() {
        assert_eq!(
            machine.tile(5)[row * 64..][..64],
            *expected,
            "row {row}, saved by XSAVE"
        );
    }
    let tiles = noise(8, 9, 8192);
    let trial = machine.with_tiles(Trial::of(Instruction::Tilestored5), &full, &tiles);
    let trial = machine.run(trial.on_address(machine.operand.address(), 64));
    assert_eq!(trial.fault(), None);
    for (row, expected) in tiles[5 * 1024..].chunks_exact(64).take(16).enumerate() {
        assert_eq!(
            machine.operand()[row * 64..][..64],
            *expected,
            "row {row}, restored by XRSTOR"
        );
    }
}

#[test]
fn xinuse_of_tiledata_follows_its_use() {
    let Some(mut machine) = here() else { return };
    let full = config(&[(16, 64); 8]);
    machine.set_operand(&full);
    let start = |machine: &mut crate::machine::Machine<Here>, instruction, in_use| {
        let trial = machine.with_tiles(Trial::of(instruction), &full, &noise(8, 9, 8192));
        trial
            .starting_from(machine.load, in_use)
            .on_address(machine.operand.address(), 64)
    };
    let cases = [
        (Instruction::Nothing, 0, 0),
        (Instruction::Nothing, 1 << TILECFG, 1 << TILECFG),
        (Instruction::Nothing, AMX, AMX),
        (Instruction::Tileloadd5, 1 << TILECFG, AMX),
        (Instruction::Tilestored5, AMX, AMX),
        (Instruction::Ldtilecfg, AMX, 1 << TILECFG),
        (Instruction::Tilerelease, AMX, 0),
    ];
    for (instruction, before, after) in cases {
        machine.set_operand(&full);
        let trial = start(&mut machine, instruction, before);
        let trial = machine.run(trial);
        assert_eq!(trial.fault(), None, "{instruction:?}");
        assert_eq!(
            trial.xinuse() & AMX,
            after,
            "XGETBV(1) after {instruction:?} from {before:#x}"
        );
        assert_eq!(
            machine.in_use() & AMX,
            after,
            "XSTATE_BV after {instruction:?} from {before:#x}"
        );
    }
}

#[test]
fn xrstor_compacted_skips_what_is_not_restored() {
    if !process::has_amx() {
        return;
    }
    process::permit_tiles();
    let mut here = Here::new();
    let bench = Bench::new(&mut here);
    let all = ALL_ENUMERATED;
    // Everything has a place; one component, and then each pair, is left out of what is asked for, or is
    // initial in the area.
    let left_out = (0..7).flat_map(|i| (0..=i).map(move |j| subset(1 << i | 1 << j)));
    let cases = left_out.flat_map(|out| {
        [(all, all & !out), (all & !out, all)].map(|(xstate_bv, rfbm)| Case {
            supervisor: false,
            before: all,
            header: Header {
                xstate_bv,
                xcomp_bv: all | 1 << 63,
            },
            // XRSTOR of TILECFG without tile data is a matter of its own.
            rfbm: if rfbm & AMX == 1 << TILECFG {
                rfbm & !AMX
            } else {
                rfbm
            },
            xfd: 0,
        })
    });
    bench.run(
        &mut here,
        true,
        cases,
        |case, area| xrstor::prepare(&bench, case, area),
        |case, outcome| xrstor::check(&bench, case, outcome),
    );
}

#[test]
fn xrstor_of_a_configuration_that_ldtilecfg_refuses_initializes_it() {
    let Some(mut machine) = here() else { return };
    let mut bad = config(&SHAPES);
    bad[2] = 1;
    let trial = machine.with_tiles(Trial::of(Instruction::Nothing), &bad, &[0; 8192]);
    let trial = machine.run(trial.starting_from(machine.load, 1 << TILECFG));
    assert_eq!(trial.fault(), None);
    assert_eq!(machine.component(TILECFG), [0; 64]);
    assert_eq!(trial.xinuse() & TILEDATA_BIT, 0);
}

#[test]
fn xrstor_of_a_configuration_alone_leaves_the_tiles() {
    let Some(mut machine) = here() else { return };
    let tiles = noise(8, 9, 8192);
    for xstate_bv in [0, 1 << TILECFG] {
        let trial = machine.with_tiles(Trial::of(Instruction::Xrstor), &config(&SHAPES), &tiles);
        let place = machine.layout.place(TILECFG).unwrap();
        let mut area = vec![0; 4096];
        area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        area[512..520].copy_from_slice(&u64::to_le_bytes(xstate_bv));
        area[place.offset..][..64].copy_from_slice(&config(&[(16, 64); 8]));
        machine.set_operand(&area);
        let trial = machine.run(trial.on(machine.operand).requesting(1 << TILECFG));
        assert_eq!(trial.fault(), None);
        assert!(
            machine.component(TILEDATA) == tiles,
            "XSTATE_BV {xstate_bv:#x}"
        );
        assert_ne!(trial.xinuse() & TILEDATA_BIT, 0, "XSTATE_BV {xstate_bv:#x}");
    }
}
