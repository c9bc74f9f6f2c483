//! Processes of their own: the permission and its lock belong to the process.

use std::os::unix::process::CommandExt;
use std::process::Command;

const MARK: &str = "CPUID_AMX_TEST_ALONE";

/// Whether this is the process that the test has for itself. Where it is not, it runs the test in
/// one, checks that it passed there, and hands on what it skipped: return then.
pub(crate) fn alone(test: &str) -> bool {
    if std::env::var_os(MARK).is_some_and(|mark| mark == test) {
        return true;
    }
    let output = again(test).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for (_, why) in text.lines().filter_map(|line| line.split_once("skipped: ")) {
        println!("skipped: {why}");
    }
    assert!(
        // A name that no test has passes too.
        output.status.success() && text.contains("test result: ok. 1 passed"),
        "{test} in a process of its own: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// Whether this process has executed itself anew. Where it has not, it does so after `before`.
pub(crate) fn executed_anew(test: &str, before: impl FnOnce()) -> bool {
    const ANEW: &str = "CPUID_AMX_TEST_EXECUTED_ANEW";
    if std::env::var_os(ANEW).is_some() {
        return true;
    }
    before();
    let error = again(test).env(ANEW, test).exec();
    panic!("exec: {error}");
}

/// Runs `child` in a fork of this process, and waits for it.
///
/// For processes that a test has for itself: what other threads they have waits for the test.
pub(crate) fn forked(child: impl FnOnce()) {
    // SAFETY: the one other thread, libtest's, waits for this one and holds no lock that the child
    // needs; the child leaves by _exit, and never returns into the frames of its parent.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let mut status = 0;
    // SAFETY: `status` is an int that lives beyond the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
        "the child ended with {status:#x}"
    );
}

fn again(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(MARK, test);
    command
}
