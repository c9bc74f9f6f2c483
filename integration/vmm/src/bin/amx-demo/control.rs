//! The same move with a part of the extended state left out: the result must be seen to be wrong.
//!
//! Without this, a demo that compares nothing would look as good as one that does.

use anyhow::bail;
use serde::Serialize;
use xsave_state::XFeatures;

use crate::child;
use crate::fleet::{self, Plan};
use crate::job::{Job, Loss, Outcome, Sizes, Stop};

/// What became of a guest that lost a part of its state.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Control {
    /// What was left out.
    pub(crate) lost: String,
    /// Whether the guest was expected to come to the right result.
    pub(crate) harmless: bool,
    /// How many registers were wrong at the end.
    pub(crate) wrong_registers: usize,
    /// The exception that it took instead of coming to its end.
    pub(crate) error: Option<String>,
}

impl Control {
    /// Whether it went as it must.
    pub(crate) fn as_expected(&self) -> bool {
        let wrong = self.wrong_registers > 0 || self.error.is_some();
        wrong != self.harmless
    }
}

/// Stops one guest and restores it several times: once whole, once without its extended state, and
/// once without each part.
pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Control>> {
    let file = plan.directory.join("control.snapshot");
    let mut job = Job {
        kind: plan.kind.name().to_owned(),
        seed: plan.seed,
        rounds: plan.kind.default_rounds(),
        slower: plan.slower,
        vcpus: 1,
        from: None,
        lose: None,
        stop: Some(Stop {
            after_micros: 3000,
            midway: true,
            to: file.clone(),
        }),
    };
    let sizes = stop_midway(plan, &mut job)?;
    let in_use = XFeatures::from_bits_retain(sizes.in_use);
    job.from = Some(file);
    job.stop = None;

    let mut cases = vec![
        ("nothing".to_owned(), None),
        ("all of it".to_owned(), Some(Loss::Everything)),
    ];
    let used = in_use & XFeatures::from_bits_retain(plan.kind.components());
    for component in used.components() {
        let loss = Loss::Component(component.number());
        cases.push((component.to_string(), Some(loss)));
    }
    cases.push(("MXCSR".to_owned(), Some(Loss::Mxcsr)));

    let mut controls = Vec::new();
    for (lost, lose) in cases {
        if fleet::interrupted() {
            break;
        }
        job.lose = lose;
        let (wrong_registers, error) = match child::run(&plan.kvm, &job)?.outcome {
            Outcome::Finished { wrong } => (wrong.iter().map(Vec::len).sum(), None),
            Outcome::Faulted { error } => (0, Some(error)),
            // That is no sign that the loss was seen.
            Outcome::Failed { error } => bail!("the control without {lost}: {error}"),
            Outcome::Saved(_) => bail!("the control's guest was stopped twice"),
        };
        controls.push(Control {
            lost,
            harmless: lose.is_none(),
            wrong_registers,
            error,
        });
    }
    Ok(controls)
}

/// Runs a new guest up to its stop. On a busy host it can come to its end before: then a slower one.
fn stop_midway(plan: &Plan, job: &mut Job) -> anyhow::Result<Sizes> {
    const ATTEMPTS: u32 = 6;
    for _ in 0..ATTEMPTS {
        match child::run(&plan.kvm, job)?.outcome {
            Outcome::Saved(sizes) => return Ok(sizes),
            Outcome::Finished { .. } => job.slower = job.slower.saturating_mul(3),
            Outcome::Faulted { error } | Outcome::Failed { error } => {
                bail!("the control's guest could not be stopped: {error}")
            }
        }
    }
    bail!("the control's guest came to its end before it was stopped, {ATTEMPTS} times")
}
