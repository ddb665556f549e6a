//! A site goes on with one host after the majority of its voters was lost for good (`quorate recover`, DESIGN §4).

use super::Context;
use super::Decided;
use super::form;
use super::migration;
use super::site::FEATURE_LEVEL;
use super::suspension;
use crate::event::Event;
use crate::event::FeatureLevelActivated;
use crate::event::HostRemoved;
use crate::event::ReleaseEvidence;
use crate::event::SiteRecovered;
use crate::event::SpmReleased;
use crate::event::VmDesiredChanged;
use crate::event::VmObservedExit;
use crate::event::VmPermitReleased;
use crate::ids::VmId;
use crate::rejection::Rejection;
use crate::state::AbortReason;
use crate::state::Desired;
use crate::state::ExitReason;
use crate::state::Fingerprint;
use crate::state::Permit;
use crate::state::StopMode;
use crate::state::Vm;

/// Events of one batch: the largest, of 79 bytes, leave room below a batch's limit of 1 MiB.
const EVENTS_MAX: usize = 8_000;

/// Begins the generation, and takes out hosts of the last one with all that they held, as many as one batch carries; asked again, the
/// next of them, until none is left. A host leaves only when its last permit is released.
pub(super) fn site(context: &Context<'_>, generation: u32, ca: Fingerprint) -> Result<Decided, Rejection> {
    let Some(site) = &context.state.site else { return Err(Rejection::NotInitialised) };
    let mut events: Vec<Event> = Vec::new();
    let before = match generation {
        same if same == site.generation && ca == site.ca => site.recovered_at,
        next if next == site.generation + 1 => {
            // One host is left, and this build runs on it.
            if site.feature_level < FEATURE_LEVEL {
                events.push(FeatureLevelActivated { level: FEATURE_LEVEL }.into());
            }
            events.push(SiteRecovered { generation, host: context.request.origin, ca }.into());
            context.seq
        }
        _ => {
            let why = format!("the site is at generation {}, not before {generation}", site.generation);
            return Err(form::invalid("generation", why));
        }
    };
    let hosts = context.state.hosts.iter().map(|(id, _)| *id);
    for gone in hosts.filter(|id| *id != context.request.origin && id.0 < before.0) {
        for (vm, known, permit) in context.state.permits_on(gone) {
            if events.len() + 5 > EVENTS_MAX {
                return Ok(Decided::many(events));
            }
            events.extend(migration::abort(context.state, vm, AbortReason::SourceLost));
            events.extend(suspension::abort(context.state, vm, AbortReason::SourceLost));
            events.extend(released(vm, known, permit));
        }
        let managed = context.state.data_centers.iter().filter(|(_, it)| it.spm.is_some_and(|spm| spm.host == gone));
        events.extend(managed.map(|(data_center, _)| SpmReleased { data_center: *data_center, host: gone }.into()));
        let held = |event: &Event| events.contains(event);
        let stranded: Vec<Event> =
            migration::abort_into(context.state, gone, AbortReason::TargetLost).filter(|event| !held(event)).collect();
        events.extend(stranded);
        events.push(HostRemoved { host: gone }.into());
    }
    Ok(Decided::many(events))
}

fn released(vm: VmId, known: &Vm, permit: Permit) -> Vec<Event> {
    let (epoch, reason) = (permit.epoch, ExitReason::HostGone);
    let mut events: Vec<Event> =
        vec![VmObservedExit { vm, epoch, host: permit.host, counter: 0, reason, detail: String::new() }.into()];
    events.push(VmPermitReleased { vm, epoch, evidence: ReleaseEvidence::Operator }.into());
    if known.desired == Desired::Running && !known.restarts_after(reason) {
        events.push(VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::PowerOff) }.into());
    }
    events
}
