//! What this process may do with AMX, and tests that need a process of their own.
#![allow(unsafe_code, reason = "arch_prctl is a system call")]

use std::process::Command;
use std::sync::OnceLock;

use crate::component::{AMX, TILEDATA};
use crate::cpuid::{Layout, cpuid};

/// ARCH_GET_XCOMP_SUPP.
pub const GET_SUPPORTED: i32 = 0x1021;
/// ARCH_GET_XCOMP_PERM.
pub const GET_PERMISSION: i32 = 0x1022;
/// ARCH_REQ_XCOMP_PERM.
pub const REQUEST_PERMISSION: i32 = 0x1023;
/// ARCH_GET_XCOMP_GUEST_PERM.
pub const GET_GUEST_PERMISSION: i32 = 0x1024;
/// ARCH_REQ_XCOMP_GUEST_PERM.
pub const REQUEST_GUEST_PERMISSION: i32 = 0x1025;

/// Why there is no AMX here, or `None`.
#[must_use]
pub fn lacks_amx() -> Option<&'static str> {
    const TILE: u32 = 1 << 24;
    let [max_leaf, ..] = cpuid(0, 0);
    if max_leaf < 0x1e || cpuid(7, 0)[3] & TILE == 0 {
        return Some("the processor has no AMX");
    }
    if Layout::here().user & AMX != AMX {
        return Some("the processor cannot save AMX state");
    }
    if query(GET_SUPPORTED).is_ok_and(|supported| supported & AMX == AMX) {
        None
    } else {
        Some("the kernel does not support AMX")
    }
}

/// Says why a test is skipped and gives whether it is to run.
#[must_use]
pub fn has_amx() -> bool {
    if let Some(why) = lacks_amx() {
        println!("skipped: {why}");
    }
    lacks_amx().is_none()
}

/// An arch_prctl that asks for a bitmap; the errno if it fails.
///
/// # Errors
///
/// The kernel's errno.
pub fn query(operation: i32) -> Result<u64, i32> {
    let mut bitmap = 0_u64;
    // SAFETY: The GET operations write eight bytes to the address, which is that of `bitmap`.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, operation, &raw mut bitmap) };
    outcome(result).map(|()| bitmap)
}

/// An arch_prctl that asks for the permission to use a component; the errno if it fails.
///
/// # Errors
///
/// The kernel's errno.
pub fn request(operation: i32, component: u32) -> Result<(), i32> {
    assert!([REQUEST_PERMISSION, REQUEST_GUEST_PERMISSION].contains(&operation));
    // SAFETY: The REQ operations take two numbers and touch no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, operation, u64::from(component)) };
    outcome(result)
}

fn outcome(result: libc::c_long) -> Result<(), i32> {
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

/// Permission for this process's own tiles, asked for once.
pub fn permit_tiles() {
    static ONCE: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = ONCE.get_or_init(|| request(REQUEST_PERMISSION, TILEDATA));
    assert_eq!(*result, Ok(()), "ARCH_REQ_XCOMP_PERM");
}

/// Permission for guests of this process, asked for once.
pub fn permit_guests() {
    static ONCE: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = ONCE.get_or_init(|| request(REQUEST_GUEST_PERMISSION, TILEDATA));
    assert_eq!(*result, Ok(()), "ARCH_REQ_XCOMP_GUEST_PERM");
}

/// Runs this test again in a process of its own, where nothing was asked for yet. Gives `true` there,
/// and `false` in the first process once the other one has passed.
///
/// # Panics
///
/// The test failed in the other process.
#[must_use]
pub fn alone(test: &str) -> bool {
    const MARK: &str = "AMX_FIDELITY_ALONE";
    if std::env::var_os(MARK).is_some_and(|name| name == test) {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(MARK, test)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} in its own process: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    false
}
