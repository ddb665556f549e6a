//! A site goes on with one host after the majority of its voters was lost for good (`quorate recover`, DESIGN §4).

use super::Context;
use super::Decided;
use super::form;
use crate::event::Event;
use crate::event::HostRemoved;
use crate::event::ReleaseEvidence;
use crate::event::SiteRecovered;
use crate::event::SpmReleased;
use crate::event::VmDesiredChanged;
use crate::event::VmObservedExit;
use crate::event::VmPermitReleased;
use crate::ids::HostId;
use crate::rejection::Rejection;
use crate::state::Desired;
use crate::state::ExitReason;
use crate::state::Fingerprint;
use crate::state::StopMode;

/// One batch, because half a recovery would be a host that is gone and still holds a permit.
pub(super) fn site(context: &Context<'_>, generation: u32, ca: Fingerprint) -> Result<Decided, Rejection> {
    let present = context.state.site.as_ref().map_or(0, |site| site.generation);
    if generation == present && context.state.site.as_ref().is_some_and(|site| site.ca == ca) {
        // Asked again after a power cut.
        return Ok(Decided::nothing());
    }
    if generation != present + 1 {
        return Err(form::invalid(
            "generation",
            format!("the site is at generation {present}, not before {generation}"),
        ));
    }
    let host = context.request.origin;
    let mut events: Vec<Event> = vec![SiteRecovered { generation, host, ca }.into()];
    let gone = context.state.hosts.iter().map(|(id, _)| *id).filter(|id| *id != host);
    for gone in gone {
        events.extend(permits_released(context, gone));
        let managed = context.state.data_centers.iter().filter(|(_, it)| it.spm.is_some_and(|spm| spm.host == gone));
        events.extend(managed.map(|(data_center, _)| SpmReleased { data_center: *data_center, host: gone }.into()));
        events.push(HostRemoved { host: gone }.into());
    }
    Ok(Decided::many(events))
}

fn permits_released(context: &Context<'_>, gone: HostId) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for (vm, known, permit) in context.state.permits_on(gone) {
        let exit = VmObservedExit {
            vm,
            epoch: permit.epoch,
            host: gone,
            counter: 0,
            reason: ExitReason::HostGone,
            detail: String::new(),
        };
        events.push(exit.into());
        events.push(VmPermitReleased { vm, epoch: permit.epoch, evidence: ReleaseEvidence::Operator }.into());
        if known.desired == Desired::Running && !known.restarts_after(ExitReason::HostGone) {
            events.push(VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::PowerOff) }.into());
        }
    }
    events
}
