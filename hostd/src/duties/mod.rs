//! Duties: what the leader owes the cluster besides deciding, and what this host owes as storage manager.
//!
//! - On the leader: the commands of [`statemachine::planner`], each with its [`backoff`]; one step of the membership a second.
//!   The trim of the stream, by [`retention`].
//! - On every host: a storage manager in maintenance gives its duty up.
//!
//! `decide` judges every command again, so a duty that was planned on an old state does nothing. Silent hosts and grants are
//! [`crate::grants`]' own.

pub mod backoff;
pub mod retention;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use consensus::decider::Leadership;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::planner;
use statemachine::state::Administrative;
use statemachine::state::HostUsage;
use statemachine::state::Liveness;
use statemachine::state::Migration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::backoff::Backoff;
use self::retention::Retention;
use crate::agent::cluster::Cluster;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two looks, however fast the state changes: a look goes over every VM.
const PAUSE: Duration = Duration::from_millis(50);
/// Duties proposed at one look; the rest follow at the next.
const AT_ONCE: usize = 64;

#[derive(Debug, Default)]
pub struct DutyCounters {
    pub issued: AtomicU64,
    pub accepted: AtomicU64,
    pub membership_steps: AtomicU64,
}

#[derive(Debug)]
pub struct DutiesHandle {
    counters: Arc<DutyCounters>,
    shutdown: CancellationToken,
}

impl DutiesHandle {
    pub fn counters(&self) -> &DutyCounters {
        &self.counters
    }

    pub fn shutdown(&self) {
        self.shutdown.cancel();
    }
}

pub fn spawn(cluster: Arc<dyn Cluster>, retention: Retention) -> DutiesHandle {
    let counters = Arc::new(DutyCounters::default());
    let shutdown = CancellationToken::new();
    let planning = plan(cluster.clone(), counters.clone());
    let membership = keep_membership(cluster.clone(), counters.clone());
    let trim = trim_events(cluster.clone(), counters.clone(), retention);
    let storage = give_up_storage(cluster);
    for task in [
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(planning)),
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(membership)),
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(storage)),
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(trim)),
    ] {
        drop(task);
    }
    DutiesHandle { counters, shutdown }
}

/// Waits until the state or the lead changed, or a second has passed. False when nobody will tell any more.
async fn wait(fold: &mut watch::Receiver<Arc<Fold>>, leadership: &mut watch::Receiver<Leadership>) -> bool {
    tokio::select! {
        biased;
        changed = fold.changed() => changed.is_ok(),
        changed = leadership.changed() => changed.is_ok(),
        () = tokio::time::sleep(LOOK_EVERY) => true,
    }
}

async fn plan(cluster: Arc<dyn Cluster>, counters: Arc<DutyCounters>) {
    let own = cluster.host();
    let (mut fold, mut leadership) = (cluster.watch_fold(), cluster.leadership());
    let began = Instant::now();
    let (mut backoff, mut evacuation) = (Backoff::default(), Backoff::default());
    let mut session = None;
    let mut resources = Vec::new();
    loop {
        let applied = fold.borrow_and_update().clone();
        let leads = leadership.borrow_and_update().ready_session();
        if leads != session {
            backoff.reset();
            evacuation.reset();
            session = leads;
        }
        if session.is_some() {
            let now_there = resources_of(&applied);
            if now_there != resources {
                // What fitted nowhere may fit now.
                backoff.reset();
                resources = now_there;
            }
            let mut ready = backoff.take(planner::due(&applied.state, own), began.elapsed());
            ready.truncate(AT_ONCE);
            // A migration takes and frees resources, so that must not be a reason to try the next at once.
            let mut moves = evacuation.take(planner::evacuations(&applied.state).collect(), began.elapsed());
            moves.truncate(Migration::MAX_IN_CLUSTER);
            ready.extend(moves);
            for command in ready {
                issue(&cluster, &counters, command).await;
            }
        }
        tokio::time::sleep(PAUSE).await;
        if !wait(&mut fold, &mut leadership).await {
            return;
        }
    }
}

