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
use statemachine::fold::Applied;
use tokio::sync::watch;

use crate::platform::Blocking;
use crate::platform::Platform;
use crate::store::StoreError;
use crate::store::health::Health;
use crate::store::segments::Segments;
use crate::store::snapshot::AppliedState;
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
    pub(super) segments: Arc<Segments>,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) health: Arc<Health>,
    pub(super) fold: watch::Sender<Arc<Fold>>,
    pub(super) head: watch::Sender<Seq>,
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
    async fn apply_entry(&mut self, entry: &Entry) -> Result<ProposalResult, StoreError> {
        let mut result = ProposalResult::default();
        match &entry.payload {
            Payload::Blank => {}
            Payload::Membership(membership) => {
                self.applied.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            Payload::Normal(proposal) => {
                for sealed in proposal.batches.iter() {
                    let applied = self.applied.fold.apply_sealed(sealed)?;
                    if let Applied::Applied(_) = applied
                        && self.segments.push(self.applied.fold.head, sealed)?
                    {
                        self.seal_in_background();
                    }
                    if applied == Applied::Superseded {
                        self.health.batch_superseded();
                    }
                    result.applied.push(applied);
                }
                if self.segments.is_overfull() {
                    let (segments, upto) = (self.segments.clone(), self.applied.fold.head.seq);
                    let sealed = self.platform.on_disk(move || segments.seal_up_to(upto)).await;
                    sealed.ok_or(StoreError::ShuttingDown)??;
                }
            }
        }
        self.applied.last_applied = Some(entry.log_id);
        Ok(result)
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
        let seq = self.applied.fold.head.seq;
        if self.fold.borrow().head != self.applied.fold.head {
            self.fold.send_replace(Arc::new(self.applied.fold.clone()));
            self.head.send_replace(seq);
        }
        answers.drain(..).for_each(|(responder, result)| responder.send(result));
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
        Ok(self.snapshots.current().map(SnapshotHandle::snapshot))
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
