//! Watches over this member: a leader that can no longer lead well gives up, and the log does not grow for ever.
//!
//! - **Gray leader** (hazard H21): heartbeats do not need the leader's disk, so a leader whose append or apply hangs
//!   would lead on while nothing commits. Older than 2 s: hand over; still leading after 2 s more: exit.
//! - **Refused leader** (hazard C15): voters that answer pings and refuse appends. openraft stops its heartbeats after
//!   3 s (`quorum_loss_probe_interval`); this alarms.
//! - **Heartbeat too short** for the network: below three times the p99 round trip elections become likely.
//! - Snapshots every so many entries, and purges behind them, by explicit trigger only (DESIGN §4).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver;
use statemachine::HostId;

use super::Inner;
use super::config::REFUSED_LEADER_MS;
use crate::transport::Channel;

const TICK: Duration = Duration::from_millis(250);
/// Own append or apply older than this: the leader is gray.
const GRAY_NS: u64 = 2_000_000_000;
/// What a hand-over may take before the host exits instead: two seconds. In ticks, because a process that stood still for three
/// has learned nothing about its disk (found by the simulation, seed 518).
const HAND_OVER_TICKS: u64 = 8;
/// Round trips remembered for the p99, over all peers.
const ROUND_TRIPS: usize = 512;
/// A warning is repeated after this many ticks: a minute.
const REPEAT_TICKS: u64 = 240;

/// What the guard found last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuardReport {
    /// This host leads, and its disk or its apply hangs.
    pub is_gray: bool,
    /// This host leads, its peers answer, and no majority accepts its appends.
    pub is_refused: bool,
    /// The heartbeat interval is below three times the p99 round trip.
    pub heartbeat_too_short: bool,
    pub round_trip_p99: Duration,
    /// Since this process started.
    pub hand_overs: u64,
}

#[derive(Default)]
struct Guard {
    round_trips: VecDeque<Duration>,
    report: GuardReport,
    /// The tick in which a gray leader asked another voter to take over.
    hand_over_since: Option<u64>,
    ticks: u64,
}

pub(super) async fn watch_over<R: AsyncRuntime>(node: Weak<Inner<R>>) {
    let mut guard = Guard::default();
    loop {
        tokio::time::sleep(TICK).await;
        let Some(inner) = node.upgrade() else {
            return;
        };
        guard.tick(&inner).await;
        *inner.guard.lock().unwrap_or_else(PoisonError::into_inner) = guard.report;
    }
}

impl<R: AsyncRuntime> Inner<R> {
    pub(super) fn guard_report(&self) -> GuardReport {
        *self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> Vec<HostId> {
        let metrics = self.raft.metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        membership.voter_ids().map(HostId).filter(|host| *host != self.host).collect()
    }
}

impl Guard {
    async fn tick<R: AsyncRuntime>(&mut self, inner: &Arc<Inner<R>>) {
        self.ticks += 1;
        inner.note_members();
        self.check_round_trips(inner);
        self.check_gray(inner).await;
        self.check_refused(inner).await;
        keep_log_short(inner).await;
    }

    fn check_round_trips<R: AsyncRuntime>(&mut self, inner: &Inner<R>) {
        for peer in inner.peers() {
            self.round_trips.extend(inner.transport.round_trip(peer));
        }
        let surplus = self.round_trips.len().saturating_sub(ROUND_TRIPS);
        self.round_trips.drain(..surplus);
        self.report.round_trip_p99 = percentile_99(self.round_trips.iter().copied());
        self.report.heartbeat_too_short = inner.config.heartbeat() < 3 * self.report.round_trip_p99;
        if self.report.heartbeat_too_short && self.ticks % REPEAT_TICKS == 1 {
            tracing::warn!(
                heartbeat_ms = inner.config.timers.heartbeat_ms,
                round_trip_p99_ms = self.report.round_trip_p99.as_millis() as u64,
                "the heartbeat is shorter than three round trips; set longer raft timers on every host"
            );
        }
    }

