//! openraft's state machine: batches that come out of the log are appended to the fold, kept in event segments, and
//! published, in this order; only then are their proposers answered.

use std::io;
use std::sync::Arc;

use futures::Stream;
use futures::StreamExt;
use openraft::AsyncRuntime;
use openraft::OptionalSend;
use openraft::storage::ApplyResponder;
use openraft::storage::EntryResponder;
use openraft::storage::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use statemachine::Fold;
use statemachine::Seq;
use statemachine::batch::SealedBatch;
use statemachine::fold::Applied;
use statemachine::fold::ApplyError;
use tokio::sync::watch;

use crate::platform::Blocking;
use crate::platform::Platform;
use crate::store::StoreError;
use crate::store::health::Health;
use crate::store::segments::Segments;
use crate::store::snapshot::AppliedState;
use crate::store::snapshot::SnapshotError;
use crate::store::snapshot::SnapshotHandle;
use crate::store::snapshot::Snapshots;
use crate::types::Entry;
use crate::types::LogId;
use crate::types::Payload;
use crate::types::ProposalResult;
use crate::types::Snapshot;
use crate::types::SnapshotMeta;
use crate::types::StoredMembership;
use crate::types::TypeConfig;

/// During a long apply readers see progress, and proposers get answers, after this many entries.
const PUBLISH_EVERY_ENTRIES: usize = 64;

pub struct StateMachine {
    pub(super) platform: Platform,
    pub(super) applied: AppliedState,
    /// What was pulled comes out of the log again when openraft begins to feed this host; that is no proposal that lost.
    pub(super) pulled_upto: Seq,
    pub(super) segments: Arc<Segments>,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) health: Arc<Health>,
    pub(super) fold: watch::Sender<Arc<Fold>>,
    pub(super) head: watch::Sender<Seq>,
}

/// How an append of pulled batches ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PulledEnd {
    /// The head after it.
    At(Seq),
    /// A batch does not follow `after`, this host's head: another chain, or the fold grew meanwhile.
    Misfit { after: Seq },
    /// A batch that follows the head does not decode. What one member sent is no reason to end this host: it asks another.
    Unsound { why: String },
}

/// Writes one snapshot, of the moment at which it was made.
pub struct SnapshotBuilder {
    platform: Platform,
    snapshots: Arc<Snapshots>,
    applied: AppliedState,
}

impl StateMachine {
    /// The fold of all that was applied here, each time that it grows.
    pub fn watch_fold(&self) -> watch::Receiver<Arc<Fold>> {
        self.fold.subscribe()
    }

