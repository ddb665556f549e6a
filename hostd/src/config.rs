//! `hostd.toml`: what an administrator decides about one host.
//!
//! Every key has a default except `name` and `address`. Unknown keys are refused, and each error names the file, the
//! key and what to write instead. Start at [`Config::load`].

use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use statemachine::VmId;
use thiserror::Error;

use crate::duties::retention::Retention;
use crate::migration::lanes::MAX_LANES;

/// Where `hostd` looks when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/quorate/hostd.toml";
/// The one port number: QUIC for Raft on udp, HTTPS on tcp.
pub const DEFAULT_PORT: u16 = 7443;

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}; write one from the sample hostd.toml, or name another with --config")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a valid hostd.toml:\n{source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{path}: {key} is not acceptable: {why}")]
    Value { path: PathBuf, key: &'static str, why: String },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's name in the site: a DNS label, dots allowed inside.
    pub name: String,
    /// Where other hosts and API clients reach this one: IP address and port, the same number on udp and tcp.
    pub address: SocketAddr,
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Directories and devices that kernels, initrds and disks of VMs may be under.
    #[serde(default = "default_allowed_paths")]
    pub allowed_paths: Vec<PathBuf>,
    /// The program that runs one guest.
    #[serde(default = "default_vmm")]
    pub vmm: PathBuf,
    /// Memory that guests may not have.
    #[serde(default = "default_reserved_memory_mib")]
    pub reserved_memory_mib: u64,
    #[serde(default)]
    pub timers: Timers,
    #[serde(default)]
    pub raft: Raft,
    #[serde(default)]
    pub events: Events,
    #[serde(default)]
    pub migration: Migration,
    #[serde(default)]
    pub log: Log,
    #[serde(default)]
    pub watchdog: Option<Watchdog>,
    /// Says that CLOCK_BOOTTIME goes on while this host does not execute, where its clock source suggests otherwise (DESIGN §5, *lease*).
    #[serde(default)]
    pub trust_clock: bool,
}

/// Everything that waits. All in milliseconds; equal on every host of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timers {
    /// Raft heartbeat: at least three times the worst round trip between hosts.
    pub heartbeat_ms: u64,
    pub election_min_ms: u64,
    pub election_max_ms: u64,
    /// A host's word to the leader that its guests may go on (DESIGN §5, *Grant*).
    pub host_heartbeat_ms: u64,
    /// How long one grant lasts, from the send time in the host's own record.
    pub lease_ms: u64,
    /// Silence after which the leader suspects a host, and then calls it unreachable.
    pub suspect_ms: u64,
    pub lost_ms: u64,
    /// A guest that ignores its power button this long is powered off.
    pub shutdown_ms: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            heartbeat_ms: 100,
            election_min_ms: 300,
            election_max_ms: 600,
            host_heartbeat_ms: 1000,
            lease_ms: 12_000,
            suspect_ms: 5000,
            lost_ms: 10_000,
            shutdown_ms: 60_000,
        }
    }
}

impl Timers {
    pub fn host_heartbeat(&self) -> Duration {
        Duration::from_millis(self.host_heartbeat_ms)
    }

    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    pub fn suspect(&self) -> Duration {
        Duration::from_millis(self.suspect_ms)
    }

    pub fn lost(&self) -> Duration {
        Duration::from_millis(self.lost_ms)
    }

    pub fn shutdown(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }

