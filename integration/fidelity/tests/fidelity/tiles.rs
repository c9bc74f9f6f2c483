//! TILELOADD, TILELOADDT1, TILESTORED and TILEZERO: shapes, zeroing of the rest, restart, refusals.

use amx_fidelity::component::{AMX, TILECFG, TILEDATA};
use amx_fidelity::pattern::noise;
use amx_fidelity::sdm::tilecfg::{Config, config};
use amx_fidelity::sdm::tmul::{Shape, shaped};
use amx_fidelity::trial::{Fault, Instruction, Processor, Trial};

use crate::machine::{Machine, here};

/// All that rows, and all that bytes per row can be for the instructions that work on dwords.
fn shapes() -> impl Iterator<Item = (u8, u8)> {
    (1..=16).flat_map(|rows| (1..=16).map(move |dwords| (rows, 4 * dwords)))
}

fn tile5((rows, columns): (u8, u8)) -> Config {
    let mut tiles = [(16, 64); 8];
    tiles[5] = (rows, columns);
    config(&tiles)
}

fn shape((rows, columns): (u8, u8)) -> Shape {
    Shape {
        rows: rows.into(),
        columns: columns.into(),
    }
}

fn rows_at(memory: &[u8], stride: usize) -> Vec<u8> {
    let mut tile = vec![0; 1024];
    for (row, to) in tile.chunks_exact_mut(64).enumerate() {
        to.copy_from_slice(&memory[row * stride..][..64]);
    }
    tile
}

fn loads_every_shape(instruction: Instruction) {
    let Some(mut machine) = here() else { return };
    let (tiles, memory) = (noise(1, 0, 8192), noise(2, 0, 4096));
    for dimensions in shapes() {
        for stride in [64, 100] {
            let trial = machine.with_tiles(Trial::of(instruction), &tile5(dimensions), &tiles);
            machine.set_operand(&memory);
            let trial = machine.run(trial.on_address(machine.operand.address(), stride as u64));
            assert_eq!(trial.fault(), None, "{dimensions:?}");
            let mut expected = tiles.clone();
            expected[5 * 1024..][..1024]
                .copy_from_slice(&shaped(&rows_at(&memory, stride), shape(dimensions)));
            assert!(
                machine.component(TILEDATA) == expected,
                "{dimensions:?}, stride {stride}"
            );
            assert_eq!(machine.component(TILECFG), tile5(dimensions));
        }
    }
}

#[test]
fn tileloadd_loads_every_shape_and_zeroes_the_rest() {
    loads_every_shape(Instruction::Tileloadd5);
}

#[test]
fn tileloaddt1_loads_every_shape_and_zeroes_the_rest() {
    loads_every_shape(Instruction::Tileloaddt1);
}

#[test]
fn tilestored_stores_every_shape_and_nothing_else() {
    let Some(mut machine) = here() else { return };
    let tiles = noise(1, 0, 8192);
    for dimensions in shapes() {
        for stride in [64, 100] {
            let trial = machine.with_tiles(
                Trial::of(Instruction::Tilestored5),
                &tile5(dimensions),
                &tiles,
            );
            machine.set_operand(&[0xee; 2048]);
            let trial = machine.run(trial.on_address(machine.operand.address(), stride as u64));
            assert_eq!(trial.fault(), None, "{dimensions:?}");
            let mut expected = [0xee; 2048];
            for row in 0..usize::from(dimensions.0) {
                let columns = usize::from(dimensions.1);
                expected[row * stride..][..columns]
                    .copy_from_slice(&tiles[5 * 1024 + row * 64..][..columns]);
            }
            assert!(
                machine.operand()[..2048] == expected,
                "{dimensions:?}, stride {stride}"
            );
            assert!(
                machine.component(TILEDATA) == tiles,
                "tiles change: {dimensions:?}"
            );
        }
    }
}

#[test]
fn tilezero_clears_the_whole_tile() {
    let Some(mut machine) = here() else { return };
    let tiles = noise(1, 0, 8192);
    for dimensions in shapes() {
        let trial = machine.with_tiles(
            Trial::of(Instruction::Tilezero5),
            &tile5(dimensions),
            &tiles,
        );
        let trial = machine.run(trial);
        assert_eq!(trial.fault(), None);
        let mut expected = tiles.clone();
        expected[5 * 1024..][..1024].fill(0);
        assert!(machine.component(TILEDATA) == expected, "{dimensions:?}");
    }
}

#[test]
fn a_sib_byte_without_an_index_means_stride_zero() {
    let Some(mut machine) = here() else { return };
    let (tiles, memory) = (noise(1, 0, 8192), noise(2, 0, 2048));
    let trial = machine.with_tiles(
        Trial::of(Instruction::TileloaddNoIndex),
        &tile5((16, 64)),
        &tiles,
    );
    machine.set_operand(&memory);
    let trial = machine.run(trial.on_address(machine.operand.address(), 64));
    assert_eq!(trial.fault(), None, "TILELOADD");
    assert!(
        machine
            .tile(5)
            .chunks_exact(64)
            .all(|row| row == &memory[..64])
    );

    let trial = machine.with_tiles(
        Trial::of(Instruction::TilestoredNoIndex),
        &tile5((16, 64)),
        &tiles,
    );
    let trial = machine.run(trial.on_address(machine.operand.address(), 64));
    assert_eq!(trial.fault(), None, "TILESTORED");
    assert_eq!(machine.operand()[..64], tiles[5 * 1024 + 15 * 64..][..64]);
    assert_eq!(machine.operand()[64..128], memory[64..128]);
}

