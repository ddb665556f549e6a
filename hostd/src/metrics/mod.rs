//! What `/metrics` says: counters that the parts of hostd raise, and gauges that are read at each scrape.
//!
//! One [`Metrics`] a node, with a registry of its own, handed to whoever counts. Names are API (DESIGN §12): the golden
//! list `golden.txt` beside this file guards them. Per-VM series are apart, in [`vms`], because their number grows
//! with the guests. Start at [`Metrics::new`].

mod scrape;
pub mod vms;

use prometheus::CounterVec;
use prometheus::Gauge;
use prometheus::GaugeVec;
use prometheus::IntCounter;
use prometheus::IntCounterVec;
use prometheus::IntGauge;
use prometheus::IntGaugeVec;
use prometheus::Opts;
use prometheus::Registry;
use prometheus::core::Collector;

pub use scrape::Reading;

/// Media type of the text form.
pub const MEDIA_TYPE: &str = prometheus::TEXT_FORMAT;

macro_rules! metrics {
    ($($(#[$doc:meta])* $field:ident : $type:ident $([$($label:literal),+])? = $name:literal, $help:literal;)*) => {
        /// Every series of a node.
        pub struct Metrics {
            registry: Registry,
            $($(#[$doc])* pub $field: $type,)*
        }

        impl Metrics {
            /// Registers everything once; two nodes in one process do not share series.
            pub fn new() -> Result<Metrics, prometheus::Error> {
                let registry = Registry::new();
                $(let $field = metrics!(@make $type, $name, $help $(, [$($label),+])?)?;
                  registry.register(Box::new($field.clone()))?;)*
                Ok(Metrics { registry, $($field,)* })
            }
        }
    };
    (@make $type:ident, $name:literal, $help:literal) => { $type::with_opts(Opts::new($name, $help)) };
    (@make $type:ident, $name:literal, $help:literal, [$($label:literal),+]) => {
        $type::new(Opts::new($name, $help), &[$($label),+])
    };
}

metrics! {
    // -- Raft, in etcd's mental model
    raft_is_leader: IntGauge = "quorate_raft_is_leader", "Whether this host leads. 1 is yes.";
    raft_has_leader: IntGauge = "quorate_raft_has_leader", "Whether a leader is known. 1 is yes.";
    raft_is_learner: IntGauge = "quorate_raft_is_learner", "Whether this host follows without a vote. 1 is yes.";
    raft_leader_changes: IntCounter = "quorate_raft_leader_changes_seen_total", "Changes of leader seen since the start.";
    raft_term: IntGauge = "quorate_raft_term", "Current term.";
    raft_last_log_index: IntGauge = "quorate_raft_last_log_index", "Index of the last entry in this host's log.";
    raft_committed_index: IntGauge = "quorate_raft_committed_index", "Index of the last entry that this host knows to be committed.";
    raft_applied_index: IntGauge = "quorate_raft_applied_index", "Index of the last applied entry.";
    raft_snapshot_index: IntGauge = "quorate_raft_snapshot_index", "Index of the last entry in the newest snapshot.";
    raft_queued_commands: IntGauge = "quorate_raft_queued_commands", "Commands that wait for the decider of this leader.";
    raft_hand_overs: IntGauge = "quorate_raft_hand_overs", "Times that this host gave up the lead because its disk hung, since its start.";
    raft_voters: IntGauge = "quorate_raft_voters", "Voting members.";
    raft_learners: IntGauge = "quorate_raft_learners", "Members without a vote.";
    raft_proposals: IntCounterVec["outcome"] = "quorate_raft_proposals_total", "Commands sent to the leader through this host, by outcome.";

    // -- disk and peers
    disk_wal_syncs: IntGauge = "quorate_disk_wal_syncs", "Write groups synced to the write-ahead log since the start.";
    disk_wal_sync_seconds: Gauge = "quorate_disk_wal_sync_seconds", "Time spent in those syncs.";
    disk_wal_written_bytes: IntGauge = "quorate_disk_wal_written_bytes", "Bytes written to the write-ahead log since the start.";
    disk_wal_size_bytes: IntGauge = "quorate_disk_wal_size_bytes", "Size of the write-ahead log on disk.";
    peer_round_trip_seconds: GaugeVec["peer"] = "quorate_peer_round_trip_seconds", "Smoothed round trip to another host.";
    peer_lag_entries: IntGaugeVec["peer"] = "quorate_peer_lag_entries", "On the leader: log entries that a member does not have yet.";

    // -- events
    events_applied_seq: IntGauge = "quorate_events_applied_seq", "Seq of the last applied batch.";
    events_oldest_seq: IntGauge = "quorate_events_oldest_seq", "Seq of the oldest batch that the stream serves.";
    events_subscribers: IntGauge = "quorate_events_subscribers", "Open event streams.";
    events_delivered: IntCounter = "quorate_events_delivered_total", "Events sent to subscribers.";
    events_overflows: IntCounter = "quorate_events_overflows_total", "Streams that were closed because their reader was too slow.";

    // -- hosts
    host_info: IntGaugeVec["host", "name", "version"] = "quorate_host_info", "This host; always 1.";
    host_count: IntGaugeVec["status"] = "quorate_host_count", "Hosts of the site by status, as this host sees them.";
    host_vm_count: IntGaugeVec["status"] = "quorate_host_vm_count", "VMs with a permit on this host, by status.";
    host_memory_mib: IntGaugeVec["kind"] = "quorate_host_memory_mib", "Memory for guests on this host: capacity, and used by permits.";
    host_vcpus: IntGaugeVec["kind"] = "quorate_host_vcpus", "CPU threads of this host, and vCPUs of its permits.";
    host_guests: IntGaugeVec["phase"] = "quorate_host_guests", "Guests' processes on this host, by phase.";
    duties_issued: IntCounter = "quorate_host_duties_issued_total", "Commands that this host issued as the leader's duty.";
    duties_accepted: IntCounter = "quorate_host_duties_accepted_total", "Those of them that the log accepted.";
    membership_steps: IntCounter = "quorate_host_membership_steps_total", "Steps of the membership that this host took as leader.";

    // -- leases
    lease_granted: IntCounter = "quorate_lease_granted_total", "Grants that this host gave as leader.";
    lease_grants_refused: IntCounter = "quorate_lease_grants_refused_total", "Heartbeats that this host, as leader, answered without a grant.";
    lease_rounds: IntCounter = "quorate_lease_rounds_total", "ReadIndex rounds made for grants by this host as leader.";
    lease_rounds_failed: IntCounter = "quorate_lease_rounds_failed_total", "Those of them that proved nothing.";
    lease_heartbeats: IntCounter = "quorate_lease_heartbeats_total", "Heartbeats that this host sent.";
    lease_confirmed: IntCounter = "quorate_lease_confirmed_total", "Grants that this host received.";
    lease_heartbeats_refused: IntCounter = "quorate_lease_heartbeats_refused_total", "Own heartbeats that were answered without a grant.";
    lease_heartbeats_failed: IntCounter = "quorate_lease_heartbeats_failed_total", "Own heartbeats without an answer in time.";
    lease_remaining_seconds: Gauge = "quorate_lease_remaining_seconds", "Time left of the last grant of this host; negative after its end.";

    // -- silence and fencing
    fence_suspected: IntCounter = "quorate_fence_suspected_total", "Hosts that this host, as leader, suspected.";
    fence_unreachable: IntCounter = "quorate_fence_unreachable_total", "Hosts that this host, as leader, called unreachable.";
    fence_recovered: IntCounter = "quorate_fence_recovered_total", "Silent hosts that came back to this leader.";
    fence_watchdog_armed: IntGauge = "quorate_fence_watchdog_armed", "Whether this host feeds an armed watchdog. 1 is yes.";

    // -- the API
    http_requests: IntCounterVec["method", "route", "status"] = "quorate_http_requests_total", "Requests that the API answered.";
    http_seconds: CounterVec["method", "route"] = "quorate_http_request_seconds_total", "Time spent in answering requests.";
}

impl Metrics {
    /// The text of `/metrics`: everything registered, the process, in names' order.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut families = self.registry.gather();
        families.extend(process_families());
        families.sort_by(|a, b| a.name().cmp(b.name()));
        prometheus::TextEncoder::new().encode_to_string(&families)
    }
}

fn process_families() -> Vec<prometheus::proto::MetricFamily> {
    prometheus::process_collector::ProcessCollector::for_self().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Names with kind and labels, as scrapers and dashboards know them.
    fn described() -> BTreeSet<String> {
        let source = include_str!("mod.rs");
        let named = source.lines().filter_map(|line| {
            let (left, right) = line.trim().split_once(" = \"quorate_")?;
            let (_, kind) = left.split_once(": ")?;
            let (name, _) = right.split_once('"')?;
            Some(format!("quorate_{name} {kind}"))
        });
        named.collect()
    }

    #[test]
    fn names_are_api_and_change_only_with_the_golden_list() {
        let golden: BTreeSet<String> = include_str!("golden.txt").lines().map(str::to_owned).collect();
        assert_eq!(described(), golden, "a changed name breaks dashboards; change golden.txt on purpose");
    }

    #[test]
    fn every_series_of_a_scrape_is_on_the_golden_list() {
        let metrics = Metrics::new().unwrap();
        metrics.raft_proposals.with_label_values(&["ok"]).inc();
        let text = metrics.text().unwrap();
        assert!(text.contains("quorate_raft_proposals_total{outcome=\"ok\"} 1"));
        let golden = include_str!("golden.txt");
        for line in text.lines().filter(|line| line.starts_with("# TYPE quorate_")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(golden.lines().any(|known| known.split(' ').next() == Some(name)), "{name}");
        }
        assert!(text.contains("process_resident_memory_bytes"));
    }

    #[test]
    fn two_nodes_in_one_process_count_apart() {
        let (one, two) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.events_delivered.inc();
        assert_eq!((one.events_delivered.get(), two.events_delivered.get()), (1, 0));
    }
}
