//! Signals that instructions under test cause in this process.
#![allow(unsafe_code, reason = "signal handlers")]

use std::sync::Once;

use crate::trial::{UNDER_TEST, signal_code};

/// Installs the handlers. They end an instruction under test, and leave all other signals as fatal as
/// they are without them.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE] {
            set_handler(signal, on_fault);
        }
    });
}

/// A signal handler with all three arguments.
pub type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Makes `handler` the handler of a signal.
pub fn set_handler(signal: i32, handler: Handler) {
    set_action(signal, handler, 0);
}

/// Makes `handler` the handler of a signal, on the thread's alternate stack.
pub fn set_handler_on_stack(signal: i32, handler: Handler) {
    set_action(signal, handler, libc::SA_ONSTACK);
}

fn set_action(signal: i32, handler: Handler, flags: i32) {
    // SAFETY: All-zero is a valid `sigaction`: default action, empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | flags;
    // SAFETY: `action` is initialised and its handler has the type that SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "sigaction");
}

extern "C" fn on_fault(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: The third argument of an SA_SIGINFO handler is the interrupted context, which nothing
    // else refers to while the handler runs.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    if registers[libc::REG_R10 as usize].cast_unsigned() == UNDER_TEST {
        registers[libc::REG_R10 as usize] = signal_code(signal).cast_signed();
        registers[libc::REG_RIP as usize] = registers[libc::REG_R11 as usize];
        return;
    }
    // Not one of ours: the instruction runs again, now with the default action.
    // SAFETY: SIG_DFL is a valid disposition for each of these signals.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
