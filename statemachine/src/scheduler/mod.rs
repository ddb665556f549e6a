//! Placement: filters, then weights, then the sum of ranks, as oVirt does it (DESIGN §6).
//!
//! A pure function of the state, so the table behind a decision is computed again on any host from
//! the state at [`Explanation::decided_on`], months later, with the same result. Ranks make units of
//! different scales combine safely: each unit orders the hosts, a host's rank is the number of hosts
//! it beats, ranks are multiplied by the unit's factor and summed, the highest sum wins, and the
//! lowest host id decides between equals.

mod explanation;
mod filters;
mod weights;

pub use explanation::Explanation;
pub use explanation::FilterCount;
pub use explanation::RankedHost;
pub use explanation::UnitRank;
pub use filters::FilterName;
pub use weights::WeightName;

pub(crate) use filters::within_limits;

use crate::ids::HostId;
use crate::ids::Seq;
use crate::state::Cluster;
use crate::state::Host;
use crate::state::State;
use crate::state::Vm;
use crate::state::VmSpec;

/// Everything a unit may look at.
pub(crate) struct Question<'a> {
    pub state: &'a State,
    pub cluster: &'a Cluster,
    pub vm: &'a Vm,
    /// The operator asked for this host.
    pub pinned: Option<HostId>,
}

impl Question<'_> {
    /// What the guest takes on a host: of a guest that runs, what it runs with.
    fn spec(&self) -> &VmSpec {
        self.vm.granted_spec.as_ref().unwrap_or(&self.vm.spec)
    }
}

pub(crate) struct Candidate<'a> {
    pub id: HostId,
    pub host: &'a Host,
}

/// Chooses a host for `vm`, another one if it holds a permit, or says why none fits. `decided_on` is the seq of `state`.
pub fn place(state: &State, vm: &Vm, pinned: Option<HostId>, decided_on: Seq) -> Result<Explanation, Explanation> {
    let (explanation, _) = place_in_full(state, vm, pinned, decided_on);
    match explanation.chosen {
        Some(_) => Ok(explanation),
        None => Err(explanation),
    }
}

/// The same decision with the rank of every host that passed, for `quorate why --full`.
pub fn place_in_full(
    state: &State,
    vm: &Vm,
    pinned: Option<HostId>,
    decided_on: Seq,
) -> (Explanation, Vec<RankedHost>) {
    let Some(cluster) = state.clusters.get(&vm.cluster) else {
        return (Explanation::nowhere(decided_on), Vec::new());
    };
    let question = Question { state, cluster, vm, pinned };
    let members = state.hosts.iter().filter(|(_, host)| host.cluster == vm.cluster);
    let mut considered = 0;
    let mut filtered = explanation::FilterTally::default();
    let mut passed = Vec::new();
    for (id, host) in members {
        considered += 1;
        let candidate = Candidate { id: *id, host };
        match filters::first_objection(&question, &candidate) {
            Some((filter, reason)) => filtered.count(filter, &host.name, reason),
            None => passed.push(candidate),
        }
    }
    let ranked = weights::rank(&question, &passed);
    let explanation = Explanation {
        policy: cluster.scheduling.policy,
        decided_on,
        considered,
        chosen: ranked.first().map(|best| best.host),
        filtered: filtered.into_counts(),
        best: ranked.iter().take(Explanation::BEST_KEPT).cloned().collect(),
    };
    (explanation, ranked)
}
