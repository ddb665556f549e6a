//! Gauges: what a scrape reads from the node at that moment.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use consensus::node::NodeMetrics;
use consensus::node::NodeStatus;
use consensus::node::Role;
use prometheus::IntCounter;
use prometheus::IntGaugeVec;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::view::host_status;
use statemachine::view::vm_status;

use super::Metrics;
use crate::agent::plan::Phase;
use crate::work::Work;

/// One moment of a node.
pub struct Reading<'a> {
    pub own: HostId,
    pub fold: &'a Fold,
    pub raft: &'a NodeMetrics,
    pub status: &'a NodeStatus,
    pub oldest: Seq,
}

impl Metrics {
    /// Sets every gauge that is not counted where it happens.
    pub fn set(&self, reading: &Reading<'_>) {
        self.set_raft(reading.raft, reading.status);
        self.set_peers(reading.raft);
        self.events_applied_seq.set(reading.fold.head.seq.0 as i64);
        self.events_oldest_seq.set(reading.oldest.0 as i64);
        self.set_hosts(reading);
    }

    fn set_raft(&self, raft: &NodeMetrics, status: &NodeStatus) {
        self.raft_is_leader.set(i64::from(raft.is_leader));
        self.raft_has_leader.set(i64::from(raft.has_leader));
        self.raft_is_learner.set(i64::from(status.role == Role::Learner));
        self.raft_term.set(raft.term as i64);
        self.raft_last_log_index.set(raft.last_log_index as i64);
        self.raft_committed_index.set(raft.committed_index as i64);
        self.raft_applied_index.set(raft.applied_index as i64);
        self.raft_snapshot_index.set(raft.snapshot_index as i64);
        self.raft_queued_commands.set(raft.queued_commands as i64);
        self.raft_voters.set(status.voters.len() as i64);
        self.raft_learners.set(status.learners.len() as i64);
        self.raft_hand_overs.set(raft.guard.hand_overs as i64);
        self.disk_wal_syncs.set(raft.disk.wal_syncs as i64);
        self.disk_wal_sync_seconds.set(raft.disk.wal_sync_ns as f64 / 1e9);
        self.disk_wal_written_bytes.set(raft.disk.wal_bytes as i64);
        self.disk_wal_size_bytes.set(raft.disk.wal_disk_bytes as i64);
    }

    fn set_peers(&self, raft: &NodeMetrics) {
        self.peer_round_trip_seconds.reset();
        self.peer_lag_entries.reset();
        for peer in &raft.members {
            let label = peer.host.to_string();
            if let Some(round_trip_ms) = peer.round_trip_ms {
                self.peer_round_trip_seconds.with_label_values(&[label.as_str()]).set(round_trip_ms / 1e3);
            }
            if let Some(lag) = peer.lag_entries {
                self.peer_lag_entries.with_label_values(&[label.as_str()]).set(lag as i64);
            }
        }
    }

    /// What agent, lease, grants and duties counted for themselves.
    pub fn set_work(&self, work: &Work) {
        let (grants, lease, duties) = (work.grants.counters(), work.lease.counters(), work.duties.counters());
        count(&self.lease_granted, &grants.granted);
        count(&self.lease_grants_refused, &grants.refused);
        count(&self.lease_rounds, &grants.rounds);
        count(&self.lease_rounds_failed, &grants.rounds_failed);
        count(&self.lease_heartbeats, &lease.sent);
        count(&self.lease_confirmed, &lease.granted);
        count(&self.lease_heartbeats_refused, &lease.refused);
        count(&self.lease_heartbeats_failed, &lease.failed);
        count(&self.fence_suspected, &grants.suspected);
        count(&self.fence_unreachable, &grants.lost);
        count(&self.fence_recovered, &grants.recovered);
        count(&self.duties_issued, &duties.issued);
        count(&self.duties_accepted, &duties.accepted);
        count(&self.membership_steps, &duties.membership_steps);
        self.fence_watchdog_armed.set(i64::from(work.watchdog.is_some()));
        if let Some(remaining_ms) = work.lease.status().remaining_ms {
            self.lease_remaining_seconds.set(remaining_ms as f64 / 1e3);
        }
        set_all(&self.host_guests, work.agent.running().iter().map(|guest| phase_name(&guest.phase).to_owned()));
    }

    fn set_hosts(&self, reading: &Reading<'_>) {
        let state = &reading.fold.state;
        set_all(&self.host_count, state.hosts.values().map(|host| host_status(host).to_string()));
        let guests = state.permits_on(reading.own);
        set_all(&self.host_vm_count, guests.map(|(id, vm, _)| vm_status(state, id, vm).to_string()));
        self.host_info.reset();
        let Some(host) = state.hosts.get(&reading.own) else { return };
        let own = reading.own.to_string();
        self.host_info.with_label_values(&[own.as_str(), &host.name, &host.facts.version]).set(1);
        let capacity = host.facts.capacity;
        self.host_memory_mib.with_label_values(&["capacity"]).set(capacity.memory_mib as i64);
        self.host_memory_mib.with_label_values(&["used"]).set(host.usage.memory_mib as i64);
        self.host_vcpus.with_label_values(&["threads"]).set(i64::from(capacity.cpu_threads));
        self.host_vcpus.with_label_values(&["used"]).set(i64::from(host.usage.vcpus));
    }
}

/// Counts labels. Those that nobody has any more disappear, rather than stay at their last number.
fn set_all(gauge: &IntGaugeVec, labels: impl Iterator<Item = String>) {
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    for label in labels {
        *counts.entry(label).or_default() += 1;
    }
    gauge.reset();
    for (label, count) in counts {
        gauge.with_label_values(&[label.as_str()]).set(count);
    }
}

fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Launching => "launching",
        Phase::Incoming { .. } => "incoming",
        Phase::Alive { quiesced: true, .. } => "quiesced",
        Phase::Alive { .. } => "alive",
        Phase::Gone(_) => "gone",
    }
}

/// Brings a counter to a total that is kept elsewhere and only rises.
fn count(counter: &IntCounter, total: &AtomicU64) {
    counter.inc_by(total.load(Ordering::Relaxed).saturating_sub(counter.get()));
}
