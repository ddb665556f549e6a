//! The lease of this host: a heartbeat to the leader each second, and the grants that answer (DESIGN §5, *Grant*).
//!
//! [`record`] is the pure half: own send times by nonce, deadlines, and who may be started by what. This module sends; the
//! agent listens on [`LeaseHandle::grant`] and acts.

pub mod clock;
pub mod record;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use consensus::decider::Leadership;
use consensus::platform::Clock;
use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::clock::Boottime;
use self::record::ConfirmedGrant;
use self::record::GrantFault;
use self::record::LeaseRecord;
use crate::agent::GuestView;
use crate::agent::cluster::Cluster;
use crate::config::Config;
use crate::grants::wire::GrantAnswer;
use crate::grants::wire::HEARTBEAT;
use crate::grants::wire::Heartbeat;
use crate::grants::wire::Nonce;

/// After a heartbeat without a grant the next goes out this much later, instead of a whole interval.
const RETRY: Duration = Duration::from_millis(250);

#[derive(Debug, Clone)]
pub struct LeaseConfig {
    pub boot: BootId,
    pub heartbeat: Duration,
    pub lease: Duration,
    /// A watchdog is armed and fed by this hostd.
    pub watchdog_armed: bool,
}

impl LeaseConfig {
    pub fn new(config: &Config, boot: BootId, watchdog_armed: bool) -> LeaseConfig {
        let (heartbeat, lease) = (config.timers.host_heartbeat(), config.timers.lease());
        LeaseConfig { boot, heartbeat, lease, watchdog_armed }
    }
}

/// How often what happened, for metrics.
#[derive(Debug, Default)]
pub struct LeaseCounters {
    pub sent: AtomicU64,
    pub granted: AtomicU64,
    /// Answered without a grant.
    pub refused: AtomicU64,
    /// Not answered in time, or by what gives nothing.
    pub failed: AtomicU64,
}

/// The lease as status and metrics show it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaseStatus {
    /// Milliseconds until the deadline; negative after it. `None` before the first grant.
    pub remaining_ms: Option<i64>,
    pub epochs: usize,
}

pub struct LeaseHandle {
    clock: Arc<dyn Clock>,
    grant: watch::Receiver<Option<ConfirmedGrant>>,
    counters: Arc<LeaseCounters>,
    shutdown: CancellationToken,
}

impl LeaseHandle {
    /// The last grant of this boot. It may have ended: [`ConfirmedGrant::allows`] looks at the clock.
    pub fn grant(&self) -> watch::Receiver<Option<ConfirmedGrant>> {
        self.grant.clone()
    }

    pub fn counters(&self) -> &LeaseCounters {
        &self.counters
    }

    pub fn status(&self) -> LeaseStatus {
        let grant = self.grant.borrow();
        let Some(grant) = grant.as_ref() else { return LeaseStatus::default() };
        let (now, deadline) = (Boottime::of(self.clock.as_ref()), grant.deadline);
        let ahead = deadline.ms_since(now) as i64;
        let remaining_ms = if now < deadline { ahead } else { -(now.ms_since(deadline) as i64) };
        LeaseStatus { remaining_ms: Some(remaining_ms), epochs: grant.epochs.len() }
    }

    pub fn shutdown(&self) {
        self.shutdown.cancel();
    }
}

/// Starts the heartbeats. `guests` are named in them.
pub fn spawn(
    config: LeaseConfig,
    cluster: Arc<dyn Cluster>,
    guests: watch::Receiver<Arc<Vec<GuestView>>>,
) -> LeaseHandle {
    let (publish, grant) = watch::channel(None);
    let counters = Arc::new(LeaseCounters::default());
    let shutdown = CancellationToken::new();
    let record = LeaseRecord::new(cluster.host(), config.boot, config.lease.as_millis() as u64);
    let clock = cluster.platform().clock.clone();
    let sender = Sender { config, cluster, guests, record, publish, counters: counters.clone() };
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(sender.run()));
    LeaseHandle { clock, grant, counters, shutdown }
}

struct Sender {
    config: LeaseConfig,
    cluster: Arc<dyn Cluster>,
    guests: watch::Receiver<Arc<Vec<GuestView>>>,
    record: LeaseRecord,
    publish: watch::Sender<Option<ConfirmedGrant>>,
    counters: Arc<LeaseCounters>,
}