#[test]
fn tileloadd_needs_a_sib_byte() {
    let Some(mut machine) = here() else { return };
    let trial = machine.with_tiles(
        Trial::of(Instruction::TileloaddNoSib),
        &tile5((16, 64)),
        &[1; 8192],
    );
    let trial = machine.run(trial.on(machine.operand));
    assert_eq!(trial.fault(), Some(Fault::SIGILL));
}

/// Runs an instruction on tile 5 with this configuration, and gives how it is refused.
fn refusal<P: Processor>(
    machine: &mut Machine<P>,
    instruction: Instruction,
    config: &Config,
) -> Option<Fault> {
    let tiles = noise(1, 0, 8192);
    let trial = machine.with_tiles(Trial::of(instruction), config, &tiles);
    let trial = machine.run(trial.on_address(machine.operand.address(), 64));
    if trial.fault().is_some() {
        assert!(
            machine.component(TILEDATA) == tiles,
            "a refused {instruction:?} changes tiles"
        );
        assert_eq!(
            machine.component(TILECFG),
            config,
            "a refused {instruction:?} changes the configuration"
        );
    }
    trial.fault()
}

#[test]
fn tiles_that_are_not_configured_are_ud() {
    let Some(mut machine) = here() else { return };
    let mut tiles = [(16, 64); 8];
    tiles[5] = (0, 0);
    for instruction in [
        Instruction::Tileloadd5,
        Instruction::Tileloaddt1,
        Instruction::Tilestored5,
        Instruction::Tilezero5,
    ] {
        assert_eq!(
            refusal(&mut machine, instruction, &config(&tiles)),
            Some(Fault::SIGILL),
            "{instruction:?}"
        );
        assert_eq!(
            refusal(&mut machine, instruction, &config(&[(16, 64); 8])),
            None,
            "{instruction:?}"
        );
        let trial = Trial::of(instruction).starting_from(machine.load, 0);
        let trial = machine.run(trial.on_address(machine.operand.address(), 64));
        assert_eq!(
            trial.fault(),
            Some(Fault::SIGILL),
            "{instruction:?} in the initial state"
        );
    }
}

#[test]
fn a_start_row_behind_the_tile_is_ud() {
    let Some(mut machine) = here() else { return };
    for (start, fault) in [
        (6, None),
        (7, Some(Fault::SIGILL)),
        (16, Some(Fault::SIGILL)),
        (255, Some(Fault::SIGILL)),
    ] {
        let mut config = tile5((7, 64));
        config[1] = start;
        for instruction in [Instruction::Tileloadd5, Instruction::Tilestored5] {
            assert_eq!(
                refusal(&mut machine, instruction, &config),
                fault,
                "{instruction:?} from row {start}"
            );
        }
        assert_eq!(refusal(&mut machine, Instruction::Tilezero5, &config), None);
    }
}

#[test]
fn a_load_starts_at_its_start_row_and_resets_it() {
    let Some(mut machine) = here() else { return };
    let (tiles, memory) = (noise(1, 0, 8192), noise(2, 0, 2048));
    for start in 0..12 {
        let mut config = tile5((12, 40));
        config[1] = start;
        let trial = machine.with_tiles(Trial::of(Instruction::Tileloadd5), &config, &tiles);
        machine.set_operand(&memory);
        let trial = machine.run(trial.on_address(machine.operand.address(), 64));
        assert_eq!(trial.fault(), None);
        let mut expected = shaped(&rows_at(&memory, 64), shape((12, 40)));
        for row in 0..usize::from(start) {
            expected[row * 64..][..40].copy_from_slice(&tiles[5 * 1024 + row * 64..][..40]);
        }
        let tile = machine.tile(5);
        for row in 0..16 {
            // Rows before the start keep their bytes; what is behind the columns of those is not said.
            let columns = if row < usize::from(start) { 40 } else { 64 };
            assert_eq!(
                tile[row * 64..][..columns],
                expected[row * 64..][..columns],
                "row {row} from {start}"
            );
        }
        assert_eq!(machine.component(TILECFG)[1], 0, "start_row");
    }
}

#[test]
fn a_load_that_faults_can_be_restarted() {
    let Some(mut machine) = here() else { return };
    // The third row lies in a page that nobody has: the null page is never mapped.
    let readable = machine.operand.address();
    let trial = machine.with_tiles(
        Trial::of(Instruction::Tileloadd5),
        &tile5((16, 64)),
        &[1; 8192],
    );
    let memory = noise(2, 0, 2048);
    machine.set_operand(&memory);
    // Rows 0 and 1 are at the operand and half way to zero and back around the top: a stride of
    // minus the address puts row 1 at zero.
    let trial = machine.run(trial.on_address(readable, readable.wrapping_neg()));
    assert_eq!(trial.fault(), Some(Fault::SIGSEGV));
    assert_eq!(
        machine.component(TILECFG)[1],
        1,
        "start_row is the row that faulted"
    );
    assert_eq!(machine.tile(5)[..64], memory[..64], "row 0 has been loaded");
    assert_eq!(machine.in_use() & AMX, AMX);
}

#[test]
fn rows_that_are_no_dwords_are_ud() {
    let Some(mut machine) = here() else { return };
    for columns in [1, 2, 3, 5, 63] {
        for instruction in [Instruction::Tileloadd5, Instruction::Tilestored5] {
            let fault = refusal(&mut machine, instruction, &tile5((4, columns)));
            assert_eq!(
                fault,
                Some(Fault::SIGILL),
                "{instruction:?} of {columns} bytes"
            );
        }
        assert_eq!(
            refusal(&mut machine, Instruction::Tilezero5, &tile5((4, columns))),
            None
        );
    }
}
