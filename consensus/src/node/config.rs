//! What a node is told by its host.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use openraft::Config;
use openraft::SnapshotPolicy;
use statemachine::mutant;
use statemachine::mutant::Mutant;

use crate::store::StoreConfig;
use crate::transport::Peer;

/// Election and heartbeat times (DESIGN §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    pub heartbeat_ms: u64,
    pub election_min_ms: u64,
    pub election_max_ms: u64,
}

impl Default for Timers {
    /// Fails over in 0.9 .. 1.2 s; round trips up to 25 ms.
    fn default() -> Timers {
        Timers { heartbeat_ms: 100, election_min_ms: 300, election_max_ms: 600 }
    }
}

impl Timers {
    /// For emulated hosts, whose round trips reach 50 ms; fails over in about 2 s.
    pub fn slow() -> Timers {
        Timers { heartbeat_ms: 200, election_min_ms: 600, election_max_ms: 1200 }
    }
}

#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Holds the log, the event segments and the transport's keys.
    pub data_dir: PathBuf,
    /// Where the transport listens (7443/udp).
    pub listen: SocketAddr,
    /// `address:port` under which other hosts reach this one.
    pub address: String,
    /// Hosts of the site that this one was told of when it joined. Asked for what was committed until the log names others.
    pub peers: Vec<Peer>,
    pub timers: Timers,
    /// From forwarding a command to its answer; beyond it the caller is told to retry.
    pub propose_timeout_ms: u64,
    /// From asking for a linearizable read to this host having applied it.
    pub read_timeout_ms: u64,
    /// Log entries between two snapshots.
    pub snapshot_every: u64,
    /// Sizes of the stores' files.
    pub store: StoreConfig,
    /// Log entries kept behind a snapshot, so that a host that was away briefly needs no snapshot.
    pub keep_behind_snapshot: u64,
    /// A host that pulls, and lacks more batches than this of a snapshot, takes the snapshot instead.
    pub snapshot_ahead: u64,
    /// A voter that is unreachable for this long is replaced (DESIGN §4).
    pub replace_voter_after_ms: u64,
}

impl NodeConfig {
    pub fn new(data_dir: impl Into<PathBuf>, listen: SocketAddr, address: impl Into<String>) -> NodeConfig {
        NodeConfig {
            data_dir: data_dir.into(),
            listen,
            address: address.into(),
            peers: Vec::new(),
            timers: Timers::default(),
            propose_timeout_ms: 5_000,
            read_timeout_ms: 2_000,
            store: StoreConfig::default(),
            snapshot_every: 20_000,
            keep_behind_snapshot: 5_000,
            snapshot_ahead: 50_000,
            replace_voter_after_ms: 600_000,
        }
    }

    pub(super) fn propose_timeout(&self) -> Duration {
        Duration::from_millis(self.propose_timeout_ms)
    }

    pub(super) fn read_timeout(&self) -> Duration {
        Duration::from_millis(self.read_timeout_ms)
    }

    pub(super) fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.timers.heartbeat_ms)
    }

    /// openraft's settings. Those that deviate from its defaults say why.
    pub(super) fn raft(&self) -> Result<Config, openraft::ConfigError> {
        let config = Config {
            cluster_name: "quorate".to_owned(),
            heartbeat_interval: self.timers.heartbeat_ms,
            election_timeout_min: self.timers.election_min_ms,
            election_timeout_max: self.timers.election_max_ms,
            // An isolated node must not raise the term (hazard H25).
            enable_pre_vote: Some(true),
            // A restarted leader must be elected: it would lead under its old id with an unapplied tail (hazard C2).
            enable_leader_restore: Some(mutant::is_on(Mutant::LeaderRestore)),
            // A leader that is refused stops its heartbeats, so that voters who would refuse it for good elect another
            // (hazard C15). openraft asks for at least lease + election.
            quorum_loss_probe_interval: Some(REFUSED_LEADER_MS.max(2 * self.timers.election_max_ms)),
            // Snapshots and purges are triggered here, after the segments that cover them are synced (DESIGN §4).
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            // A lagging host gets a snapshot when the log it needs is gone, not for lagging.
            replication_lag_threshold: 1 << 40,
            // Openraft's default of 200 ms would cut every real snapshot short.
            install_snapshot_timeout: SNAPSHOT_MS,
            ..Config::default()
        };
        config.validate()
    }
}

/// A leader that its voters refuse this long stops heartbeats and alarms.
pub(super) const REFUSED_LEADER_MS: u64 = 3_000;
/// Transfer and installation of one snapshot.
pub(super) const SNAPSHOT_MS: u64 = 600_000;
