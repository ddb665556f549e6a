//! `quorate`: the operator's command line.
//!
//! Path of a command: [`args`] parses it -> [`commands`] asks hostd through `tools::client`, and waits if told to ->
//! [`output`] shows the answer as a table for people or as JSON or YAML for programs -> [`exit`] says how it went.
//!
//! On a host, root talks to its own hostd over a Unix socket. From anywhere else: `--server`, `--ca`, `--token-file`.

mod args;
mod commands;
mod exit;
mod output;
mod terminal;
mod wait;

#[cfg(test)]
mod manual_tests;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;
use exit::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Local(format!("no runtime could be started: {error}")).report(),
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
