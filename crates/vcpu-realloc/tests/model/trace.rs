//! A path of the checker in words: one line per step.

use std::fmt::Write as _;

use super::guest::Todo;
use super::setup::{Host, Setup};
use super::world::{
    Exit, FOREIGN, GuestStep, KernelStep, Mode, Step, Target, Tiles, Vcpu, VmmStep, World, Write,
};

/// The steps, numbered.
pub(crate) fn lines(setup: &Setup, path: &[(World, Option<Step>)]) -> String {
    let mut text = String::new();
    for (number, pair) in path.windows(2).enumerate() {
        let [(before, Some(step)), (after, _)] = pair else {
            unreachable!("only the last state has no step");
        };
        let (who, what) = words(setup, before, *step, after);
        writeln!(text, "{:>2}. {who:<15} {what}", number + 1).unwrap();
    }
    text
}

fn words(setup: &Setup, before: &World, step: Step, after: &World) -> (String, String) {
    let mut what;
    let who = match step {
        Step::Guest(index, step) => {
            let (was, is) = (&before.vcpus[index], &after.vcpus[index]);
            what = guest(step, was, is);
            format!("vCPU {index}, guest")
        }
        Step::Kernel(index, step) => {
            let (was, is) = (&before.vcpus[index], &after.vcpus[index]);
            what = kernel(setup, step, was, is);
            format!("vCPU {index}, host")
        }
        Step::Vmm(index, step) => {
            let (was, is) = (&before.vcpus[index], &after.vcpus[index]);
            what = vmm(setup, step, was, is);
            format!("vCPU {index}, VMM")
        }
        Step::Move(target) => {
            what = match target {
                Target::New => "saved, and restored into new vCPUs".into(),
                Target::Armed => "saved, and restored into vCPUs that have XFD set".into(),
                Target::InUse => "saved, and restored into vCPUs that have tiles in use".into(),
            };
            for (number, vcpu) in after.vcpus.iter().enumerate() {
                write!(what, "; vCPU {number} has {}", has(vcpu)).unwrap();
                if vcpu.exit == Exit::Asked(None) {
                    what += ", about which the VMM is asked";
                }
            }
            "VM".into()
        }
        Step::MoveForeign => {
            what = "saved without the grant, and restored into new vCPUs".into();
            for (number, vcpu) in after.vcpus.iter().enumerate() {
                write!(what, "; vCPU {number} has {}", has(vcpu)).unwrap();
                if vcpu.exit == Exit::Asked(None) {
                    what += ", about which the VMM is asked";
                }
            }
            "VM".into()
        }
        Step::Migrate(from, to) => {
            what = format!("the task with AMX of vCPU {from} is to go on on vCPU {to}");
            "guest".into()
        }
        Step::Crafted => {
            what = "a crafted snapshot is restored: tiles in use and XFD set".into();
            "VM".into()
        }
    };
    if before.filter && !after.filter {
        what += "; the filter is lifted";
    }
    if after.dead {
        what += "; XRSTORS of tiles in use with XFD set: #NM in the host";
    }
    (who, what)
}

fn register(write: Write) -> &'static str {
    match write {
        Write::Xfd(true) => "WRMSR XFD = 1<<18",
        Write::Xfd(false) => "WRMSR XFD = 0",
        Write::Reserved => "WRMSR XFD = 1<<1, which is reserved",
        Write::Xcr0(true) => "XSETBV, with AMX",
        Write::Xcr0(false) => "XSETBV, without AMX",
    }
}

fn content(tiles: Tiles) -> String {
    match tiles {
        0 => "tiles initial".into(),
        FOREIGN => "another's tiles".into(),
        number => format!("tiles {number}"),
    }
}

fn has(vcpu: &Vcpu) -> String {
    let xfd = if vcpu.xfd { "1<<18" } else { "0" };
    format!("XFD = {xfd}, {}", content(vcpu.tiles))
}

fn guest(step: GuestStep, was: &Vcpu, is: &Vcpu) -> String {
    let wrote = |write: Write| match is.mode {
        Mode::Guest => format!("{}, not intercepted", register(write)),
        _ => format!("{}, which exits", register(write)),
    };
    match step {
        GuestStep::Use(number) if is.guest.todo == Todo::FirstUse => {
            format!("a tile instruction (for {}) raises #NM", content(number))
        }
        GuestStep::Use(number) if is.tiles == number => {
            format!("a tile instruction: {}", content(number))
        }
        GuestStep::Use(_) => "a tile instruction raises an exception".into(),
        GuestStep::Release => "TILERELEASE".into(),
        GuestStep::Switch => {
            let to = if was.guest.amx_runs {
                "without"
            } else {
                "with"
            };
            let saves = is.guest.saved != 0 && was.guest.saved == 0;
            let saves = if saves {
                "XSAVES its task's tiles; "
            } else {
                ""
            };
            format!("{saves}schedules the task {to} AMX")
        }
        GuestStep::Write(write) => wrote(write),
        GuestStep::Kernel => match was.guest.todo {
            Todo::BootXfd => format!("boots: {}", wrote(Write::Xfd(true))),
            Todo::BootXcr0 => wrote(Write::Xcr0(true)),
            Todo::Out if believed(was, is) => "XFD is 1<<18, as it believes".into(),
            Todo::Out => wrote(Write::Xfd(true)),
            Todo::FirstUse if believed(was, is) => {
                "in its #NM handler: XFD is 0, as it believes, and the task goes on".into()
            }
            Todo::FirstUse => format!("in its #NM handler: {}", wrote(Write::Xfd(false))),
            Todo::In if believed(was, is) => "XFD is 0, as it believes".into(),
            Todo::In => wrote(Write::Xfd(false)),
            Todo::InRestore if is.guest.dead => {
                "XRSTORS of its task's tiles with XFD set: #NM in the guest's kernel, which dies"
                    .into()
            }
            Todo::OutRestore => "XRSTORS of a task without AMX".into(),
            Todo::InRestore => format!("XRSTORS of its task: {}", content(is.tiles)),
            Todo::User => unreachable!("a task runs"),
        },
    }
}

