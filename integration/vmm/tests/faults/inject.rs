//! Makes a system call of another process fail: really, by ptrace, with nothing in the code for it.
//!
//! One thread of that process does operations one after the other, each between two marks. The marks
//! are calls of getppid, which nothing else here makes. A call that is to fail is not made.

use std::ffi::c_long;
use std::io::{Read, Write};
use std::process::Stdio;

use nix::errno::Errno;
use nix::libc::{SYS_getppid, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid, gettid};

use crate::groups::Group;
use crate::process::{Process, say};

/// A system call of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// The operation's number.
    pub(crate) operation: usize,
    pub(crate) number: c_long,
    /// Its second argument: the request of an ioctl.
    pub(crate) request: u64,
}

/// Waits until the parent watches this thread. What it does then is not seen before [`mark`].
pub(crate) fn watched() {
    say(gettid());
    let mut byte = [0];
    std::io::stdin()
        .read_exact(&mut byte)
        .expect("the parent answers");
}

/// An operation of the watched thread begins or ends here.
pub(crate) fn mark() {
    let _ = getppid();
}

/// Runs `job` in a process of its own, and asks `fails` at each call of its `operations` operations.
/// What the process has said.
pub(crate) fn run(
    group: Group,
    job: &str,
    operations: usize,
    mut fails: impl FnMut(Call) -> Option<Errno>,
) -> Vec<String> {
    let mut process = Process::start(group, job, Stdio::piped());
    let thread = process.hear().expect("it says which thread");
    let thread = Pid::from_raw(thread.parse().expect("a number"));
    ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD).expect("it is our child");
    ptrace::interrupt(thread).expect("it is watched");
    assert!(matches!(
        wait(thread),
        WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..)
    ));
    process.stdin().write_all(&[1]).expect("it waits");
    let mut marks = 0;
    while marks < 2 * operations {
        let before = call(thread);
        let number = before.orig_rax.cast_signed();
        if number == SYS_getppid {
            marks += 1;
        }
        let call_here = Call {
            operation: marks / 2,
            number,
            request: before.rsi,
        };
        let within = marks % 2 == 1 && number != SYS_getppid;
        let errno = if within { fails(call_here) } else { None };
        if errno.is_some() {
            // No such call: the kernel does nothing.
            let nothing = user_regs_struct {
                orig_rax: u64::MAX,
                ..before
            };
            ptrace::setregs(thread, nothing).expect("it is stopped");
        }
        let after = call(thread);
        if let Some(errno) = errno {
            let failed = user_regs_struct {
                rax: (-i64::from(errno as i32)).cast_unsigned(),
                ..after
            };
            ptrace::setregs(thread, failed).expect("it is stopped");
        }
    }
    ptrace::detach(thread, None).expect("it is stopped");
    process.passes()
}

/// The registers at the beginning of the next call, or at the end of this one.
fn call(thread: Pid) -> user_regs_struct {
    let mut signal: Option<Signal> = None;
    loop {
        ptrace::syscall(thread, signal).expect("it is stopped");
        match wait(thread) {
            WaitStatus::PtraceSyscall(_) => return ptrace::getregs(thread).expect("it is stopped"),
            WaitStatus::Stopped(_, pending) => signal = Some(pending),
            other => panic!("{other:?}"),
        }
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it is watched")
}
