//! Hosts, VMs and clusters by name or id. A name wins: it is what people type, and a host may well be called `7`.

use statemachine::ClusterId;
use statemachine::HostId;
use statemachine::Rejection;
use statemachine::State;
use statemachine::VmId;
use statemachine::rejection::Noun;

pub fn host(state: &State, text: &str) -> Result<HostId, Rejection> {
    if let Some((id, _)) = state.host_by_name(text) {
        return Ok(id);
    }
    match text.parse::<HostId>() {
        Ok(id) if state.hosts.contains(&id) => Ok(id),
        _ => Err(Rejection::NotFound { noun: Noun::Host, name: shortened(text) }),
    }
}

pub fn vm(state: &State, text: &str) -> Result<VmId, Rejection> {
    if let Some((id, _)) = state.vm_by_name(text) {
        return Ok(id);
    }
    match text.parse::<VmId>() {
        Ok(id) if state.vms.contains(&id) => Ok(id),
        _ => Err(Rejection::NotFound { noun: Noun::Vm, name: shortened(text) }),
    }
}

pub fn cluster(state: &State, text: &str) -> Result<ClusterId, Rejection> {
    if let Some((id, _)) = state.clusters.iter().find(|(_, cluster)| cluster.name == text) {
        return Ok(*id);
    }
    match text.parse().map(ClusterId) {
        Ok(id) if state.clusters.contains(&id) => Ok(id),
        _ => Err(Rejection::NotFound { noun: Noun::Cluster, name: shortened(text) }),
    }
}

/// What was asked for goes back in an error; not more of it than a name may have, and nothing that moves a cursor.
fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}
