//! Membership: executes one step of the plan at a time.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use openraft::AsyncRuntime;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use statemachine::HostId;
use statemachine::State;
use statemachine::state::Liveness;
use thiserror::Error;

use super::Inner;
use super::NodeOn;
use crate::membership;
use crate::membership::Current;
use crate::membership::Release;
use crate::membership::Step;
use crate::types::LogId;
use crate::types::PeerAddress;
use crate::types::Proposal;

/// A learner this close to the leader's log, in entries, counts as caught up.
const CAUGHT_UP_WITHIN: u64 = 500;

#[derive(Debug, Error)]
pub enum MemberError {
    #[error("this host does not lead; membership is changed on the leader")]
    NotLeader,
    #[error("host {host} is not a voter, so it cannot lead")]
    NotAVoter { host: HostId },
    #[error("the membership change was not accepted: {why}")]
    Refused { why: String },
}

impl<R: AsyncRuntime> NodeOn<R> {
    /// Takes the next step of [`membership::plan`], if there is one and no other is under way. hostd calls this on the
    /// leader every second or so; returning the step says that it is done.
    pub async fn reconcile_membership(&self) -> Result<Option<Step>, MemberError> {
        let inner = &self.inner;
        let Ok(_turn) = inner.membership.try_lock() else {
            return Ok(None);
        };
        let current = inner.current().ok_or(MemberError::NotLeader)?;
        let fold = self.fold();
        let Some(step) = membership::plan(&fold.state, &current) else {
            return Ok(None);
        };
        tracing::info!(?step, "the membership changes");
        inner.take_step(step.clone()).await?;
        Ok(Some(step))
    }

    /// The membership as this leader knows it; `None` on a follower.
    pub fn membership(&self) -> Option<Current> {
        self.inner.current()
    }

    /// Hands the lead to another voter. Returns when the request is made; [`NodeOn::leadership`] tells the outcome.
    pub async fn transfer_leader(&self, to: HostId) -> Result<(), MemberError> {
        self.inner.transfer(to).await
    }
}

