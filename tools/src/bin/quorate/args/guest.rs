//! `quorate guest ...`: what is asked of the agent inside a guest.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::Subcommand;

use super::parse_duration;

#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Whether the guest's agent answers, and how full its file systems are
    #[command(after_help = "Example:\n  quorate guest show web1")]
    Show { vm: String },
    /// Run a program in the guest, and show what it writes
    #[command(after_help = "Examples:
  quorate guest exec web1 -- /usr/bin/uptime
  quorate guest exec web1 --input motd -- /usr/bin/tee /etc/motd")]
    Exec(ExecArgs),
    /// Make the guest's file systems consistent on its disks, and stop them until `thaw`
    #[command(after_help = "Example:\n  quorate guest freeze db1 --for 20s && take-a-snapshot; quorate guest thaw db1")]
    Freeze {
        vm: String,
        /// Thawed after this time in any case, 60s at most
        #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
        limit: Duration,
    },
    /// Let frozen file systems go on; fails when they did so before, for then a snapshot is not consistent
    #[command(after_help = "Example:\n  quorate guest thaw db1")]
    Thaw { vm: String },
    /// Set the guest's clock to its host's
    #[command(after_help = "Example:\n  quorate guest set-time web1")]
    SetTime { vm: String },
    /// Ask the guest's system to restart itself, in order; `vm reset` does not ask
    #[command(after_help = "Example:\n  quorate guest reboot web1")]
    Reboot { vm: String },
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    pub vm: String,
    /// What the program reads: a file, or - for standard input
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Leave it alone after this time, 5m at most
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "30s")]
    pub timeout: Duration,
    /// Path of the program in the guest, and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub program: Vec<String>,
}
