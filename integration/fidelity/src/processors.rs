//! The processors that this process may use, and threads that go from one to another.
#![allow(unsafe_code, reason = "the affinity of a thread is a system call's")]

use std::mem;

/// The numbers of the processors that this thread may run on.
#[must_use]
pub fn allowed() -> Vec<usize> {
    // SAFETY: A `cpu_set_t` is an array of integers, for which zeros are a value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: The call writes as many bytes as it is told, which is the size of `set`.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: The number is smaller than that of the bits in the set.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Moves this thread to a processor. It runs there when this is done.
pub fn go_to(cpu: usize) {
    assert!(cpu < libc::CPU_SETSIZE as usize);
    // SAFETY: A `cpu_set_t` is an array of integers, for which zeros are a value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: The number is smaller than that of the bits in the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The call reads as many bytes as it is told, which is the size of `set`.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(
        result,
        0,
        "processor {cpu}: {}",
        std::io::Error::last_os_error()
    );
}
