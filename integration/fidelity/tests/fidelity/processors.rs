//! Several processors: where they are, and state that goes from one to another. With one, they are few.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use amx_fidelity::component::{AMX, TILECFG, TILEDATA, TILEDATA_BIT};
use amx_fidelity::cpuid::cpuid;
use amx_fidelity::pattern::noise;
use amx_fidelity::processors;
use amx_fidelity::sdm::tilecfg::config;
use amx_fidelity::trial::{Fault, Instruction, Trial};

use crate::machine::{guest, here};

/// SDM vol. 2, CPUID, leaf 0BH: no domain has more processors than it says.
#[test]
fn processors_are_where_leaf_0b_says() {
    std::thread::spawn(|| {
        let mut domains: BTreeMap<(u32, u32), (u32, u32)> = BTreeMap::new();
        for cpu in processors::allowed() {
            processors::go_to(cpu);
            for level in 0..8 {
                let [shift, room, kind, id] = cpuid(0xb, level);
                if kind >> 8 & 0xff == 0 {
                    break;
                }
                let domain = domains.entry((level, id >> (shift & 31))).or_default();
                *domain = (domain.0 + 1, room & 0xffff);
            }
        }
        for ((level, id), (there, room)) in domains {
            assert!(
                there <= room,
                "level {level}, domain {id}: {there} processors of {room}"
            );
        }
    })
    .join()
    .unwrap();
}

/// Runs this as often as `turns` says, each time on another processor than before, if there is one.
fn on_one_after_the_other(turns: usize, first: usize, mut run: impl FnMut(usize)) {
    let all = processors::allowed();
    for turn in 0..turns {
        processors::go_to(all[(first + turn) % all.len()]);
        run(turn);
    }
}

/// Tiles, and IA32_XFD, belong to a task and to a vCPU, wherever these run; and each processor has its own
/// registers, in which others' values were before.
#[test]
fn tiles_and_xfd_go_with_their_owners_from_processor_to_processor() {
    let (Some(_), Some(_)) = (here(), guest()) else {
        return;
    };
    let (shapes, turns) = (config(&[(16, 64); 8]), 200);
    let finished = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (finished, shapes) = (&finished, &shapes);
        for seed in 0..2_u8 {
            scope.spawn(move || {
                let mut machine = here().unwrap();
                let tiles = noise(20 + seed, 0, 8192);
                on_one_after_the_other(turns, seed.into(), |_| {
                    let trial = Trial::of(Instruction::Yield);
                    let trial = machine.with_tiles(trial, shapes, &tiles);
                    assert_eq!(machine.run(trial).xinuse() & AMX, AMX);
                    assert!(machine.component(TILEDATA) == tiles, "task {seed}");
                });
                finished.fetch_add(1, Ordering::Relaxed);
            });
            scope.spawn(move || {
                let mut machine = guest().unwrap();
                let tiles = noise(30 + seed, 0, 8192);
                on_one_after_the_other(turns, seed.into(), |turn| {
                    // Armed in every second turn: for one vCPU in those in which it is not for the other.
                    let armed = (turn + usize::from(seed)) % 2 == 0;
                    let xfd = if armed { TILEDATA_BIT } else { 0 };
                    let trial = Trial::of(Instruction::Tilezero5);
                    let trial = machine.with_tiles(trial, shapes, &tiles).with_xfd(xfd);
                    let trial = machine.run(trial);
                    let expected = if armed {
                        (Some(Fault::NM), TILEDATA_BIT)
                    } else {
                        (None, 0)
                    };
                    assert_eq!(
                        (trial.fault(), trial.xfd_err()),
                        expected,
                        "vCPU {seed}, {turn}"
                    );
                    assert_eq!(machine.component(TILECFG), *shapes, "vCPU {seed}, {turn}");
                    // While it is armed, KVM saves no tiles when it takes the vCPU off its processor.
                    if !armed {
                        let mut after = tiles.clone();
                        after[5 * 1024..6 * 1024].fill(0);
                        assert!(machine.component(TILEDATA) == after, "vCPU {seed}, {turn}");
                    }
                });
                finished.fetch_add(1, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(finished.into_inner(), 4);
}
