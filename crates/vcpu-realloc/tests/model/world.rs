//! The state of a modelled machine, and what can happen next.

use vcpu_realloc::Gate;

use super::guest::Guest;
use super::setup::{Bounds, Host, Program, Setup};

/// The content of tiles. Zero is the initial state: XINUSE\[18\] or XSTATE_BV\[18\] is clear.
pub(crate) type Tiles = u8;
/// What a vCPU had in its tiles before a snapshot was restored into it.
pub(crate) const FOREIGN: Tiles = Tiles::MAX;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub vcpus: Vec<Vcpu>,
    /// Writes of XFD leave to the VMM: the MSR filter, which is the VM's.
    pub filter: bool,
    /// The host has taken #NM in XRSTORS.
    pub dead: bool,
    /// The VM's gate: some vCPU has been granted, here or where the VM ran before.
    pub promised: bool,
    /// What may still happen.
    pub left: Bounds,
}

/// One vCPU: its guest, the kernel's part, the VMM's part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Vcpu {
    pub guest: Guest,
    // The kernel's.
    pub mode: Mode,
    pub xcr0: bool,
    /// IA32_XFD\[18\] as the guest has it.
    pub xfd: bool,
    /// KVM passes XFD through: it does so from the first nonzero write on.
    pub passthrough: bool,
    /// The guest's registers are in the processor; else in the area.
    pub loaded: bool,
    /// IA32_XFD\[18\] of the processor that the vCPU's thread runs on.
    pub processor_xfd: bool,
    /// In the processor or in the area, as `loaded` says.
    pub tiles: Tiles,
    // The VMM's.
    pub exit: Exit,
    pub gate: Gate,
    /// The VMM has memory for the tiles.
    pub grown: bool,
    /// The guest has enabled tiles by an XSETBV that nobody saw, and still has them.
    pub unseen: bool,
    /// A question whose write is gone, and which another thread may still answer.
    pub stale: Option<Write>,
    /// Exits that it may still have, and whether it had more.
    pub exits_left: u8,
    pub too_many_exits: bool,
}

/// Where a vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    /// Executing the guest.
    Guest,
    /// In the kernel after an exit, in the middle of this instruction of the guest.
    Kernel(Option<Write>),
    /// In the VMM.
    Vmm,
}

/// An instruction of the guest that writes a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Write {
    /// WRMSR of IA32_XFD with bit 18 set or clear, and nothing else.
    Xfd(bool),
    /// WRMSR of IA32_XFD with a reserved bit.
    Reserved,
    /// XSETBV of XCR0, with AMX or without.
    Xcr0(bool),
}

