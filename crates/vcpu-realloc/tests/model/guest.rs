//! The guests: a kernel with two tasks, of which one uses AMX; and a program that does anything.

use super::setup::{Program, Setup};
use super::world::{GuestStep, Mode, Tiles, Vcpu, World, Write};

/// A guest, as it sees itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Guest {
    pub program: Program,
    /// What it has written, as far as the writes did not fault.
    pub xcr0: bool,
    pub xfd: bool,
    /// What its kernel believes XFD to be: a write that faulted counts as done.
    pub believes_xfd: bool,
    /// Its kernel has taken #NM in XRSTORS.
    pub dead: bool,
    /// What its kernel does next.
    pub todo: Todo,
    /// Which task runs.
    pub amx_runs: bool,
    /// What the task with AMX must find in its tiles. `None`: it has not used them yet, or has no
    /// claim to what is in them.
    pub tiles: Option<Tiles>,
    /// The area of that task in the guest's memory.
    pub saved: Tiles,
}

/// The next instruction of a guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Todo {
    /// At boot: WRMSR XFD = 1<<18 (`fpu__init_cpu_xstate`).
    BootXfd,
    /// Then XSETBV.
    BootXcr0,
    /// None: a task runs.
    User,
    /// In #NM, at the first use by a task: WRMSR XFD = 0.
    FirstUse,
    /// Scheduling out a task with AMX, whose tiles have been saved: WRMSR XFD = 1<<18.
    Out,
    /// XRSTORS of a task without AMX, which initializes the tiles.
    OutRestore,
    /// Scheduling it in: WRMSR XFD = 0.
    In,
    /// Then XRSTORS of its tiles.
    InRestore,
}

impl Guest {
    pub(crate) fn new(program: Program) -> Self {
        Self {
            program,
            xcr0: false,
            xfd: false,
            believes_xfd: false,
            dead: false,
            todo: match program {
                Program::Linux | Program::Lazy => Todo::BootXfd,
                Program::Any => Todo::User,
            },
            amx_runs: program == Program::Any,
            tiles: None,
            saved: 0,
        }
    }

    /// It starts again, with the registers as they are.
    pub(crate) fn restart(&mut self) {
        *self = Self {
            xcr0: self.xcr0,
            xfd: self.xfd,
            ..Self::new(self.program)
        };
    }

    pub(crate) fn steps(&self, setup: &Setup, mut push: impl FnMut(GuestStep)) {
        if self.dead {
            return;
        }
        if self.todo != Todo::User {
            return push(GuestStep::Kernel);
        }
        if self.program == Program::Any {
            for write in [
                Write::Xfd(true),
                Write::Xfd(false),
                Write::Xcr0(true),
                Write::Xcr0(false),
                Write::Reserved,
            ] {
                push(GuestStep::Write(write));
            }
        } else {
            push(GuestStep::Switch);
        }
        if self.amx_runs {
            for content in 1..=setup.contents {
                push(GuestStep::Use(content));
            }
            push(GuestStep::Release);
        }
    }

    /// The next instruction of its kernel, where it writes a register.
    fn write(&self) -> Option<Write> {
        match self.todo {
            Todo::BootXfd | Todo::Out => Some(Write::Xfd(true)),
            Todo::BootXcr0 => Some(Write::Xcr0(true)),
            Todo::FirstUse | Todo::In => Some(Write::Xfd(false)),
            Todo::User | Todo::OutRestore | Todo::InRestore => None,
        }
    }

    /// A write was performed: the next instruction follows.
    pub(crate) fn written(&mut self, setup: &Setup, write: Write) {
        match write {
            Write::Xcr0(value) => self.xcr0 = value,
            Write::Xfd(value) => {
                self.xfd = value;
                self.believes_xfd = value;
                if value && self.program == Program::Any && !setup.keeps_disabled() {
                    // It has no claim to tiles that it disables.
                    self.tiles = None;
                }
            }
            Write::Reserved => {}
        }
        self.go_on();
    }

    /// What follows a write.
    fn go_on(&mut self) {
        let lazy = self.program == Program::Lazy;
        self.todo = match self.todo {
            Todo::BootXfd => Todo::BootXcr0,
            // The first task's XRSTORS.
            Todo::BootXcr0 => Todo::OutRestore,
            Todo::Out if !lazy => Todo::OutRestore,
            Todo::In if !lazy => Todo::InRestore,
            todo => {
                match todo {
                    Todo::Out => self.amx_runs = false,
                    Todo::In => self.amx_runs = true,
                    Todo::FirstUse => self.tiles = Some(0),
                    _ => {}
                }
                Todo::User
            }
        };
    }

    /// The write raised #GP. Linux fixes WRMSR up, warns, and goes on as if it had been done
    /// (`ex_handler_msr`, `xfd_update_state`).
    pub(crate) fn faulted(&mut self) {
        if self.program == Program::Any {
            return;
        }
        if let Some(Write::Xfd(value)) = self.write() {
            self.believes_xfd = value;
        }
        self.go_on();
    }

