//! Ratios between what takes turns in this run, so that both sides meet the same machine.

use std::time::{Duration, Instant};

/// How often each side takes its turn.
const TURNS: usize = 2_000;

/// Median time of one side over that of the other.
pub(crate) struct Ratio {
    name: String,
    value: f64,
    at_most: Option<f64>,
}

impl Ratio {
    /// Measures both sides; a turn is `calls` calls.
    pub(crate) fn in_turns(
        name: &str,
        calls: usize,
        mut measured: impl FnMut(),
        mut against: impl FnMut(),
    ) -> Self {
        let mut times = [Vec::with_capacity(TURNS), Vec::with_capacity(TURNS)];
        for _ in 0..TURNS {
            times[0].push(time(calls, &mut measured));
            times[1].push(time(calls, &mut against));
        }
        let [measured, against] = times.map(|mut times| {
            times.sort_unstable();
            times[TURNS / 2].as_secs_f64()
        });
        Self {
            name: name.into(),
            value: measured / against,
            at_most: None,
        }
    }

    /// With a goal, which is told and not asserted: machines are noisy.
    pub(crate) fn at_most(mut self, goal: f64) -> Self {
        self.at_most = Some(goal);
        self
    }
}

fn time(calls: usize, function: &mut impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..calls {
        function();
    }
    start.elapsed()
}

/// One line for each, with its goal where it has one.
pub(crate) fn print(ratios: &[Ratio]) {
    println!("\nmedian time of one side over the other's, in turns:");
    for Ratio {
        name,
        value,
        at_most,
    } in ratios
    {
        let goal = match at_most {
            Some(goal) if value <= goal => format!("  (at most {goal}: reached)"),
            Some(goal) => format!("  (at most {goal}: NOT reached)"),
            None => String::new(),
        };
        println!("  {value:6.3}  {name}{goal}");
    }
}
