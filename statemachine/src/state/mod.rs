//! What the cluster believes: the fold of all events.
//!
//! `State` is a handful of ordered persistent maps, so a consistent read, a speculative copy or a
//! fork costs O(1). Derived numbers that the scheduler needs ([`HostUsage`]) are kept beside their
//! source by `evolve` and checked against it by [`crate::invariants`].

mod guest_facts;
mod host;
mod image;
mod migration;
mod plugs;
mod site;
mod spec;
mod standstill;
mod suspension;
mod vm;

pub use guest_facts::*;
pub use host::*;
pub use image::*;
pub use migration::*;
pub use plugs::*;
pub use site::*;
pub use spec::*;
pub use standstill::*;
pub use suspension::*;
pub use vm::*;

use std::sync::Arc;

use imbl::OrdMap;

use crate::digest::Digest;
use crate::digest::DigestMap;
use crate::ids::ClusterId;
use crate::ids::DataCenterId;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::TokenId;
use crate::ids::VmId;

#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// `None` until the first batch.
    pub site: Option<Site>,
    pub data_centers: DigestMap<DataCenterId, DataCenter>,
    pub clusters: DigestMap<ClusterId, Cluster>,
    pub hosts: DigestMap<HostId, Host>,
    /// Hosts that were removed, and when: a valid certificate of one of these is refused by name.
    pub removed_hosts: DigestMap<HostId, Seq>,
    pub tokens: DigestMap<TokenId, Token>,
    pub vms: DigestMap<VmId, Vm>,
    /// VM names are unique; the index makes that rule O(log n).
    pub vm_names: DigestMap<String, VmId>,
    /// What the agents of guests that hold a permit said last. Level 3.
    pub guests: DigestMap<VmId, Arc<GuestFacts>>,
    /// Guests on their way, and those that have not come up at their target yet. Level 3.
    pub migrations: DigestMap<VmId, Migration>,
    /// What users said last about standing still, of guests that hold a permit. Level 3.
    pub pauses: DigestMap<VmId, Pause>,
    /// Errors of disks that hold guests. Level 3.
    pub disk_faults: DigestMap<VmId, DiskFault>,
    /// Devices that come and leave while their guests run. Level 3.
    pub plugs: DigestMap<VmId, Plugs>,
    /// What users want guests that run to make do with, in MiB. Level 3.
    pub memory_targets: DigestMap<VmId, u64>,
    /// What hosts' processors can be to guests. Level 3.
    pub processors: DigestMap<HostId, HostProcessor>,
    /// How the guests of clusters may be moved. Level 3.
    pub migration_policies: DigestMap<ClusterId, MigrationPolicy>,
    /// Guests that fall asleep, sleep or wake up. Level 3.
    pub suspensions: DigestMap<VmId, Suspension>,
    pub remembered: DigestMap<RememberedKey, Remembered>,
    /// Insertion order of `remembered`, so that it can be bounded. An index: neither digested nor written down.
    pub remembered_order: OrdMap<Seq, RememberedKey>,
}

impl Default for State {
    fn default() -> Self {
        State {
            site: None,
            data_centers: DigestMap::new("data_center"),
            clusters: DigestMap::new("cluster"),
            hosts: DigestMap::new("host"),
            removed_hosts: DigestMap::new("removed_host"),
            tokens: DigestMap::new("token"),
            vms: DigestMap::new("vm"),
            vm_names: DigestMap::new("vm_name"),
            guests: DigestMap::new("guest"),
            migrations: DigestMap::new("migration"),
            pauses: DigestMap::new("pause"),
            disk_faults: DigestMap::new("disk_fault"),
            plugs: DigestMap::new("plugs"),
            memory_targets: DigestMap::new("memory_target"),
            processors: DigestMap::new("processor"),
            migration_policies: DigestMap::new("migration_policy"),
            suspensions: DigestMap::new("suspension"),
            remembered: DigestMap::new("remembered"),
            remembered_order: OrdMap::new(),
        }
    }
}