    /// Applies one entry. An error here ends the host: going on would leave a hole.
    pub(super) async fn apply_entry(&mut self, entry: &Entry) -> Result<ProposalResult, StoreError> {
        let mut result = ProposalResult::default();
        match &entry.payload {
            Payload::Blank => {}
            Payload::Membership(membership) => {
                self.applied.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            Payload::Normal(proposal) => {
                for sealed in proposal.batches.iter() {
                    let applied = self.append(sealed)?;
                    let is_again = || sealed.previous().is_ok_and(|previous| previous.seq < self.pulled_upto);
                    if applied == Applied::Superseded && !is_again() {
                        self.health.batch_superseded();
                    }
                    result.applied.push(applied);
                }
                self.seal_overfull().await?;
            }
        }
        self.applied.last_applied = Some(entry.log_id);
        Ok(result)
    }

    /// Appends one batch to the fold and to the stream, if it follows the head.
    fn append(&mut self, sealed: &SealedBatch) -> Result<Applied, StoreError> {
        let applied = self.applied.fold.apply_sealed(sealed)?;
        if let Applied::Applied(_) = applied
            && self.segments.push(self.applied.fold.head, sealed)?
        {
            self.seal_in_background();
        }
        Ok(applied)
    }

    async fn seal_overfull(&self) -> Result<(), StoreError> {
        if !self.segments.is_overfull() {
            return Ok(());
        }
        let (segments, upto) = (self.segments.clone(), self.applied.fold.head.seq);
        let sealed = self.platform.on_disk(move || segments.seal_up_to(upto)).await;
        Ok(sealed.ok_or(StoreError::ShuttingDown)??)
    }

    /// Appends batches that a member has committed, on a host that openraft does not feed. Writes a snapshot when the last one is
    /// `snapshot_every` batches old: nothing else keeps them here.
    pub async fn append_pulled(
        &mut self,
        batches: Vec<Arc<SealedBatch>>,
        snapshot_every: u64,
    ) -> Result<PulledEnd, StoreError> {
        match self.try_append_pulled(&batches, snapshot_every).await {
            Err(error) if !matches!(error, StoreError::ShuttingDown) => {
                self.platform.exit.fatal(&error);
                Err(error)
            }
            ended => ended,
        }
    }

    async fn try_append_pulled(
        &mut self,
        batches: &[Arc<SealedBatch>],
        snapshot_every: u64,
    ) -> Result<PulledEnd, StoreError> {
        let before = self.applied.fold.head.seq;
        let mut broken_off = None;
        for sealed in batches {
            match self.append(sealed) {
                Ok(Applied::Applied(_)) => {}
                Ok(Applied::Superseded) => broken_off = Some(PulledEnd::Misfit { after: self.applied.fold.head.seq }),
                Err(StoreError::Apply(error @ ApplyError::Undecodable { .. })) => {
                    broken_off = Some(PulledEnd::Unsound { why: error.to_string() });
                }
                Err(error) => return Err(error),
            }
            if broken_off.is_some() {
                break;
            }
        }
        self.seal_overfull().await?;
        let head = self.applied.fold.head.seq;
        self.health.pulled((head.0 - before.0) as usize);
        self.pulled_upto = head;
        self.show();
        if let Some(broken_off) = broken_off {
            return Ok(broken_off);
        }
        let kept = self.snapshots.current().map_or(Seq::ZERO, |snapshot| snapshot.manifest.head.seq);
        if head.0 >= kept.0 + snapshot_every {
            self.build().await?;
        }
        Ok(PulledEnd::At(head))
    }

    pub(super) async fn build(&self) -> Result<(), StoreError> {
        let (snapshots, applied) = (self.snapshots.clone(), self.applied.clone());
        let built = self.platform.on_disk(move || snapshots.build(&applied)).await;
        built.ok_or(StoreError::ShuttingDown)??;
        Ok(())
    }

    /// Takes over a snapshot that was pulled from a member. The place in the log stays this host's own, if it has one.
    pub async fn install_pulled(&mut self, snapshot: SnapshotHandle) -> Result<(), StoreError> {
        if snapshot.manifest.head.seq <= self.applied.fold.head.seq {
            return Ok(());
        }
        let snapshot = snapshot.at(self.applied.last_applied, self.applied.membership.clone());
        let snapshots = self.snapshots.clone();
        let installed = self.platform.on_disk(move || snapshots.install(snapshot)).await;
        match installed.ok_or(StoreError::ShuttingDown)? {
            Ok(applied) => {
                self.applied = applied;
                self.pulled_upto = self.applied.fold.head.seq;
                self.health.snapshot_installed();
                self.show();
                Ok(())
            }
            // Nothing was taken over yet; another member's may be sound.
            Err(error @ (SnapshotError::Unreadable { .. } | SnapshotError::Digest { .. })) => Err(error.into()),
            Err(error) => {
                let error = error.into();
                self.platform.exit.fatal(&error);
                Err(error)
            }
        }
    }

    /// openraft begins to feed a host that pulled: the leader's snapshot says where in the log, and the fold that is here already
    /// goes on. Batches between the two come out of the log once more and change nothing.
    async fn adopt_log_position(&mut self, snapshot: &SnapshotHandle) -> Result<(), StoreError> {
        self.applied.last_applied = snapshot.manifest.last_applied;
        self.applied.membership = snapshot.manifest.membership.clone();
        self.build().await?;
        let snapshots = self.snapshots.clone();
        let forgotten = self.platform.on_disk(move || snapshots.forget_received()).await;
        Ok(forgotten.ok_or(StoreError::ShuttingDown)??)
    }

    fn seal_in_background(&self) {
        let (segments, upto) = (self.segments.clone(), self.applied.fold.head.seq);
        let exit = self.platform.exit.clone();
        let seal = move || {
            if let Err(error) = segments.seal_up_to(upto) {
                exit.fatal(&error);
            }
        };
        match self.platform.disk.hangs() {
            Some(_) => {
                let platform = self.platform.clone();
                drop(tokio::spawn(async move { platform.on_disk(seal).await }));
            }
            None if self.platform.blocking == Blocking::Inline => seal(),
            None => drop(tokio::task::spawn_blocking(seal)),
        }
    }

    /// Readers first, then proposers: who was answered finds what was answered.
    fn publish<R: AsyncRuntime>(&self, answers: &mut Vec<(ApplyResponder<TypeConfig<R>>, ProposalResult)>) {
        self.show();
        answers.drain(..).for_each(|(responder, result)| responder.send(result));
    }

    fn show(&self) {
        if self.fold.borrow().head != self.applied.fold.head {
            self.fold.send_replace(Arc::new(self.applied.fold.clone()));
            self.head.send_replace(self.applied.fold.head.seq);
        }
    }

    fn fatal(&self, error: StoreError) -> io::Error {
        self.health.apply_ended();
        self.platform.exit.fatal(&error);
        error.into()
    }
}

impl<R: AsyncRuntime> RaftStateMachine<TypeConfig<R>> for StateMachine {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied.last_applied, self.applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig<R>>>> + Unpin + OptionalSend,
    {
        self.health.apply_began(self.platform.clock.boottime_ns());
        let mut answers = Vec::new();
        let mut since_published = 0;
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let result = match self.apply_entry(&entry).await {
                Ok(result) => result,
                Err(error) => return Err(self.fatal(error)),
            };
            if let Some(responder) = responder {
                answers.push((responder, result));
            }
            since_published += 1;
            if since_published == PUBLISH_EVERY_ENTRIES {
                self.publish(&mut answers);
                since_published = 0;
            }
        }
        self.publish(&mut answers);
        self.health.apply_ended();
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            platform: self.platform.clone(),
            snapshots: self.snapshots.clone(),
            applied: self.applied.clone(),
        }
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotHandle) -> io::Result<()> {
        if self.applied.fold.head.seq >= snapshot.manifest.head.seq {
            return match self.adopt_log_position(&snapshot).await {
                Err(StoreError::ShuttingDown) => Err(StoreError::ShuttingDown.into()),
                Err(error) => Err(self.fatal(error)),
                Ok(()) => Ok(()),
            };
        }
        let snapshots = self.snapshots.clone();
        let installed = self.platform.on_disk(move || snapshots.install(snapshot)).await;
        match installed {
            None => Err(StoreError::ShuttingDown.into()),
            Some(Err(error)) => Err(self.fatal(error.into())),
            Some(Ok(applied)) => {
                self.applied = applied;
                self.health.snapshot_installed();
                self.publish::<R>(&mut Vec::new());
                Ok(())
            }
        }
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let current = self.snapshots.current();
        // One of a host that pulls says nothing about openraft's log.
        Ok(current.filter(|snapshot| snapshot.manifest.last_applied.is_some()).map(SnapshotHandle::snapshot))
    }
}

impl<R: AsyncRuntime> RaftSnapshotBuilder<TypeConfig<R>> for SnapshotBuilder {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let (snapshots, applied) = (self.snapshots.clone(), self.applied.clone());
        let built = self.platform.on_disk(move || snapshots.build(&applied)).await;
        match built {
            None => Err(StoreError::ShuttingDown.into()),
            Some(Err(error)) => {
                let error = StoreError::from(error);
                self.platform.exit.fatal(&error);
                Err(error.into())
            }
            Some(Ok(handle)) => Ok(handle.snapshot()),
        }
    }
}
