//! Lets the vCPUs run until they halt, a device stops them, or a time is up.
//!
//! Each vCPU has a thread while it runs. A vCPU that is stopped has no exit left to complete: an
//! OUT that the guest has executed is neither seen twice nor lost when its state moves on.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::libc::{EAGAIN, EINTR};
use thiserror::Error;
use vcpu_realloc::kvm::HandleError;
use vmm_sys_util::errno;

use crate::bus::{Bus, BusError};
use crate::first_use::{FirstUse, Gate, Wrote};
use crate::kick::{self, Kick, Kickable};
use crate::vm::Vcpu;

/// How many exits one instruction may take to be completed. REP OUTSB takes one per chunk, a memory access
/// one per page and eight bytes, REP MOVS from where no memory is one for each element, up to 1024 of them
/// before KVM looks at `immediate_exit` (arch/x86/kvm/emulate.c, x86_emulate_insn).
const MAX_COMPLETIONS: u32 = 4096;

/// Why the vCPUs do not run any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// All have executed HLT.
    Halted,
    /// The time was up for at least one of them.
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Run,
    Halt,
    /// The guest uses AMX for the first time, and the VMM says to stop.
    Stop,
}

enum Event {
    Started(Kick),
    Ended(Result<Ended, RunError>),
}

/// The gate of a vCPU, where somebody watches.
type Watched<'a> = Option<&'a mut Gate>;

/// Runs `vcpus`, each on a thread of its own, until all halt or `limit` is over.
pub(crate) fn run(
    vcpus: &mut [Vcpu],
    first_use: Option<&mut FirstUse>,
    bus: &impl Bus,
    limit: Duration,
) -> Result<Ended, RunError> {
    let mut gates = first_use.map(|first_use| first_use.gates.iter_mut());
    kick::install().map_err(RunError::Signal)?;
    let stop = AtomicBool::new(false);
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let mut handles = Vec::new();
        for (index, vcpu) in (0..).zip(vcpus.iter_mut()) {
            let (sender, stop) = (sender.clone(), &stop);
            let mut watched = gates.as_mut().and_then(Iterator::next);
            handles.push(scope.spawn(move || {
                // The receiver outlives all threads: it cannot be gone.
                let _ = sender.send(Event::Started(Kick::this_thread()));
                let ended = run_one(&mut vcpu.fd, index, &mut watched, bus, stop);
                let _ = sender.send(Event::Ended(ended));
            }));
        }
        drop(sender);
        let result = supervise(&receiver, handles.len(), &stop, limit);
        // Not joined before: a kick needs the thread to exist.
        drop(handles);
        result
    })
}

