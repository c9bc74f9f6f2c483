//! The VMM: the driver around the real gate, the answers, snapshots, reset and INIT.

use vcpu_realloc::{Action, Event, Gate};
use xsave_state::XFeatures;

use super::kernel::bits;
use super::setup::{Policy, Program, Protection, Setup};
use super::world::{Exit, FOREIGN, Mode, Target, Tiles, Vcpu, VmmStep, World, Write};

fn xcr0(amx: bool) -> XFeatures {
    let always = XFeatures::X87 | XFeatures::SSE;
    if amx { always | XFeatures::AMX } else { always }
}

fn event(write: Write) -> Event {
    match write {
        Write::Xfd(value) => Event::WriteXfd(bits(value)),
        Write::Reserved => Event::WriteXfd(XFeatures::SSE),
        Write::Xcr0(value) => Event::WriteXcr0(xcr0(value)),
    }
}

/// What a snapshot has of one vCPU.
#[derive(Clone, Copy)]
struct Saved {
    xcr0: bool,
    xfd: bool,
    tiles: Tiles,
}

impl Setup {
    /// The default policy promises something about guests that write XFD only to change it.
    pub(crate) fn counts_exits(&self, program: Program) -> bool {
        self.is_kvm() && self.policy == Policy::Vm && program != Program::Any
    }

    pub(crate) fn exits_allowed(&self, program: Program) -> u8 {
        if self.counts_exits(program) { 2 } else { 0 }
    }
}

impl World {
    pub(super) fn vmm_step(&mut self, setup: &Setup, index: usize, step: VmmStep) {
        match step {
            VmmStep::Run => {
                let vcpu = &mut self.vcpus[index];
                if vcpu.exit == Exit::Fault {
                    vcpu.guest.faulted();
                }
                vcpu.exit = Exit::None;
                self.dead |= !vcpu.run(setup);
            }
            VmmStep::Handle => self.vcpus[index].handle(setup),
            VmmStep::Grant => self.grant(setup, index),
            VmmStep::Deny => {
                self.left.denials -= 1;
                let vcpu = &mut self.vcpus[index];
                // Its kernel then believes what is not so, and writes at the next two switches.
                vcpu.exits_left += 2 * u8::from(setup.counts_exits(vcpu.guest.program));
                vcpu.deny(setup);
            }
            VmmStep::Fail => {
                self.left.failures -= 1;
                self.vcpus[index].fail(setup);
            }
            VmmStep::Retry => self.vcpus[index].retry(setup),
            VmmStep::LateGrant => {
                let stale = self.vcpus[index].stale.take();
                if let Some(write) = stale.filter(|_| setup.lacks(Protection::ResetDropsTheWrite)) {
                    // The mutant performs the write that it was asked about.
                    self.vcpus[index].perform_silently(setup, write);
                }
                self.grant(setup, index);
            }
            VmmStep::Reset | VmmStep::Init => {
                let init = step == VmmStep::Init;
                if init {
                    self.left.inits -= 1;
                } else {
                    self.left.resets -= 1;
                }
                let filter = self.filter;
                let vcpu = &mut self.vcpus[index];
                vcpu.restart(setup, init);
                let allowed = setup.exits_allowed(vcpu.guest.program);
                vcpu.exits_left = if filter { allowed } else { 0 };
            }
            VmmStep::Observe => self.vcpus[index].observe(setup),
        }
    }

    /// The VMM has memory: for one vCPU or, by the default policy, for all.
    fn grant(&mut self, setup: &Setup, index: usize) {
        self.promised = true;
        if !setup.lacks(Protection::NoDenialAfterFirstUse) {
            for vcpu in &mut self.vcpus {
                let _ = vcpu.gate.on(Event::GrantedElsewhere(XFeatures::XTILEDATA));
            }
        }
        let everyone = setup.policy == Policy::Vm && !setup.lacks(Protection::AllGrownBeforeLift);
        for (number, vcpu) in self.vcpus.iter_mut().enumerate() {
            if everyone || number == index {
                vcpu.grant(setup);
            }
        }
        let all_passed = self.vcpus.iter().all(|vcpu| vcpu.gate.has_passed());
        let lifts = setup.policy == Policy::Vm && !setup.lacks(Protection::LiftAtFirstUse);
        if self.filter && (lifts || all_passed && setup.policy == Policy::Vcpu) {
            self.filter = false;
            for vcpu in &mut self.vcpus {
                vcpu.exits_left = 0;
            }
        }
    }