    /// The rules that keep elections possible and leases longer than a failover.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let rules: [(&'static str, bool, &str); 7] = [
            ("timers.heartbeat_ms", (10..=5000).contains(&self.heartbeat_ms), "write 10 to 5000"),
            (
                "timers.election_min_ms",
                self.election_min_ms >= 2 * self.heartbeat_ms,
                "write at least twice heartbeat_ms, or followers elect between two heartbeats",
            ),
            (
                "timers.election_max_ms",
                self.election_max_ms > self.election_min_ms && self.election_max_ms <= 60_000,
                "write more than election_min_ms, at most 60000",
            ),
            (
                "timers.host_heartbeat_ms",
                (50..=10_000).contains(&self.host_heartbeat_ms) && self.host_heartbeat_ms * 3 <= self.lease_ms,
                "write 50 to 10000, and at most a third of lease_ms",
            ),
            (
                "timers.lease_ms",
                // Every vmm refuses a later deadline (vmm_control::MAX_LEASE_NS), and fencing waits no longer.
                (1000..=12_000).contains(&self.lease_ms) && self.lease_ms > 3 * self.election_max_ms,
                "write 1000 to 12000, and more than three times election_max_ms, or a change of leader pauses guests",
            ),
            (
                "timers.suspect_ms",
                self.suspect_ms > 2 * self.host_heartbeat_ms,
                "write more than twice host_heartbeat_ms, or one lost heartbeat raises suspicion",
            ),
            (
                "timers.lost_ms",
                self.lost_ms > self.suspect_ms && self.lost_ms <= 600_000,
                "write more than suspect_ms, at most 600000",
            ),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            None => Ok(()),
            Some((key, _, fix)) => Err((key, fix.to_owned())),
        }
    }
}

/// How much of the stream of events is kept; equal on every host of a site, since the leader's word counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Events {
    pub keep_days: u64,
    /// A batch holds the events of one command.
    pub keep_batches: u64,
}

impl Default for Events {
    fn default() -> Self {
        Events { keep_days: 30, keep_batches: 10_000_000 }
    }
}

impl Events {
    pub fn retention(&self) -> Retention {
        let keep_for = Duration::from_secs(self.keep_days * 24 * 3600);
        Retention { keep_for, keep_batches: self.keep_batches, ..Retention::default() }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        match ((1..=36_500).contains(&self.keep_days), self.keep_batches >= 1_000) {
            (false, _) => Err(("events.keep_days", "write 1 to 36500".to_owned())),
            (_, false) => Err(("events.keep_batches", "write at least 1000".to_owned())),
            _ => Ok(()),
        }
    }
}

/// How much log a host keeps. In entries; an entry holds one or more commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raft {
    pub snapshot_every_entries: u64,
    /// Kept behind a snapshot, so that a host that was away briefly needs none.
    pub keep_behind_snapshot_entries: u64,
}

impl Default for Raft {
    fn default() -> Self {
        Raft { snapshot_every_entries: 20_000, keep_behind_snapshot_entries: 5_000 }
    }
}

impl Raft {
    fn check(&self) -> Result<(), (&'static str, String)> {
        match (10..=10_000_000).contains(&self.snapshot_every_entries) {
            true => Ok(()),
            false => Err(("raft.snapshot_every_entries", "write 10 to 10000000".to_owned())),
        }
    }
}

/// How guests leave this host. What they may cost is a matter of the cluster and the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Migration {
    /// Over so many a guest goes at once. One keeps one processor at each end busy, so by default they are half of this host's, at most 4.
    pub connections: u16,
}

impl Default for Migration {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Migration { connections: (processors / 2).clamp(1, 4) as u16 }
    }
}

impl Migration {
    fn check(&self) -> Result<(), (&'static str, String)> {
        match (1..=MAX_LANES).contains(&self.connections) {
            true => Ok(()),
            false => Err(("migration.connections", format!("write 1 to {MAX_LANES}"))),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or filters such as `info,hostd::agent=debug`.
    pub level: String,
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Log { level: "info".to_owned(), format: LogFormat::Text }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// Usually `/dev/watchdog`; armed with nowayout, fed while lease guests obey.
    pub device: PathBuf,
}

fn default_data_dir() -> PathBuf {
    PathBuf::from("/var/lib/quorate")
}

fn default_run_dir() -> PathBuf {
    PathBuf::from("/run/quorate")
}

fn default_allowed_paths() -> Vec<PathBuf> {
    vec![PathBuf::from("/var/lib/quorate/images")]
}

fn default_vmm() -> PathBuf {
    PathBuf::from("/usr/bin/vmm")
}

fn default_reserved_memory_mib() -> u64 {
    512
}

impl Config {
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Config::parse(path, &text)
    }

    /// Reads the text of a configuration; `path` is for its errors.
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        config.check().map_err(|(key, why)| ConfigError::Value { path: path.to_owned(), key, why })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.name.is_empty() {
            return Err(("name", "write the host's name, for example \"h1\"".to_owned()));
        }
        if self.address.ip().is_unspecified() || self.address.port() == 0 {
            let why = format!("write the address that other hosts dial, for example \"192.0.2.10:{DEFAULT_PORT}\"");
            return Err(("address", why));
        }
        for (key, path) in [("data_dir", &self.data_dir), ("run_dir", &self.run_dir), ("vmm", &self.vmm)] {
            check_absolute(key, path)?;
        }
        for path in &self.allowed_paths {
            check_absolute("allowed_paths", path)?;
        }
        // A Unix socket's path has 108 bytes; a VM's control socket is the longest that hangs under run_dir.
        const LONGEST_BELOW: usize = "/vm/00000000-0000-0000-0000-000000000000/vmm/control.sock".len();
        if self.run_dir.as_os_str().len() + LONGEST_BELOW > 107 {
            return Err(("run_dir", format!("write a path of at most {} bytes", 107 - LONGEST_BELOW)));
        }
        self.raft.check()?;
        self.events.check()?;
        self.migration.check()?;
        self.timers.check()
    }

