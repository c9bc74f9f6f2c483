//! The same world and the same claims beyond the checker's bounds: more vCPUs, more of everything, long
//! random runs.

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use vcpu_realloc::fpswitch::Strategy as Switch;

use super::checker::Machine;
use super::properties::{ALWAYS, SOMETIMES};
use super::setup::{Bounds, Host, Policy, Program, Setup};
use super::trace;
use super::world::{Step, VmmStep};

fn many() -> Bounds {
    Bounds {
        denials: 6,
        failures: 12,
        moves: 6,
        resets: 6,
        inits: 6,
        migrations: 12,
    }
}

/// Runs choices on a setup until something breaks.
fn run(setup: &Setup, choices: &[u16], reached: &mut BTreeSet<&'static str>) -> Result<(), String> {
    let mut world = Machine::new(setup.clone()).start();
    let mut path = Vec::new();
    let mut steps = Vec::new();
    for &choice in choices {
        steps.clear();
        world.steps(setup, &mut steps);
        if steps.is_empty() {
            break;
        }
        // What disturbs is rare, or no run would get far.
        if choice % 8 != 0 && steps.iter().any(|step| !disturbs(*step)) {
            steps.retain(|step| !disturbs(*step));
        }
        let step = steps[usize::from(choice / 8) % steps.len()];
        let Some(next) = world.after(setup, step) else {
            continue;
        };
        path.push((std::mem::replace(&mut world, next), Some(step)));
        for claim in SOMETIMES {
            if !reached.contains(claim.name) && (claim.holds)(setup, &world) {
                reached.insert(claim.name);
            }
        }
        for claim in ALWAYS {
            if !(claim.holds)(setup, &world) {
                path.push((world, None));
                return Err(format!("{}\n{}", claim.name, trace::lines(setup, &path)));
            }
        }
    }
    Ok(())
}

fn disturbs(step: Step) -> bool {
    use VmmStep::{Init, LateGrant, Reset};
    matches!(
        step,
        Step::Move(_)
            | Step::MoveForeign
            | Step::Migrate(..)
            | Step::Crafted
            | Step::Vmm(_, Reset | Init | LateGrant)
    )
}

/// Runs of a setup, from a fixed seed; they shrink to the shortest that fails.
fn runs(
    setup: &Setup,
    steps: usize,
    cases: u32,
    max_shrink_iters: u32,
) -> Result<BTreeSet<&'static str>, String> {
    let reached = RefCell::new(BTreeSet::new());
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let choices = prop::collection::vec(any::<u16>(), steps);
    TestRunner::new_with_rng(config, rng)
        .run(&choices, |choices| {
            run(setup, &choices, &mut reached.borrow_mut()).map_err(TestCaseError::fail)
        })
        .map_err(|error| error.to_string())?;
    Ok(reached.into_inner())
}

fn holds(setup: Setup, cases: u32) {
    let reached =
        runs(&setup, 1_500, cases, 2_000).unwrap_or_else(|error| panic!("{setup:?}: {error}"));
    println!(
        "reached {} of {}: {reached:?}",
        reached.len(),
        SOMETIMES.len()
    );
    for must in [
        "a guest uses tiles",
        "tiles are used after a growth that failed and was retried",
        "tiles are used after a denial",
        "tiles are used after a reset",
        "tiles are used after an INIT",
    ] {
        assert!(
            reached.contains(must),
            "no run of {setup:?} reached: {must}"
        );
    }
}

#[test]
fn long_runs_of_four_vcpus_on_kvm() {
    let programs = [Program::Linux, Program::Any, Program::Linux, Program::Any];
    for policy in [Policy::Vm, Policy::Vcpu] {
        holds(
            Setup {
                policy,
                bounds: many(),
                contents: 200,
                ..Setup::new(&programs, Host::Kvm { fixed: true })
            },
            64,
        );
    }
}

#[test]
fn long_runs_of_three_vcpus_on_kvm_without_the_fix() {
    // Not `Any`: see the traces, of a guest that enables AMX while XFD is clear.
    let programs = [Program::Linux; 3];
    holds(
        Setup {
            bounds: many(),
            contents: 200,
            ..Setup::new(&programs, Host::Kvm { fixed: false })
        },
        64,
    );
}

#[test]
fn long_runs_of_four_vcpus_on_hypervisors_with_options_1_and_2() {
    let programs = [Program::Linux, Program::Lazy, Program::Any, Program::Lazy];
    for strategy in [Switch::AtExit, Switch::AroundSave] {
        holds(
            Setup {
                bounds: many(),
                contents: 200,
                ..Setup::new(&programs, Host::Own(strategy))
            },
            64,
        );
    }
}

/// The random runs see what the checker sees: none of them is blind.
#[test]
fn long_runs_find_what_a_missing_protection_lets_through() {
    for mutant in super::mutants::all() {
        // More of what it needs, and nothing else: a run is short of time for all at once.
        let Bounds {
            denials,
            failures,
            moves,
            resets,
            inits,
            migrations,
        } = mutant.setup.bounds;
        let bounds = Bounds {
            denials: 10 * denials,
            failures: 10 * failures,
            // A move gives everything another chance.
            moves: 10 * moves.max(3),
            resets: 10 * resets,
            inits: 10 * inits,
            migrations: 10 * migrations,
        };
        let setup = Setup {
            bounds,
            ..mutant.setup.clone()
        };
        assert!(
            runs(&setup, 300, 30_000, 0).is_err(),
            "no random run breaks anything without it: {}",
            mutant.name
        );
    }
}
