//! Live migration: a permit goes from one host to another while the guest runs (DESIGN §5).
//!
//! ```text
//!            VmMigrate                    ReportMigrationLoaded (the target holds all state)
//! (none) ───────────────► moving ──────────────────────────────► committed ──► (none, when it is up there)
//!                           │ cancel, failure, a host lost, the guest's end
//!                           └──────────► (none): the source goes on
//! ```
//!
//! The log says which of the two it was, once for each id. The source stands still before the target can hold all state, and goes on
//! only when it has applied the abort; the target runs only when it has applied the commit. So whatever is lost on the way, there
//! is one runner, or none until evidence releases the permit (R1).

use std::sync::Arc;

use super::Context;
use super::Decided;
use super::form;
use super::host;
use super::suspension;
use super::vm::find;
use super::vm::wrong_state;
use crate::command::ReportId;
use crate::event::ClusterMigrationPolicyChanged;
use crate::event::Event;
use crate::event::MigrationAborted;
use crate::event::MigrationCommitted;
use crate::event::MigrationProgressed;
use crate::event::MigrationStarted;
use crate::ids::ClusterId;
use crate::ids::HostId;
use crate::ids::MigrationId;
use crate::ids::Seq;
use crate::ids::VmId;
use crate::rejection::Noun;
use crate::rejection::Rejection;
use crate::scheduler;
use crate::state::AbortReason;
use crate::state::Desired;
use crate::state::GuestStatus;
use crate::state::Liveness;
use crate::state::Migration;
use crate::state::MigrationPolicy;
use crate::state::MigrationProgress;
use crate::state::State;

pub(super) fn start(context: &Context<'_>, vm: VmId, pinned: Option<HostId>) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if let Some(host) = pinned {
        host::find(context, host)?;
    }
    let Some(permit) = known.permit.filter(|_| known.desired == Desired::Running) else {
        let why = format!("only a running VM can be moved; `quorate vm start {}` chooses a host", known.name);
        return Err(wrong_state(known, why));
    };
    match context.state.migrations.get(&vm) {
        // Asked again for the same, it is under way already.
        Some(moving) if moving.is_moving() && pinned.is_none_or(|host| host == moving.to) => {
            return Ok(Decided::nothing());
        }
        Some(_) => {
            let why = format!("it is on its way already; wait, or `quorate vm cancel-migration {}`", known.name);
            return Err(wrong_state(known, why));
        }
        None => suspension::check_awake(context, vm, known)?,
    }
    let observed = known.observed.map(|observed| observed.status);
    if !matches!(observed, Some(GuestStatus::Up | GuestStatus::PausedUser)) {
        return Err(wrong_state(
            known,
            "it is neither up nor paused by its user; a guest that an error holds stays where it is",
        ));
    }
    let source = host::find(context, permit.host)?;
    if source.liveness != Liveness::Alive {
        return Err(wrong_state(known, format!("its host {} does not answer", source.name)));
    }
    check_limits(context.state, permit.host, &source.name)?;
    let decided_on = Seq(context.seq.0 - 1);
    let nowhere = |explanation| Rejection::NoHostFits { name: known.name.clone(), explanation: Box::new(explanation) };
    let explanation = scheduler::place(context.state, known, pinned, decided_on).map_err(nowhere)?;
    let chosen = explanation.chosen.and_then(|id| Some((id, context.state.hosts.get(&id)?.facts.boot)));
    let Some((to, to_boot)) = chosen else { return Err(nowhere(explanation)) };
    let explanation = Arc::new(explanation);
    Ok(Decided::one(MigrationStarted { vm, epoch: permit.epoch, from: permit.host, to, to_boot, explanation }))
}

/// How many may be under way at once. Those into one host are the scheduler's to count.
fn check_limits(state: &State, from: HostId, name: &str) -> Result<(), Rejection> {
    let out = state.all_moving().filter(|(_, other)| other.from == from).count();
    if out >= Migration::MAX_OUT_OF_HOST {
        return Err(Rejection::MigrationLimit { place: format!("host {name}"), limit: Migration::MAX_OUT_OF_HOST });
    }
    let Some(host) = state.hosts.get(&from) else { return Ok(()) };
    let near = |other: &Migration| state.hosts.get(&other.from).is_some_and(|it| it.cluster == host.cluster);
    if state.all_moving().filter(|(_, other)| near(other)).count() >= Migration::MAX_IN_CLUSTER {
        let cluster = state.clusters.get(&host.cluster).map(|cluster| cluster.name.clone()).unwrap_or_default();
        return Err(Rejection::MigrationLimit {
            place: format!("cluster {cluster}"),
            limit: Migration::MAX_IN_CLUSTER,
        });
    }
    Ok(())
}