/// Nothing was written, because the kernel believes that it has been.
fn believed(was: &Vcpu, is: &Vcpu) -> bool {
    is.mode == Mode::Guest && was.guest.todo != is.guest.todo && was.guest.xfd == is.guest.xfd
}

fn kernel(setup: &Setup, step: KernelStep, was: &Vcpu, is: &Vcpu) -> String {
    let saved = || {
        let xfd = if was.processor_xfd && is.tiles != was.tiles {
            "with XFD set, which saves tiles in use as initial"
        } else if was.tiles != 0 {
            "which saves the tiles"
        } else {
            "tiles initial"
        };
        format!("XSAVES, {xfd}")
    };
    match step {
        KernelStep::Interrupt => "an interrupt; VM exit".into(),
        KernelStep::Enter if was.loaded => format!("VM entry with {}", has(is)),
        KernelStep::Enter => format!("XRSTORS and VM entry with {}", has(is)),
        KernelStep::Softirq => format!("a softirq uses the FPU: {}", saved()),
        KernelStep::Preempt => format!("the thread is preempted: {}", saved()),
        KernelStep::Leave if was.loaded => format!("KVM_RUN returns: {}", saved()),
        KernelStep::Leave => "KVM_RUN returns".into(),
        KernelStep::Emulate => {
            let Mode::Kernel(Some(write)) = was.mode else {
                unreachable!("it is in the middle of an instruction");
            };
            let performs = match setup.host {
                Host::Kvm { .. } => "KVM",
                Host::Own(_) => "the hypervisor",
            };
            match is.mode {
                Mode::Vmm => format!("{}: leaves to the VMM", register(write)),
                _ => format!("{}: {performs} performs it", register(write)),
            }
        }
    }
}

fn vmm(setup: &Setup, step: VmmStep, was: &Vcpu, is: &Vcpu) -> String {
    let outcome = match is.exit {
        Exit::None => match was.exit {
            Exit::Write(write) | Exit::Asked(Some(write)) | Exit::Failed(Some(write)) => {
                match write {
                    Write::Xfd(xfd) if is.xfd != xfd => "the guest goes on without its write",
                    _ => "the write is performed",
                }
            }
            _ => "the vCPU may run",
        },
        Exit::Write(_) => "an exit waits",
        Exit::Asked(_) => "the gate asks for growth",
        Exit::Failed(_) => "the question stands",
        Exit::Fault => "the guest gets #GP",
    };
    match step {
        VmmStep::Run => format!(
            "KVM_RUN, {}",
            if was.exit == Exit::Fault {
                "with #GP"
            } else {
                "the guest's registers are loaded"
            }
        ),
        VmmStep::Handle => format!("handles the exit: {outcome}"),
        VmmStep::Grant => format!("grants: {outcome}"),
        VmmStep::Deny => format!("denies: {outcome}"),
        VmmStep::Fail => format!("has no memory: {outcome}"),
        VmmStep::Retry => format!("tries again: {outcome}"),
        VmmStep::LateGrant => {
            let performed = if setup.without.is_some() && was.xfd != is.xfd {
                ", and XFD is written as it was asked then"
            } else {
                ""
            };
            format!("the answer to the question before the reset: granted{performed}")
        }
        VmmStep::Reset => format!("resets it; it has {}", has(is)),
        VmmStep::Init => format!("INIT; it has {}", has(is)),
        VmmStep::Observe => format!("reads XCR0 and XFD: {outcome}"),
    }
}

/// A beginning that traces share.
pub(crate) struct Known {
    title: &'static str,
    lines: Vec<String>,
}

/// Their titles, in the order in which the mutants come.
const TITLES: [&str; 2] = [
    "Up to first use, on KVM",
    "Up to first use, on a hypervisor of its own",
];
/// The step at which they end.
const END: &str = "in its #NM handler: WRMSR XFD = 0, which exits";

/// Prints the beginning that `trace` shares with an earlier one as one line. The first trace on each
/// kind of host gives the beginning.
pub(crate) fn fold(known: &mut Vec<Known>, name: &str, trace: &str) -> String {
    let lines: Vec<_> = trace.lines().map(String::from).collect();
    if let Some(begin) = known.iter().find(|known| lines.starts_with(&known.lines)) {
        return begin.shorten(&lines);
    }
    let Some(last) = lines.iter().position(|line| line.ends_with(END)) else {
        return trace.into();
    };
    let title = TITLES.get(known.len());
    let begin = Known {
        title: title.unwrap_or_else(|| panic!("a third kind of beginning: {name}")),
        lines: lines[..=last].to_vec(),
    };
    let short = begin.shorten(&lines);
    known.push(begin);
    short
}

impl Known {
    fn shorten(&self, lines: &[String]) -> String {
        let number = self.lines.len();
        let mut text = format!(" 1-{number}. {}, as above\n", lower(self.title));
        for line in &lines[number..] {
            text += line;
            text.push('\n');
        }
        text
    }

    pub(crate) fn render(&self) -> String {
        format!(
            "### {}\n\n```text\n{}\n```\n\n",
            self.title,
            self.lines.join("\n")
        )
    }
}

fn lower(text: &str) -> String {
    let (first, rest) = text.split_at(1);
    first.to_lowercase() + rest
}