impl Sender {
    async fn run(mut self) {
        let mut leadership = self.cluster.leadership();
        let own = self.cluster.host();
        loop {
            let began = Instant::now();
            let leader = leader(*leadership.borrow_and_update(), own);
            let granted = match leader {
                None => false,
                Some(leader) => tokio::select! {
                    biased;
                    granted = self.beat(leader) => granted,
                    // The answer of a leader that is none any more is not worth waiting for.
                    changed = leader_changes(&mut leadership, leader, own) => {
                        if !changed { return }
                        false
                    }
                },
            };
            let wait = if granted { self.config.heartbeat } else { RETRY };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(began + wait) => {}
                live = self.worth_a_heartbeat(&mut leadership) => {
                    if !live { return }
                    // At once, but no storm of them.
                    tokio::time::sleep_until(began + RETRY.min(wait)).await;
                }
            }
        }
    }

    /// Returns when something happened for which nobody should wait a whole interval: another leader, or a permit for this
    /// host that its grant does not name yet. False when nobody will ever tell.
    async fn worth_a_heartbeat(&self, leadership: &mut watch::Receiver<Leadership>) -> bool {
        let mut fold = self.cluster.watch_fold();
        loop {
            let applied = fold.borrow_and_update().clone();
            if self.waits_for_a_grant(&applied) {
                return true;
            }
            tokio::select! {
                biased;
                changed = leadership.changed() => return changed.is_ok(),
                changed = fold.changed() => if changed.is_err() { return false },
            }
        }
    }

    fn waits_for_a_grant(&self, fold: &Fold) -> bool {
        let named = |epoch: Epoch| self.record.grant().is_some_and(|grant| grant.epochs.contains(&epoch));
        let mut permits = fold.state.permits_on(self.cluster.host());
        permits.any(|(_, _, permit)| permit.boot == self.config.boot && !named(permit.epoch))
    }

    /// One heartbeat; did it bring a grant?
    async fn beat(&mut self, leader: HostId) -> bool {
        let platform = self.cluster.platform();
        let clock = platform.clock.clone();
        let mut random = [0; 8];
        platform.entropy.fill(&mut random);
        let nonce = Nonce(u64::from_ne_bytes(random));
        let epochs =
            |guests: &[GuestView]| guests.iter().filter(|it| it.is_under_permit()).map(|it| it.epoch).collect();
        let running = epochs(&self.guests.borrow());
        let heartbeat = Heartbeat {
            host: self.cluster.host(),
            boot: self.config.boot,
            nonce,
            applied: self.cluster.fold().head.seq,
            wall_ms: clock.wall_ms(),
            watchdog_armed: self.config.watchdog_armed,
            running,
        };
        // Noted before the bytes leave: the deadline may be early, never late.
        self.record.send(nonce, Boottime::of(clock.as_ref()));
        self.counters.sent.fetch_add(1, Ordering::Relaxed);
        let answer = self.cluster.peer_call(leader, HEARTBEAT, heartbeat.encode(), self.config.heartbeat).await;
        let answer = match answer {
            Ok(body) => GrantAnswer::decode(&body),
            Err(error) => {
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%leader, "no answer to a heartbeat: {error}");
                return false;
            }
        };
        match answer {
            Ok(GrantAnswer::Granted(grant)) => match self.record.accept(&grant, Boottime::of(clock.as_ref())) {
                Ok(confirmed) => {
                    self.counters.granted.fetch_add(1, Ordering::Relaxed);
                    self.publish.send_replace(Some(confirmed.clone()));
                    true
                }
                Err(fault) => self.no_grant(leader, fault),
            },
            Ok(GrantAnswer::Refused(why)) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%leader, "the leader gives no grant: {why}");
                false
            }
            Err(error) => {
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%leader, "the leader's answer to a heartbeat does not decode: {error}");
                false
            }
        }
    }

    fn no_grant(&self, leader: HostId, fault: GrantFault) -> bool {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%leader, "a grant gives nothing: {fault}");
        false
    }
}

fn leader(leadership: Leadership, own: HostId) -> Option<HostId> {
    match leadership {
        Leadership::Leading { .. } => Some(own),
        Leadership::Following { leader } => leader,
    }
}

/// Returns when another host leads, or none does; false when nobody will ever tell.
async fn leader_changes(leadership: &mut watch::Receiver<Leadership>, from: HostId, own: HostId) -> bool {
    leadership.wait_for(|now| leader(*now, own) != Some(from)).await.is_ok()
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
