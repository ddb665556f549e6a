//! Who should be a voter: a pure function from what the cluster believes to the next single step.
//!
//! One voter while fewer than three hosts are alive, else three, or five where the site asks for them and has them; other hosts
//! are standby learners, at most four; removed hosts leave (DESIGN §4, hazard H19). Voters are kept as they are, but for two reasons:
//! one that was away for ten minutes is replaced by a learner that is there, and one that shares a failure domain with
//! another by a learner of a domain of its own. One step at a time, through one controller
//! ([`crate::node::NodeOn::reconcile_membership`]): concurrent changes may end in a joint configuration for good; one whose
//! leader died halfway is ended by the next leader.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use statemachine::HostId;
use statemachine::State;
use statemachine::state::Host;
use statemachine::state::Liveness;

/// Below this many hosts one votes alone: two voters are worse than one.
pub const VOTERS_MIN: usize = 3;
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
    /// Hosts that were away for so long that another takes their place among the voters.
    pub gone: BTreeSet<HostId>,
    /// The newest membership entry is not committed yet: a change is under way.
    pub is_changing: bool,
    /// The voters that a joint configuration leads to.
    pub joint: Option<BTreeSet<HostId>>,
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

impl Step {
    /// A hand-over was asked for, no more, when it is taken; every other step is in the log.
    pub fn is_done_when_taken(&self) -> bool {
        !matches!(self, Step::TransferLeader { .. })
    }
}

/// The next step towards what `state` demands; `None` when there is nothing to do, or nothing that may be done now.
pub fn plan(state: &State, current: &Current) -> Option<Step> {
    if current.is_changing {
        return None;
    }
    // A committed joint configuration: the leader that began the change died before its second half, and nobody else will
    // take it. Until then every commit needs a majority of both (found by the simulation, seed 50).
    let wanted = current.joint.clone().unwrap_or_else(|| wanted_voters(state, current));
    if (wanted != current.voters || current.joint.is_some()) && !wanted.is_empty() {
        if !wanted.contains(&current.leader) {
            // A leader that removes itself leaves a gap; a voter of both configurations leaves none.
            let heir = current.voters.intersection(&wanted).next();
            return heir.map(|to| Step::TransferLeader { to: *to });
        }
        return Some(Step::SetVoters(wanted));
    }
    leaving(state, current).or_else(|| moved(state, current)).or_else(|| joining(state, current))
}

/// How a host that is about to be removed stops being a voter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// It is none.
    NoVoter,
    Voters(BTreeSet<HostId>),
    /// It leads: these vote, then that one leads, and takes it out.
    HandOver {
        voters: Option<BTreeSet<HostId>>,
        to: HostId,
    },
    /// It is the only voter, and nobody else could be one: the site would end with it.
    Nobody,
}

pub fn release(state: &State, current: &Current, host: HostId) -> Release {
    if !current.voters.contains(&host) {
        return Release::NoVoter;
    }
    if host == current.leader {
        if let Some(to) = current.voters.iter().copied().find(|voter| *voter != host) {
            return Release::HandOver { voters: None, to };
        }
        let able = |other: &HostId| current.caught_up.contains(other) && state.hosts.get(other).is_some_and(is_alive);
        let heir = current.learners().find(able);
        return heir.map_or(Release::Nobody, |to| Release::HandOver { voters: Some([host, to].into()), to });
    }
    let mut without = state.clone();
    without.hosts.remove(&host);
    match wanted_voters(&without, current) {
        wanted if wanted.is_empty() => Release::Nobody,
        wanted => Release::Voters(wanted),
    }
}

