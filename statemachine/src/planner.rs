//! What the leader owes the cluster, as a function of the state. The shell issues these commands, with
//! backoff on its monotonic clock; `decide` judges each again.

use crate::command::Command;
use crate::decide::FEATURE_LEVEL;
use crate::ids::HostId;
use crate::state::Administrative;
use crate::state::Desired;
use crate::state::GuestStatus;
use crate::state::Liveness;
use crate::state::State;
use crate::view;

/// Commands that are due when `leader` leads.
pub fn due(state: &State, leader: HostId) -> Vec<Command> {
    feature_level(state).into_iter().chain(spm_grants(state, leader)).chain(placements(state)).collect()
}

/// The level that every host which is not away supports, and the leader knows.
fn feature_level(state: &State) -> Option<Command> {
    let present = state.hosts.values().filter(|host| host.liveness != Liveness::Unreachable);
    let common = present.map(|host| host.facts.feature_level).min()?.min(FEATURE_LEVEL);
    let site = state.site.as_ref()?;
    (common > site.feature_level).then_some(Command::FeatureLevelActivate { level: common })
}

/// VMs that should run and have no permit.
fn placements(state: &State) -> impl Iterator<Item = Command> {
    let waiting = state.vms.iter().filter(|(_, vm)| vm.permit.is_none() && vm.desired == Desired::Running);
    waiting.map(|(vm, _)| Command::VmPlace { vm: *vm })
}

/// Guests that may be moved, on hosts that are in maintenance. Their shell asks for each of these at growing distances, whatever becomes of it:
/// one that cannot be moved now is not tried all the time.
pub fn evacuations(state: &State) -> impl Iterator<Item = Command> {
    let leaving = |host: &HostId| {
        let host = state.hosts.get(host);
        host.is_some_and(|host| host.administrative == Administrative::Maintenance && host.liveness == Liveness::Alive)
    };
    let movable = state.vms.iter().filter(move |(vm, known)| {
        let up = known.observed.is_some_and(|seen| matches!(seen.status, GuestStatus::Up | GuestStatus::PausedUser));
        // Those too that are on their way: asked again, nothing happens, and whether it was asked lately is not forgotten.
        let on_its_way = state.moving(**vm).is_some();
        known.desired == Desired::Running
            && (up || on_its_way)
            && known.permit.is_some_and(|permit| leaving(&permit.host))
            && state.migration_policy(known).automatic == Some(true)
    });
    movable.map(|(vm, _)| Command::VmMigrate { vm: *vm, host: None })
}

/// A data center without a storage manager: by default the leader's host, else the highest priority
/// (oVirt's `vds_spm_priority`), else the lowest id.
fn spm_grants(state: &State, leader: HostId) -> impl Iterator<Item = Command> {
    let vacant = state.data_centers.iter().filter(|(_, data_center)| data_center.spm.is_none());
    vacant.filter_map(move |(data_center, _)| {
        let member = |cluster| state.clusters.get(cluster).is_some_and(|it| it.data_center == *data_center);
        let candidates = state.hosts.iter().filter(|(_, host)| member(&host.cluster) && view::may_be_spm(host));
        let best = candidates.max_by_key(|(id, host)| (**id == leader, host.spm_priority, std::cmp::Reverse(**id)));
        best.map(|(host, _)| Command::SpmGrant { data_center: *data_center, host: *host })
    })
}
