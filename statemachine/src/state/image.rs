//! The state as it is written to a snapshot: plain entries, encoded by [`crate::codec`], in the oldest layout that can say them
//! (ADR 0015). The first value is the number of the layout; of the first layout there are two, because its first value was the site,
//! which is or is not there.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use super::Cluster;
use super::DataCenter;
use super::DiskFault;
use super::GuestFacts;
use super::Host;
use super::HostProcessor;
use super::Migration;
use super::MigrationPolicy;
use super::Pause;
use super::Plugs;
use super::Remembered;
use super::RememberedKey;
use super::Site;
use super::State;
use super::Suspension;
use super::Token;
use super::Vm;
use crate::digest::DigestMap;
use crate::ids::ClusterId;
use crate::ids::DataCenterId;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::TokenId;
use crate::ids::VmId;

/// A variant's number and fields never change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StateImage {
    WithoutSite(Box<Entries>),
    WithSite(Box<(Site, Entries)>),
    /// With what only level 3 can say.
    Level3(Box<(Option<Site>, Entries, Newer)>),
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Newer {
    facts: Vec<(VmId, Arc<GuestFacts>)>,
    migrations: Vec<(VmId, Migration)>,
    pauses: Vec<(VmId, Pause)>,
    disk_faults: Vec<(VmId, DiskFault)>,
    plugs: Vec<(VmId, Plugs)>,
    memory_targets: Vec<(VmId, u64)>,
    processors: Vec<(HostId, HostProcessor)>,
    migration_policies: Vec<(ClusterId, MigrationPolicy)>,
    suspensions: Vec<(VmId, Suspension)>,
}

