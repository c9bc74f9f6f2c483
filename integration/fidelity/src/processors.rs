//! The processors that this process may use, and threads that go from one to another.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The thread that asks.
const THIS: Pid = Pid::from_raw(0);

/// The numbers of the processors that this thread may run on.
#[must_use]
pub fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(THIS).unwrap();
    (0..CpuSet::count())
        .filter(|&cpu| set.is_set(cpu).unwrap())
        .collect()
}

/// Moves this thread to a processor. It runs there when this is done.
pub fn go_to(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(THIS, &set).unwrap();
}
