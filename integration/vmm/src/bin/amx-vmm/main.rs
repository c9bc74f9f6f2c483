//! A VMM to be used by hand: runs a Linux guest, sends it to another process while it runs, takes one that
//! comes, saves it to a file and goes on from one.
//!
//! | module | its one job |
//! |---|---|
//! | [`cli`] | what it can be told |
//! | [`event`] | what it says, as data: one JSON object per line |
//! | [`screen`] | the same to look at |
//! | [`host`] | the process that has the guest, from its arrival to its end |
//! | [`control`] | the socket on which that process takes orders |
//! | [`signals`] | Ctrl-C and SIGTERM |
//! | [`ask`] | the process that gives them |
//!
//! docs/migration.md shows a session.

mod ask;
mod cli;
mod control;
mod event;
mod host;
mod screen;
mod signals;

use amx_vmm::words::in_words;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use event::{Code, Event};
use screen::Screen;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut screen = Screen::new(cli.json);
    let done = match cli.command {
        Command::Run(guest) => host::boot(&guest, &mut screen),
        Command::Receive(incoming) => host::receive(&incoming, &mut screen),
        Command::Restore(file) => host::restore(&file, &mut screen),
        Command::Send(send) => ask::ask(&send.control.control, &send.request(), &mut screen),
        Command::Save(save) => ask::ask(&save.control.control, &save.request(), &mut screen),
        Command::Status(order) => ask::ask(&order.control, &control::Request::Status, &mut screen),
        Command::Resume(order) => ask::ask(&order.control, &control::Request::Resume, &mut screen),
        Command::Stop(order) => ask::ask(&order.control, &control::Request::Stop, &mut screen),
    };
    let code = done.unwrap_or_else(|error| {
        let reason = in_words(error.as_ref());
        screen.show(&Event::Failed { reason });
        Code::Failed
    });
    screen.finish();
    code.into()
}
