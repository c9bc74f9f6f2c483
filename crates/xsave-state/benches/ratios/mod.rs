//! Ratios between what takes turns in this run, so that both sides meet the same machine.
#![allow(dead_code, reason = "each benchmark uses a part")]

use std::time::{Duration, Instant};

/// How often each side takes its turn; less often where it is to be quick, as under emulation.
fn turns() -> usize {
    if std::env::args().any(|argument| argument == "--quick") {
        100
    } else {
        2_000
    }
}

/// What is told of a ratio, and not asserted: machines are noisy.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    None,
    AtMost(f64),
    AtLeast(f64),
}

/// Median time of one side over that of the other.
pub(crate) struct Ratio {
    name: String,
    value: f64,
    goal: Goal,
}

impl Ratio {
    /// Measures both sides; a turn is `calls` calls.
    pub(crate) fn in_turns(
        name: &str,
        calls: usize,
        measured: impl FnMut(),
        against: impl FnMut(),
    ) -> Self {
        Self::in_turns_of(turns(), name, calls, measured, calls, against)
    }

    /// The same for two sides of which one takes much longer: each has its own number of calls. To drop what is
    /// `measured` making is not measured.
    pub(crate) fn in_turns_of<T>(
        turns: usize,
        name: &str,
        measured_calls: usize,
        mut measured: impl FnMut() -> T,
        against_calls: usize,
        mut against: impl FnMut(),
    ) -> Self {
        let mut times = [Vec::with_capacity(turns), Vec::with_capacity(turns)];
        for _ in 0..turns {
            times[0].push(time(measured_calls, &mut measured));
            times[1].push(time(against_calls, &mut against));
        }
        let [measured, against] = times.map(|mut times| {
            times.sort_unstable();
            times[turns / 2].as_secs_f64()
        });
        let calls = against_calls as f64 / measured_calls as f64;
        Self::of(name, measured / against * calls, Goal::None)
    }

    /// A ratio of something else than times.
    pub(crate) fn of(name: &str, value: f64, goal: Goal) -> Self {
        Self {
            name: name.into(),
            value,
            goal,
        }
    }

    /// With a goal.
    pub(crate) fn with(mut self, goal: Goal) -> Self {
        self.goal = goal;
        self
    }

    pub(crate) fn at_most(self, goal: f64) -> Self {
        self.with(Goal::AtMost(goal))
    }
}

fn time<T>(calls: usize, function: &mut impl FnMut() -> T) -> Duration {
    let mut made = Vec::with_capacity(calls);
    let start = Instant::now();
    for _ in 0..calls {
        made.push(function());
    }
    let time = start.elapsed();
    drop(made);
    time
}

/// One line for each, with its goal where it has one.
pub(crate) fn print(ratios: &[Ratio]) {
    println!("\nmedian time of one side over the other's, in turns:");
    for Ratio { name, value, goal } in ratios {
        let (words, goal, reached) = match *goal {
            Goal::None => ("", 0.0, true),
            Goal::AtMost(goal) => ("at most", goal, *value <= goal),
            Goal::AtLeast(goal) => ("at least", goal, *value >= goal),
        };
        let verdict = if reached { "reached" } else { "NOT reached" };
        let goal = match words {
            "" => String::new(),
            words => format!("  ({words} {goal}: {verdict})"),
        };
        println!("  {value:8.3}  {name}{goal}");
    }
}
