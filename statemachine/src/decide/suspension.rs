//! Sleep: a running guest becomes a file of its host, and goes on from there when it is started (oVirt's *suspend*).
//!
//! ```text
//!         VmSuspend            ReportSuspended              VmStart                  it is up
//! (none) ──────────► saving ─────────────────────► asleep ──────────► waking ───────────────────► (none)
//!                      │ it ends, is stopped,         ▲ │               │ │ anything else that ends it
//!                      │ or cannot be saved           │ │ pulled plug   │ └──────────────────────► (none): its memory is lost
//!                      ▼                              │ └──► (none)     │
//!                    (none): it goes on               └─────────────────┘ it did not run
//! ```
//!
//! The guest stands still from before its file is whole until the log says what became of that (R1). A file is used for one run: once the
//! guest may have run from it, it is a past in which its disks were others.

use super::Context;
use super::Decided;
use super::form;
use super::host;
use super::vm::find;
use super::vm::wrong_state;
use crate::command::ReportId;
use crate::event::Event;
use crate::event::ReleaseEvidence;
use crate::event::SuspensionAborted;
use crate::event::SuspensionCompleted;
use crate::event::SuspensionDiscarded;
use crate::event::SuspensionStarted;
use crate::event::VmDesiredChanged;
use crate::event::VmPermitReleased;
use crate::event::VmRunStrategyChanged;
use crate::ids::MigrationId;
use crate::ids::VmId;
use crate::rejection::Rejection;
use crate::state::AbortReason;
use crate::state::Desired;
use crate::state::GuestStatus;
use crate::state::Liveness;
use crate::state::RunStrategy;
use crate::state::State;
use crate::state::StopMode;
use crate::state::Suspension;
use crate::state::SuspensionPhase;
use crate::state::Vm;

pub(super) fn start(context: &Context<'_>, vm: VmId) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if let Some(suspension) = context.state.suspensions.get(&vm) {
        return match suspension.phase {
            SuspensionPhase::Saving { .. } | SuspensionPhase::Asleep(_) => Ok(Decided::nothing()),
            SuspensionPhase::Waking { .. } => Err(wrong_state(known, "it is waking up; suspend it when it is up")),
        };
    }
    let Some(permit) = known.permit.filter(|_| known.desired == Desired::Running) else {
        return Err(wrong_state(
            known,
            format!("only a running VM can be suspended; `quorate vm start {}`", known.name),
        ));
    };
    if context.state.migrations.contains(&vm) {
        let why = format!("it is on its way to another host; wait, or `quorate vm cancel-migration {}`", known.name);
        return Err(wrong_state(known, why));
    }
    if context.state.plugs.get(&vm).is_some_and(|plugs| !plugs.coming.is_empty() || !plugs.leaving.is_empty()) {
        return Err(wrong_state(known, format!("a device is on its way; see `quorate vm show {}`", known.name)));
    }
    if known.observed.map(|observed| observed.status) != Some(GuestStatus::Up) {
        return Err(wrong_state(known, "it is not up; a guest that stands still, or boots, cannot be suspended"));
    }
    let home = host::find(context, permit.host)?;
    if home.liveness != Liveness::Alive {
        return Err(wrong_state(known, format!("its host {} does not answer", home.name)));
    }
    Ok(Decided::one(SuspensionStarted { vm, epoch: permit.epoch, host: permit.host }))
}

/// The end of one that is not asleep yet, as part of a batch that makes it pointless.
pub(super) fn abort(state: &State, vm: VmId, reason: AbortReason) -> Option<Event> {
    let Suspension { id: suspension, host, .. } = *state.suspensions.get(&vm).filter(|it| it.is_saving())?;
    Some(SuspensionAborted { vm, suspension, host, reason, detail: String::new() }.into())
}

