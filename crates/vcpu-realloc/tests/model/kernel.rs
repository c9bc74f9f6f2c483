//! The host's kernel: exits and entries, XSAVES and XRSTORS of a guest, preemption, softirqs, and the
//! ioctls. IA32_XFD is written as [`Strategy::plan`] says.

use vcpu_realloc::fpswitch::{Moment, Plan, Situation, Strategy};
use xsave_state::XFeatures;

use super::setup::{Host, Protection, Setup};
use super::world::{Exit, KernelStep, Mode, Tiles, Vcpu, World, Write};

pub(crate) fn bits(xtiledata: bool) -> XFeatures {
    if xtiledata {
        XFeatures::XTILEDATA
    } else {
        XFeatures::empty()
    }
}

impl World {
    pub(super) fn kernel_step(&mut self, setup: &Setup, index: usize, step: KernelStep) {
        let vcpu = &mut self.vcpus[index];
        match step {
            KernelStep::Interrupt => vcpu.exit_to_kernel(setup, None),
            KernelStep::Softirq => vcpu.save(setup),
            KernelStep::Preempt => {
                vcpu.save(setup);
                vcpu.run_host();
            }
            KernelStep::Leave => {
                vcpu.leave(setup);
            }
            KernelStep::Enter => {
                // `switch_fpu_return` in `vcpu_enter_guest`.
                if !vcpu.loaded {
                    self.dead |= !vcpu.restore(setup);
                }
                vcpu.apply(setup, Moment::Entry);
                vcpu.mode = Mode::Guest;
            }
            KernelStep::Emulate => self.emulate(setup, index),
        }
    }

    /// KVM goes on with the instruction for which the guest exited.
    fn emulate(&mut self, setup: &Setup, index: usize) {
        let Mode::Kernel(Some(write)) = self.vcpus[index].mode else {
            return;
        };
        let traps = self.traps(setup, index, write);
        let counts = self.filter && setup.counts_exits(self.vcpus[index].guest.program);
        let vcpu = &mut self.vcpus[index];
        if traps {
            vcpu.leave(setup);
            vcpu.exit = Exit::Write(write);
            if counts {
                vcpu.too_many_exits |= vcpu.exits_left == 0;
                vcpu.exits_left = vcpu.exits_left.saturating_sub(1);
            }
            return;
        }
        vcpu.mode = Mode::Kernel(None);
        match write {
            Write::Xcr0(value) => {
                vcpu.xcr0 = value;
                vcpu.unseen |= vcpu.usable() && !vcpu.grown;
            }
            Write::Reserved => return vcpu.guest.faulted(),
            Write::Xfd(value) => vcpu.update_xfd(setup, value),
        }
        vcpu.forget_unseen();
        vcpu.guest.written(setup, write);
    }
}

impl Vcpu {
    /// VM exit, in the middle of `instruction` or between two.
    pub(super) fn exit_to_kernel(&mut self, setup: &Setup, instruction: Option<Write>) {
        self.mode = Mode::Kernel(instruction);
        self.apply(setup, Moment::Exit);
    }

    fn plan(&self, setup: &Setup, moment: Moment) -> Plan {
        let situation = Situation {
            in_use: bits(self.tiles != 0),
            guest_xfd: bits(self.xfd),
            processor_xfd: bits(self.processor_xfd),
        };
        let taken_out = match setup.without {
            Some(Protection::OptionAtSave) => Some(Moment::Save),
            Some(Protection::OptionAtRestore) => Some(Moment::Restore),
            Some(Protection::OptionAtExit) => Some(Moment::Exit),
            Some(Protection::OptionAtEntry) => Some(Moment::Entry),
            _ => None,
        };
        match setup.strategy() {
            // Without this moment of the option: as Linux, or nothing at all.
            _ if taken_out == Some(moment) && moment == Moment::Entry => Plan::NOTHING,
            _ if taken_out == Some(moment) => Strategy::Linux.plan(moment, situation),
            strategy => strategy.plan(moment, situation),
        }
    }

    /// Writes what the plan says where the moment has no instruction of interest.
    fn apply(&mut self, setup: &Setup, moment: Moment) {
        let plan = self.plan(setup, moment);
        self.processor_xfd = !plan.end(bits(self.processor_xfd)).is_empty();
    }

    /// XSAVES: what is disabled is saved as initial.
    fn save(&mut self, setup: &Setup) {
        let plan = self.plan(setup, Moment::Save);
        if !plan.during(bits(self.processor_xfd)).is_empty() {
            self.tiles = 0;
        }
        self.processor_xfd = !plan.end(bits(self.processor_xfd)).is_empty();
        self.loaded = false;
    }

    /// XRSTORS: false where it raises #NM.
    #[must_use]
    fn restore(&mut self, setup: &Setup) -> bool {
        let plan = self.plan(setup, Moment::Restore);
        let disabled = !plan.during(bits(self.processor_xfd)).is_empty();
        self.processor_xfd = !plan.end(bits(self.processor_xfd)).is_empty();
        self.loaded = true;
        !(disabled && self.tiles != 0)
    }

    /// A task of the host runs, one without AMX.
    fn run_host(&mut self) {
        self.processor_xfd = true;
    }

    /// KVM_RUN returns (`kvm_put_guest_fpu`).
    fn leave(&mut self, setup: &Setup) {
        if self.loaded {
            self.save(setup);
        }
        self.run_host();
        self.mode = Mode::Vmm;
    }

    /// KVM_RUN begins (`kvm_load_guest_fpu`): false where the host dies.
    #[must_use]
    pub(super) fn run(&mut self, setup: &Setup) -> bool {
        self.mode = Mode::Kernel(None);
        self.restore(setup)
    }

    /// `fpu_update_guest_xfd`, for the guest's own write.
    fn update_xfd(&mut self, setup: &Setup, value: bool) {
        self.xfd = value;
        self.passthrough |= value;
        match (setup.host, self.loaded) {
            // The fix for CVE-2026-23005.
            (Host::Kvm { fixed: true }, false) if value => self.tiles = 0,
            (Host::Kvm { .. } | Host::Own(Strategy::Linux), true) => self.processor_xfd = value,
            // The others write it at entry.
            _ => {}
        }
    }

    /// What nobody has seen is over when the guest has nothing any more.
    pub(super) fn forget_unseen(&mut self) {
        self.unseen &= self.usable() || self.tiles != 0;
    }

    /// KVM_SET_MSRS of IA32_XFD.
    pub(super) fn set_xfd(&mut self, value: bool) {
        self.xfd = value;
        self.passthrough |= value;
    }

    /// KVM_SET_XSAVE.
    pub(super) fn set_xsave(&mut self, setup: &Setup, tiles: Tiles) {
        let masked = setup.host == (Host::Kvm { fixed: true }) && self.xfd;
        self.tiles = if masked { 0 } else { tiles };
    }
}
