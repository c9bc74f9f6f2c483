//! Ctrl-C and SIGTERM: how often, and what to do where nobody looks.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use amx_vmm::migration::Cancel;
use nix::libc;
use vmm_sys_util::signal::register_signal_handler;

use crate::control::Socket;
use crate::event::Code;

/// How soon a signal takes effect.
const SOON: Duration = Duration::from_millis(100);

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

/// Counts them from now on.
pub(crate) fn listen() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // Without it Ctrl-C ends this process as before, and that is no reason to lose a guest.
        let _ = register_signal_handler(signal, on_signal);
    }
}

/// How many there were.
pub(crate) fn seen() -> u32 {
    SEEN.load(Ordering::SeqCst)
}

/// As if there had been none.
pub(crate) fn forget() {
    SEEN.store(0, Ordering::SeqCst);
}

/// Cancels the move at the first signal, until what is returned is dropped.
pub(crate) fn cancel_at_the_first(cancel: &Cancel) -> impl Sized + use<> {
    let cancel = cancel.clone();
    let (watched, over) = mpsc::channel::<()>();
    thread::spawn(move || {
        while over.recv_timeout(SOON) == Err(RecvTimeoutError::Timeout) {
            if seen() > 0 {
                cancel.cancel();
                return;
            }
        }
    });
    watched
}

/// Ends this process at the second signal, until what is returned is dropped. The socket goes with it.
pub(crate) fn exit_at_the_second(socket: Option<&Socket>) -> impl Sized + use<> {
    let path = socket.map(|socket| socket.path().to_owned());
    let (watched, over) = mpsc::channel::<()>();
    thread::spawn(move || {
        while over.recv_timeout(SOON) == Err(RecvTimeoutError::Timeout) {
            if seen() > 1 {
                if let Some(path) = &path {
                    // Nobody needs to know that it is gone already.
                    let _ = std::fs::remove_file(path);
                }
                process::exit(Code::Interrupted as i32);
            }
        }
    });
    watched
}
