//! Reads: what this host has applied, and what the cluster has committed (DESIGN §4: never lease reads).

use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::ReadPolicy;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::codec;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;

use super::Inner;
use super::NodeOn;
use crate::decider::Leadership;
use crate::transport::Channel;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReadError {
    #[error("the cluster has no leader now, so no read is known to be current; retry in a second")]
    NoLeader,
    #[error("the leader could not confirm that it still leads: {why}; retry")]
    NotConfirmed { why: String },
    #[error(
        "this host has applied seq {applied}, seq {wanted} did not arrive within {after_ms} ms; retry, or ask another host"
    )]
    Lagging { applied: Seq, wanted: Seq, after_ms: u64 },
}

/// A read that waits for a round.
pub(super) type Waiting = oneshot::Sender<Result<Seq, ReadError>>;
/// Reads that wait for the next round; more of them wait outside.
pub(super) const READS_WAITING: usize = 4096;

impl<R: AsyncRuntime> NodeOn<R> {
    /// What this host has applied. O(1).
    pub fn fold(&self) -> Arc<Fold> {
        self.inner.fold.borrow().clone()
    }

    /// Changes after each applied log entry.
    pub fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        self.inner.fold.clone()
    }

    /// Waits until this host has applied `seq` (read your own writes).
    pub async fn wait_applied(&self, seq: Seq, timeout: Duration) -> Result<Arc<Fold>, ReadError> {
        self.inner.wait_applied(seq, timeout).await
    }

    /// A seq that covers every command that was answered before this call, applied on this host when it returns: the
    /// fold is then linearizable. One ReadIndex round on the leader; also what a grant rests on (hazard C4).
    pub async fn read_index(&self) -> Result<Seq, ReadError> {
        let (waiting, round) = oneshot::channel();
        let stopping = |_| ReadError::NotConfirmed { why: "this host is stopping".to_owned() };
        self.inner.reads.send(waiting).await.map_err(|_| stopping(()))?;
        let seq = round.await.map_err(|_| stopping(()))??;
        self.inner.wait_applied(seq, self.inner.config.read_timeout()).await?;
        Ok(seq)
    }
}

/// Gives each round to all reads that wait for one: a thousand readers cost the leader no more than one. Whoever comes while a
/// round runs waits for the next, because a read may not rest on a round that began before it.
pub(super) async fn share_rounds<R: AsyncRuntime>(node: Weak<Inner<R>>, mut reads: mpsc::Receiver<Waiting>) {
    while let Some(first) = reads.recv().await {
        let Some(inner) = node.upgrade() else { return };
        let mut together = vec![first];
        while let Ok(next) = reads.try_recv() {
            together.push(next);
        }
        let seq = inner.read_round().await;
        for waiting in together {
            let _ = waiting.send(seq.clone());
        }
    }
}

impl<R: AsyncRuntime> Inner<R> {
    pub(super) async fn wait_applied(&self, seq: Seq, timeout: Duration) -> Result<Arc<Fold>, ReadError> {
        let mut fold = self.fold.clone();
        let reached = tokio::time::timeout(timeout, fold.wait_for(|fold| fold.head.seq >= seq)).await;
        if let Ok(Ok(fold)) = reached {
            return Ok(fold.clone());
        }
        let applied = self.fold.borrow().head.seq;
        Err(ReadError::Lagging { applied, wanted: seq, after_ms: timeout.as_millis() as u64 })
    }

    /// On the leader: one round to a majority that starts now, then this host's apply up to what was committed.
    pub(super) async fn confirm_lead(&self) -> Result<Seq, ReadError> {
        let timeout = self.config.read_timeout();
        let not_confirmed = |why: String| ReadError::NotConfirmed { why };
        let round = tokio::time::timeout(timeout, self.raft.get_read_linearizer(ReadPolicy::ReadIndex)).await;
        let linearizer = round
            .map_err(|_| not_confirmed(format!("no majority answered within {} ms", timeout.as_millis())))?
            .map_err(|error| not_confirmed(error.to_string()))?;
        let applied = linearizer.try_await_ready(&self.raft, Some(timeout)).await;
        applied
            .map_err(|error| not_confirmed(error.to_string()))?
            .map_err(|_| not_confirmed("its own apply is behind".to_owned()))?;
        Ok(self.fold.borrow().head.seq)
    }

    async fn read_round(&self) -> Result<Seq, ReadError> {
        match self.leadership_now() {
            Leadership::Leading { .. } => self.confirm_lead().await,
            Leadership::Following { leader: Some(leader) } => self.ask_leader(leader, self.config.read_timeout()).await,
            Leadership::Following { leader: None } => Err(ReadError::NoLeader),
        }
    }

    async fn ask_leader(&self, leader: HostId, timeout: Duration) -> Result<Seq, ReadError> {
        let peer = self.peer(leader).ok_or(ReadError::NoLeader)?;
        let answer = self.transport.call(peer, Channel::ReadIndex, Bytes::new(), timeout).await;
        let answer = answer.map_err(|error| ReadError::NotConfirmed { why: error.to_string() })?;
        codec::decode(&answer).map_err(|error| ReadError::NotConfirmed { why: error.to_string() })
    }
}