/// Nothing may change about a guest that is falling asleep or waking up.
pub(super) fn check_awake(context: &Context<'_>, vm: VmId, known: &Vm) -> Result<(), Rejection> {
    let why = match context.state.suspensions.get(&vm).map(|suspension| &suspension.phase) {
        Some(SuspensionPhase::Saving { .. }) => "it is being suspended; wait until it sleeps",
        Some(SuspensionPhase::Waking { .. }) => "it is waking up; wait until it is up",
        Some(SuspensionPhase::Asleep(_)) | None => return Ok(()),
    };
    Err(wrong_state(known, why))
}

/// What a stop does to a guest that is not awake: its memory goes only with a plug that is pulled.
pub(super) fn stop(context: &Context<'_>, vm: VmId, known: &Vm, mode: StopMode) -> Result<Option<Event>, Rejection> {
    let Some(suspension) = context.state.suspensions.get(&vm) else { return Ok(None) };
    let discarded = || SuspensionDiscarded { vm, suspension: suspension.id, host: suspension.host };
    match (&suspension.phase, mode) {
        (SuspensionPhase::Saving { .. }, _) => Ok(abort(context.state, vm, AbortReason::Cancelled)),
        (SuspensionPhase::Asleep(_), StopMode::PowerOff) => Ok(Some(discarded().into())),
        (SuspensionPhase::Waking { .. }, StopMode::PowerOff) => Ok(None),
        (SuspensionPhase::Waking { .. }, StopMode::Shutdown) => check_awake(context, vm, known).map(|()| None),
        // It could not wake up, and is not to try again.
        (SuspensionPhase::Asleep(_), StopMode::Shutdown) if known.desired == Desired::Running => Ok(None),
        (SuspensionPhase::Asleep(_), StopMode::Shutdown) => {
            let name = &known.name;
            let why = format!(
                "it is suspended; `quorate vm start {name}` wakes it up, `quorate vm stop {name} --power-off` throws its memory away"
            );
            Err(wrong_state(known, why))
        }
    }
}

fn find_saving<'a>(context: &Context<'a>, vm: VmId, suspension: MigrationId) -> Result<&'a Suspension, Rejection> {
    let known = find(context, vm)?;
    let over = || Rejection::StaleMigration { name: known.name.clone(), migration: suspension };
    context.state.suspensions.get(&vm).filter(|it| it.id == suspension && it.is_saving()).ok_or_else(over)
}

/// Its host has all of it, and it stands still: the permit ends. One that always runs becomes one that never does, as by a stop.
pub(super) fn completed(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    suspension: MigrationId,
    bytes: u64,
) -> Result<Decided, Rejection> {
    host::check_report(context, report)?;
    let known = find(context, vm)?;
    let saving = find_saving(context, vm, suspension)?;
    let held = known.permit.filter(|permit| Some(permit.epoch) == saving.epoch() && permit.host == report.host);
    let Some(permit) = held else { return Err(Rejection::StaleReport) };
    let (host, counter, epoch) = (report.host, report.counter, permit.epoch);
    let mut events: Vec<Event> = vec![SuspensionCompleted { vm, suspension, host, counter, bytes }.into()];
    events.push(VmPermitReleased { vm, epoch, evidence: ReleaseEvidence::Host }.into());
    if known.run_strategy == RunStrategy::Always {
        events.push(VmRunStrategyChanged { vm, run_strategy: RunStrategy::Halted }.into());
    }
    events.push(VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::Shutdown) }.into());
    Ok(Decided::many(events))
}

pub(super) fn failed(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    suspension: MigrationId,
    detail: &str,
) -> Result<Decided, Rejection> {
    host::check_report(context, report)?;
    if find_saving(context, vm, suspension)?.host != report.host {
        return Err(Rejection::StaleReport);
    }
    form::text("detail", detail, form::DETAIL_MAX)?;
    let (host, reason, detail) = (report.host, AbortReason::Failed, detail.to_owned());
    Ok(Decided::one(SuspensionAborted { vm, suspension, host, reason, detail }))
}
