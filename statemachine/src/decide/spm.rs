//! The storage pool manager: one a data center, sticky, its token the seq of the grant (DESIGN §5, S1).

use super::Context;
use super::Decided;
use super::host;
use crate::command::Actor;
use crate::event::SpmGranted;
use crate::event::SpmReleased;
use crate::ids::DataCenterId;
use crate::ids::HostId;
use crate::rejection::Noun;
use crate::rejection::Rejection;
use crate::state::DataCenter;
use crate::view;

fn find<'a>(context: &Context<'a>, data_center: DataCenterId) -> Result<&'a DataCenter, Rejection> {
    let missing = || Rejection::NotFound { noun: Noun::DataCenter, name: data_center.to_string() };
    context.state.data_centers.get(&data_center).ok_or_else(missing)
}

pub(super) fn grant(context: &Context<'_>, data_center: DataCenterId, host: HostId) -> Result<Decided, Rejection> {
    let known = find(context, data_center)?;
    let candidate = host::find(context, host)?;
    if let Some(spm) = known.spm {
        if spm.host == host {
            return Ok(Decided::nothing());
        }
        let holder = context.state.hosts.get(&spm.host).map_or_else(|| spm.host.to_string(), |it| it.name.clone());
        return Err(Rejection::SpmHeld { name: known.name.clone(), holder });
    }
    if !view::may_be_spm(candidate) {
        let why = "a storage manager is up, not in maintenance, and has a priority of 0 or more".to_owned();
        return Err(Rejection::HostState { name: candidate.name.clone(), why });
    }
    Ok(Decided::one(SpmGranted { data_center, host }))
}

/// By the host that holds it, or by an administrator on that host's behalf while it is down for good.
pub(super) fn release(context: &Context<'_>, data_center: DataCenterId) -> Result<Decided, Rejection> {
    let Some(spm) = find(context, data_center)?.spm else { return Ok(Decided::nothing()) };
    match context.request.actor {
        Actor::Host(host) if host == spm.host => Ok(Decided::one(SpmReleased { data_center, host })),
        _ => Err(Rejection::Forbidden {
            who: format!("{:?}", context.request.actor),
            why: "only the storage manager itself releases its duty; put its host into maintenance".to_owned(),
        }),
    }
}