impl State {
    /// The digest that every host must agree on at equal seq.
    pub fn digest(&self) -> Digest {
        self.sum_digests(false)
    }

    /// The same, from every entity again; differs from [`Self::digest`] only when memory or code lies.
    pub fn recompute_digest(&self) -> Digest {
        self.sum_digests(true)
    }

    fn sum_digests(&self, again: bool) -> Digest {
        macro_rules! sum {
            ($total:ident, $($map:ident),*) => {
                $($total.add(if again { self.$map.recompute() } else { self.$map.digest() });)*
            };
        }
        let mut total = Digest::of("site", &self.site);
        // Without entries a map adds nothing, so one of a later level is not seen before that level.
        sum!(total, data_centers, clusters, hosts, removed_hosts, tokens, vms, vm_names, remembered);
        sum!(total, guests, migrations, pauses, disk_faults, plugs, memory_targets, processors, migration_policies);
        sum!(total, suspensions);
        total
    }

    pub fn vm_by_name(&self, name: &str) -> Option<(VmId, &Vm)> {
        let vm = *self.vm_names.get(name)?;
        Some((vm, self.vms.get(&vm)?))
    }

    pub fn host_by_name(&self, name: &str) -> Option<(HostId, &Host)> {
        self.hosts.iter().find(|(_, host)| host.name == name).map(|(id, host)| (*id, host))
    }

    /// VMs that hold a run permit on this host.
    pub fn permits_on(&self, host: HostId) -> impl Iterator<Item = (VmId, &Vm, Permit)> {
        self.vms.iter().filter_map(move |(id, vm)| match vm.permit {
            Some(permit) if permit.host == host => Some((*id, vm, permit)),
            _ => None,
        })
    }

    /// The migration of a guest that its source still runs.
    pub fn moving(&self, vm: VmId) -> Option<&Migration> {
        self.migrations.get(&vm).filter(|migration| migration.is_moving())
    }

    /// All of those.
    pub fn all_moving(&self) -> impl Iterator<Item = (VmId, &Migration)> {
        self.migrations.iter().filter(|(_, migration)| migration.is_moving()).map(|(vm, migration)| (*vm, migration))
    }

    /// What a guest may have open, or relies on while it sleeps: nobody else may write to its volumes, or have the addresses of its cards.
    pub fn held_spec<'a>(&'a self, id: &VmId, vm: &'a Vm) -> Option<&'a Arc<VmSpec>> {
        let asleep = || Some(&self.suspensions.get(id)?.asleep()?.spec);
        vm.granted_spec.as_ref().or_else(asleep)
    }

    /// How this VM may be moved: as it says itself, or its cluster, or as everybody's guests.
    pub fn migration_policy(&self, vm: &Vm) -> MigrationPolicy {
        let cluster = self.migration_policies.get(&vm.cluster).copied().unwrap_or_default();
        let own = vm.granted_spec.as_ref().unwrap_or(&vm.spec).migration;
        own.or(cluster).or(MigrationPolicy::DEFAULT)
    }

    /// The processor that a guest of this model gets where it starts now. Of a cluster none of whose hosts has said what it can run,
    /// nothing is known, and `cluster` stays as it is: such a guest gets what its host has.
    pub fn settled_model(&self, cluster: ClusterId, model: CpuModel) -> CpuModel {
        if model != CpuModel::Cluster {
            return model;
        }
        let members = self.hosts.iter().filter(|(_, host)| host.cluster == cluster);
        let known = members.filter_map(|(id, _)| self.processors.get(id)).collect::<Vec<_>>();
        match known.is_empty() {
            true => CpuModel::Cluster,
            false => common_model(known.into_iter()).unwrap_or(CpuModel::Host),
        }
    }

    pub fn token_by_hash(&self, secret_hash: &[u8; 32]) -> Option<(TokenId, &Token)> {
        self.tokens.iter().find(|(_, token)| &token.secret_hash == secret_hash).map(|(id, token)| (*id, token))
    }
}
