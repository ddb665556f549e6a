//! What people and `/metrics` see of a member.

use openraft::AsyncRuntime;
use openraft::Instant as _;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use statemachine::HostId;
use statemachine::Seq;

use super::GuardReport;
use super::NodeOn;
use crate::decider::Leadership;
use crate::store::health::HealthCounters;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    /// Holds the log and does not vote.
    Learner,
    /// No member of the Raft group: pulls what was committed from one ([`crate::feed`]).
    Puller,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStatus {
    pub host: HostId,
    pub role: Role,
    /// `None` as well when it was not heard for two election timeouts.
    pub leader: Option<HostId>,
    pub voters: Vec<HostId>,
    pub learners: Vec<HostId>,
    /// What this host has applied.
    pub applied: Seq,
    pub leadership: Leadership,
}

/// Gauges and counters for `quorate_raft_*`, `quorate_disk_*` and `quorate_peer_*`. Terms and log indexes are for
/// graphs and for people who debug; nothing may be decided on them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeMetrics {
    pub is_leader: bool,
    pub has_leader: bool,
    pub term: u64,
    pub last_log_index: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub snapshot_index: u64,
    pub purged_index: u64,
    pub applied_seq: Seq,
    /// On a leader that is not the only voter: since a majority last answered.
    pub quorum_ack_age_ms: Option<u64>,
    /// Commands that wait for the decider.
    pub queued_commands: usize,
    pub members: Vec<PeerMetrics>,
    pub disk: HealthCounters,
    pub guard: GuardReport,
    /// The core stopped; the host must be restarted.
    pub stopped: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PeerMetrics {
    pub host: HostId,
    pub is_voter: bool,
    pub round_trip_ms: Option<f64>,
    /// On the leader: log entries that the member does not have yet.
    pub lag_entries: Option<u64>,
}

impl<R: AsyncRuntime> NodeOn<R> {
    pub fn status(&self) -> NodeStatus {
        let inner = &self.inner;
        let metrics = inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let leadership = inner.leadership_now();
        let applied = inner.fold.borrow().head.seq;
        let leader = inner.leader_now();
        if let Some(outlook) = &*inner.outlook.borrow() {
            let (voters, learners) = (outlook.voters.clone(), outlook.learners.clone());
            return NodeStatus { host: inner.host, role: Role::Puller, leader, voters, learners, applied, leadership };
        }
        NodeStatus {
            host: inner.host,
            role: role(metrics.state),
            leader,
            voters: membership.voter_ids().map(HostId).collect(),
            learners: membership.learner_ids().map(HostId).collect(),
            applied,
            leadership,
        }
    }

    pub fn metrics(&self) -> NodeMetrics {
        let inner = &self.inner;
        let metrics = inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last_log_index = metrics.last_log_index.unwrap_or(0);
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let replication = metrics.replication.as_ref();
        let lag = |host: &u64| {
            let matched = replication?.get(host)?.as_ref().map_or(0, |log_id| log_id.index);
            Some(last_log_index.saturating_sub(matched))
        };
        let members = membership.nodes().map(|(host, _)| PeerMetrics {
            host: HostId(*host),
            is_voter: voters.contains(host),
            round_trip_ms: inner.transport.round_trip(HostId(*host)).map(|time| time.as_secs_f64() * 1000.0),
            lag_entries: lag(host),
        });
        NodeMetrics {
            is_leader: metrics.state.is_leader(),
            has_leader: !matches!(inner.leadership_now(), Leadership::Following { leader: None }),
            term: metrics.current_term,
            last_log_index,
            committed_index: metrics.local_committed.map_or(0, |log_id| log_id.index),
            applied_index: metrics.last_applied.map_or(0, |log_id| log_id.index),
            snapshot_index: metrics.snapshot.map_or(0, |log_id| log_id.index),
            purged_index: metrics.purged.map_or(0, |log_id| log_id.index),
            applied_seq: inner.fold.borrow().head.seq,
            quorum_ack_age_ms: metrics
                .last_quorum_acked
                .filter(|_| voters.len() > 1)
                .map(|at| at.elapsed().as_millis() as u64),
            queued_commands: inner.decider.queued(),
            members: members.filter(|member| member.host != inner.host).collect(),
            disk: inner.health.counters(),
            guard: inner.guard_report(),
            stopped: metrics.running_state.as_ref().err().map(|error| error.to_string()),
        }
    }
}

fn role(state: ServerState) -> Role {
    match state {
        ServerState::Leader => Role::Leader,
        ServerState::Candidate => Role::Candidate,
        ServerState::Follower => Role::Follower,
        ServerState::Learner | ServerState::Shutdown => Role::Learner,
    }
}