/// Keeps the voters that still belong, fills up from caught-up learners, and drops to the leader alone when the site
/// has too few hosts for a majority that survives one of them.
fn wanted_voters(state: &State, current: &Current) -> BTreeSet<HostId> {
    let kept: BTreeSet<HostId> = current.voters.iter().copied().filter(|host| state.hosts.contains(host)).collect();
    if state.hosts.len() < VOTERS_MIN {
        let alone = if kept.contains(&current.leader) { Some(current.leader) } else { kept.first().copied() };
        return alone.into_iter().collect();
    }
    let mut choice = Choice { state, current, voters: kept.clone() };
    let size = voter_count(state);
    while choice.voters.len() > size && choice.drop_one() {}
    while choice.voters.len() < size && choice.add_one() {}
    // One becomes three at once, and three become five: an even number needs one more answer and survives no more losses.
    let alive = state.hosts.iter().filter(|(_, host)| is_alive(host)).count();
    let alone = kept.len() <= 1 && (choice.voters.len() < VOTERS_MIN || alive < VOTERS_MIN);
    let even = choice.voters.len() > kept.len() && kept.len() >= VOTERS_MIN && choice.voters.len() < size;
    if alone || even {
        choice.voters = kept.clone();
    }
    if choice.voters == kept {
        choice.replace_one();
    }
    choice.voters
}

/// How many hosts should vote in a site of at least three.
fn voter_count(state: &State) -> usize {
    let asked = state.site.as_ref().map_or(VOTERS_MIN, |site| site.voters.into());
    if state.hosts.len() >= asked { asked } else { VOTERS_MIN }
}

/// A set of voters that is being put together. Whoever leads stays: it cannot take itself out without a gap.
struct Choice<'a> {
    state: &'a State,
    current: &'a Current,
    voters: BTreeSet<HostId>,
}

impl Choice<'_> {
    fn domain(&self, host: HostId) -> Option<&str> {
        let domain = self.state.hosts.get(&host)?.failure_domain.as_str();
        (!domain.is_empty()).then_some(domain)
    }

    /// Another voter would fail together with this host.
    fn is_doubled(&self, host: HostId) -> bool {
        let domain = self.domain(host);
        domain.is_some() && self.voters.iter().any(|other| *other != host && self.domain(*other) == domain)
    }

    /// Learners that may vote at once, those first that share no domain with a voter.
    fn candidate(&self) -> Option<HostId> {
        let able = |host: &HostId| {
            let is_there = self.state.hosts.get(host).is_some_and(is_alive);
            is_there && self.current.caught_up.contains(host) && !self.voters.contains(host)
        };
        self.current.learners().filter(able).min_by_key(|host| (self.is_doubled(*host), *host))
    }

    /// The voter that is missed least: away, then doubled, then the newest.
    fn least(&self) -> Option<HostId> {
        let others = self.voters.iter().copied().filter(|host| *host != self.current.leader);
        others.max_by_key(|host| (self.current.gone.contains(host), self.is_doubled(*host), *host))
    }

    fn drop_one(&mut self) -> bool {
        self.least().is_some_and(|host| self.voters.remove(&host))
    }

    fn add_one(&mut self) -> bool {
        self.candidate().is_some_and(|host| self.voters.insert(host))
    }

    /// A voter that is away, or doubled, makes room for a learner that is not.
    fn replace_one(&mut self) {
        let (Some(old), Some(new)) = (self.least(), self.candidate()) else { return };
        let is_gone = self.current.gone.contains(&old);
        let spreads = self.is_doubled(old) && !self.is_doubled(new);
        if is_gone || spreads {
            self.voters.remove(&old);
            self.voters.insert(new);
        }
    }
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
    let count = voter_count(state);
    let standby = count - current.voters.len().min(count) + STANDBY_LEARNERS;
    let voted: BTreeSet<&str> =
        current.voters.iter().filter_map(|voter| Some(state.hosts.get(voter)?.failure_domain.as_str())).collect();
    let brings_domain = |host: &Host| !host.failure_domain.is_empty() && !voted.contains(host.failure_domain.as_str());
    let outside = state.hosts.iter().filter(|(host, _)| !current.addresses.contains_key(host));
    let (host, known) = outside.min_by_key(|(id, host)| (!is_alive(host), !brings_domain(host), **id))?;
    if current.learners().count() < standby {
        return Some(Step::AddLearner { host: *host, address: known.address.clone() });
    }
    // A learner that is away keeps its slot from one that is there, and could take a voter's place.
    let away = current.learners().find(|learner| current.gone.contains(learner))?;
    is_alive(known).then_some(Step::RemoveLearner { host: away })
}