pub(super) fn cancel(context: &Context<'_>, vm: VmId) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    match abort(context.state, vm, AbortReason::Cancelled) {
        Some(aborted) => Ok(Decided::one(aborted)),
        None => Err(wrong_state(known, "it is not on its way, or has arrived already")),
    }
}

/// The end of a migration that is not committed, as part of a batch that makes it pointless.
pub(super) fn abort(state: &State, vm: VmId, reason: AbortReason) -> Option<Event> {
    let moving = state.moving(vm)?;
    let Migration { id: migration, from, to, .. } = *moving;
    Some(MigrationAborted { vm, migration, from, to, reason, detail: String::new() }.into())
}

/// The ends of all migrations into a host that is not there any more as it was, or takes no guest any more.
pub(super) fn abort_into(state: &State, host: HostId, reason: AbortReason) -> impl Iterator<Item = Event> {
    let into = state.all_moving().filter(move |(_, moving)| moving.to == host);
    into.filter_map(move |(vm, _)| abort(state, vm, reason))
}

pub(super) fn policy(context: &Context<'_>, cluster: ClusterId, policy: MigrationPolicy) -> Result<Decided, Rejection> {
    let known = context.state.clusters.get(&cluster);
    known.ok_or_else(|| Rejection::NotFound { noun: Noun::Cluster, name: cluster.to_string() })?;
    form::migration_policy(&policy)?;
    if context.state.migration_policies.get(&cluster).copied().unwrap_or_default() == policy {
        return Ok(Decided::nothing());
    }
    Ok(Decided::one(ClusterMigrationPolicyChanged { cluster, policy }))
}

fn find_moving<'a>(context: &Context<'a>, vm: VmId, migration: MigrationId) -> Result<&'a Migration, Rejection> {
    let known = find(context, vm)?;
    let over = || Rejection::StaleMigration { name: known.name.clone(), migration };
    context.state.moving(vm).filter(|moving| moving.id == migration).ok_or_else(over)
}

/// The target holds everything: the permit is its own from this batch on.
pub(super) fn loaded(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    migration: MigrationId,
) -> Result<Decided, Rejection> {
    let target = host::check_report(context, report)?;
    let known = find(context, vm)?;
    let moving = find_moving(context, vm, migration)?;
    let refused = |why: &str| Err(Rejection::HostState { name: target.name.clone(), why: why.to_owned() });
    if report.host != moving.to || report.boot != moving.to_boot {
        return refused("it is not the target of this migration");
    }
    if target.liveness != Liveness::Alive {
        return refused("it is suspected; a guest cannot go to a host that may be lost");
    }
    let Some(permit) = known.permit.filter(|permit| permit.epoch == moving.epoch) else {
        return Err(Rejection::StaleMigration { name: known.name.clone(), migration });
    };
    let (from, to, boot, release) = (moving.from, moving.to, moving.to_boot, permit.release);
    Ok(Decided::one(MigrationCommitted { vm, migration, from, to, boot, release, counter: report.counter }))
}

/// Either host says that it cannot be done.
pub(super) fn failed(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    migration: MigrationId,
    detail: &str,
) -> Result<Decided, Rejection> {
    host::check_report(context, report)?;
    let moving = find_moving(context, vm, migration)?;
    if ![moving.from, moving.to].contains(&report.host) {
        return Err(Rejection::StaleReport);
    }
    form::text("detail", detail, form::DETAIL_MAX)?;
    let (from, to, reason, detail) = (moving.from, moving.to, AbortReason::Failed, detail.to_owned());
    Ok(Decided::one(MigrationAborted { vm, migration, from, to, reason, detail }))
}

pub(super) fn progressed(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    migration: MigrationId,
    progress: MigrationProgress,
) -> Result<Decided, Rejection> {
    host::check_report(context, report)?;
    let moving = find_moving(context, vm, migration)?;
    if report.host != moving.from {
        return Err(Rejection::StaleReport);
    }
    if progress.throttle_percent > 100 {
        return Err(form::invalid("throttle", "it is a share of 100"));
    }
    if moving.progress == Some(progress) {
        return Ok(Decided::nothing());
    }
    let (host, counter) = (report.host, report.counter);
    Ok(Decided::one(MigrationProgressed { vm, migration, host, counter, progress }))
}