/// What the VMM has to do before the vCPU may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Exit {
    /// Nothing.
    None,
    /// KVM_EXIT_X86_WRMSR, or its like.
    Write(Write),
    /// It has been asked, about this write or about what the guest can use already.
    Asked(Option<Write>),
    /// It has answered that it has no memory.
    Failed(Option<Write>),
    /// Raise #GP at the guest's instruction.
    Fault,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Guest(usize, GuestStep),
    Kernel(usize, KernelStep),
    Vmm(usize, VmmStep),
    /// All vCPUs are captured and restored.
    Move(Target),
    /// The same by a VMM that saves no grant: nobody knows.
    MoveForeign,
    /// A task that does not run goes from one vCPU of the guest to another.
    Migrate(usize, usize),
    /// A crafted snapshot is restored into all vCPUs.
    Crafted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum GuestStep {
    /// The next instruction of its kernel.
    Kernel,
    /// A tile instruction that gives the tiles this content.
    Use(Tiles),
    /// TILERELEASE.
    Release,
    /// The other task is scheduled.
    Switch,
    /// A program without a kernel writes a register.
    Write(Write),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KernelStep {
    /// An interrupt makes the guest exit.
    Interrupt,
    /// VM entry.
    Enter,
    /// A softirq uses the FPU.
    Softirq,
    /// The thread is scheduled out and in.
    Preempt,
    /// KVM_RUN returns.
    Leave,
    /// KVM goes on with the guest's instruction.
    Emulate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum VmmStep {
    /// KVM_RUN.
    Run,
    /// The driver handles the exit.
    Handle,
    Grant,
    Deny,
    Fail,
    Retry,
    /// The thread that was asked before the reset answers.
    LateGrant,
    Reset,
    Init,
    /// XCR0 and XFD are read, as at a capture.
    Observe,
}

/// The vCPU that a snapshot is restored into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// A new one.
    New,
    /// One that ran before and has XFD set.
    Armed,
    /// One that ran before and has tiles in use.
    InUse,
}

impl World {
    pub(crate) fn new(setup: &Setup, gate: &Gate) -> Self {
        let vcpu = |&program: &Program| Vcpu {
            guest: Guest::new(program),
            mode: Mode::Vmm,
            xcr0: false,
            xfd: false,
            passthrough: false,
            loaded: false,
            processor_xfd: true,
            tiles: 0,
            exit: Exit::None,
            gate: gate.clone(),
            grown: false,
            unseen: false,
            stale: None,
            exits_left: setup.exits_allowed(program),
            too_many_exits: false,
        };
        Self {
            vcpus: setup.programs.iter().map(vcpu).collect(),
            filter: setup.is_kvm(),
            dead: false,
            promised: false,
            left: setup.bounds,
        }
    }

    /// Whether this write of the vCPU leaves to the VMM.
    pub(crate) fn traps(&self, setup: &Setup, vcpu: usize, write: Write) -> bool {
        match (setup.host, write) {
            (Host::Kvm { .. }, Write::Xcr0(_)) => false,
            (Host::Kvm { .. }, _) => self.filter,
            (Host::Own(_), _) => !self.vcpus[vcpu].gate.has_passed(),
        }
    }

    /// All steps that are possible here.
    pub(crate) fn steps(&self, setup: &Setup, steps: &mut Vec<Step>) {
        if self.dead {
            return;
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            match vcpu.mode {
                Mode::Guest => {
                    vcpu.guest
                        .steps(setup, |step| steps.push(Step::Guest(index, step)));
                    steps.push(Step::Kernel(index, KernelStep::Interrupt));
                }
                Mode::Kernel(instruction) => {
                    if vcpu.loaded {
                        steps.push(Step::Kernel(index, KernelStep::Softirq));
                        steps.push(Step::Kernel(index, KernelStep::Preempt));
                    }
                    if instruction.is_some() {
                        steps.push(Step::Kernel(index, KernelStep::Emulate));
                    } else {
                        steps.push(Step::Kernel(index, KernelStep::Enter));
                        steps.push(Step::Kernel(index, KernelStep::Leave));
                    }
                }
                Mode::Vmm => self.vmm_steps(setup, index, steps),
            }
            if vcpu.stale.is_some() {
                steps.push(Step::Vmm(index, VmmStep::LateGrant));
            }
        }
        if self.left.moves > 0 && self.vcpus.iter().all(|vcpu| vcpu.mode == Mode::Vmm) {
            for target in [Target::New, Target::Armed, Target::InUse] {
                steps.push(Step::Move(target));
            }
            steps.push(Step::MoveForeign);
            steps.push(Step::Crafted);
        }
        if self.left.migrations > 0 {
            self.migrations(|from, to| steps.push(Step::Migrate(from, to)));
        }
    }

    fn vmm_steps(&self, setup: &Setup, index: usize, steps: &mut Vec<Step>) {
        let vcpu = &self.vcpus[index];
        let mut push = |step| steps.push(Step::Vmm(index, step));
        match vcpu.exit {
            Exit::None => push(VmmStep::Run),
            Exit::Fault => push(VmmStep::Run),
            Exit::Write(_) => push(VmmStep::Handle),
            Exit::Asked(write) => {
                push(VmmStep::Grant);
                if write.is_some() && self.left.denials > 0 {
                    push(VmmStep::Deny);
                }
                if self.left.failures > 0 {
                    push(VmmStep::Fail);
                }
            }
            Exit::Failed(_) => push(VmmStep::Retry),
        }
        let between_instructions = matches!(
            vcpu.exit,
            Exit::None | Exit::Asked(None) | Exit::Failed(None)
        );
        // A capture of a guest with a kernel finds what the gate knows.
        if setup.is_kvm() && vcpu.guest.program == Program::Any && between_instructions {
            push(VmmStep::Observe);
        }
        if self.left.resets > 0 {
            push(VmmStep::Reset);
        }
        if self.left.inits > 0 {
            push(VmmStep::Init);
        }
    }

    /// The state after a step; `None` where nothing changes.
    pub(crate) fn after(&self, setup: &Setup, step: Step) -> Option<Self> {
        let mut next = self.clone();
        next.apply(setup, step);
        (next != *self).then_some(next)
    }

    fn apply(&mut self, setup: &Setup, step: Step) {
        match step {
            Step::Guest(index, step) => self.guest_step(setup, index, step),
            Step::Kernel(index, step) => self.kernel_step(setup, index, step),
            Step::Vmm(index, step) => self.vmm_step(setup, index, step),
            Step::Move(target) => self.move_all(setup, target, false),
            Step::MoveForeign => self.move_all(setup, Target::New, true),
            Step::Migrate(from, to) => self.migrate(from, to),
            Step::Crafted => self.restore_crafted(setup),
        }
    }
}

impl Vcpu {
    /// The tiles are in use while XFD disables them.
    pub(crate) fn in_use_while_disabled(&self) -> bool {
        self.tiles != 0 && self.xfd
    }

    /// The guest can execute tile instructions.
    pub(crate) fn usable(&self) -> bool {
        self.xcr0 && !self.xfd
    }
}
