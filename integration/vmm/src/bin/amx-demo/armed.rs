//! XFD armed, and in the middle of an #NM: the two moments that a snapshot without IA32_XFD and
//! IA32_XFD_ERR loses.

use std::path::Path;

use amx_guest::{Kind, workload};
use amx_vmm::{Doorbell, Ended, Host, Vm};
use anyhow::bail;
use serde::Serialize;
use xsave_state::XFeatures;

use crate::child;
use crate::fleet::Plan;
use crate::job::{Job, Loss, Outcome, Sizes, Stop, Times};
use crate::leg::{self, LIMIT, timed};

/// The payload's name in a [`Job`].
pub(crate) const NAME: &str = "armed";

/// One moment at which the guest was moved, or the end that it came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Moment {
    pub(crate) what: &'static str,
    pub(crate) found: String,
    /// XFD was left out, so that the guest must see it.
    pub(crate) control: bool,
    pub(crate) good: bool,
}

/// One process: restores or boots the XFD payload, and runs it to the doorbell or to its end.
pub(crate) fn leg(host: &Host, job: &Job, times: &mut Times) -> anyhow::Result<Outcome> {
    let mut vm = match &job.from {
        None => Vm::boot_armed(host)?,
        Some(path) => leg::restore(host, path, job.lose, times)?,
    };
    match (vm.run(&Doorbell::default(), LIMIT)?, &job.stop) {
        (Ended::Stopped, Some(stop)) => {
            let snapshot = timed(&mut times.capture, || vm.capture(host))?;
            leg::save(&snapshot, stop, times)
        }
        (Ended::Halted, _) => {
            let wrong = workload::check_armed(&vm.read_area(0)?);
            let names = wrong.into_iter().map(|difference| difference.register);
            Ok(Outcome::Finished {
                wrong: vec![names.collect()],
            })
        }
        _ => bail!("the XFD payload did not come to its end"),
    }
}

/// Moves the XFD payload at both moments, and once more without its XFD. Nothing where the guests
/// have no tiles.
pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Moment>> {
    if plan.kind != Kind::Tiles {
        return Ok(Vec::new());
    }
    let file = |name: &str| plan.directory.join(name);
    let (armed, in_nm, unused) = (file("armed"), file("in-nm"), file("unused"));
    let tiles = XFeatures::XTILEDATA.bits();

    let mut moments = Vec::new();
    let first = saved(process(plan, None, None, &armed)?)?;
    moments.push(Moment {
        what: "XFD armed",
        found: registers(&first),
        control: false,
        good: (first.xfd, first.xfd_err) == (tiles, 0) && first.in_use & tiles == 0,
    });
    let second = saved(process(plan, Some(&armed), None, &in_nm)?)?;
    moments.push(Moment {
        what: "in the #NM",
        found: registers(&second),
        control: false,
        good: (second.xfd, second.xfd_err) == (tiles, tiles) && second.in_use & tiles == 0,
    });
    let wrong = finished(process(plan, Some(&in_nm), None, &unused)?)?;
    moments.push(Moment {
        what: "at the end",
        found: verdict(&wrong),
        control: false,
        good: wrong.is_empty(),
    });
    for (what, from) in [
        ("armed, XFD left out", &armed),
        ("in the #NM, XFD left out", &in_nm),
    ] {
        let wrong = finished(process(plan, Some(from), Some(Loss::Xfd), &unused)?)?;
        moments.push(Moment {
            what,
            found: verdict(&wrong),
            control: true,
            good: !wrong.is_empty(),
        });
    }
    Ok(moments)
}

fn process(
    plan: &Plan,
    from: Option<&Path>,
    lose: Option<Loss>,
    to: &Path,
) -> anyhow::Result<Outcome> {
    let job = Job {
        kind: NAME.to_owned(),
        seed: 0,
        rounds: 1,
        slower: 1,
        vcpus: 1,
        from: from.map(Path::to_owned),
        lose,
        stop: Some(Stop {
            after_micros: 0,
            midway: false,
            to: to.to_owned(),
        }),
    };
    Ok(child::run(&plan.kvm, &job)?.outcome)
}

fn saved(outcome: Outcome) -> anyhow::Result<Sizes> {
    match outcome {
        Outcome::Saved(sizes) => Ok(sizes),
        other => bail!("the XFD payload was not stopped: {other:?}"),
    }
}

fn finished(outcome: Outcome) -> anyhow::Result<Vec<String>> {
    match outcome {
        Outcome::Finished { wrong } => Ok(wrong.into_iter().flatten().collect()),
        other => bail!("the XFD payload did not come to its end: {other:?}"),
    }
}

fn registers(sizes: &Sizes) -> String {
    let name = XFeatures::from_bits_retain;
    let tiles = if name(sizes.in_use).contains(XFeatures::XTILEDATA) {
        "live"
    } else {
        "initial"
    };
    format!(
        "IA32_XFD {}, IA32_XFD_ERR {}, tiles {tiles}",
        name(sizes.xfd),
        name(sizes.xfd_err)
    )
}

fn verdict(wrong: &[String]) -> String {
    if wrong.is_empty() {
        "the guest saw IA32_XFD_ERR, and its tile went through".to_owned()
    } else {
        format!("the guest found wrong: {}", wrong.join(", "))
    }
}
