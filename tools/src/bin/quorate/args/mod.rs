//! The command line: noun, then verb (DESIGN §12). Every command's help ends with an example.

mod devices;
mod guest;
mod parts;
mod values;
mod vm;

pub use devices::*;
pub use guest::*;
pub use parts::*;
pub use values::*;
pub use vm::*;

use std::path::PathBuf;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use hostd_api::DEFAULT_SOCKET;
use tools::client::Options;

use crate::exit::Failure;

/// Operate a Quorate site: hosts, VMs, events
#[derive(Debug, Parser)]
#[command(name = "quorate", version, max_term_width = 110)]
#[command(after_help = "Examples:
  quorate init --name berlin              make this host the first of a new site
  quorate token create --ttl 3h           a token that admits one more host
  quorate join TOKEN                      on that host
  quorate vm list                         what runs where
  quorate events --follow                 watch the site live

Exit codes: 0 done, 1 refused or failed, 2 command line not understood, 3 not found, 4 hostd not reached,
5 --wait gave up.")]
pub struct Cli {
    #[command(flatten)]
    pub connection: Connection,
    /// How to show the answer
    #[arg(short, long, global = true, value_enum, default_value = "table", env = "QUORATE_OUTPUT")]
    pub output: Format,
    #[command(subcommand)]
    pub command: Command,
}

/// Where hostd is.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub struct Connection {
    /// Unix socket of this host's hostd, for root
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "QUORATE_SOCKET")]
    pub socket: PathBuf,
    /// Talk to a host over the network instead; several are tried in order
    #[arg(long, global = true, value_name = "URL", value_delimiter = ',', env = "QUORATE_SERVER")]
    pub server: Vec<String>,
    /// Certificate authority of the site, needed with --server
    #[arg(long, global = true, value_name = "FILE", env = "QUORATE_CA")]
    pub ca: Option<PathBuf>,
    /// File with an API token, needed with --server
    #[arg(long, global = true, value_name = "FILE", env = "QUORATE_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
}

