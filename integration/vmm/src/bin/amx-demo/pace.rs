//! Makes a guest run long enough to be stopped often, on a host of any speed.
//!
//! The payloads spend their time in PAUSE, which takes a hundred cycles on some processors and next
//! to nothing in an emulator.

use std::time::Duration;

use anyhow::bail;

use crate::child;
use crate::fleet::Plan;
use crate::job::{Job, Outcome};

/// What a guest should take from its first round to its last.
const WANTED: Duration = Duration::from_millis(50);
/// A guest is not made slower than this, whatever the clock says.
const LIMIT: u64 = 100;

/// Runs one guest without stopping it, and says how many times as long it has to wait.
pub(crate) fn slower(plan: &Plan) -> anyhow::Result<u64> {
    let job = Job {
        kind: plan.kind.name().to_owned(),
        seed: plan.seed,
        rounds: plan.kind.default_rounds(),
        slower: 1,
        vcpus: 1,
        from: None,
        lose: None,
        stop: None,
    };
    let answer = child::run(&plan.kvm, &job)?;
    match answer.outcome {
        Outcome::Finished { .. } => {}
        Outcome::Faulted { error } | Outcome::Failed { error } => {
            bail!("the first guest did not come to its end: {error}")
        }
        Outcome::Saved(_) => bail!("the first guest was stopped"),
    }
    let took = answer
        .times
        .run
        .unwrap_or(WANTED)
        .max(Duration::from_micros(1));
    let times = WANTED.as_micros().div_ceil(took.as_micros().max(1));
    Ok(u64::try_from(times).unwrap_or(LIMIT).clamp(1, LIMIT))
}