impl Newer {
    fn is_empty(&self) -> bool {
        let Newer { facts, migrations, pauses, disk_faults, plugs, memory_targets, .. } = self;
        let Newer { processors, migration_policies, suspensions, .. } = self;
        let of_guests = facts.is_empty() && migrations.is_empty() && pauses.is_empty() && disk_faults.is_empty();
        of_guests
            && suspensions.is_empty()
            && plugs.is_empty()
            && memory_targets.is_empty()
            && processors.is_empty()
            && migration_policies.is_empty()
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entries {
    data_centers: Vec<(DataCenterId, DataCenter)>,
    clusters: Vec<(ClusterId, Cluster)>,
    hosts: Vec<(HostId, Host)>,
    removed_hosts: Vec<(HostId, Seq)>,
    tokens: Vec<(TokenId, Token)>,
    vms: Vec<(VmId, Vm)>,
    vm_names: Vec<(String, VmId)>,
    remembered: Vec<(RememberedKey, Remembered)>,
}

impl From<&State> for StateImage {
    fn from(state: &State) -> Self {
        let entries = Entries {
            data_centers: state.data_centers.to_entries(),
            clusters: state.clusters.to_entries(),
            hosts: state.hosts.to_entries(),
            removed_hosts: state.removed_hosts.to_entries(),
            tokens: state.tokens.to_entries(),
            vms: state.vms.to_entries(),
            vm_names: state.vm_names.to_entries(),
            remembered: state.remembered.to_entries(),
        };
        let newer = Newer {
            facts: state.guests.to_entries(),
            migrations: state.migrations.to_entries(),
            pauses: state.pauses.to_entries(),
            disk_faults: state.disk_faults.to_entries(),
            plugs: state.plugs.to_entries(),
            memory_targets: state.memory_targets.to_entries(),
            processors: state.processors.to_entries(),
            migration_policies: state.migration_policies.to_entries(),
            suspensions: state.suspensions.to_entries(),
        };
        match (state.site.clone(), newer.is_empty()) {
            (None, true) => StateImage::WithoutSite(Box::new(entries)),
            (Some(site), true) => StateImage::WithSite(Box::new((site, entries))),
            (site, false) => StateImage::Level3(Box::new((site, entries, newer))),
        }
    }
}

impl From<StateImage> for State {
    fn from(image: StateImage) -> Self {
        let (site, entries, newer) = match image {
            StateImage::WithoutSite(entries) => (None, *entries, Newer::default()),
            StateImage::WithSite(both) => (Some(both.0), both.1, Newer::default()),
            StateImage::Level3(all) => *all,
        };
        State {
            site,
            data_centers: DigestMap::from_entries("data_center", entries.data_centers),
            clusters: DigestMap::from_entries("cluster", entries.clusters),
            hosts: DigestMap::from_entries("host", entries.hosts),
            removed_hosts: DigestMap::from_entries("removed_host", entries.removed_hosts),
            tokens: DigestMap::from_entries("token", entries.tokens),
            vms: DigestMap::from_entries("vm", entries.vms),
            vm_names: DigestMap::from_entries("vm_name", entries.vm_names),
            guests: DigestMap::from_entries("guest", newer.facts),
            migrations: DigestMap::from_entries("migration", newer.migrations),
            pauses: DigestMap::from_entries("pause", newer.pauses),
            disk_faults: DigestMap::from_entries("disk_fault", newer.disk_faults),
            plugs: DigestMap::from_entries("plugs", newer.plugs),
            memory_targets: DigestMap::from_entries("memory_target", newer.memory_targets),
            processors: DigestMap::from_entries("processor", newer.processors),
            migration_policies: DigestMap::from_entries("migration_policy", newer.migration_policies),
            suspensions: DigestMap::from_entries("suspension", newer.suspensions),
            remembered_order: entries.remembered.iter().map(|(key, remembered)| (remembered.seq, *key)).collect(),
            remembered: DigestMap::from_entries("remembered", entries.remembered),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;
    use crate::ids::BootId;
    use crate::ids::Epoch;
    use crate::ids::MigrationId;
    use crate::ids::SiteId;
    use crate::state::Fingerprint;
    use crate::state::MigrationPhase;
    use crate::state::MigrationProgress;
    use crate::state::SuspensionPhase;

    /// As the image was before it had layouts.
    #[derive(Serialize)]
    struct Former {
        site: Option<Site>,
        entries: Entries,
    }

    fn state(site: bool) -> State {
        let site = site.then(|| Site {
            id: SiteId::default(),
            name: "site".to_owned(),
            ca: Fingerprint([3; 32]),
            feature_level: 2,
            trimmed_upto: Seq(4),
            voters: 3,
            generation: 0,
            recovered_at: Seq::ZERO,
        });
        let mut state = State { site, ..State::default() };
        state.data_centers.insert(DataCenterId(1), DataCenter { name: "dc".to_owned(), spm: None });
        state
    }

    #[test]
    fn a_state_with_nothing_new_has_the_bytes_that_it_always_had() {
        for site in [false, true] {
            let state = state(site);
            let image = StateImage::from(&state);
            let entries = match image.clone() {
                StateImage::WithoutSite(entries) => *entries,
                StateImage::WithSite(both) => both.1,
                StateImage::Level3(_) => panic!("no guest said anything"),
            };
            assert_eq!(codec::encode(&image), codec::encode(&Former { site: state.site, entries }));
        }
    }

    #[test]
    fn what_is_known_of_guests_that_run_is_kept() {
        let said = |state: &mut State| {
            let facts = GuestFacts { hostname: Some("web1".to_owned()), ..GuestFacts::default() };
            state.guests.insert(VmId::default(), Arc::new(facts));
        };
        let moves = |state: &mut State| {
            let migration = Migration {
                id: MigrationId(9),
                epoch: Epoch(7),
                from: HostId(1),
                to: HostId(2),
                to_boot: BootId::default(),
                phase: MigrationPhase::Committed { epoch: Epoch(11) },
                progress: Some(MigrationProgress { round: 3, ..MigrationProgress::default() }),
            };
            state.migrations.insert(VmId::default(), migration);
        };
        let stands = |state: &mut State| state.pauses.insert(VmId::default(), Pause { wanted: true, at: Seq(8) });
        let waits = |state: &mut State| {
            let fault = DiskFault { disk: "root".to_owned(), what: "no space".to_owned(), no_space: true };
            state.disk_faults.insert(VmId::default(), fault);
        };
        let sleeps = |state: &mut State| {
            let phase = SuspensionPhase::Saving { epoch: Epoch(7) };
            state.suspensions.insert(VmId::default(), Suspension { id: MigrationId(9), host: HostId(1), phase });
        };
        let known: [&dyn Fn(&mut State); 5] = [&said, &moves, &stands, &waits, &sleeps];
        for (site, known) in [false, true].into_iter().flat_map(|site| known.map(|known| (site, known))) {
            let mut state = state(site);
            known(&mut state);
            let image: StateImage = codec::decode(&codec::encode(&StateImage::from(&state))).unwrap();
            let restored = State::from(image);
            assert_eq!(restored, state);
            assert_eq!(restored.recompute_digest(), state.digest());
        }
    }
}