    /// All vCPUs are captured, and restored elsewhere.
    pub(super) fn move_all(&mut self, setup: &Setup, target: Target, foreign: bool) {
        self.left.moves -= 1;
        let granted = if foreign {
            !setup.lacks(Protection::AskedWithoutGrant)
        } else {
            self.promised && !setup.lacks(Protection::GrantTravels)
        };
        self.promised |= granted;
        let saved: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.capture(setup)).collect();
        for (vcpu, saved) in self.vcpus.iter_mut().zip(saved) {
            if let Exit::Asked(Some(write)) | Exit::Failed(Some(write)) = vcpu.exit
                && setup.lacks(Protection::MoveWithdrawsTheWrite)
            {
                // The mutant completes the instruction to get a vCPU that can be captured.
                vcpu.guest.written(setup, write);
            }
            vcpu.become_target(setup, target);
            vcpu.restore_from(setup, saved, granted);
        }
        self.filter = setup.is_kvm();
    }

    /// A snapshot with tiles in use while XFD disables them is restored into all vCPUs.
    pub(super) fn restore_crafted(&mut self, setup: &Setup) {
        if !setup.lacks(Protection::SnapshotRule) {
            // `ExtendedState::new` refuses it: see the test of that name.
            return;
        }
        self.left.moves -= 1;
        let crafted = Saved {
            xcr0: true,
            xfd: true,
            tiles: FOREIGN,
        };
        for vcpu in &mut self.vcpus {
            vcpu.guest.restart();
            vcpu.guest.xcr0 = true;
            vcpu.guest.xfd = true;
            vcpu.become_target(setup, Target::New);
            vcpu.restore_from(setup, crafted, false);
        }
        self.filter = setup.is_kvm();
    }
}

impl Vcpu {
    /// The driver handles an exit.
    fn handle(&mut self, setup: &Setup) {
        let Exit::Write(write) = self.exit else {
            return;
        };
        if setup.is_kvm() && !setup.lacks(Protection::ObserveXcr0) {
            let _ = self.gate.on(Event::ObserveXcr0(xcr0(self.xcr0)));
        }
        match self.gate.on(event(write)) {
            Action::Grow(_) if !setup.lacks(Protection::GrantBeforeUse) => {
                self.exit = Exit::Asked(Some(write));
            }
            Action::InjectGp(_) => self.exit = Exit::Fault,
            _ => self.perform(setup, write),
        }
    }

    /// The guest's write takes place, and its next instruction follows.
    fn perform(&mut self, setup: &Setup, write: Write) {
        self.perform_silently(setup, write);
        self.guest.written(setup, write);
        self.exit = Exit::None;
    }

    /// `write_xfd`, or what a hypervisor of its own does.
    fn perform_silently(&mut self, setup: &Setup, write: Write) {
        match write {
            Write::Xcr0(value) => self.xcr0 = value,
            Write::Reserved => {}
            Write::Xfd(value) => {
                if value && setup.is_kvm() && !setup.lacks(Protection::ReleaseBeforeXfd) {
                    self.set_xsave(setup, 0);
                }
                self.set_xfd(value);
            }
        }
        self.forget_unseen();
    }

    fn grant(&mut self, setup: &Setup) {
        self.grown = true;
        let _ = self.gate.on(Event::Grant(XFeatures::XTILEDATA));
        match self.exit {
            Exit::Asked(Some(write)) | Exit::Failed(Some(write)) => self.perform(setup, write),
            Exit::Asked(None) | Exit::Failed(None) => self.exit = Exit::None,
            _ => {}
        }
    }

    fn deny(&mut self, setup: &Setup) {
        let Exit::Asked(Some(write)) = self.exit else {
            return;
        };
        let action = self.gate.on(Event::Deny);
        if setup.lacks(Protection::DenialHasNoEffect) {
            self.perform(setup, write);
        } else if let Action::InjectGp(_) = action {
            self.exit = Exit::Fault;
        }
    }