    /// What it must find in its tiles, where it can look now.
    pub(crate) fn expects(&self) -> Option<Tiles> {
        let looks = self.todo == Todo::User && self.amx_runs && self.xcr0 && !self.xfd;
        self.tiles.filter(|_| looks)
    }
}

impl World {
    pub(super) fn guest_step(&mut self, setup: &Setup, index: usize, step: GuestStep) {
        let vcpu = &mut self.vcpus[index];
        match step {
            GuestStep::Use(content) => vcpu.use_tiles(content),
            GuestStep::Release => {
                // Needs XCR0 only: XFD does not disable it (SDM Vol. 1 §13.14).
                if vcpu.xcr0 {
                    vcpu.tiles = 0;
                    vcpu.guest.tiles = vcpu.guest.tiles.map(|_| 0);
                }
            }
            GuestStep::Switch => vcpu.guest.switch(vcpu.tiles),
            GuestStep::Write(write) => self.write(setup, index, write),
            GuestStep::Kernel => match (vcpu.guest.write(), vcpu.guest.todo) {
                // It has that value already, as it believes.
                (Some(Write::Xfd(value)), todo)
                    if todo != Todo::BootXfd && vcpu.guest.believes_xfd == value =>
                {
                    vcpu.guest.go_on();
                }
                (Some(write), _) => self.write(setup, index, write),
                (None, Todo::InRestore) if vcpu.xfd && vcpu.guest.saved != 0 => {
                    vcpu.guest.dead = true;
                }
                (None, Todo::InRestore) => {
                    vcpu.tiles = vcpu.guest.saved;
                    vcpu.guest.saved = 0;
                    vcpu.guest.amx_runs = true;
                    vcpu.guest.todo = Todo::User;
                }
                (None, _) => {
                    vcpu.tiles = 0;
                    vcpu.guest.amx_runs = false;
                    vcpu.guest.todo = Todo::User;
                }
            },
        }
    }

    /// The tasks that can go on on another vCPU: they do not run, and that one's kernel has none of its
    /// own with AMX at the moment.
    pub(super) fn migrations(&self, mut push: impl FnMut(usize, usize)) {
        let rests = |vcpu: &Vcpu| {
            let guest = &vcpu.guest;
            guest.program == Program::Linux
                && guest.todo == Todo::User
                && !guest.amx_runs
                && !guest.dead
                && guest.xcr0
        };
        for (from, source) in self.vcpus.iter().enumerate() {
            for (to, target) in self.vcpus.iter().enumerate() {
                let can = rests(source) && source.guest.tiles.is_some() && rests(target);
                if from != to && can && target.guest.tiles.is_none() {
                    push(from, to);
                }
            }
        }
    }

    pub(super) fn migrate(&mut self, from: usize, to: usize) {
        self.left.migrations -= 1;
        let source = &mut self.vcpus[from].guest;
        let (tiles, saved) = (source.tiles.take(), std::mem::take(&mut source.saved));
        let target = &mut self.vcpus[to].guest;
        (target.tiles, target.saved) = (tiles, saved);
    }

    /// The guest writes a register: directly, or by an exit.
    fn write(&mut self, setup: &Setup, index: usize, write: Write) {
        let traps = self.traps(setup, index, write);
        let vcpu = &mut self.vcpus[index];
        let direct = match write {
            // KVM always intercepts XSETBV.
            Write::Xcr0(_) => !setup.is_kvm() && !traps,
            Write::Xfd(_) => !traps && (vcpu.passthrough || !setup.is_kvm()),
            Write::Reserved => !traps,
        };
        if !direct {
            vcpu.exit_to_kernel(setup, Some(write));
            return;
        }
        match write {
            Write::Xfd(value) => {
                vcpu.xfd = value;
                vcpu.processor_xfd = value;
            }
            Write::Xcr0(value) => vcpu.xcr0 = value,
            Write::Reserved => return,
        }
        vcpu.guest.written(setup, write);
    }
}

impl Vcpu {
    fn use_tiles(&mut self, content: Tiles) {
        debug_assert_eq!(self.mode, Mode::Guest);
        if !self.xcr0 {
            // #UD.
            return;
        }
        if self.processor_xfd {
            // #NM. The guest's kernel clears XFD, and the instruction is executed again.
            if self.guest.program != Program::Any {
                self.guest.todo = Todo::FirstUse;
            }
            return;
        }
        self.tiles = content;
        self.guest.tiles = Some(content);
    }
}

impl Guest {
    /// The other task is scheduled; `tiles` are in the registers.
    fn switch(&mut self, tiles: Tiles) {
        let lazy = self.program == Program::Lazy;
        match (self.amx_runs, self.tiles) {
            (true, Some(_)) => {
                if !lazy {
                    self.saved = tiles;
                }
                self.todo = Todo::Out;
            }
            (false, Some(_)) => self.todo = Todo::In,
            (amx_runs, None) => self.amx_runs = !amx_runs,
        }
    }
}
