//! Where a host's committed batches come from (DESIGN §4, hazard H24).
//!
//! Voters and standby learners are pushed to by openraft; all other hosts pull committed batches from any of them and
//! verify the chain, because a leader that pushes to 500 hosts commits a hundredth of what it could. [`LogFeed`] hides
//! which of the two a host is. Members serve pulls already ([`MemberFeed::serve`]), so that a host can become a
//! follower that pulls without a change to any member.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use statemachine::Fold;
use statemachine::Seq;
use statemachine::batch::SealedBatch;
use tokio::sync::watch;

use crate::store::event_store::EventStore;
use crate::store::event_store::EventStoreError;

/// One answer to a pull holds at most this much, well below the limit of a message.
const PULL_BATCHES: usize = 4096;
const PULL_BYTES: usize = 4 << 20;

/// What every host has, member or not: the fold of its log, and the batches behind it.
pub trait LogFeed: Send + Sync + 'static {
    /// What this host has applied.
    fn fold(&self) -> Arc<Fold>;

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>>;

    /// The batches themselves, from the oldest kept to the head.
    fn events(&self) -> &Arc<EventStore>;
}

/// The feed of a member: openraft pushes, the state machine publishes.
pub struct MemberFeed {
    fold: watch::Receiver<Arc<Fold>>,
    events: Arc<EventStore>,
}

/// Asks for committed batches after a seq.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    pub after: Seq,
    pub limit_batches: u32,
}

/// Committed batches in order, without a gap. Each names the one before it, so the receiver verifies the chain by
/// applying them ([`Fold::apply_sealed`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    pub batches: Vec<Arc<SealedBatch>>,
    pub head: Seq,
}

impl MemberFeed {
    pub fn new(fold: watch::Receiver<Arc<Fold>>, events: Arc<EventStore>) -> MemberFeed {
        MemberFeed { fold, events }
    }

    /// Answers another host's pull.
    pub async fn serve(&self, request: PullRequest) -> Result<Pulled, EventStoreError> {
        let limit = (request.limit_batches as usize).clamp(1, PULL_BATCHES);
        let stored = self.events.read(request.after, limit, PULL_BYTES).await?;
        let batches = stored.into_iter().map(|batch| batch.sealed).collect();
        Ok(Pulled { batches, head: self.events.head() })
    }
}

impl LogFeed for MemberFeed {
    fn fold(&self) -> Arc<Fold> {
        self.fold.borrow().clone()
    }

    fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        self.fold.clone()
    }

    fn events(&self) -> &Arc<EventStore> {
        &self.events
    }
}