async fn issue(cluster: &Arc<dyn Cluster>, counters: &DutyCounters, command: Command) {
    let own = cluster.host();
    counters.issued.fetch_add(1, Ordering::Relaxed);
    let request = Request { actor: Actor::Duty(own), origin: own, idempotency: None, command: command.clone() };
    match cluster.propose(request).await {
        Ok(answer) => {
            counters.accepted.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(seq = %answer.seq, ?command, "a duty is done");
        }
        Err(error) => tracing::info!(?command, "a duty is not done yet: {error}"),
    }
}

/// What placements depend on beside the VMs themselves.
fn resources_of(fold: &Fold) -> Vec<(HostId, Liveness, Administrative, HostUsage)> {
    let hosts = fold.state.hosts.iter();
    hosts.map(|(id, host)| (*id, host.liveness, host.administrative, host.usage)).collect()
}

fn host_ids(fold: &Fold) -> Vec<HostId> {
    fold.state.hosts.iter().map(|(id, _)| *id).collect()
}

async fn keep_membership(cluster: Arc<dyn Cluster>, counters: Arc<DutyCounters>) {
    let leadership = cluster.leadership();
    let mut fold = cluster.watch_fold();
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = Vec::new();
    loop {
        tokio::select! {
            biased;
            _ = look.tick() => {}
            // Whoever joins waits for it.
            changed = fold.wait_for(|fold| host_ids(fold) != known) => match changed {
                Ok(fold) => known = host_ids(&fold),
                Err(_) => return,
            },
        }
        if leadership.borrow().ready_session().is_none() {
            continue;
        }
        // Several steps in a row: a join is a learner first and a voter next.
        loop {
            match cluster.reconcile_membership().await {
                Ok(Some(step)) => {
                    counters.membership_steps.fetch_add(1, Ordering::Relaxed);
                    tracing::info!("membership: {}", step.what);
                    if !step.is_done {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!("the membership was not changed: {error}");
                    break;
                }
            }
        }
    }
}

/// The leader lets events go that are too old or too many.
async fn trim_events(cluster: Arc<dyn Cluster>, counters: Arc<DutyCounters>, retention: Retention) {
    let Some(events) = cluster.events() else { return };
    let leadership = cluster.leadership();
    let mut look = tokio::time::interval(retention.look_every);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        if leadership.borrow().ready_session().is_none() {
            continue;
        }
        match retention.look(&events, cluster.platform().clock.wall_ms()).await {
            Ok(Some(upto)) => issue(&cluster, &counters, Command::EventsTrim { upto }).await,
            Ok(None) => {}
            Err(error) => tracing::warn!("the stream was not trimmed: {error}"),
        }
    }
}

/// The storage manager releases its permit itself once it is put into maintenance: nobody else may (DESIGN §5, *SPM*). There is
/// no storage work in this release that would have to end first.
async fn give_up_storage(cluster: Arc<dyn Cluster>) {
    let own = cluster.host();
    let (mut fold, mut leadership) = (cluster.watch_fold(), cluster.leadership());
    loop {
        let applied = fold.borrow_and_update().clone();
        leadership.borrow_and_update();
        let in_maintenance = |host: &statemachine::state::Host| host.administrative == Administrative::Maintenance;
        if applied.state.hosts.get(&own).is_some_and(in_maintenance) {
            let held = applied.state.data_centers.iter().filter(|(_, it)| it.spm.is_some_and(|spm| spm.host == own));
            for (data_center, _) in held {
                let command = Command::SpmRelease { data_center: *data_center };
                let request = Request { actor: Actor::Host(own), origin: own, idempotency: None, command };
                match cluster.propose(request).await {
                    Ok(_) => tracing::info!(%data_center, "the storage manager's duty is given up for maintenance"),
                    Err(error) => {
                        tracing::warn!(%data_center, "the storage manager's duty is not given up yet: {error}");
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                }
            }
        }
        if !wait(&mut fold, &mut leadership).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
