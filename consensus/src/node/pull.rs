//! A host that is no member pulls what was committed; a member serves it ([`crate::feed`], ADR 13).
//!
//! The host's log and vote stay empty. What it pulls goes through the same state machine as what openraft applies, so that
//! everything above sees one fold and one stream. When a slot among the members becomes free, the leader adds the host as a
//! learner: what comes out of the log then and is in the fold already changes nothing.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::async_runtime::WatchReceiver;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::codec;
use tokio::time::Instant;

use super::Inner;
use crate::decider::Leadership;
use crate::feed::Committed;
use crate::feed::Outlook;
use crate::feed::PULL_BATCHES;
use crate::feed::PULL_BYTES;
use crate::feed::PullRequest;
use crate::feed::Pulled;
use crate::feed::WAIT_MAX_MS;
use crate::network::AddressBook;
use crate::store::event_store::EventStoreError;
use crate::store::state_machine::PulledEnd;
use crate::transport::Channel;
use crate::transport::Peer;
use crate::transport::Refusal;

/// A busy stream is asked for this often, so that 500 hosts cost each member some thousand small answers a second.
const BETWEEN: Duration = Duration::from_millis(50);
/// Pause before the next member is asked when one does not answer well.
const AFTER_FAILURE: Duration = Duration::from_millis(250);
/// After so many answers without news another member is asked.
const QUIET_ANSWERS: u32 = 8;
/// A member looks this often whether it still is one.
const MEMBER_LOOKS: Duration = Duration::from_secs(1);
/// On top of the wait that was asked for.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The same failure is told again after this long.
const REPEAT: Duration = Duration::from_secs(60);

/// Pulls whenever this host is no member and no leader appends to it; ends with the node.
pub(super) async fn pull_while_outside<R: AsyncRuntime>(node: Weak<Inner<R>>) {
    let (mut turn, mut quiet) = (0, 0);
    let mut told: Option<Instant> = None;
    loop {
        let Some(inner) = node.upgrade() else { return };
        if !inner.is_outside() {
            inner.outlook.send_if_modified(|outlook| outlook.take().is_some());
            if inner.is_member() && inner.is_unheard() {
                inner.ask_who_is_member(turn).await;
                turn += 1;
            }
            drop(inner);
            tokio::time::sleep(MEMBER_LOOKS).await;
            continue;
        }
        let pause = match inner.pull(turn).await {
            Ok(Next::More) => Duration::ZERO,
            Ok(Next::Later) => BETWEEN,
            Ok(Next::Quiet) => {
                // One whose apply hangs says "nothing new" for ever.
                quiet += 1;
                turn += usize::from(quiet % QUIET_ANSWERS == 0);
                Duration::ZERO
            }
            Ok(Next::OtherMember) => {
                turn += 1;
                AFTER_FAILURE
            }
            Err(why) => {
                turn += 1;
                if inner.is_outside() && told.is_none_or(|at| at.elapsed() > REPEAT) {
                    tracing::warn!("this host pulls what was committed, and cannot now: {why}");
                    told = Some(Instant::now());
                }
                AFTER_FAILURE
            }
        };
        drop(inner);
        tokio::time::sleep(pause).await;
    }
}

enum Next {
    /// The member has more.
    More,
    Later,
    /// Nothing happened while the member held the request.
    Quiet,
    /// This one knows no leader, or is behind us.
    OtherMember,
}

impl<R: AsyncRuntime> Inner<R> {
    fn is_member(&self) -> bool {
        let metrics = self.raft.metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let is_named = membership.nodes().any(|(host, _)| *host == self.host.0);
        is_named && *self.left.lock().unwrap_or_else(PoisonError::into_inner) <= *membership.log_id()
    }

    /// No leader appends to it, and it is none.
    fn is_unheard(&self) -> bool {
        let leads = matches!(self.leadership_now(), Leadership::Leading { .. });
        !leads && self.silence_ms() > 3 * self.config.timers.election_max_ms
    }

    /// No member, and no leader appends to it: one that is being added hears its leader before it knows.
    pub(super) fn is_outside(&self) -> bool {
        !self.is_member() && self.is_unheard()
    }

    /// A host that was away may have lost its slot meanwhile, and nobody appends to it to say so: its own log calls it a member for
    /// ever (found by the simulation, seed 260). A later entry, committed, says otherwise.
    async fn ask_who_is_member(&self, turn: usize) {
        let Some(source) = self.source(turn) else { return };
        let body = Bytes::from(codec::encode(&PullRequest { after: Seq(u64::MAX), wait_ms: 0 }));
        let Ok(answer) = self.transport.call(source, Channel::Pull, body, ANSWER_WITHIN).await else { return };
        let Ok(Pulled { outlook, .. }) = codec::decode(&answer) else { return };
        let known = *self.raft.metrics().borrow_watched().membership_config.log_id();
        if outlook.ends_membership_of(self.host, known) {
            tracing::info!("this host lost its place in the Raft group while it was away; it pulls from now on");
            *self.left.lock().unwrap_or_else(PoisonError::into_inner) = outlook.since;
        }
    }

