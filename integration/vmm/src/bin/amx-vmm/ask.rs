//! The process that gives an order: tells it, and shows what comes of it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};

use crate::control::{self, Request};
use crate::event::{Code, Event};
use crate::screen::Screen;

/// Waits for the answer: a guest may take long to be moved, and what it takes is shown.
pub(crate) fn ask(path: &Path, order: &Request, screen: &mut Screen) -> anyhow::Result<Code> {
    let stream = UnixStream::connect(path).with_context(|| {
        format!(
            "{}: no process with a guest takes orders there; `amx-vmm run --control` is one",
            path.display()
        )
    })?;
    control::tell(&stream, order).context("the order could not be told")?;
    for line in BufReader::new(stream).lines() {
        let line = line.context("the process with the guest")?;
        let event: Event =
            serde_json::from_str(&line).context("the process with the guest speaks otherwise")?;
        screen.show(&event);
        let resumed = *order == Request::Resume && matches!(event, Event::State { .. });
        if let Some(code) = event.code().or(resumed.then_some(Code::Good)) {
            return Ok(code);
        }
    }
    bail!("the process with the guest has ended without an answer: look what it says")
}