    async fn check_gray<R: AsyncRuntime>(&mut self, inner: &Inner<R>) {
        let leads = inner.raft.metrics().borrow_watched().state.is_leader();
        let now_ns = inner.platform.clock.boottime_ns();
        let append_ns = inner.health.append_age_ns(now_ns).unwrap_or(0);
        let apply_ns = inner.health.apply_age_ns(now_ns).unwrap_or(0);
        self.report.is_gray = leads && append_ns.max(apply_ns) > GRAY_NS;
        if !self.report.is_gray {
            self.hand_over_since = None;
            return;
        }
        match self.hand_over_since {
            None => {
                self.hand_over_since = Some(self.ticks);
                self.report.hand_overs += 1;
                let ages = (append_ns / 1_000_000, apply_ns / 1_000_000);
                tracing::error!(
                    append_age_ms = ages.0,
                    apply_age_ms = ages.1,
                    "this leader's disk hangs; handing over"
                );
                if let Some(heir) = inner.best_heir()
                    && let Err(error) = inner.transfer(heir).await
                {
                    tracing::warn!(%heir, "the hand-over was not accepted: {error}");
                }
            }
            Some(since) if self.ticks > since + HAND_OVER_TICKS => {
                inner.platform.exit.fatal(&"this leader's disk hangs and no other voter took over");
            }
            Some(_) => {}
        }
    }

    async fn check_refused<R: AsyncRuntime>(&mut self, inner: &Arc<Inner<R>>) {
        let acked = {
            let metrics = inner.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.state.is_leader().then(|| metrics.last_quorum_acked.map(|at| at.elapsed()))
        };
        let silent = acked.flatten().is_some_and(|age| age > Duration::from_millis(REFUSED_LEADER_MS));
        let was_refused = std::mem::replace(&mut self.report.is_refused, false);
        let peers = inner.peers();
        // A lone voter is its own majority: openraft notes no acknowledgement, and nobody refuses.
        if !silent || peers.is_empty() {
            return;
        }
        let pings = peers
            .iter()
            .filter_map(|peer| inner.peer(*peer))
            .map(|peer| inner.transport.call(peer, Channel::Ping, Bytes::new(), inner.config.heartbeat() * 5));
        let answers = futures::future::join_all(pings).await.into_iter().filter(Result::is_ok).count();
        // With this host they are a majority: the network works, so it is we who are refused.
        self.report.is_refused = answers + 1 > peers.len().div_ceil(2);
        if self.report.is_refused && !was_refused {
            tracing::error!(
                round_trip_p99_ms = self.report.round_trip_p99.as_millis() as u64,
                "peers answer and refuse this leader's appends; it stops its heartbeats so that another is elected"
            );
        }
    }
}

/// Snapshots when enough entries were applied since the last one, and purges what is well behind it.
async fn keep_log_short<R: AsyncRuntime>(inner: &Inner<R>) {
    let (applied, snapshot, purged) = {
        let metrics = inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let index = |log_id: Option<crate::types::LogId>| log_id.map_or(0, |log_id| log_id.index);
        (index(metrics.last_applied), index(metrics.snapshot), index(metrics.purged))
    };
    if applied >= snapshot + inner.config.snapshot_every
        && let Err(error) = inner.raft.trigger().snapshot().await
    {
        tracing::warn!("a snapshot was not begun: {error}");
    }
    // The snapshot's manifest is durable with all segments that it names, so what it covers may go. Purging in steps of
    // a tenth keeps it from being a write every tick.
    let purge_upto = snapshot.saturating_sub(inner.config.keep_behind_snapshot);
    if purge_upto >= purged + inner.config.snapshot_every.div_ceil(10).max(1)
        && let Err(error) = inner.raft.trigger().purge_log(purge_upto).await
    {
        tracing::warn!("the log was not purged: {error}");
    }
}

/// Zero when there are none.
fn percentile_99(samples: impl Iterator<Item = Duration>) -> Duration {
    let mut sorted: Vec<Duration> = samples.collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * 99).div_ceil(100);
    rank.checked_sub(1).and_then(|index| sorted.get(index).copied()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_99th_percentile_is_a_sample_and_zero_without_any() {
        assert_eq!(percentile_99(std::iter::empty()), Duration::ZERO);
        assert_eq!(percentile_99([Duration::from_millis(7)].into_iter()), Duration::from_millis(7));
        let hundred = (1..=100).map(Duration::from_millis);
        assert_eq!(percentile_99(hundred), Duration::from_millis(99));
    }
}
