//! Starts a process of the chain and waits for it, with a time-out.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::job::{Answer, Job};

/// No process of the demo takes longer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Runs `job` in a new process of this program.
pub(crate) fn run(kvm: &str, job: &Job) -> anyhow::Result<Answer> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut child = Command::new(program)
        .args(["leg", "--kvm", kvm])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("a new process")?;
    let answer = converse(&mut child, job);
    if answer.is_err() {
        // It may have ended already.
        let _ = child.kill();
    }
    let status = child.wait().context("waiting for the process")?;
    match answer {
        Ok((out, _)) if status.success() => {
            serde_json::from_slice(&out).context("the answer of the process")
        }
        Ok((_, errors)) => bail!("the process ended with {status}: {}", last_line(&errors)),
        Err(error) => Err(error),
    }
}

/// Tells the job, and reads everything until the process closes its output.
fn converse(child: &mut Child, job: &Job) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        bail!("the process has no pipes");
    };
    let out = collect(stdout);
    let errors = collect(stderr);
    let job = serde_json::to_vec(job).context("the job")?;
    // Closed at the end of this statement's scope: the process reads up to there.
    stdin.write_all(&job).context("telling the job")?;
    drop(stdin);
    let out = out
        .recv_timeout(TIMEOUT)
        .with_context(|| format!("no answer in {} s", TIMEOUT.as_secs()))?;
    let errors = errors.recv_timeout(TIMEOUT).unwrap_or_default();
    Ok((out, errors))
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is; nobody may be waiting any more.
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().rfind(|line| !line.trim().is_empty());
    line.unwrap_or("it said nothing").to_owned()
}
