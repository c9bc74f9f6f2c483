//! The system calls that the standard library has no safe form of. All unsafe code of the init is here.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn mmap(
        address: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn chroot(path: *const c_char) -> c_int;
    fn chdir(path: *const c_char) -> c_int;
    fn kill(process: c_int, signal: c_int) -> c_int;
    fn waitpid(process: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn sched_setscheduler(process: c_int, policy: c_int, priority: *const c_int) -> c_int;
}

fn checked(result: c_int) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// mount(2) of a file system that has no device.
pub fn mount_fs(kind: &CStr, target: &CStr, options: &CStr) -> io::Result<()> {
    // SAFETY: the pointers are of strings that end in a zero byte and outlive the call.
    checked(unsafe {
        mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    })
}

/// Takes a mount out of the tree at once; it goes when its last user does.
pub fn unmount(target: &CStr) -> io::Result<()> {
    const MNT_DETACH: c_int = 2;
    // SAFETY: the pointer is of a string that ends in a zero byte and outlives the call.
    checked(unsafe { umount2(target.as_ptr(), MNT_DETACH) })
}

/// finit_module(2).
pub fn load_module(file: BorrowedFd<'_>, parameters: &CStr) -> io::Result<()> {
    const FINIT_MODULE: c_long = 313;
    // SAFETY: the descriptor is open and the string ends in a zero byte; both outlive the call.
    let result = unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Kills every process but this one, and reaps all of them.
pub fn kill_all_others() {
    const EVERYONE: c_int = -1;
    const SIGKILL: c_int = 9;
    // SAFETY: no memory is passed. Signals to "everyone" from the first process spare it.
    unsafe { kill(EVERYONE, SIGKILL) };
    // SAFETY: a null status is allowed. The call fails when no child is left, which ends the loop; each of them has been killed.
    while unsafe { waitpid(EVERYONE, std::ptr::null_mut(), 0) } > 0 {}
}

/// Sets the wall clock.
pub fn set_clock(seconds: i64, nanoseconds: i64) -> io::Result<()> {
    const CLOCK_REALTIME: c_int = 0;
    // SAFETY: on x86-64 a timespec is two i64, and the array outlives the call.
    checked(unsafe { clock_settime(CLOCK_REALTIME, &[seconds, nanoseconds]) })
}

/// Makes the loopback interface go up, given any socket.
pub fn interface_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    const SIOCSIFFLAGS: c_ulong = 0x8914;
    const IFF_UP: u8 = 1;
    // struct ifreq: 16 bytes of name, then the flags; 40 bytes in all.
    let mut request = [0_u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16] = IFF_UP;
    // SAFETY: the kernel reads one struct ifreq, which the array is large enough for, and it outlives the call.
    checked(unsafe { ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, request.as_mut_ptr()) })
}

/// Makes the kernel use what was written to /dev/urandom from now on; by itself it does so after a minute.
pub fn reseed(urandom: BorrowedFd<'_>) -> io::Result<()> {
    const RNDRESEEDCRNG: c_ulong = 0x5207;
    // SAFETY: this request takes no argument.
    checked(unsafe { ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG) })
}

/// Lets this thread go before every ordinary one as soon as it has something to do.
pub fn go_first() -> io::Result<()> {
    const THIS_THREAD: c_int = 0;
    const SCHED_FIFO: c_int = 1;
    // SAFETY: struct sched_param is one int, which outlives the call.
    checked(unsafe { sched_setscheduler(THIS_THREAD, SCHED_FIFO, &1) })
}

/// Makes the program start with `root` as its root directory, in `directory`.
pub fn start_in(command: &mut Command, root: CString, directory: CString) {
    let enter = move || {
        // SAFETY: the pointers are of strings that end in a zero byte and outlive the calls.
        checked(unsafe { chroot(root.as_ptr()) })?;
        // SAFETY: as above.
        checked(unsafe { chdir(directory.as_ptr()) })
    };
    // SAFETY: between fork and exec this makes two system calls, on strings that were made before, and reads errno. It takes no lock,
    // so it does not matter what the other threads held at the fork; nothing is allocated, and nothing freed.
    unsafe { command.pre_exec(enter) };
}

/// A piece of physical memory that is not RAM.
pub struct Physical {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping lives as long as the process and belongs to no thread.
unsafe impl Send for Physical {}

impl Physical {
    /// Maps it through /dev/mem.
    pub fn map(memory: BorrowedFd<'_>, address: u64, bytes: usize) -> io::Result<Self> {
        const READ_WRITE: c_int = 3;
        const SHARED: c_int = 1;
        // SAFETY: the kernel chooses a free address, so no memory in use is replaced.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                READ_WRITE,
                SHARED,
                memory.as_raw_fd(),
                address as i64,
            )
        };
        if base as isize == -1 {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self {
                base: base.cast(),
                bytes,
            })
        }
    }

    /// Reads the 32-bit register at `offset`.
    pub fn read_register(&self, offset: usize) -> u32 {
        assert!(offset % 4 == 0 && offset + 4 <= self.bytes);
        // SAFETY: inside the mapping and aligned, by the assertion.
        unsafe { self.base.add(offset).cast::<u32>().read_volatile() }
    }

    /// Writes the 32-bit register at `offset`.
    pub fn write_register(&self, offset: usize, value: u32) {
        assert!(offset % 4 == 0 && offset + 4 <= self.bytes);
        // SAFETY: inside the mapping and aligned, by the assertion.
        unsafe { self.base.add(offset).cast::<u32>().write_volatile(value) }
    }

    /// Copies from the piece at `offset`.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        assert!(offset <= self.bytes && to.len() <= self.bytes - offset);
        // SAFETY: inside the mapping, by the assertion; the slice is ordinary memory and does not overlap it. The host program
        // changes the window only while a register is being accessed, which this is not.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(offset), to.as_mut_ptr(), to.len()) }
    }

    /// Copies into the piece at `offset`.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        assert!(offset <= self.bytes && from.len() <= self.bytes - offset);
        // SAFETY: as for `copy_out`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.add(offset), from.len()) }
    }
}