/// A host that joined and did not report yet counts: its learner is how it learns that it joined.
fn is_alive(host: &Host) -> bool {
    matches!(host.liveness, Liveness::Alive | Liveness::New)
}

#[cfg(test)]
mod tests {
    use statemachine::BootId;
    use statemachine::ClusterId;
    use statemachine::Seq;
    use statemachine::SiteId;
    use statemachine::command::HostFacts;
    use statemachine::decide::FEATURE_LEVEL;
    use statemachine::state::Administrative;
    use statemachine::state::Capacity;
    use statemachine::state::Fingerprint;
    use statemachine::state::HostUsage;
    use statemachine::state::Site;
    use uuid::Uuid;

    use super::*;

    fn address(host: u64) -> String {
        format!("192.0.2.{host}:7443")
    }

    fn state(hosts: &[(u64, Liveness)]) -> State {
        let mut state = State::default();
        for (id, liveness) in hosts {
            let host = Host {
                name: format!("host{id}"),
                address: address(*id),
                cluster: ClusterId(1),
                public_key: Fingerprint([0; 32]),
                certificate: None,
                facts: HostFacts {
                    boot: BootId(Uuid::from_u128(1)),
                    capacity: Capacity::default(),
                    feature_level: FEATURE_LEVEL,
                    version: String::new(),
                    clock_runs_while_stopped: true,
                    watchdog_timeout_ms: None,
                },
                previous_boots: Default::default(),
                report_counter: 0,
                administrative: Administrative::Active,
                liveness: *liveness,
                spm_priority: 5,
                usage: HostUsage::default(),
                failure_domain: String::new(),
            };
            state.hosts.insert(HostId(*id), host);
        }
        state
    }

    fn alive(hosts: &[u64]) -> State {
        state(&hosts.iter().map(|host| (*host, Liveness::Alive)).collect::<Vec<_>>())
    }

    fn ids(hosts: &[u64]) -> BTreeSet<HostId> {
        hosts.iter().copied().map(HostId).collect()
    }

    /// Host 1 leads, every learner has caught up.
    fn members(voters: &[u64], learners: &[u64]) -> Current {
        let all = voters.iter().chain(learners);
        Current {
            leader: HostId(1),
            voters: ids(voters),
            addresses: all.map(|host| (HostId(*host), address(*host))).collect(),
            caught_up: ids(learners),
            gone: BTreeSet::new(),
            is_changing: false,
            joint: None,
        }
    }

    /// Takes steps until there is none, as the controller does.
    fn converge(state: &State, mut current: Current) -> Current {
        for _ in 0..50 {
            let Some(step) = plan(state, &current) else {
                return current;
            };
            match step {
                Step::AddLearner { host, address } | Step::SetAddress { host, address } => {
                    current.addresses.insert(host, address);
                    current.caught_up.insert(host);
                }
                Step::SetVoters(voters) => current.voters = voters,
                Step::RemoveLearner { host } => drop(current.addresses.remove(&host)),
                Step::TransferLeader { to } => current.leader = to,
            }
        }
        panic!("the plan never ends: {current:?}");
    }

    #[test]
    fn one_host_votes_alone_and_two_are_no_better() {
        assert_eq!(plan(&alive(&[1]), &members(&[1], &[])), None);
        let two = converge(&alive(&[1, 2]), members(&[1], &[]));
        assert_eq!((two.voters.clone(), two.learners().collect::<Vec<_>>()), (ids(&[1]), vec![HostId(2)]));
    }

    #[test]
    fn from_the_third_host_on_three_vote_and_four_stand_by() {
        let nine = converge(&alive(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), members(&[1], &[]));
        assert_eq!(nine.voters, ids(&[1, 2, 3]));
        assert_eq!(nine.learners().count(), STANDBY_LEARNERS);
    }

