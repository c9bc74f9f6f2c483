//! `amx-lab`: runs any static program on a host with KVM and AMX, on a machine that has neither.

mod cargo;
mod cli;
mod codes;
mod look;
mod run;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing help to a closed pipe is not worth a word.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { codes::LAB } else { 0 });
        }
    };
    let result = match cli.command {
        cli::Command::Run(args) => run::run(&args),
        cli::Command::Shell(args) => run::shell(&args),
        cli::Command::Cargo(args) => cargo::cargo(&args),
        cli::Command::Prepare(args) => look::prepare(&args),
        cli::Command::GuestKernel(args) => run::guest_kernel(&args),
        cli::Command::Status(args) => look::status(&args),
        cli::Command::Clean => look::clean(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = codes::of(&error);
            if code == codes::BROKEN_PIPE {
                return ExitCode::from(code);
            }
            eprintln!("amx-lab: {error:#}");
            if let Some(advice) = codes::advice(&error) {
                eprintln!("amx-lab: {advice}");
            }
            ExitCode::from(code)
        }
    }
}