    fn fail(&mut self, setup: &Setup) {
        let Exit::Asked(write) = self.exit else {
            return;
        };
        let action = self.gate.on(Event::Fail);
        if setup.lacks(Protection::FailureKeepsTheWrite) {
            let _ = self.gate.on(Event::Withdraw);
        }
        if action == Action::Hold {
            self.exit = Exit::Failed(write);
        }
    }

    fn retry(&mut self, setup: &Setup) {
        let Exit::Failed(write) = self.exit else {
            return;
        };
        match (self.gate.on(Event::Retry), write) {
            (Action::Grow(_), _) => self.exit = Exit::Asked(write),
            // Nothing waits any more: the guest goes on.
            (_, Some(write)) => {
                self.guest.written(setup, write);
                self.exit = Exit::None;
            }
            (_, None) => self.exit = Exit::None,
        }
    }

    /// RESET or INIT.
    fn restart(&mut self, setup: &Setup, init: bool) {
        if let Exit::Asked(Some(write)) = self.exit {
            self.stale = Some(write);
        }
        let action = if init && !setup.lacks(Protection::InitKeepsXfd) {
            if setup.is_kvm() && !setup.lacks(Protection::ObserveAtInit) {
                // What the gate last saw may be old.
                let _ = self.gate.on(Event::ObserveXcr0(xcr0(self.xcr0)));
            }
            self.gate.on(Event::Init)
        } else {
            self.set_xfd(false);
            if !init {
                self.tiles = 0;
                self.xcr0 = false;
                self.guest.xcr0 = false;
                self.guest.xfd = false;
            }
            self.unseen = false;
            self.gate.on(Event::Reset)
        };
        self.guest.restart();
        self.settle(action);
    }

    /// A capture looks at both registers and at what is in use.
    fn observe(&mut self, setup: &Setup) {
        let action = self.gate.on(Event::Observe {
            xcr0: xcr0(self.xcr0),
            xfd: bits(self.xfd),
            in_use: bits(self.capture(setup).tiles != 0),
        });
        self.settle(action);
    }

    fn settle(&mut self, action: Action) {
        self.exit = if let Action::Grow(_) = action {
            self.unseen = false;
            Exit::Asked(None)
        } else {
            Exit::None
        };
    }

    fn capture(&self, setup: &Setup) -> Saved {
        let xfd = self.xfd && !setup.lacks(Protection::XfdInSnapshot);
        // XSTATE_BV & XFD = 0; a hypervisor that keeps such tiles has a format that can hold them.
        let masked = self.xfd && setup.is_kvm();
        Saved {
            xcr0: self.xcr0,
            xfd,
            tiles: if masked { 0 } else { self.tiles },
        }
    }

    /// The vCPU that is restored into, as it is before.
    fn become_target(&mut self, setup: &Setup, target: Target) {
        self.mode = Mode::Vmm;
        self.loaded = false;
        self.processor_xfd = true;
        self.xcr0 = target != Target::New;
        self.xfd = target == Target::Armed;
        self.tiles = if target == Target::InUse { FOREIGN } else { 0 };
        self.passthrough = target != Target::New;
        self.grown = false;
        self.stale = None;
        self.unseen = false;
        self.exits_left = setup.exits_allowed(self.guest.program);
        self.gate = Gate::new(self.gate.layout());
    }

    /// The plan of a restore: release, XFD, XCR0, the area.
    fn restore_from(&mut self, setup: &Setup, saved: Saved, granted: bool) {
        let xfd_first = !setup.lacks(Protection::XfdBeforeXsave);
        if saved.xfd {
            self.set_xsave(setup, 0);
        }
        if xfd_first {
            self.set_xfd(saved.xfd);
        }
        // `xsave_state::kvm::restore` passes the register through for a guest that can use tiles.
        self.passthrough |=
            saved.xcr0 && !saved.xfd && !setup.lacks(Protection::RestorePassesThrough);
        self.xcr0 = saved.xcr0;
        self.set_xsave(setup, saved.tiles);
        if !xfd_first {
            self.set_xfd(saved.xfd);
        }
        if setup.lacks(Protection::RestoreIsTold) {
            self.exit = Exit::None;
            return;
        }
        let in_use = bits(saved.tiles != 0);
        let action = self.gate.on(Event::Restore {
            xcr0: xcr0(saved.xcr0),
            xfd: bits(saved.xfd),
            in_use,
            granted: bits(granted),
        });
        self.settle(action);
    }
}
