//! A process that a test has started, and what it says.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use crate::groups::Group;
use crate::{support, trial};

/// Before what is meant for the parent; the rest is the test harness's.
const MARK: &str = "fault: ";
/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(300);

/// It is killed when it is dropped.
pub(crate) struct Process {
    what: String,
    child: Child,
    lines: Receiver<String>,
}

/// Says `line` to the parent.
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{MARK}{line}");
    std::io::stdout().flush().expect("the parent listens");
}

impl Process {
    pub(crate) fn start(group: Group, job: &str, stdin: impl Into<Stdio>) -> Self {
        let mut child = support::command(group.test(), job)
            .env(trial::SLOWER, trial::slower_by().to_string())
            .stdin(stdin)
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // The harness may have begun the line.
                if let Some((_, said)) = line.split_once(MARK) {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Self {
            what: format!("{group:?}, {job}"),
            child,
            lines,
        }
    }

    pub(crate) fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("it is piped")
    }

    /// What it says next, or `None` when it has ended.
    pub(crate) fn hear(&mut self) -> Option<String> {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("{} hangs", self.what),
        }
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }

    /// Waits for its end; everything that it has still said. It has to pass.
    pub(crate) fn passes(mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = self.hear() {
            lines.push(line);
        }
        let status = self.child.wait().expect("it is ours");
        assert!(status.success(), "{}: {status}", self.what);
        lines
    }

    /// Waits for its end, whatever it is.
    pub(crate) fn ends(mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = self.hear() {
            lines.push(line);
        }
        lines
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
