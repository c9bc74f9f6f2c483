//! The system calls and the ports that the standard library has no safe form of.

use std::arch::asm;
use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::report::Wish;
use crate::tiles;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn ioperm(from: c_ulong, count: c_ulong, on: c_int) -> c_int;
    #[link_name = "fork"]
    fn c_fork() -> c_int;
    fn waitpid(process: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn kill(process: c_int, signal: c_int) -> c_int;
    fn raise(signal: c_int) -> c_int;
    fn sigaction(signal: c_int, new: *const Action, old: *mut Action) -> c_int;
    fn setitimer(which: c_int, new: *const [i64; 4], old: *mut [i64; 4]) -> c_int;
    fn sched_setaffinity(process: c_int, bytes: usize, mask: *const u64) -> c_int;
    fn _exit(status: c_int) -> !;
}

const SIGILL: c_int = 4;
const SIGUSR1: c_int = 10;
const SIGALRM: c_int = 14;
const SIGTERM: c_int = 15;

/// struct sigaction of the C library.
#[repr(C)]
struct Action {
    handler: extern "C" fn(c_int, *mut c_void, *mut c_void),
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

fn checked(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// mount(2) of a file system that has no device.
pub fn mount_fs(kind: &CStr, target: &CStr) -> io::Result<()> {
    let (kind, target) = (kind.as_ptr(), target.as_ptr());
    // SAFETY: the pointers are of strings that end in a zero byte and outlive the call; no data are allowed.
    checked(unsafe { mount(kind, target, kind, 0, std::ptr::null()) }).map(drop)
}

/// finit_module(2).
pub fn load_module(file: &File) -> io::Result<()> {
    const FINIT_MODULE: c_long = 313;
    // SAFETY: the descriptor is open and the string ends in a zero byte; both outlive the call.
    checked(unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) }).map(drop)
}

/// fork(2): 0 in the child.
pub fn fork() -> io::Result<i32> {
    // SAFETY: this process has one thread.
    let child = checked(unsafe { c_fork() })?;
    i32::try_from(child).map_err(io::Error::other)
}

/// waitpid(2): the exit status, or 128 more than the signal's number.
pub fn wait_for(child: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the pointer is of an int that outlives the call.
    checked(unsafe { waitpid(child, &raw mut status, 0) })?;
    Ok(match status & 0x7f {
        0 => status >> 8 & 0xff,
        signal => 128 + signal,
    })
}

/// _exit(2): nothing of the parent's is flushed.
pub fn exit(status: i32) -> ! {
    // SAFETY: no memory is passed.
    unsafe { _exit(status) }
}

/// SIGTERM to a child.
pub fn terminate(child: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    checked(unsafe { kill(child, SIGTERM) }).map(drop)
}

/// reboot(2): restarts the machine, or switches it off.
pub fn reboot(restart: bool) -> io::Result<()> {
    const REBOOT: c_long = 169;
    const MAGIC: c_long = 0xfee1_dead;
    const MAGIC_2: c_long = 672_274_793;
    const POWER_OFF: c_long = 0x4321_fedc;
    const RESTART: c_long = 0x0123_4567;
    let how = if restart { RESTART } else { POWER_OFF };
    // SAFETY: these commands take no argument.
    checked(unsafe { syscall(REBOOT, MAGIC, MAGIC_2, how, 0) }).map(drop)
}

/// Lets this process, and those it forks, use one port.
pub fn permit_port(port: u16) -> io::Result<()> {
    // SAFETY: no memory is passed.
    checked(unsafe { ioperm(c_ulong::from(port), 1, 1) }).map(drop)
}

/// Writes bytes to a port that was permitted.
pub fn write_port(port: u16, bytes: &[u8]) {
    // SAFETY: REP OUTSB reads the bytes of the slice; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep outsb", inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, in("dx") port,
            options(nostack, readonly, preserves_flags));
    }
}

/// What the host wants.
pub fn read_wish(port: u16) -> Wish {
    let wish: u8;
    // SAFETY: the port was permitted, and reading it does nothing else.
    unsafe {
        asm!("in al, dx", out("al") wish, in("dx") port, options(nomem, nostack, preserves_flags))
    }
    match wish {
        1 => Wish::PowerOff,
        2 => Wish::Reset,
        _ => Wish::GoOn,
    }
}

