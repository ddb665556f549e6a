//! The `vmm` binary: `vmm run` runs one guest for hostd, `vmm check` tells what this host's KVM can do, `vmm processor` what it offers.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use vmm::check;
use vmm::cpu::report;
use vmm::devices::net::TapFd;
use vmm::process::{self, RunOptions};
use vmm::sandbox::UserId;

/// Runs one guest of Quorate on KVM.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the guest that a configuration file describes, to its end
    Run {
        /// The configuration, as JSON
        #[arg(long)]
        config: PathBuf,
        /// Where to listen for hostd
        #[arg(long)]
        control: PathBuf,
        /// An open descriptor that holds the VM's lock; without it the run directory is locked
        #[arg(long)]
        lock_fd: Option<RawFd>,
        /// An open descriptor of the tap of a network card; each card of the configuration needs one
        #[arg(long = "tap-fd", value_name = "ID=FD")]
        tap_fds: Vec<TapFd>,
        /// Give up what the guest's process does not need: most system calls, files, the network, all capabilities. Disks that come later
        /// must come with their files
        #[arg(long)]
        sandbox: bool,
        /// In the sandbox, be this user, and the group of the same number. The run directory and that of the marks must be theirs
        #[arg(long, value_name = "ID", requires = "sandbox")]
        user: Option<UserId>,
        /// Wait for the guest to come from elsewhere, over the control socket, instead of starting it
        #[arg(long)]
        incoming: bool,
    },
    /// Run tiny test guests and tell what this host's KVM can do
    Check,
    /// Tell what this host offers to guests, as one object of JSON: processor models, clock, huge pages
    Processor,
}

fn main() -> ExitCode {
    let process_start = Instant::now();
    match Arguments::parse().command {
        Command::Run { config, control, lock_fd, tap_fds, sandbox, user, incoming } => {
            // Before the first thread: all inherit the mask.
            if let Err(error) = vmm::control::server::block_signals() {
                eprintln!("vmm: cannot prepare for signals: {error}");
                return ExitCode::FAILURE;
            }
            let options = RunOptions { config, control, lock_fd, tap_fds, incoming, sandbox, user };
            ExitCode::from(process::run(&options, process_start))
        }
        Command::Check => {
            let report = check::run();
            println!("{report}");
            // 0: any guest; 1: small guests only; 2: none.
            ExitCode::from(if report.runs_linux() { 0 } else { 2 - u8::from(report.runs_flat_guests()) })
        }
        Command::Processor => match report::run() {
            Ok(found) => {
                println!("{}", serde_json::json!(found));
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("vmm: {}", vmm::process::chain(&error));
                ExitCode::FAILURE
            }
        },
    }
}