impl Connection {
    pub fn options(self) -> Result<Options, Failure> {
        if self.server.is_empty() {
            return Ok(Options::Socket(self.socket));
        }
        let (Some(ca_file), Some(token_file)) = (self.ca, self.token_file) else {
            let why = "--server needs --ca (copy /var/lib/quorate/identity/ca.pem from a host) and --token-file \
                       (a file with the token of `quorate token create --purpose admin`)";
            return Err(Failure::Usage(why.to_owned()));
        };
        Ok(Options::Servers { urls: self.server, ca_file, token_file })
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make this host the first of a new site
    #[command(after_help = "Example:\n  quorate init --name berlin")]
    Init(InitArgs),
    /// Make this host a member of a site
    #[command(after_help = "Examples:\n  quorate join qrt1.AAEC...\n  quorate join --wait - < token.txt")]
    Join(JoinArgs),
    /// Take this host out of its site; it must be in maintenance
    #[command(after_help = "Example:\n  quorate host maintenance \"$(hostname)\" --wait && quorate leave")]
    Leave,
    /// This host, its leader, and how the site is
    #[command(after_help = "Example:\n  quorate status")]
    Status,
    /// Tokens: admission of hosts, and access to the API
    #[command(subcommand)]
    Token(TokenCommand),
    /// The site as a whole
    #[command(subcommand)]
    Site(SiteCommand),
    /// Clusters of the site: hosts that are alike, and the rules of their guests
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Hosts of the site
    #[command(subcommand)]
    Host(HostCommand),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Inside a VM, by the agent that runs there
    #[command(subcommand)]
    Guest(GuestCommand),
    /// What was decided and seen, in order
    #[command(after_help = "Examples:
  quorate events                                    all that is kept
  quorate events --follow                           from now on
  quorate events --entity vm/web1 --from oldest --follow
  quorate events -o json --after qrc1.AAAB...       behind a cursor, one JSON object a line")]
    Events(EventsArgs),
    /// Why a VM runs where it runs, or why it waits
    #[command(after_help = "Example:\n  quorate why web1")]
    Why { vm: String },
    /// Which host has the storage duty of each data center
    #[command(after_help = "Example:\n  quorate spm")]
    Spm,
    /// The replicated state itself
    #[command(subcommand)]
    State(StateCommand),
    /// This machine's data directory, while hostd is stopped
    #[command(subcommand)]
    Store(StoreCommand),
    /// Go on with this host alone, after most voters were lost for good
    #[command(after_help = "Examples:
  quorate recover                              show what would be kept and lost; change nothing
  systemctl stop hostd && quorate recover --all-other-hosts-are-off && systemctl start hostd")]
    Recover {
        /// hostd's data directory
        #[arg(long, value_name = "PATH", default_value = "/var/lib/quorate")]
        data_dir: std::path::PathBuf,
        /// Your word that no other host of the site runs, or ever comes back with its state
        #[arg(long)]
        all_other_hosts_are_off: bool,
    },
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  quorate completion bash > /etc/bash_completion.d/quorate")]
    Completion { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// Name of the site
    #[arg(long, default_value = "default")]
    pub name: String,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Text of a join token, or - to read it from standard input
    pub token: String,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print its text, which is shown this once
    #[command(after_help = "Examples:
  quorate token create --ttl 3h
  quorate token create --purpose viewer --ttl 30d --note grafana > viewer.token")]
    Create {
        /// What it allows
        #[arg(long, value_enum, default_value = "join")]
        purpose: Purpose,
        /// How long it is valid: 90m, 3h, 30d
        #[arg(long, default_value = "3h", value_parser = parse_duration)]
        ttl: std::time::Duration,
        /// For whom or what it is
        #[arg(long, default_value = "")]
        note: String,
    },
    /// List tokens, without their text
    #[command(after_help = "Example:\n  quorate token list")]
    List,
    /// Refuse a token from now on
    #[command(after_help = "Example:\n  quorate token revoke 17")]
    Revoke { id: u64 },
}

#[derive(Debug, Subcommand)]
pub enum SiteCommand {
    /// Change what holds for the whole site
    #[command(after_help = "Example:\n  quorate site set --voters 5")]
    Set {
        /// How many hosts vote: 3 survive the loss of one, 5 of two
        #[arg(long, value_name = "N")]
        voters: u8,
    },
}

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// List clusters
    #[command(after_help = "Example:\n  quorate cluster list")]
    List,
    /// Change a cluster: how its guests may be moved, where they do not say themselves
    #[command(after_help = "Example:\n  quorate cluster set Default --migrate-bandwidth 200 --migrate-downtime 500")]
    Set {
        cluster: String,
        #[command(flatten)]
        migration: MigrationArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List hosts
    #[command(after_help = "Example:\n  quorate host list")]
    List,
    /// Everything about a host
    #[command(after_help = "Example:\n  quorate host show n2")]
    Show { host: String },
    /// Change what a host is to the site
    #[command(after_help = "Examples:
  quorate host set n2 --failure-domain rack7
  quorate host set n2 --failure-domain '' --spm-priority -1")]
    Set {
        host: String,
        /// Hosts of one domain may fail together, so their votes are spread; '' takes the host out of its domain
        #[arg(long, value_name = "NAME", required_unless_present = "spm_priority")]
        failure_domain: Option<String>,
        /// Who gets the storage duty first: -1 never, 0 to 10
        #[arg(long, value_name = "N", allow_negative_numbers = true)]
        spm_priority: Option<i8>,
    },
    /// Give the host no more VMs
    #[command(after_help = "Example:\n  quorate host maintenance n2 --wait --timeout 10m")]
    Maintenance {
        host: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// End maintenance
    #[command(after_help = "Example:\n  quorate host activate n2 --wait")]
    Activate {
        host: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take a host out of the site for good; it must be in maintenance
    #[command(after_help = "Example:\n  quorate host remove n2")]
    Remove { host: String },
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on behind this cursor
    #[arg(long, value_name = "CURSOR", conflicts_with = "from")]
    pub after: Option<String>,
    /// Where to begin: `oldest` by default, `now` with --follow
    #[arg(long, value_enum)]
    pub from: Option<Begin>,
    /// Go on with what happens next, until interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// Only these kinds, such as VmPermitGranted
    #[arg(long, value_delimiter = ',')]
    pub kind: Vec<String>,
    /// Only about these: vm/NAME, host/NAME, or with ids
    #[arg(long, value_delimiter = ',')]
    pub entity: Vec<String>,
    /// Only asked for by these: root@host/ID, token/ID, host/ID, duty@host/ID, joiner
    #[arg(long, value_delimiter = ',')]
    pub actor: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum StateCommand {
    /// Compare what the hosts believe: equal seq must mean equal digest
    #[command(after_help = "Example:\n  quorate state digest")]
    Digest,
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Read everything and say what is sound; change nothing
    #[command(after_help = "Example:\n  systemctl stop hostd && quorate store check")]
    Check {
        /// hostd's `data_dir`
        #[arg(long, default_value = "/var/lib/quorate")]
        data_dir: PathBuf,
    },
    /// Make the event index again, and a damaged snapshot, from the event segments
    #[command(after_help = "Example:\n  systemctl stop hostd && quorate store rebuild && systemctl start hostd")]
    Rebuild {
        /// hostd's `data_dir`
        #[arg(long, default_value = "/var/lib/quorate")]
        data_dir: PathBuf,
    },
}

/// Whether to wait until what was asked for is so.
#[derive(Debug, Clone, Copy, Args)]
pub struct Wait {
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
    /// How long --wait waits: 30s, 2m
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    pub timeout: std::time::Duration,
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
