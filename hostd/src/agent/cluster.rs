//! What the agent, the lease, the keeper of grants and the leader's duties need of consensus: a door small enough that a test
//! can stand behind it. The product's is [`consensus::node::Node`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consensus::decider::Leadership;
use consensus::decider::ProposeError;
use consensus::node::Node;
use consensus::transport::PeerKind;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use thiserror::Error;
use tokio::sync::watch;

/// A question to the cluster that got no answer. `0` says why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Unanswered(pub String);

pub trait Cluster: Send + Sync + 'static {
    fn host(&self) -> HostId;

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

    /// Leader only: the next step of the membership, if one is due. Says what it did.
    fn reconcile_membership(&self) -> BoxFuture<'_, Result<Option<String>, Unanswered>>;

    fn transfer_leader(&self, to: HostId) -> BoxFuture<'_, Result<(), Unanswered>>;
}

fn unanswered(error: impl std::fmt::Display) -> Unanswered {
    Unanswered(error.to_string())
}

impl Cluster for Node {
    fn host(&self) -> HostId {
        Node::host(self)
    }

    fn fold(&self) -> Arc<Fold> {
        Node::fold(self)
    }

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        Node::watch_fold(self)
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        Node::leadership(self)
    }

    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Answer, ProposeError>> {
        Node::propose(self, request).boxed()
    }

    fn confirm_lead(&self, session: u64) -> BoxFuture<'_, Result<Seq, Unanswered>> {
        let leadership = Node::leadership(self);
        async move {
            // Sessions never repeat, so one that is current before and after the round was current throughout, and
            // the round was this host's own.
            let still = || leadership.borrow().ready_session() == Some(session);
            if !still() {
                return Err(Unanswered("this host does not lead in that session any more".to_owned()));
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
        async move { Node::peer_call(self, to, kind, body, timeout).await.map_err(unanswered) }.boxed()
    }

    fn reconcile_membership(&self) -> BoxFuture<'_, Result<Option<String>, Unanswered>> {
        async move {
            let step = Node::reconcile_membership(self).await.map_err(unanswered)?;
            Ok(step.map(|step| format!("{step:?}")))
        }
        .boxed()
    }

    fn transfer_leader(&self, to: HostId) -> BoxFuture<'_, Result<(), Unanswered>> {
        async move { Node::transfer_leader(self, to).await.map_err(unanswered) }.boxed()
    }
}