/// Waits for all vCPUs, and stops them all when the time is up or one has failed.
fn supervise(
    events: &mpsc::Receiver<Event>,
    vcpus: usize,
    stop: &AtomicBool,
    limit: Duration,
) -> Result<Ended, RunError> {
    let deadline = Instant::now().checked_add(limit);
    let mut kicks: Vec<Kick> = Vec::with_capacity(vcpus);
    let mut left = vcpus;
    let mut result = Ok(Ended::Halted);
    while left > 0 {
        let stopping = stop.load(Ordering::SeqCst);
        let event = match deadline {
            Some(deadline) if !stopping => {
                events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
            _ => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let stop_now;
        match event {
            Ok(Event::Started(kick)) => {
                kicks.push(kick);
                // It may have looked at the flag before the others were stopped.
                stop_now = stopping;
            }
            Ok(Event::Ended(ended)) => {
                left = left.saturating_sub(1);
                // One that failed, or that a device stopped, stops all.
                stop_now = !matches!(ended, Ok(Ended::Halted)) && !stopping;
                result = worse(result, ended);
            }
            Err(RecvTimeoutError::Timeout) => stop_now = true,
            Err(RecvTimeoutError::Disconnected) => return Err(RunError::ThreadDied),
        }
        if stop_now {
            stop.store(true, Ordering::SeqCst);
            for kick in &kicks {
                // A thread that has ended already needs no kick.
                let _ = kick.send();
            }
        }
    }
    result
}

/// What is to be said of both: the first error, or that one of them was stopped.
fn worse(
    first: Result<Ended, RunError>,
    second: Result<Ended, RunError>,
) -> Result<Ended, RunError> {
    match (first, second) {
        (Err(error), _) | (Ok(_), Err(error)) => Err(error),
        (Ok(Ended::Halted), Ok(Ended::Halted)) => Ok(Ended::Halted),
        (Ok(_), Ok(_)) => Ok(Ended::Stopped),
    }
}

fn run_one(
    vcpu: &mut VcpuFd,
    index: u8,
    watched: &mut Watched<'_>,
    bus: &impl Bus,
    stop: &AtomicBool,
) -> Result<Ended, RunError> {
    let mut kickable = Kickable::new(vcpu);
    let mut ended = Ended::Stopped;
    // The flag is set before the kick is sent, and looked at after `immediate_exit` was cleared, so
    // a kick that comes between any two of these steps ends the loop.
    while !stop.load(Ordering::SeqCst) {
        match step(kickable.vcpu(), index, watched, bus)? {
            Some(Next::Run) if bus.stops(index) => break,
            Some(Next::Run) => {}
            Some(Next::Halt) => {
                ended = Ended::Halted;
                break;
            }
            Some(Next::Stop) => break,
            None => kickable.vcpu().set_kvm_immediate_exit(0),
        }
    }
    complete(kickable.vcpu(), index, watched, bus)?;
    Ok(ended)
}

/// Completes what the last exit left pending: KVM takes over the result of a port or memory access
/// when KVM_RUN is called next, and with `immediate_exit` it does nothing else. One instruction can
/// need more than one exit.
fn complete(
    vcpu: &mut VcpuFd,
    index: u8,
    watched: &mut Watched<'_>,
    bus: &impl Bus,
) -> Result<(), RunError> {
    for _ in 0..MAX_COMPLETIONS {
        vcpu.set_kvm_immediate_exit(1);
        if step(vcpu, index, watched, bus)?.is_none() {
            vcpu.set_kvm_immediate_exit(0);
            return Ok(());
        }
    }
    vcpu.set_kvm_immediate_exit(0);
    Err(RunError::NeverCompletes {
        vcpu: index,
        exits: MAX_COMPLETIONS,
    })
}

/// KVM_RUN, and the exit. `None`: interrupted, nothing is pending.
fn step(
    vcpu: &mut VcpuFd,
    index: u8,
    watched: &mut Watched<'_>,
    bus: &impl Bus,
) -> Result<Option<Next>, RunError> {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) if matches!(error.errno(), EINTR | EAGAIN) => return Ok(None),
        Err(error) => return Err(RunError::Run { vcpu: index, error }),
    };
    match exit {
        VcpuExit::IoOut(port, data) => bus.port_write(index, port, data)?,
        VcpuExit::IoIn(port, data) => bus.port_read(index, port, data),
        VcpuExit::MmioWrite(address, data) => bus.memory_write(index, address, data),
        VcpuExit::MmioRead(address, data) => bus.memory_read(index, address, data),
        VcpuExit::Intr => return Ok(None),
        VcpuExit::Hlt => return Ok(Some(Next::Halt)),
        VcpuExit::X86Wrmsr(exit) => {
            let (msr, value) = (exit.index, exit.data);
            let wrote = match watched {
                Some(gate) => gate
                    .write(msr, value, vcpu)
                    .map_err(|error| RunError::FirstUse { vcpu: index, error })?,
                None => Wrote::NotOurs,
            };
            match wrote {
                Wrote::Done => {}
                Wrote::Stopped => return Ok(Some(Next::Stop)),
                Wrote::NotOurs => {
                    let exit = format!("WRMSR of {msr:#x} to {value:#x}");
                    return Err(no_answer(vcpu, index, exit));
                }
            }
        }
        other => {
            let exit = format!("{other:?}");
            return Err(no_answer(vcpu, index, exit));
        }
    }
    Ok(Some(Next::Run))
}

fn no_answer(vcpu: &VcpuFd, index: u8, exit: String) -> RunError {
    let rip = vcpu.get_regs().ok().map(|regs| regs.rip);
    RunError::Exit {
        vcpu: index,
        exit,
        rip: rip.unwrap_or_default(),
    }
}

/// The vCPUs could not run on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The handler of the kick could not be installed.
    #[error("the signal handler that stops vCPUs: {0}")]
    Signal(#[source] errno::Error),
    /// KVM_RUN failed.
    #[error("KVM_RUN of vCPU {vcpu}: {error}")]
    Run {
        /// The vCPU.
        vcpu: u8,
        /// By the kernel.
        error: errno::Error,
    },
    /// KVM gave the vCPU back for a reason that this VMM has no answer to.
    #[error("vCPU {vcpu} left the guest at {rip:#x} with {exit}, which this VMM has no answer to")]
    Exit {
        /// The vCPU.
        vcpu: u8,
        /// The exit.
        exit: String,
        /// The guest's instruction pointer.
        rip: u64,
    },
    /// The guest uses AMX for the first time, or arms it, and that could not be handled.
    #[error("a write of IA32_XFD by vCPU {vcpu}: {error}")]
    FirstUse {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        error: HandleError<Infallible>,
    },
    /// An instruction does not come to its end.
    #[error("vCPU {vcpu} has left the guest {exits} times for one instruction")]
    NeverCompletes {
        /// The vCPU.
        vcpu: u8,
        /// How often.
        exits: u32,
    },
    /// The guest did something after which it cannot go on.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A vCPU's thread ended without a word.
    #[error("a vCPU's thread has died")]
    ThreadDied,
}