    /// On a member: what was committed after what the asker has.
    pub(super) async fn serve_pull(&self, body: &[u8]) -> Result<Bytes, Refusal> {
        let request: PullRequest = codec::decode(body).map_err(Refusal::new)?;
        if !self.is_member() {
            return Err(Refusal::new("this host is no member of the Raft group; it pulls itself"));
        }
        let mut head = self.events.watch_head();
        let wait = Duration::from_millis(u64::from(request.wait_ms.min(WAIT_MAX_MS)));
        // Nothing new in time is an answer too: it says who leads.
        let _ = tokio::time::timeout(wait, head.wait_for(|head| *head > request.after)).await;
        let what = self.committed_after(request).await.map_err(Refusal::new)?;
        Ok(Bytes::from(codec::encode(&Pulled { what, outlook: self.outlook_of_member() })))
    }

    async fn committed_after(&self, request: PullRequest) -> Result<Committed, EventStoreError> {
        let head = self.events.head();
        let snapshot = self.snapshots.current();
        if let Some(snapshot) = &snapshot
            && snapshot.manifest.head.seq.0 > request.after.0.saturating_add(self.config.snapshot_ahead)
        {
            return Ok(Committed::Snapshot { manifest: snapshot.manifest.encode() });
        }
        match self.events.read(request.after, PULL_BATCHES, PULL_BYTES).await {
            Ok(stored) => {
                let batches = stored.into_iter().map(|batch| batch.sealed).collect();
                Ok(Committed::Batches { batches, head })
            }
            Err(EventStoreError::Ahead { .. }) => Ok(Committed::Batches { batches: Vec::new(), head }),
            Err(trimmed @ EventStoreError::Trimmed { .. }) => match snapshot {
                Some(snapshot) => Ok(Committed::Snapshot { manifest: snapshot.manifest.encode() }),
                None => Err(trimmed),
            },
            Err(error) => Err(error),
        }
    }

    fn outlook_of_member(&self) -> Outlook {
        let metrics = self.raft.metrics();
        let membership = metrics.borrow_watched().committed_membership_config.clone();
        Outlook {
            since: *membership.log_id(),
            leader: self.leader_now(),
            voters: membership.voter_ids().map(HostId).collect(),
            learners: membership.membership().learner_ids().map(HostId).collect(),
        }
    }

    /// Whom to ask: members in an order that this host's id turns, the leader last, then every other host that is known, since the
    /// members may all have changed while this one was away.
    fn source(&self, turn: usize) -> Option<Peer> {
        let mut hosts: Vec<HostId> = Vec::new();
        if let Some(outlook) = &*self.outlook.borrow() {
            let leader = outlook.leader;
            let members = outlook.voters.iter().chain(&outlook.learners).copied();
            hosts.extend(members.filter(|host| Some(*host) != leader));
            let first = self.host.0 as usize % hosts.len().max(1);
            hosts.rotate_left(first);
            hosts.extend(leader);
        }
        let fold = self.fold.borrow().clone();
        let known = fold.state.hosts.iter().map(|(host, _)| *host);
        for host in known.chain(self.config.peers.iter().map(|peer| peer.host)) {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
        let told = |host| self.config.peers.iter().find(|peer| peer.host == host).map(|peer| peer.address.clone());
        let address = |host| self.addresses.address(host).or_else(|| told(host));
        let others = hosts.into_iter().filter(|host| *host != self.host);
        let known: Vec<Peer> = others.filter_map(|host| Some(Peer { host, address: address(host)? })).collect();
        known.get(turn % known.len().max(1)).cloned()
    }

    async fn pull(self: &Arc<Self>, turn: usize) -> Result<Next, String> {
        let source = self.source(turn).ok_or("it knows no other host; join it again")?;
        let after = self.fold.borrow().head.seq;
        let wait = Duration::from_millis(self.config.timers.election_max_ms);
        let request = PullRequest { after, wait_ms: wait.as_millis() as u32 };
        let body = Bytes::from(codec::encode(&request));
        let answer = self.transport.call(source.clone(), Channel::Pull, body, wait + ANSWER_WITHIN).await;
        let answer = answer.map_err(words)?;
        let Pulled { what, outlook } =
            codec::decode(&answer).map_err(|error| format!("host {}: {error}", source.host))?;
        let knows_leader = outlook.leader.is_some();
        if knows_leader {
            self.pulled_ms.store(self.boottime_ms(), Ordering::Relaxed);
            self.outlook.send_if_modified(|known| known.replace(outlook.clone()) != Some(outlook));
        }
        let next = match what {
            Committed::Batches { batches, head } if batches.is_empty() && head < after => Next::OtherMember,
            Committed::Batches { batches, .. } if batches.is_empty() => Next::Quiet,
            Committed::Batches { batches, head } => {
                let every = self.config.snapshot_every;
                let appended = self.raft.with_state_machine(move |store| Box::pin(store.append_pulled(batches, every)));
                match appended.await.map_err(words)?.map_err(words)? {
                    PulledEnd::At(seq) if seq < head => Next::More,
                    PulledEnd::At(_) => Next::Later,
                    PulledEnd::Misfit { after } => {
                        return Err(format!("what host {} sent does not follow seq {after}", source.host));
                    }
                    PulledEnd::Unsound { why } => {
                        return Err(format!("host {} sent what it cannot have: {why}", source.host));
                    }
                }
            }
            Committed::Snapshot { manifest } => {
                let (_turn, snapshot) = self.service.fetch(source, &manifest).await?;
                let installed = self.raft.with_state_machine(move |store| Box::pin(store.install_pulled(snapshot)));
                installed.await.map_err(words)?.map_err(words)?;
                Next::More
            }
        };
        Ok(if knows_leader { next } else { Next::OtherMember })
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}