impl<R: AsyncRuntime> Inner<R> {
    fn current(&self) -> Option<Current> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if !metrics.state.is_leader() {
            // Whoever leads next counts anew, and so does this host when it leads again.
            self.away_since_ms.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return None;
        }
        let membership = metrics.membership_config.membership();
        let last = metrics.last_log_index.unwrap_or(0);
        let near = |matched: Option<u64>| matched.is_some_and(|index| index + CAUGHT_UP_WITHIN >= last);
        let replication = metrics.replication.as_ref();
        let caught_up = replication.into_iter().flatten();
        Some(Current {
            leader: HostId(metrics.id),
            voters: membership.voter_ids().map(HostId).collect(),
            addresses: membership.nodes().map(|(host, node)| (HostId(*host), node.address.clone())).collect(),
            caught_up: caught_up
                .filter(|(_, matched)| near(matched.as_ref().map(|log_id| log_id.index)))
                .map(|(host, _)| HostId(*host))
                .collect(),
            gone: self.gone(),
            is_changing: metrics.membership_config != metrics.committed_membership_config,
            joint: match membership.get_joint_config().as_slice() {
                [_, .., to] => Some(to.iter().copied().map(HostId).collect()),
                _ => None,
            },
        })
    }

    /// Hosts that the log has called unreachable for as long as a voter may be away, on this leader's clock.
    fn gone(&self) -> BTreeSet<HostId> {
        let now_ms = self.boottime_ms();
        let fold = self.fold.borrow().clone();
        let away = fold.state.hosts.iter().filter(|(_, host)| host.liveness == Liveness::Unreachable);
        let away: BTreeSet<HostId> = away.map(|(host, _)| *host).collect();
        let mut since = self.away_since_ms.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|host, _| away.contains(host));
        for host in away {
            since.entry(host).or_insert(now_ms);
        }
        let long =
            |(_, since_ms): &(&HostId, &u64)| now_ms.saturating_sub(**since_ms) >= self.config.replace_voter_after_ms;
        since.iter().filter(long).map(|(host, _)| *host).collect()
    }

    async fn take_step(&self, step: Step) -> Result<(), MemberError> {
        let change = match step {
            Step::TransferLeader { to } => return self.transfer(to).await,
            Step::AddLearner { host, address } => ChangeMembers::AddNodes(one(host, address)),
            Step::SetAddress { host, address } => ChangeMembers::SetNodes(one(host, address)),
            Step::SetVoters(voters) => {
                ChangeMembers::ReplaceAllVoters(voters.iter().map(|host| host.0).collect::<BTreeSet<_>>())
            }
            Step::RemoveLearner { host } => ChangeMembers::RemoveNodes(BTreeSet::from([host.0])),
        };
        // `retain`: a voter that is left out stays as a learner until the plan removes it.
        let changed = self.raft.change_membership(change, true).await;
        changed.map_err(|error| MemberError::Refused { why: error.to_string() })?;
        Ok(())
    }

    /// Takes a host out of the voters, if it is one, with another in its place where there is one.
    pub(super) async fn release_voter(&self, host: HostId, state: &State) -> Result<(), MemberError> {
        let current = self.current().ok_or(MemberError::NotLeader)?;
        let refused = |why: &str| Err(MemberError::Refused { why: why.to_owned() });
        let release = membership::release(state, &current, host);
        if release == Release::NoVoter {
            return Ok(());
        }
        if current.is_changing {
            return refused("another change of the membership is under way");
        }
        tracing::info!(%host, ?release, "a host is about to be removed");
        match release {
            Release::NoVoter => Ok(()),
            Release::Voters(voters) => self.take_step(Step::SetVoters(voters)).await,
            Release::HandOver { voters, to } => {
                if let Some(voters) = voters {
                    if !self.follows_now(to).await {
                        return refused("the other host does not answer at this moment, and would have to vote");
                    }
                    self.take_step(Step::SetVoters(voters)).await?;
                }
                self.take_step(Step::TransferLeader { to }).await?;
                refused("it leads, and hands over first")
            }
            Release::Nobody => refused("it is the only one, and no other host that is up has the whole log"),
        }
    }

    /// Whether a host takes in an entry that is written now. A voter more raises the majority at once: who died a second ago, and
    /// is alive in the log still, must not become one.
    async fn follows_now(&self, host: HostId) -> bool {
        let Ok(written) = self.raft.client_write(Proposal::barrier()).await else { return false };
        let has = |matched: &Option<LogId>| matched.is_some_and(|log_id| log_id.index >= written.log_id.index);
        let within = Duration::from_millis(self.config.timers.election_max_ms);
        let waits = self.raft.wait(Some(within));
        let follows = waits.metrics(
            |metrics| metrics.replication.as_ref().and_then(|hosts| hosts.get(&host.0)).is_some_and(has),
            "a host follows now",
        );
        follows.await.is_ok()
    }

    pub(super) async fn transfer(&self, to: HostId) -> Result<(), MemberError> {
        let current = self.current().ok_or(MemberError::NotLeader)?;
        if !current.voters.contains(&to) {
            return Err(MemberError::NotAVoter { host: to });
        }
        let asked = self.raft.trigger().transfer_leader(to.0).await;
        asked.map_err(|error| MemberError::Refused { why: error.to_string() })
    }

    /// The voter, other than this host, whose log is nearest to ours.
    pub(super) fn best_heir(&self) -> Option<HostId> {
        let current = self.current()?;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics.replication.as_ref()?;
        replication
            .iter()
            .filter(|(host, _)| **host != self.host.0 && current.voters.contains(&HostId(**host)))
            .max_by_key(|(_, matched)| matched.as_ref().map(|log_id| log_id.index))
            .map(|(host, _)| HostId(*host))
    }
}

fn one(host: HostId, address: String) -> BTreeMap<u64, PeerAddress> {
    BTreeMap::from([(host.0, PeerAddress { address })])
}
