//! State and head of the chain, moved together: compare-and-append (DESIGN §3, hazard C1).

use thiserror::Error;

use crate::batch::Batch;
use crate::batch::Head;
use crate::batch::SealedBatch;
use crate::codec::CodecError;
use crate::command::Request;
use crate::decide;
use crate::decide::FEATURE_LEVEL;
use crate::event::Event;
use crate::evolve;
use crate::ids::Seq;
use crate::rejection::Rejection;
use crate::stamp::Stamp;
use crate::state::Created;
use crate::state::Remembered;
use crate::state::RememberedKey;
use crate::state::State;
use crate::state::StateImage;

/// Remembered answers are kept for a day and up to this many.
pub const REMEMBERED_MAX: usize = 10_000;
pub const REMEMBERED_FOR_MS: u64 = 24 * 60 * 60 * 1000;

/// The fold of a log up to its head. Cloning is O(1).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fold {
    pub state: State,
    pub head: Head,
    /// Stamp of the last batch; the next is never earlier.
    pub stamp: Stamp,
}

/// What the decider makes of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// A batch to propose, and the answer to give when it is applied.
    Batch { batch: Batch, sealed: SealedBatch, answer: Answer },
    /// The same request was answered before, or nothing needs to change: hold until the head is applied.
    Settled(Answer),
    /// No. Also held: it may rest on batches in flight (hazard C13).
    Rejected(Rejection),
}

/// What a caller gets for an accepted command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Answer {
    pub seq: Seq,
    pub created: Option<Created>,
}

/// What became of a batch that came out of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Applied {
    Applied(Seq),
    /// It does not follow the head: a no-op on every host.
    Superseded,
}

/// A batch that fits the head and cannot be applied: this host must stop before it, and leave its guests alone.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum ApplyError {
    #[error("batch {seq} fits the log but does not decode: {source}")]
    Undecodable { seq: Seq, source: CodecError },
    #[error(
        "the site goes to feature level {level} with batch {seq}, and this build knows {FEATURE_LEVEL}; upgrade quorate on this host. \
         Its guests run on meanwhile, those with a lease as long as it lasts"
    )]
    LevelTooHigh { seq: Seq, level: u32 },
}

impl Fold {
    /// Decides one request against this fold. Pure: two calls give the same answer.
    pub fn decide(&self, request: &Request, wall_ms: u64) -> Decision {
        let stamp = self.stamp.advance(wall_ms);
        if let Some(settled) = self.remembered(request) {
            return settled;
        }
        let decided = match decide::decide(&self.state, request, self.head.seq.next(), stamp) {
            Ok(decided) => decided,
            Err(rejection) => return Decision::Rejected(rejection),
        };
        if decided.events.is_empty() {
            return Decision::Settled(Answer { seq: self.head.seq, created: decided.created });
        }
        let batch = Batch {
            previous: self.head,
            stamp,
            actor: request.actor.clone(),
            origin: request.origin,
            idempotency: request.idempotency.clone(),
            created: decided.created,
            events: decided.events,
        };
        let answer = Answer { seq: batch.seq(), created: batch.created };
        let sealed = batch.seal();
        Decision::Batch { batch, sealed, answer }
    }

    fn remembered(&self, request: &Request) -> Option<Decision> {
        let idempotency = request.idempotency.as_ref()?;
        let key = RememberedKey::of(&request.actor, &idempotency.key);
        let remembered = self.state.remembered.get(&key)?;
        if remembered.body_hash != idempotency.body_hash {
            return Some(Decision::Rejected(Rejection::IdempotencyConflict { seq: remembered.seq }));
        }
        Some(Decision::Settled(Answer { seq: remembered.seq, created: remembered.created }))
    }

    /// Appends a batch that came out of the log, if it follows the head.
    pub fn apply_sealed(&mut self, sealed: &SealedBatch) -> Result<Applied, ApplyError> {
        let seq = self.head.seq.next();
        // A batch whose header is unreadable cannot be shown not to fit: the host stops.
        let follows = sealed.open_after(self.head).map_err(|source| ApplyError::Undecodable { seq, source })?;
        let Some(batch) = follows else { return Ok(Applied::Superseded) };
        let levels = batch.events.iter().filter_map(|event| match event {
            Event::FeatureLevelActivated(activated) => Some(activated.level),
            Event::SiteInitialised(site) => Some(site.feature_level),
            _ => None,
        });
        if let Some(level) = levels.max().filter(|level| *level > FEATURE_LEVEL) {
            return Err(ApplyError::LevelTooHigh { seq, level });
        }
        self.append(&batch, sealed);
        Ok(Applied::Applied(seq))
    }

    /// Appends a batch that is known to follow the head (the decider's own speculation).
    pub fn append(&mut self, batch: &Batch, sealed: &SealedBatch) {
        assert_eq!(batch.previous, self.head, "a batch is appended to the head that it names");
        let seq = batch.seq();
        for event in &batch.events {
            evolve::evolve(&mut self.state, event, evolve::At { seq, at_ms: batch.stamp.at_ms });
        }
        self.remember(batch);
        self.head = Head { seq, hash: sealed.hash() };
        self.stamp = batch.stamp;
    }

    fn remember(&mut self, batch: &Batch) {
        let now_ms = batch.stamp.at_ms;
        if let Some(idempotency) = &batch.idempotency {
            let key = RememberedKey::of(&batch.actor, &idempotency.key);
            let remembered = Remembered {
                body_hash: idempotency.body_hash,
                seq: batch.seq(),
                created: batch.created,
                at_ms: now_ms,
            };
            self.state.remembered.insert(key, remembered);
            self.state.remembered_order.insert(batch.seq(), key);
        }
        // At most two leave for each that enters, so forgetting is O(1) a batch.
        for _ in 0..2 {
            let Some((seq, key)) = self.state.remembered_order.get_min().copied() else { return };
            let expired = self.state.remembered.get(&key).is_none_or(|old| old.at_ms + REMEMBERED_FOR_MS < now_ms);
            if !expired && self.state.remembered_order.len() <= REMEMBERED_MAX {
                return;
            }
            self.state.remembered_order.remove(&seq);
            self.state.remembered.remove(&key);
        }
    }
}

/// A fold as it is written to a snapshot.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct FoldImage {
    state: StateImage,
    head: Head,
    stamp: Stamp,
}

impl From<&Fold> for FoldImage {
    fn from(fold: &Fold) -> Self {
        FoldImage { state: StateImage::from(&fold.state), head: fold.head, stamp: fold.stamp }
    }
}

impl From<FoldImage> for Fold {
    fn from(image: FoldImage) -> Self {
        Fold { state: State::from(image.state), head: image.head, stamp: image.stamp }
    }
}
