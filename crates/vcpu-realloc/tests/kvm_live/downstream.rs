//! The loops of VMMs, in their shape: each takes one arm. (The shapes are Cloud Hypervisor's and
//! Firecracker's; the code is ours.)

use std::sync::{Arc, Mutex};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vcpu_realloc::kvm::{ExitHandler, HandleError, Handled, Mode, Options};
use vcpu_realloc::{Answer, Request};
use xsave_state::kvm::XsaveBuffer;

use crate::boot::{AMX, XCR0_AMX};
use crate::machine::{ARMED, Command, Machine, Vcpu, guest, host};

type VmmError = String;

fn grant(request: &Request) -> Result<Answer, VmmError> {
    assert_eq!(request.growth.bytes(), 8192);
    Ok(Answer::Grant)
}

/// What the loop above it does next.
#[derive(Debug, PartialEq, Eq)]
enum VmExit {
    Ignore,
    Reset,
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("a write of IA32_XFD: {0}")]
    Gate(HandleError<VmmError>),
    #[error("an exit that nobody handles: {0}")]
    Unexpected(String),
}

/// A vCPU whose `run` tells its loop what to do, as in Cloud Hypervisor's hypervisor crate. Its
/// descriptor is behind a lock.
struct HypervisorVcpu {
    fd: Arc<Mutex<VcpuFd>>,
    handler: ExitHandler,
    buffer: XsaveBuffer,
}

impl HypervisorVcpu {
    fn run(&mut self) -> Result<VmExit, RunError> {
        let mut fd = self.fd.lock().unwrap();
        match fd.run() {
            Ok(run) => match run {
                VcpuExit::IoOut(..) => Ok(VmExit::Ignore),
                VcpuExit::Shutdown | VcpuExit::Hlt => Ok(VmExit::Reset),
                VcpuExit::X86Wrmsr(exit) => self
                    .handler
                    .handle(exit.index, exit.data, &mut fd, &mut self.buffer, &mut grant)
                    .map(|_| VmExit::Ignore)
                    .map_err(RunError::Gate),
                exit => Err(RunError::Unexpected(format!("{exit:?}"))),
            },
            Err(error) if matches!(error.errno(), libc::EAGAIN | libc::EINTR) => Ok(VmExit::Ignore),
            Err(error) => Err(RunError::Unexpected(error.to_string())),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum VcpuEmulation {
    Handled,
    Interrupted,
    Stopped,
}

/// A vCPU that hands the exit on to a function which does not have the descriptor, as Firecracker's:
/// the arm goes in front of that.
struct EmulatedVcpu {
    fd: VcpuFd,
    handler: ExitHandler,
    buffer: XsaveBuffer,
    ports: Vec<u16>,
}

impl EmulatedVcpu {
    fn run_emulation(&mut self) -> Result<VcpuEmulation, RunError> {
        match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR => {
                self.fd.set_kvm_immediate_exit(0);
                Ok(VcpuEmulation::Interrupted)
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => self
                .handler
                .handle(
                    exit.index,
                    exit.data,
                    &mut self.fd,
                    &mut self.buffer,
                    &mut grant,
                )
                .map(|_| VcpuEmulation::Handled)
                .map_err(RunError::Gate),
            exit => handle_exit(&mut self.ports, exit),
        }
    }
}

fn handle_exit(
    ports: &mut Vec<u16>,
    exit: Result<VcpuExit<'_>, kvm_ioctls::Error>,
) -> Result<VcpuEmulation, RunError> {
    match exit {
        Ok(VcpuExit::IoOut(port, _)) => {
            ports.push(port);
            Ok(VcpuEmulation::Handled)
        }
        Ok(VcpuExit::Hlt) => Ok(VcpuEmulation::Stopped),
        exit => Err(RunError::Unexpected(format!("{exit:?}"))),
    }
}

/// A VM of one vCPU that boots and uses AMX where there is any, and the parts of its vCPU.
fn machine() -> Option<(Machine, Vcpu)> {
    let mut machine = Machine::new(1, Options::default())?;
    let amx = host().is_some_and(|(_, _, layout)| !layout.xfd().is_empty());
    if amx {
        let boot = [Command::WriteXfd(ARMED), Command::WriteXcr0(XCR0_AMX)];
        machine.tell(0, &[boot[0], boot[1], AMX[0], Command::Bell(1), AMX[1]]);
    } else {
        machine.tell(0, &[Command::WriteXfd(0), Command::Bell(1)]);
    }
    let vcpu = machine.vcpus.pop().unwrap();
    Some((machine, vcpu))
}

fn check(machine: &mut Machine, handler: &ExitHandler) {
    if handler.gate().has_passed() {
        assert_eq!(machine.gate.mode(), Mode::Lifted);
        assert!(machine.tiles_are_right(0));
    }
    assert_eq!(machine.word(0, guest::GP_COUNT), 0);
}

#[test]
fn in_a_loop_like_cloud_hypervisors() {
    let Some((mut machine, vcpu)) = machine() else {
        return;
    };
    let mut vcpu = HypervisorVcpu {
        fd: Arc::new(Mutex::new(vcpu.fd)),
        handler: vcpu.handler,
        buffer: XsaveBuffer::new(&machine.host),
    };
    while vcpu.run().unwrap() != VmExit::Reset {}
    check(&mut machine, &vcpu.handler);
}

#[test]
fn in_a_loop_like_firecrackers() {
    let Some((mut machine, vcpu)) = machine() else {
        return;
    };
    let mut vcpu = EmulatedVcpu {
        fd: vcpu.fd,
        handler: vcpu.handler,
        buffer: XsaveBuffer::new(&machine.host),
        ports: Vec::new(),
    };
    while vcpu.run_emulation().unwrap() != VcpuEmulation::Stopped {}
    assert_eq!(vcpu.ports, [guest::BELL_PORT]);
    check(&mut machine, &vcpu.handler);
}

#[test]
fn in_a_plain_match() {
    let Some((mut machine, mut vcpu)) = machine() else {
        return;
    };
    let buffer = &mut XsaveBuffer::new(&machine.host);
    let mut writes = 0;
    loop {
        match vcpu.fd.run().unwrap() {
            VcpuExit::X86Wrmsr(exit) => {
                let handler = &mut vcpu.handler;
                let handled = handler
                    .handle(exit.index, exit.data, &mut vcpu.fd, buffer, &mut grant)
                    .unwrap();
                assert!(matches!(handled, Handled::Written { .. }));
                writes += 1;
            }
            VcpuExit::Hlt => break,
            VcpuExit::IoOut(..) => {}
            exit => panic!("{exit:?}"),
        }
    }
    assert!(writes > 0 && writes <= 2);
    check(&mut machine, &vcpu.handler);
}
