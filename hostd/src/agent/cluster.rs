//! What the agent, the lease, the keeper of grants and the leader's duties need of consensus: a door small enough that a test
//! can stand behind it. The product's is [`consensus::node::Node`], a simulation's the same on another runtime.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consensus::decider::Leadership;
use consensus::decider::ProposeError;
use consensus::node::NodeOn;
use consensus::platform::Platform;
use consensus::store::event_store::EventStore;
use consensus::transport::PeerKind;
use consensus::types::AsyncRuntime;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use thiserror::Error;
use tokio::sync::watch;

/// A question to the cluster that got no answer. `0` says why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Unanswered(pub String);

/// A step of the membership that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipStep {
    pub what: String,
    /// The next step may be looked for at once; else this one takes effect later.
    pub is_done: bool,
}

pub trait Cluster: Send + Sync + 'static {
    fn host(&self) -> HostId;

    /// The machine below: its clock and its randomness.
    fn platform(&self) -> &Platform;

    /// What this host has applied.
    fn fold(&self) -> Arc<Fold>;

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>>;

    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// Has a command decided, wherever the leader is.
    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Answer, ProposeError>>;

    /// One ReadIndex round that starts now, by this host as the leader of exactly that session, and this host's apply up to
    /// it. A round that another leader made proves nothing about grants given here (hazard C4).
    fn confirm_lead(&self, session: u64) -> BoxFuture<'_, Result<Seq, Unanswered>>;

    /// A request to a host, this one included.
    fn peer_call(
        &self,
        to: HostId,
        kind: PeerKind,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Bytes, Unanswered>>;

    /// The stream of this host, where there is one.
    fn events(&self) -> Option<Arc<EventStore>>;

    /// Leader only: the next step of the membership, if one is due. Says what it did.
    fn reconcile_membership(&self) -> BoxFuture<'_, Result<Option<MembershipStep>, Unanswered>>;

    fn transfer_leader(&self, to: HostId) -> BoxFuture<'_, Result<(), Unanswered>>;
}

fn unanswered(error: impl std::fmt::Display) -> Unanswered {
    Unanswered(error.to_string())
}

impl<R: AsyncRuntime> Cluster for NodeOn<R> {
    fn host(&self) -> HostId {
        NodeOn::host(self)
    }

    fn platform(&self) -> &Platform {
        NodeOn::platform(self)
    }

    fn fold(&self) -> Arc<Fold> {
        NodeOn::fold(self)
    }

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        NodeOn::watch_fold(self)
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        NodeOn::leadership(self)
    }

    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Answer, ProposeError>> {
        NodeOn::propose(self, request).boxed()
    }

    fn confirm_lead(&self, session: u64) -> BoxFuture<'_, Result<Seq, Unanswered>> {
        let leadership = NodeOn::leadership(self);
        async move {
            // Sessions never repeat, so one that is current before and after the round was current throughout, and
            // the round was this host's own.
            let still = || leadership.borrow().ready_session() == Some(session);
            if !still() {
                return Err(Unanswered("this host does not lead in that session any more".to_owned()));
            }
            if mutant::is_on(Mutant::GrantByAge) {
                return Ok(NodeOn::fold(self).head.seq);
            }
            let seq = self.read_index().await.map_err(unanswered)?;
            if !still() {
                return Err(Unanswered("this host lost the lead during the round".to_owned()));
            }
            Ok(seq)
        }
        .boxed()
    }

    fn peer_call(
        &self,
        to: HostId,
        kind: PeerKind,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Bytes, Unanswered>> {
        async move { NodeOn::peer_call(self, to, kind, body, timeout).await.map_err(unanswered) }.boxed()
    }

    fn events(&self) -> Option<Arc<EventStore>> {
        Some(NodeOn::events(self).clone())
    }

    fn reconcile_membership(&self) -> BoxFuture<'_, Result<Option<MembershipStep>, Unanswered>> {
        async move {
            let step = NodeOn::reconcile_membership(self).await.map_err(unanswered)?;
            Ok(step.map(|step| MembershipStep { what: format!("{step:?}"), is_done: step.is_done_when_taken() }))
        }
        .boxed()
    }

    fn transfer_leader(&self, to: HostId) -> BoxFuture<'_, Result<(), Unanswered>> {
        async move { NodeOn::transfer_leader(self, to).await.map_err(unanswered) }.boxed()
    }
}