    #[test]
    fn one_becomes_three_at_once_and_only_when_both_others_have_the_log() {
        let mut current = members(&[1], &[2, 3]);
        current.caught_up = ids(&[2]);
        assert_eq!(plan(&alive(&[1, 2, 3]), &current), None, "two voters would be worse than one");
        current.caught_up = ids(&[2, 3]);
        assert_eq!(plan(&alive(&[1, 2, 3]), &current), Some(Step::SetVoters(ids(&[1, 2, 3]))));
    }

    #[test]
    fn an_unreachable_voter_keeps_its_vote() {
        let site =
            state(&[(1, Liveness::Alive), (2, Liveness::Alive), (3, Liveness::Unreachable), (4, Liveness::Alive)]);
        assert_eq!(plan(&site, &members(&[1, 2, 3], &[4])), None);
    }

    #[test]
    fn a_voter_that_was_away_for_long_is_replaced_by_one_that_is_there() {
        let site =
            state(&[(1, Liveness::Alive), (2, Liveness::Alive), (3, Liveness::Unreachable), (4, Liveness::Alive)]);
        let current = Current { gone: ids(&[3]), ..members(&[1, 2, 3], &[4]) };
        assert_eq!(plan(&site, &current), Some(Step::SetVoters(ids(&[1, 2, 4]))));
        let late = Current { caught_up: BTreeSet::new(), ..current.clone() };
        assert_eq!(plan(&site, &late), None, "a voter without the log would stall commits");
        let after = converge(&site, current);
        assert_eq!(after.learners().collect::<Vec<_>>(), vec![HostId(3)], "it comes back as a learner");
        let leads = Current { gone: ids(&[1]), ..members(&[1, 2, 3], &[4]) };
        assert_eq!(plan(&site, &leads), None, "who leads is not away");
    }

    #[test]
    fn a_slot_goes_to_a_host_that_is_there_and_of_another_rack_first() {
        let hosts: Vec<(u64, Liveness)> =
            (1..=10).map(|id| (id, if id == 8 { Liveness::Unreachable } else { Liveness::Alive })).collect();
        let racks: Vec<(u64, &str)> = (1..=10).map(|id| (id, if id == 10 { "b" } else { "a" })).collect();
        let site = with_domains(state(&hosts), &racks);
        let full = members(&[1, 2, 3], &[4, 5, 6, 7]);
        assert_eq!(plan(&site, &full), None, "every slot is taken by a host that is there");
        let away = Current { gone: ids(&[5]), ..full.clone() };
        assert_eq!(plan(&site, &away), Some(Step::RemoveLearner { host: HostId(5) }));
        let free = members(&[1, 2, 3], &[4, 6, 7]);
        let step = Step::AddLearner { host: HostId(10), address: address(10) };
        assert_eq!(plan(&site, &free), Some(step), "its rack has no vote yet");
    }

    fn with_domains(mut state: State, domains: &[(u64, &str)]) -> State {
        for (host, domain) in domains {
            state.hosts.update(&HostId(*host), |host| host.failure_domain = (*domain).to_owned());
        }
        state
    }

    #[test]
    fn voters_spread_over_failure_domains() {
        let racks = [(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "c")];
        let site = with_domains(alive(&[1, 2, 3, 4, 5]), &racks);
        assert_eq!(converge(&site, members(&[1], &[])).voters, ids(&[1, 4, 5]), "from the beginning");
        let after = converge(&site, members(&[1, 2, 3], &[4, 5]));
        assert_eq!(after.voters, ids(&[1, 4, 5]), "one swap after the other");
        let two = with_domains(alive(&[1, 2, 3, 4]), &[(1, "a"), (2, "a"), (3, "b"), (4, "b")]);
        assert_eq!(plan(&two, &members(&[1, 2, 3], &[4])), None, "no swap that spreads nothing");
    }

