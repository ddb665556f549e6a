//! What openraft is told about us: the types that a log entry is made of.
//!
//! [`TypeConfig`] is generic over the async runtime alone, so that the product (tokio) and a simulation (a seeded
//! runtime) run the same code. No other type here depends on it: the store and its files are the same in both.

use std::cmp::Ordering;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use openraft::OptionalSend;
use openraft::vote::RaftLeaderId;
use serde::Deserialize;
use serde::Serialize;
use statemachine::batch::SealedBatch;
use statemachine::fold::Applied;

/// What a cluster runs on: tokio, or a simulation's.
pub use openraft::AsyncRuntime;
/// The product's runtime, under the name that spares a dependency of our own.
#[allow(deprecated)]
pub use openraft::impls::TokioRuntime;

/// A host in Raft's eyes: the number inside its `HostId`.
pub type NodeId = u64;

/// Standard Raft: at most one leader a term, so that a leader id is never shared by two (hazard C2).
pub type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, NodeId>;
pub type CommittedLeaderId = <LeaderId as RaftLeaderId>::Committed;
pub type LogId = openraft::LogId<CommittedLeaderId>;
pub type Vote = openraft::Vote<LeaderId>;
pub type Payload = openraft::EntryPayload<Proposal, NodeId, PeerAddress>;
pub type Entry = openraft::Entry<CommittedLeaderId, Payload>;
pub type Membership = openraft::Membership<NodeId, PeerAddress>;
pub type StoredMembership = openraft::StoredMembership<CommittedLeaderId, NodeId, PeerAddress>;
pub type SnapshotMeta = openraft::SnapshotMeta<CommittedLeaderId, NodeId, PeerAddress>;
pub type Snapshot = openraft::Snapshot<CommittedLeaderId, NodeId, PeerAddress, crate::store::snapshot::SnapshotHandle>;

/// openraft's type parameters for a cluster that runs on `R`.
pub struct TypeConfig<R = TokioRuntime>(PhantomData<fn() -> R>);

impl<R: AsyncRuntime> openraft::RaftTypeConfig for TypeConfig<R> {
    type D = Proposal;
    type R = ProposalResult;
    type NodeId = NodeId;
    type Node = PeerAddress;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = R;
    type Responder<T>
        = openraft::impls::ProgressResponder<Self, T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

// Written by hand: a derive would ask the same of `R`, of which no value exists.
impl<R> fmt::Debug for TypeConfig<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TypeConfig")
    }
}
impl<R> Clone for TypeConfig<R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R> Copy for TypeConfig<R> {}
impl<R> Default for TypeConfig<R> {
    fn default() -> Self {
        TypeConfig(PhantomData)
    }
}
impl<R> PartialEq for TypeConfig<R> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl<R> Eq for TypeConfig<R> {}
impl<R> PartialOrd for TypeConfig<R> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<R> Ord for TypeConfig<R> {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

/// Where a member's Raft transport listens: `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeerAddress {
    pub address: String,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

/// What one log entry carries: the batches of one group commit, in order. None of them: the barrier with which a
/// decider session begins (DESIGN §3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Shared: one entry is held by the log's cache, its writer and a replication stream for each follower.
    pub batches: Arc<[SealedBatch]>,
}

impl Proposal {
    pub fn new(batches: Vec<SealedBatch>) -> Proposal {
        Proposal { batches: batches.into() }
    }

    pub fn barrier() -> Proposal {
        Proposal::new(Vec::new())
    }

    /// Bytes of all batches, which is nearly the size of the entry.
    pub fn size_bytes(&self) -> usize {
        self.batches.iter().map(|batch| batch.as_bytes().len()).sum()
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.batches.len() {
            0 => f.write_str("barrier"),
            count => write!(f, "{count} batches of {} bytes", self.size_bytes()),
        }
    }
}

/// What became of each batch of a proposal, in the same order. Empty for barriers and membership entries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProposalResult {
    pub applied: Vec<Applied>,
}
