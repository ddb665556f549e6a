//! Who should be a voter: a pure function from what the cluster believes to the next single step.
//!
//! One voter while fewer than three hosts are alive, else three; other hosts are standby learners, at most four; removed
//! hosts leave (DESIGN §4, hazard H19). Voters are kept as they are: an unreachable voter is not replaced here, since
//! only `HostFenced` or an operator says that it will not come back. One step at a time, through one controller
//! ([`crate::node::NodeOn::reconcile_membership`]): concurrent changes may end in a joint configuration for good.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use statemachine::HostId;
use statemachine::State;
use statemachine::state::Host;
use statemachine::state::Liveness;

pub const VOTERS: usize = 3;
pub const STANDBY_LEARNERS: usize = 4;

/// The membership as the leader knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    pub leader: HostId,
    pub voters: BTreeSet<HostId>,
    /// With the address in the membership entry.
    pub addresses: BTreeMap<HostId, String>,
    /// Learners that hold nearly all of the log: promoting another would stall commits until it caught up.
    pub caught_up: BTreeSet<HostId>,
    /// A change is under way.
    pub is_joint: bool,
}

impl Current {
    pub fn learners(&self) -> impl Iterator<Item = HostId> {
        self.addresses.keys().copied().filter(|host| !self.voters.contains(host))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    AddLearner {
        host: HostId,
        address: String,
    },
    /// The member listens elsewhere now.
    SetAddress {
        host: HostId,
        address: String,
    },
    /// Goes through a joint configuration. Voters left out stay as learners.
    SetVoters(BTreeSet<HostId>),
    RemoveLearner {
        host: HostId,
    },
    /// The leader is to leave: another voter first.
    TransferLeader {
        to: HostId,
    },
}

/// The next step towards what `state` demands; `None` when there is nothing to do, or nothing that may be done now.
pub fn plan(state: &State, current: &Current) -> Option<Step> {
    if current.is_joint {
        return None;
    }
    let wanted = wanted_voters(state, current);
    if wanted != current.voters && !wanted.is_empty() {
        if !wanted.contains(&current.leader) {
            // A leader that removes itself leaves a gap; a voter of both configurations leaves none.
            let heir = current.voters.intersection(&wanted).next();
            return heir.map(|to| Step::TransferLeader { to: *to });
        }
        return Some(Step::SetVoters(wanted));
    }
    leaving(state, current).or_else(|| moved(state, current)).or_else(|| joining(state, current))
}

/// Keeps the voters that still belong, fills up from caught-up learners, and drops to the leader alone when the site
/// has too few hosts for a majority that survives one of them.
fn wanted_voters(state: &State, current: &Current) -> BTreeSet<HostId> {
    let kept: BTreeSet<HostId> = current.voters.iter().copied().filter(|host| state.hosts.contains(host)).collect();
    if state.hosts.len() < VOTERS {
        let alone = if kept.contains(&current.leader) { Some(current.leader) } else { kept.first().copied() };
        return alone.into_iter().collect();
    }
    let alive = state.hosts.iter().filter(|(_, host)| is_alive(host)).count();
    let candidates = current
        .learners()
        .filter(|host| current.caught_up.contains(host) && state.hosts.get(host).is_some_and(is_alive));
    let missing = VOTERS.saturating_sub(kept.len());
    let added: Vec<HostId> = candidates.take(missing).collect();
    // Two voters are worse than one: both must answer. So one becomes three at once.
    let grows_to_majority = kept.len() + added.len() >= VOTERS;
    if kept.len() <= 1 && !(grows_to_majority && alive >= VOTERS) {
        return kept;
    }
    kept.into_iter().chain(added).collect()
}

fn leaving(state: &State, current: &Current) -> Option<Step> {
    current.learners().find(|host| !state.hosts.contains(host)).map(|host| Step::RemoveLearner { host })
}

fn moved(state: &State, current: &Current) -> Option<Step> {
    current.addresses.iter().find_map(|(host, address)| {
        let known = state.hosts.get(host)?;
        (known.address != *address).then(|| Step::SetAddress { host: *host, address: known.address.clone() })
    })
}

fn joining(state: &State, current: &Current) -> Option<Step> {
    let standby = VOTERS - current.voters.len().min(VOTERS) + STANDBY_LEARNERS;
    if current.learners().count() >= standby {
        return None;
    }
    let (host, known) = state.hosts.iter().find(|(host, _)| !current.addresses.contains_key(host))?;
    Some(Step::AddLearner { host: *host, address: known.address.clone() })
}

/// A host that joined and did not report yet counts: its learner is how it learns that it joined.
fn is_alive(host: &Host) -> bool {
    matches!(host.liveness, Liveness::Alive | Liveness::New)
}
