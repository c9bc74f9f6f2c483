//! A timer that interrupts one thread again and again.
#![allow(unsafe_code, reason = "POSIX timers")]

use std::time::Duration;

use crate::trap;

/// Interrupts the thread that made it, so that its KVM_RUN returns EINTR, until this is dropped.
#[derive(Debug)]
pub struct Ticks(libc::timer_t);

impl Ticks {
    /// Starts interrupting this thread, once per `period`.
    ///
    /// # Panics
    ///
    /// There are no timers left, or the period is a second or more.
    #[must_use]
    pub fn start(period: Duration) -> Self {
        trap::set_handler(libc::SIGUSR1, nothing);
        // SAFETY: All-zero is a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGUSR1;
        // SAFETY: The call takes nothing and cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: `event` is initialised, and the call writes one timer_t to `timer`.
        let result =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        assert_eq!(result, 0, "timer_create");
        let ticks = Self(timer);
        assert_eq!(period.as_secs(), 0, "a period of a second or more");
        let period = libc::timespec {
            tv_sec: 0,
            tv_nsec: period.subsec_nanos().into(),
        };
        let times = libc::itimerspec {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: The timer exists, `times` is initialised, and no old value is asked for.
        let result =
            unsafe { libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()) };
        assert_eq!(result, 0, "timer_settime");
        ticks
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        // SAFETY: The timer exists, and nothing uses it after this.
        unsafe { libc::timer_delete(self.0) };
    }
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
