//! The world as a model of `stateright`.

use std::thread;

use stateright::{Checker, HasDiscoveries, Model, Path, Property};
use vcpu_realloc::Gate;
use xsave_state::{Component, ComponentId, Layout, Palette};

use super::properties::{ALWAYS, SOMETIMES};
use super::setup::Setup;
use super::world::{Step, World};

#[derive(Clone)]
pub(crate) struct Machine {
    pub setup: Setup,
    gate: Gate,
}

impl Machine {
    pub(crate) fn new(setup: Setup) -> Self {
        let gate = Gate::new(&layout());
        Self { setup, gate }
    }

    pub(crate) fn start(&self) -> World {
        World::new(&self.setup, &self.gate)
    }
}

/// A guest with x87, SSE and AMX.
pub(crate) fn layout() -> Layout {
    Layout::from_parts(
        [
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )
    .unwrap()
}

/// The checker's predicates are plain functions, so each claim has one of its own.
macro_rules! properties {
    ($kind:ident, $claims:ident: $($number:literal)*) => {
        [$(Property::$kind($claims[$number].name, |machine: &Machine, world: &World| {
            ($claims[$number].holds)(&machine.setup, world)
        })),*]
    };
}

impl Model for Machine {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.start()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(&self.setup, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        world.after(&self.setup, step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let always = properties!(always, ALWAYS: 0 1 2 3 4 5 6 7);
        let sometimes =
            properties!(sometimes, SOMETIMES: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18);
        assert_eq!(
            (always.len(), sometimes.len()),
            (ALWAYS.len(), SOMETIMES.len())
        );
        always.into_iter().chain(sometimes).collect()
    }
}

/// What a whole search found.
pub(crate) struct Searched {
    pub states: usize,
    /// Names of `SOMETIMES`, in their order.
    pub reached: Vec<&'static str>,
    /// The claims that do not hold.
    pub broken: Vec<(&'static str, Path<World, Step>)>,
}

/// Visits every state.
pub(crate) fn search(setup: Setup) -> Searched {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let checker = Machine::new(setup)
        .checker()
        .threads(threads)
        .spawn_bfs()
        .join();
    let mut found = checker.discoveries();
    Searched {
        states: checker.unique_state_count(),
        reached: SOMETIMES
            .iter()
            .map(|claim| claim.name)
            .filter(|name| found.contains_key(name))
            .collect(),
        broken: ALWAYS
            .iter()
            .filter_map(|claim| Some((claim.name, found.remove(claim.name)?)))
            .collect(),
    }
}

/// The shortest way to a state that breaks a claim, and the claim.
pub(crate) fn counterexample(setup: &Setup) -> Option<(&'static str, Path<World, Step>)> {
    // The checker looks at many states before it stops at a find, and keeps the last: so it is let
    // one level deeper at a time; where that takes long, as deep as it likes, which is a short way, too.
    for depth in (1..40).chain([usize::MAX]) {
        let checker = Machine::new(setup.clone())
            .checker()
            .target_max_depth(depth)
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let mut found = checker.discoveries();
        for claim in ALWAYS {
            if let Some(path) = found.remove(claim.name) {
                return Some((claim.name, path));
            }
        }
        if checker.max_depth().saturating_add(1) < depth {
            return None;
        }
    }
    None
}
