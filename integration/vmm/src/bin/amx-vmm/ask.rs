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
    // Who does not want to hear it may have said why before.
    let told = control::tell(&stream, order);
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let event: Event =
            serde_json::from_str(&line).context("the process with the guest speaks otherwise")?;
        screen.show(&event);
        let code = match (order, &event) {
            (Request::Resume, Event::State { .. }) | (Request::Cancel, Event::NotMoved { .. }) => {
                Some(Code::Good)
            }
            // It was too late.
            (Request::Cancel | Request::Stop, Event::HandedOver(_)) => Some(Code::Failed),
            (Request::Stop, Event::NotMoved { .. }) => None,
            _ => event.code(),
        };
        if let Some(code) = code {
            return Ok(code);
        }
    }
    told.context("the order could not be told")?;
    bail!("the process with the guest has ended without an answer: look what it says")
}
