//! What the cluster believes: the fold of all events.
//!
//! `State` is a handful of ordered persistent maps, so a consistent read, a speculative copy or a
//! fork costs O(1). Derived numbers that the scheduler needs ([`HostUsage`]) are kept beside their
//! source by `evolve` and checked against it by [`crate::invariants`].

mod guest_facts;
mod host;
mod site;
mod vm;

pub use guest_facts::*;
pub use host::*;
pub use site::*;
pub use vm::*;

use imbl::OrdMap;
use serde::Deserialize;
use serde::Serialize;

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
        sum!(total, data_centers, clusters, hosts, removed_hosts, tokens, vms, vm_names, remembered);
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

    pub fn token_by_hash(&self, secret_hash: &[u8; 32]) -> Option<(TokenId, &Token)> {
        self.tokens.iter().find(|(_, token)| &token.secret_hash == secret_hash).map(|(id, token)| (*id, token))
    }
}

/// `State` as it is written to a snapshot: plain entries, encoded by [`crate::codec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StateImage {
    site: Option<Site>,
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
        StateImage {
            site: state.site.clone(),
            data_centers: state.data_centers.to_entries(),
            clusters: state.clusters.to_entries(),
            hosts: state.hosts.to_entries(),
            removed_hosts: state.removed_hosts.to_entries(),
            tokens: state.tokens.to_entries(),
            vms: state.vms.to_entries(),
            vm_names: state.vm_names.to_entries(),
            remembered: state.remembered.to_entries(),
        }
    }
}

impl From<StateImage> for State {
    fn from(image: StateImage) -> Self {
        State {
            site: image.site,
            data_centers: DigestMap::from_entries("data_center", image.data_centers),
            clusters: DigestMap::from_entries("cluster", image.clusters),
            hosts: DigestMap::from_entries("host", image.hosts),
            removed_hosts: DigestMap::from_entries("removed_host", image.removed_hosts),
            tokens: DigestMap::from_entries("token", image.tokens),
            vms: DigestMap::from_entries("vm", image.vms),
            vm_names: DigestMap::from_entries("vm_name", image.vm_names),
            remembered_order: image.remembered.iter().map(|(key, remembered)| (remembered.seq, *key)).collect(),
            remembered: DigestMap::from_entries("remembered", image.remembered),
        }
    }
}
