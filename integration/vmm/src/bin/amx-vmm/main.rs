//! A VMM to be used by hand: runs a Linux guest, sends it to another process while it runs, takes one that
//! comes, saves it to a file and goes on from one.
//!
//! | module | its one job |
//! |---|---|
//! | [`cli`] | what it can be told |
//! | [`event`] | what it says, as data: one JSON object per line |
//! | [`screen`] | the same to look at |
//! | [`teller`] | both, from a thread of its own |
//! | [`host`] | the process that has the guest, from its arrival to its end |
//! | [`control`] | the socket on which that process takes orders |
//! | [`clerk`] | who takes them while a guest is moved |
//! | [`signals`] | Ctrl-C and SIGTERM |
//! | [`ask`] | the process that gives them |
//!
//! docs/migration.md shows a session.

mod ask;
mod clerk;
mod cli;
mod control;
mod event;
mod host;
mod screen;
mod signals;
mod teller;

use amx_vmm::words::in_words;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use control::Request;
use event::{Code, Event};
use screen::Screen;
use teller::Teller;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut screen = Screen::new(cli.json);
    let (control, request) = match cli.command {
        Command::Run(guest) => return with_guest(screen, |teller| host::boot(&guest, teller)),
        Command::Receive(incoming) => {
            return with_guest(screen, |teller| host::receive(&incoming, teller));
        }
        Command::Restore(file) => return with_guest(screen, |teller| host::restore(&file, teller)),
        Command::Send(send) => (send.control.control.clone(), send.request()),
        Command::Save(save) => (save.control.control.clone(), save.request()),
        Command::Status(order) => (order.control, Request::Status),
        Command::Cancel(order) => (order.control, Request::Cancel),
        Command::Resume(order) => (order.control, Request::Resume),
        Command::Stop(order) => (order.control, Request::Stop),
    };
    let done = ask::ask(&control, &request, &mut screen);
    let code = done.unwrap_or_else(|error| {
        let reason = in_words(error.as_ref());
        screen.show(&Event::Failed { reason });
        Code::Failed
    });
    screen.finish();
    code.into()
}

/// The process that has a guest waits for no reader.
fn with_guest(screen: Screen, act: impl FnOnce(&mut Teller) -> anyhow::Result<Code>) -> ExitCode {
    let mut teller = Teller::new(screen);
    let code = act(&mut teller).unwrap_or_else(|error| {
        let reason = in_words(error.as_ref());
        teller.show(Event::Failed { reason });
        Code::Failed
    });
    code.into()
}