    /// CA certificate, own certificate and key, and on voters the CA's key.
    pub fn identity_dir(&self) -> PathBuf {
        self.data_dir.join("identity")
    }

    /// Raft log, event segments, snapshots, keys of the transport.
    pub fn raft_dir(&self) -> PathBuf {
        self.data_dir.join("raft")
    }

    /// Markers of started epochs: `marks/<vm>/<epoch>`.
    pub fn marks_dir(&self) -> PathBuf {
        self.data_dir.join("marks")
    }

    /// Guests that sleep.
    pub fn asleep_dir(&self) -> PathBuf {
        self.data_dir.join("asleep")
    }

    /// The API of root.
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join("hostd.sock")
    }

    /// One directory a guest that runs here.
    pub fn vm_run_dir(&self, vm: VmId) -> PathBuf {
        self.vms_run_dir().join(vm.to_string())
    }

    pub fn vms_run_dir(&self) -> PathBuf {
        self.run_dir.join("vm")
    }
}

fn check_absolute(key: &'static str, path: &Path) -> Result<(), (&'static str, String)> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err((key, format!("{} is not an absolute path", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "name = \"h1\"\naddress = \"192.0.2.10:7443\"\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("hostd.toml"), text)
    }

    #[test]
    fn a_name_and_an_address_are_enough() {
        let config = parse(MINIMAL).unwrap();
        assert_eq!(config.timers, Timers::default());
        assert_eq!(config.socket_path(), Path::new("/run/quorate/hostd.sock"));
        assert_eq!(config.identity_dir(), Path::new("/var/lib/quorate/identity"));
    }

    #[test]
    fn the_shipped_sample_is_valid() {
        parse(include_str!("../packaging/hostd.toml")).unwrap();
    }

    #[test]
    fn an_error_names_the_file_and_the_key() {
        let cases = [
            (format!("{MINIMAL}colour = \"blue\"\n"), "colour"),
            (format!("{MINIMAL}[timers]\nlease = 3\n"), "lease"),
            (format!("{MINIMAL}[timers]\nlease_ms = 900\n"), "timers.host_heartbeat_ms"),
            (format!("{MINIMAL}[timers]\nelection_min_ms = 150\n"), "timers.election_min_ms"),
            (format!("{MINIMAL}[timers]\nlost_ms = 4000\n"), "timers.lost_ms"),
            (format!("{MINIMAL}[raft]\nsnapshot_every_entries = 1\n"), "raft.snapshot_every_entries"),
            (format!("{MINIMAL}[migration]\nconnections = 0\n"), "migration.connections"),
            (format!("{MINIMAL}data_dir = \"state\"\n"), "data_dir"),
            (format!("{MINIMAL}run_dir = \"/{}\"\n", "r".repeat(80)), "run_dir"),
            ("name = \"h1\"\naddress = \"0.0.0.0:7443\"\n".to_owned(), "address"),
            ("address = \"192.0.2.10:7443\"\n".to_owned(), "name"),
        ];
        for (text, key) in cases {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains("hostd.toml") && error.contains(key), "{key}: {error}");
        }
    }
}
