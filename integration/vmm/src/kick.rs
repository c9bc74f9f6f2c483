//! The signal that takes a vCPU out of the guest.
//!
//! Its handler sets `immediate_exit` of the vCPU that its thread runs. A signal that comes just
//! before KVM_RUN is therefore not lost: KVM_RUN returns at once.

#![allow(
    unsafe_code,
    reason = "a signal handler that writes one byte of the shared kvm_run page"
)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;

use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use vmm_sys_util::errno;
use vmm_sys_util::signal::register_signal_handler;

const KICK: Signal = Signal::SIGUSR1;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// As long as it lives, a [`Kick`] of this thread reaches the vCPU.
pub(crate) struct Kickable<'a> {
    vcpu: &'a mut VcpuFd,
    /// It belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

/// Another thread, to be kicked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kick(Pthread);

/// Installs the handler, once per process.
pub(crate) fn install() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(KICK as i32, on_kick))
}

impl<'a> Kickable<'a> {
    /// This thread runs `vcpu` from now on.
    pub(crate) fn new(vcpu: &'a mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self {
            vcpu,
            _thread: PhantomData,
        }
    }

    /// The vCPU.
    pub(crate) fn vcpu(&mut self) -> &mut VcpuFd {
        self.vcpu
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

impl Kick {
    /// The calling thread.
    pub(crate) fn this_thread() -> Self {
        Self(pthread_self())
    }

    /// Takes that thread out of KVM_RUN, or lets its next KVM_RUN return at once. The thread must
    /// not have been joined.
    pub(crate) fn send(self) -> Result<(), nix::Error> {
        pthread_kill(self.0, KICK)
    }
}

extern "C" fn on_kick(
    _signal: i32,
    _info: *mut nix::libc::siginfo_t,
    _context: *mut nix::libc::c_void,
) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: The pointer is to `immediate_exit` in the kvm_run page of the vCPU that this
        // thread's `Kickable` borrows; the page stays mapped as long as the vCPU exists, and the
        // pointer is null again before the borrow ends. One byte, volatile: the kernel shares the
        // page, and the interrupted code of this thread may read or write the same byte, but never
        // part of it. Reading a const-initialised thread-local without a destructor and a
        // store are async-signal-safe.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
