//! The exit statuses that are amx-lab's own. All others are the program's.

use amx_lab::{JobError, LabError};

/// The lab's kernel crashed.
pub(crate) const HOST_PANIC: u8 = 120;
/// The emulator failed.
pub(crate) const EMULATOR: u8 = 121;
/// Time was out; timeout(1) has the same.
pub(crate) const TIMED_OUT: u8 = 124;
/// The lab could not be used: not prepared, a wrong option, no disk; env(1) and others have the same for themselves.
pub(crate) const LAB: u8 = 125;
/// The program cannot be run there: not static, not x86-64, not a program; shells have the same.
pub(crate) const CANNOT_RUN: u8 = 126;
/// There is no such program; shells have the same.
pub(crate) const NO_PROGRAM: u8 = 127;
/// What a shell gives for a program that wrote to a closed pipe, of which there is nothing to be said.
pub(crate) const BROKEN_PIPE: u8 = 128 + 13;

/// The status that says what kind of error this is.
pub(crate) fn of(error: &anyhow::Error) -> u8 {
    let job = |error: &JobError| match error {
        JobError::NoProgram { .. } => NO_PROGRAM,
        JobError::Program { .. } | JobError::NotExecutable { .. } => CANNOT_RUN,
        _ => LAB,
    };
    match error.downcast_ref::<LabError>() {
        Some(LabError::HostPanic { .. }) => HOST_PANIC,
        Some(LabError::Emulator { .. }) => EMULATOR,
        Some(LabError::TimedOut { .. }) => TIMED_OUT,
        Some(LabError::NotStarted { .. }) => CANNOT_RUN,
        Some(LabError::Job(error)) => job(error),
        Some(LabError::Output { source }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            BROKEN_PIPE
        }
        _ => error.downcast_ref::<JobError>().map_or(LAB, job),
    }
}

/// What the user can do about it, where the error does not say so itself.
pub(crate) fn advice(error: &anyhow::Error) -> Option<&'static str> {
    if let Some(LabError::NotUnpacked { .. }) = error.downcast_ref() {
        return Some("if there was no room: --memory or AMX_LAB_MEMORY gives the lab more");
    }
    match of(error) {
        TIMED_OUT => Some("--timeout or AMX_LAB_TIMEOUT sets another limit, 0 none"),
        EMULATOR => Some(
            "if the program is not the reason: amx-lab status --verify compares the lab's parts with their hashes",
        ),
        _ => None,
    }
}