    #[test]
    fn five_vote_where_the_site_asks_for_them_and_has_them() {
        let asks = |hosts: &[u64]| {
            let mut state = alive(hosts);
            state.site = Some(Site {
                id: SiteId(Uuid::from_u128(7)),
                name: "site".to_owned(),
                ca: Fingerprint([0; 32]),
                feature_level: 2,
                trimmed_upto: Seq::ZERO,
                voters: 5,
                generation: 0,
                recovered_at: Seq::ZERO,
            });
            state
        };
        assert_eq!(converge(&asks(&[1, 2, 3, 4]), members(&[1], &[])).voters, ids(&[1, 2, 3]));
        let mut one_short = members(&[1, 2, 3], &[4, 5]);
        one_short.caught_up = ids(&[4]);
        assert_eq!(plan(&asks(&[1, 2, 3, 4, 5]), &one_short), None, "four are no better than three");
        let seven = converge(&asks(&[1, 2, 3, 4, 5, 6, 7]), members(&[1, 2, 3], &[]));
        assert_eq!((seven.voters, seven.addresses.len()), (ids(&[1, 2, 3, 4, 5]), 7));
        let fewer = converge(&alive(&[1, 2, 3, 4, 5, 6]), members(&[1, 2, 3, 4, 5], &[6]));
        assert_eq!(fewer.voters, ids(&[1, 2, 3]), "and three again when it asks for no more");
    }

    #[test]
    fn a_removed_voter_is_replaced_and_then_leaves() {
        let current = members(&[1, 2, 3], &[4]);
        assert_eq!(plan(&alive(&[1, 2, 4]), &current), Some(Step::SetVoters(ids(&[1, 2, 4]))));
        let after = converge(&alive(&[1, 2, 4]), current);
        assert_eq!(after.addresses.keys().copied().collect::<BTreeSet<_>>(), ids(&[1, 2, 4]));
    }

    #[test]
    fn a_removed_leader_hands_over_first() {
        let current = members(&[1, 2, 3], &[4]);
        assert_eq!(plan(&alive(&[2, 3, 4]), &current), Some(Step::TransferLeader { to: HostId(2) }));
        let after = converge(&alive(&[2, 3, 4]), current);
        assert_eq!(after.voters, ids(&[2, 3, 4]));
    }

    #[test]
    fn a_site_that_shrinks_to_two_hosts_votes_alone_again() {
        let after = converge(&alive(&[1, 2]), members(&[1, 2, 3], &[]));
        assert_eq!((after.voters.clone(), after.learners().collect::<Vec<_>>()), (ids(&[1]), vec![HostId(2)]));
    }

    #[test]
    fn a_member_that_moved_is_found_at_its_new_address() {
        let mut current = members(&[1, 2, 3], &[]);
        current.addresses.insert(HostId(3), "192.0.2.99:7443".to_owned());
        let step = Step::SetAddress { host: HostId(3), address: address(3) };
        assert_eq!(plan(&alive(&[1, 2, 3]), &current), Some(step));
    }

    #[test]
    fn a_change_whose_leader_died_halfway_is_ended_by_the_next() {
        let mut state = alive(&[2, 3, 4]);
        state.removed_hosts.insert(HostId(1), Seq(9));
        let half = Current { leader: HostId(2), joint: Some(ids(&[2, 3])), ..members(&[1, 2, 3], &[4]) };
        assert_eq!(plan(&state, &half), Some(Step::SetVoters(ids(&[2, 3]))));
        let removed_leads = Current { leader: HostId(1), ..half.clone() };
        assert_eq!(plan(&state, &removed_leads), Some(Step::TransferLeader { to: HostId(2) }));
        assert_eq!(plan(&state, &Current { is_changing: true, ..half }), None, "its second half is on its way");
    }

    #[test]
    fn nothing_begins_while_a_change_is_under_way() {
        let current = Current { is_changing: true, ..members(&[1], &[2, 3]) };
        assert_eq!(plan(&alive(&[1, 2, 3]), &current), None);
        let mut removed = alive(&[1, 2]);
        removed.removed_hosts.insert(HostId(3), Seq(9));
        assert_eq!(plan(&removed, &current), None);
    }
}
