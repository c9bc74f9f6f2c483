//! One process of the chain: restore, run, stop, save.

use amx_vmm::words::in_words;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use amx_guest::{Kind, Workload};
use amx_vmm::{BusError, Console, Ended, Host, RunError, Snapshot, Vm, file};
use anyhow::{Context, bail};
use xsave_state::{ComponentId, ExtendedState, Image, XFeatures};

use crate::armed;
use crate::job::{Answer, Job, Loss, Outcome, Sizes, Stop, Times};

/// No guest of the demo runs longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Reads the job from standard input, does it, and writes the answer to standard output.
pub(crate) fn main(kvm: &str) -> anyhow::Result<u8> {
    let job: Job = serde_json::from_reader(io::stdin()).context("the job")?;
    let mut times = Times::default();
    let outcome = run(kvm, &job, &mut times).unwrap_or_else(|error| Outcome::Failed {
        error: in_words(error.as_ref()),
    });
    let answer = Answer { times, outcome };
    serde_json::to_writer(io::stdout(), &answer).context("the answer")?;
    Ok(crate::GOOD)
}

fn run(kvm: &str, job: &Job, times: &mut Times) -> anyhow::Result<Outcome> {
    let host = Host::probe_at(kvm)?;
    if job.kind == armed::NAME {
        return armed::leg(&host, job, times);
    }
    let Some(kind) = Kind::parse(&job.kind) else {
        bail!("there is no payload {}", job.kind);
    };
    let workloads: Vec<Workload> = (0..u64::from(job.vcpus))
        .map(|vcpu| Workload::new(kind, job.seed.wrapping_add(vcpu), job.rounds).slower(job.slower))
        .collect();
    let mut vm = match &job.from {
        None => Vm::boot(&host, kind, &workloads)?,
        Some(path) => restore(&host, path, job.lose, times)?,
    };
    let console = Console::default();
    let limit = match &job.stop {
        Some(stop) => Duration::from_micros(stop.after_micros),
        None => LIMIT,
    };
    loop {
        let ended = match timed(&mut times.run, || vm.run(&console, limit)) {
            Err(RunError::Bus(error @ BusError::GuestFault { .. })) => {
                let error = error.to_string();
                return Ok(Outcome::Faulted { error });
            }
            ended => ended?,
        };
        match (ended, &job.stop) {
            (Ended::Stopped, Some(stop)) => {
                let snapshot = timed(&mut times.capture, || vm.capture(&host))?;
                if !stop.midway || snapshot.is_midway(&workloads) {
                    return save(&snapshot, stop, times);
                }
            }
            (Ended::Halted, _) => return finish(&vm, &workloads),
            _ => bail!("the guest did not come to its end in {} s", LIMIT.as_secs()),
        }
    }
}

/// The VM of a snapshot file, without what is to be left out.
pub(crate) fn restore(
    host: &Host,
    path: &Path,
    loss: Option<Loss>,
    times: &mut Times,
) -> anyhow::Result<Vm> {
    let bytes = timed(&mut times.read, || file::read(path))?;
    let snapshot = timed(&mut times.check, || -> anyhow::Result<_> {
        let snapshot = Snapshot::from_bytes(&bytes)?;
        snapshot.fit(host)?;
        Ok(snapshot)
    })?;
    let snapshot = lose(snapshot, loss)?;
    Ok(timed(&mut times.restore, || Vm::restore(host, &snapshot))?)
}

pub(crate) fn save(snapshot: &Snapshot, stop: &Stop, times: &mut Times) -> anyhow::Result<Outcome> {
    let bytes = timed(&mut times.write, || {
        let bytes = snapshot.to_bytes();
        file::write(&stop.to, &bytes).map(|()| bytes)
    })?;
    let extended = snapshot.vcpus().first().map(|vcpu| vcpu.extended());
    let in_use = extended.map(|e| e.image().xstate_bv()).unwrap_or_default();
    Ok(Outcome::Saved(Sizes {
        file: bytes.len(),
        area: extended.map_or(0, |e| e.layout().standard_size_of(in_use)),
        in_use: in_use.bits(),
        xfd: extended.map_or(0, |e| e.registers().xfd.bits()),
        xfd_err: extended.map_or(0, |e| e.registers().xfd_err.bits()),
        pages: snapshot.memory().len(),
    }))
}

fn finish(vm: &Vm, workloads: &[Workload]) -> anyhow::Result<Outcome> {
    let wrong = (0..)
        .zip(workloads)
        .map(|(index, workload)| {
            let area = vm.read_area(index)?;
            let differences = workload.check(&area);
            Ok(differences.into_iter().map(|d| d.register).collect())
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(Outcome::Finished { wrong })
}

/// The same snapshot as it would be if a VMM forgot `loss`.
fn lose(snapshot: Snapshot, loss: Option<Loss>) -> anyhow::Result<Snapshot> {
    let Some(loss) = loss else {
        return Ok(snapshot);
    };
    let mut error = None;
    let snapshot = snapshot.map_extended(|extended| {
        without(extended, loss).unwrap_or_else(|cause| {
            error = Some(cause);
            extended.clone()
        })
    });
    match error {
        Some(error) => Err(error),
        None => Ok(snapshot),
    }
}

fn without(
    extended: &ExtendedState<'static>,
    loss: Loss,
) -> anyhow::Result<ExtendedState<'static>> {
    let image = extended.image();
    let mut registers = extended.registers();
    let image = match loss {
        Loss::Xfd => {
            registers.xfd = XFeatures::empty();
            registers.xfd_err = XFeatures::empty();
            image.clone()
        }
        Loss::Everything => Image::initial(image.layout()),
        Loss::Component(number) => {
            let Some(id) = ComponentId::new(number) else {
                bail!("there is no component {number}");
            };
            image.clone().without(id.bit())
        }
        Loss::Mxcsr => {
            let mut area = image.as_bytes().to_vec();
            let reset = 0x1f80u32.to_le_bytes();
            for (byte, new) in area.iter_mut().skip(24).zip(reset) {
                *byte = new;
            }
            Image::parse(&area, image.layout())?.into_owned()
        }
    };
    Ok(ExtendedState::new(image, registers)?)
}

pub(crate) fn timed<T>(time: &mut Option<Duration>, step: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = step();
    *time = Some(start.elapsed());
    result
}