/// sched_yield(2) and getpid(2).
pub fn give_way() {
    const SCHED_YIELD: c_long = 24;
    const GETPID: c_long = 39;
    for number in [GETPID, SCHED_YIELD] {
        // SAFETY: these take no arguments and cannot fail.
        unsafe { syscall(number) };
    }
}

/// A millisecond in which others run.
pub fn sleep() {
    std::thread::sleep(std::time::Duration::from_millis(1));
}

/// Stays on one processor.
pub fn run_on(processor: u32) -> io::Result<()> {
    let mask = 1_u64 << (processor % 64);
    // SAFETY: the mask is eight bytes long and outlives the call.
    checked(unsafe { sched_setaffinity(0, 8, &raw const mask) }).map(drop)
}

/// ARCH_REQ_XCOMP_PERM of component 18.
pub fn request_tiles() -> io::Result<()> {
    const ARCH_PRCTL: c_long = 158;
    const REQUEST: c_long = 0x1023;
    const XTILEDATA: c_long = 18;
    // SAFETY: no memory is passed.
    checked(unsafe { syscall(ARCH_PRCTL, REQUEST, XTILEDATA) }).map(drop)
}

fn handle(
    signal: c_int,
    handler: extern "C" fn(c_int, *mut c_void, *mut c_void),
) -> io::Result<()> {
    const SA_SIGINFO: c_int = 4;
    const SA_RESTART: c_int = 0x1000_0000;
    let action = Action {
        handler,
        mask: [0; 16],
        flags: SA_SIGINFO | SA_RESTART,
        restorer: 0,
    };
    // SAFETY: the structure is the C library's and outlives the call; the handlers below do only what is safe at any instruction.
    checked(unsafe { sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

static END: AtomicBool = AtomicBool::new(false);
static SIGILLS: AtomicU64 = AtomicU64::new(0);
static DISTURBANCES: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_sigterm(_signal: c_int, _info: *mut c_void, _context: *mut c_void) {
    END.store(true, Ordering::Relaxed);
}

/// SIGTERM is noted from now on.
pub fn end_on_sigterm() -> io::Result<()> {
    handle(SIGTERM, on_sigterm)
}

/// Whether SIGTERM has come.
pub fn has_to_end() -> bool {
    END.load(Ordering::Relaxed)
}

extern "C" fn on_sigill(_signal: c_int, _info: *mut c_void, context: *mut c_void) {
    /// Of gregs[REG_RIP] in ucontext_t.
    const RIP: usize = 40 + 16 * 8;
    SIGILLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel passes a ucontext_t, and takes RIP from it when the handler returns. The only instruction that raises SIGILL on
    // purpose in this process is `zero_skippable`'s, of that length; behind any other one the process is lost either way.
    unsafe { *context.cast::<u8>().add(RIP).cast::<u64>() += tiles::ZERO_BYTES };
}

/// SIGILL is counted from now on, and the instruction is left out.
pub fn skip_on_sigill() -> io::Result<()> {
    handle(SIGILL, on_sigill)
}

/// How often SIGILL has come.
pub fn sigills() -> u64 {
    SIGILLS.load(Ordering::Relaxed)
}

/// Uses the tiles as if they were its own.
extern "C" fn on_disturbance(_signal: c_int, _info: *mut c_void, _context: *mut c_void) {
    tiles::load_config(&tiles::SMALL);
    tiles::zero_skippable();
    tiles::load(2, &tiles::Tile([0xdd; tiles::TILE]));
    tiles::release();
    DISTURBANCES.fetch_add(1, Ordering::Relaxed);
}

/// Handlers that use tiles come every three milliseconds from now on.
pub fn disturb() -> io::Result<()> {
    const ITIMER_REAL: c_int = 0;
    let every = [0, 3000, 0, 3000];
    handle(SIGALRM, on_disturbance)?;
    handle(SIGUSR1, on_disturbance)?;
    // SAFETY: struct itimerval is four i64 on x86-64, and outlives the call.
    checked(unsafe { setitimer(ITIMER_REAL, &raw const every, std::ptr::null_mut()) }).map(drop)
}

/// And one comes now.
pub fn disturb_now() -> io::Result<()> {
    let before = DISTURBANCES.load(Ordering::Relaxed);
    // SAFETY: no memory is passed.
    checked(unsafe { raise(SIGUSR1) })?;
    if DISTURBANCES.load(Ordering::Relaxed) == before {
        return Err(io::Error::other("SIGUSR1 did not come"));
    }
    Ok(())
}
