//! Event segments: the truth about what happened (DESIGN §4).
//!
//! Batches that were applied gather in memory (the *tail*), and are sealed into immutable files. Until then the Raft
//! log holds them too: it is purged only up to a snapshot, and a snapshot seals first. So a crash loses nothing, and
//! the tail is rebuilt when the log is applied again.

pub mod file;

use std::collections::VecDeque;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use statemachine::Seq;
use statemachine::batch::ChainHash;
use statemachine::batch::Head;
use statemachine::batch::SealedBatch;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use thiserror::Error;

use self::file::SegmentFile;
use self::file::SegmentId;
use crate::store::disk::Disk;
use crate::store::disk::DiskError;
use crate::store::index::EventIndex;

#[derive(Debug, Error)]
pub enum SegmentError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(
        "event segment {path} is damaged: {why}. Remove this host from the cluster and join it again with an empty \
         data directory",
        path = path.display()
    )]
    Damaged { path: PathBuf, why: String },
    #[error("event segment {first} to {last} is named by the snapshot and missing. Remove this host and join it again")]
    Missing { first: Seq, last: Seq },
    #[error("batch {seq} came out of the log with hash {found}, a sealed segment has {stored}")]
    Diverged { seq: Seq, found: ChainHash, stored: ChainHash },
    #[error("an event segment holds at least one batch")]
    Empty,
}

/// A batch and its place in the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredBatch {
    pub seq: Seq,
    pub sealed: Arc<SealedBatch>,
}

pub struct Segments {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    index: Arc<dyn EventIndex>,
    seal_at_bytes: usize,
    state: Mutex<State>,
    /// Held while a segment is written, so that they are written one by one.
    sealing: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Rising by first and by last seq.
    sealed: Vec<SegmentFile>,
    /// The newest batches, contiguous: all that is not sealed, and some that are.
    tail: VecDeque<StoredBatch>,
    tail_bytes: usize,
    unsealed_bytes: usize,
    seal_asked: bool,
}

impl State {
    /// Head of the chain up to which segments are on disk.
    fn sealed_head(&self) -> Head {
        self.sealed.last().map_or(Head::default(), |segment| segment.head)
    }

    fn segment_of(&self, seq: Seq) -> Option<&SegmentFile> {
        let at = self.sealed.partition_point(|segment| segment.id.last < seq);
        self.sealed.get(at).filter(|segment| segment.id.first <= seq)
    }
}

impl Segments {
    /// Opens the folder. `named` are the segments that the current snapshot rests on: each must be there. Others are
    /// kept when they continue the chain, and are leftovers of an interrupted install when they do not.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        index: Arc<dyn EventIndex>,
        seal_at_bytes: usize,
        named: &[SegmentId],
    ) -> Result<Segments, SegmentError> {
        disk.create_dir_all(dir)?;
        let mut found = Vec::new();
        for name in disk.list(dir)? {
            let path = dir.join(&name);
            match name.ends_with(file::SUFFIX) {
                true => found.push(file::open(&disk, &path)?),
                false => disk.remove(&path)?,
            }
        }
        for id in named {
            if !found.iter().any(|segment| segment.id == *id) {
                return Err(SegmentError::Missing { first: id.first, last: id.last });
            }
        }
        let (sealed, leftovers) = select(found, named);
        for leftover in leftovers {
            tracing::info!(segment = %leftover.path.display(), "an interrupted snapshot left this segment; removed");
            disk.remove(&leftover.path)?;
        }
        let state = State { sealed, ..State::default() };
        let dir = dir.to_owned();
        Ok(Segments { disk, dir, index, seal_at_bytes, state: Mutex::new(state), sealing: Mutex::new(()) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a batch that was applied. True when it is time to call [`Self::seal_up_to`] (once, until it is done).
    pub fn push(&self, head: Head, sealed: &SealedBatch) -> Result<bool, SegmentError> {
        let mut state = self.state();
        let on_disk = state.sealed_head();
        if head.seq <= on_disk.seq {
            // Sealed before a restart, applied again after it.
            if head.seq == on_disk.seq && head.hash != on_disk.hash {
                return Err(SegmentError::Diverged { seq: head.seq, found: head.hash, stored: on_disk.hash });
            }
            return Ok(false);
        }
        let len = sealed.as_bytes().len();
        state.tail.push_back(StoredBatch { seq: head.seq, sealed: Arc::new(sealed.clone()) });
        state.tail_bytes += len;
        state.unsealed_bytes += len;
        let full = state.unsealed_bytes >= self.seal_at_bytes && !state.seal_asked;
        state.seal_asked |= full;
        Ok(full)
    }

    /// Batches wait in memory far beyond the size of a segment: whoever applies has to seal by itself.
    pub fn is_overfull(&self) -> bool {
        self.state().unsealed_bytes >= self.seal_at_bytes.saturating_mul(4)
    }

    /// Makes all batches up to `upto` durable in sealed segments. Blocks.
    pub fn seal_up_to(&self, upto: Seq) -> Result<(), SegmentError> {
        let _one_at_a_time = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (previous, batches) = {
                let mut state = self.state();
                state.seal_asked = false;
                let previous = state.sealed_head();
                let wanted = state.tail.iter().filter(|batch| batch.seq > previous.seq && batch.seq <= upto);
                let mut bytes = 0;
                let batches: Vec<StoredBatch> = wanted
                    .take_while(|batch| {
                        let room = bytes < self.seal_at_bytes;
                        bytes += batch.sealed.as_bytes().len();
                        room
                    })
                    .cloned()
                    .collect();
                (previous, batches)
            };
            if batches.is_empty() {
                return Ok(());
            }
            let (segment, marks) = file::write(&self.disk, &self.dir, previous, &batches)?;
            self.index.add(&segment.id, &marks);
            let mut state = self.state();
            let bytes: usize = batches.iter().map(|batch| batch.sealed.as_bytes().len()).sum();
            state.unsealed_bytes = state.unsealed_bytes.saturating_sub(bytes);
            keep(&mut state.sealed, segment);
            self.trim_tail(&mut state);
        }
    }

    /// Sealed batches stay in memory while there is room: subscribers live at the end of the stream.
    fn trim_tail(&self, state: &mut State) {
        let sealed = state.sealed_head().seq;
        while state.tail_bytes > self.seal_at_bytes && state.tail.front().is_some_and(|batch| batch.seq <= sealed) {
            if let Some(batch) = state.tail.pop_front() {
                state.tail_bytes -= batch.sealed.as_bytes().len();
            }
        }
    }

    /// First seq that is served.
    pub fn oldest(&self) -> Seq {
        let state = self.state();
        let sealed = state.sealed.first().map(|segment| segment.id.first);
        sealed.or(state.tail.front().map(|batch| batch.seq)).unwrap_or(Seq(1))
    }

    /// Head of the chain up to which everything is in synced segments.
    pub fn sealed_head(&self) -> Head {
        self.state().sealed_head()
    }

    /// The sealed segments that cover the chain up to `upto`.
    pub fn ids_up_to(&self, upto: Seq) -> Vec<SegmentId> {
        let state = self.state();
        state.sealed.iter().map(|segment| segment.id).filter(|id| id.first <= upto).collect()
    }

    /// Batches after `after` from memory, when they are there.
    pub fn read_tail(
        &self,
        after: Seq,
        upto: Seq,
        limit_batches: usize,
        limit_bytes: usize,
    ) -> Option<Vec<StoredBatch>> {
        let state = self.state();
        let front = state.tail.front()?.seq;
        if after.next() < front || after >= upto {
            return None;
        }
        let mut batches = Vec::new();
        let mut bytes = 0;
        for batch in state.tail.range(((after.0 + 1 - front.0) as usize).min(state.tail.len())..) {
            bytes += batch.sealed.as_bytes().len();
            if batch.seq > upto || batches.len() >= limit_batches || (!batches.is_empty() && bytes > limit_bytes) {
                break;
            }
            batches.push(batch.clone());
        }
        (!batches.is_empty()).then_some(batches)
    }

    /// Batches after `after` from the segment that holds the next one. Empty when no segment does. Blocks.
    pub fn read_sealed(
        &self,
        after: Seq,
        limit_batches: usize,
        limit_bytes: usize,
    ) -> Result<Vec<StoredBatch>, SegmentError> {
        let Some(segment) = self.state().segment_of(after.next()).cloned() else {
            return Ok(Vec::new());
        };
        let mark = self.index.find(&segment.id, after.next());
        if let Some(mark) = mark
            && let Ok(Some(batches)) = segment.read(Some(mark), after, limit_batches, limit_bytes)
        {
            return Ok(batches);
        }
        // The index does not know this segment, or is wrong about it: the segment is the truth.
        self.index.add(&segment.id, &segment.marks()?);
        let batches = segment.read(None, after, limit_batches, limit_bytes)?;
        batches.ok_or_else(|| SegmentError::Damaged {
            path: segment.path.clone(),
            why: format!("batch {} is not in it", after.next()),
        })
    }

    /// A piece of a segment, for a peer that pulls it.
    pub fn chunk(&self, id: &SegmentId, offset: u64, max: u64) -> Result<Option<Vec<u8>>, SegmentError> {
        let segment = self.state().sealed.iter().find(|segment| segment.id == *id).cloned();
        segment.map(|segment| segment.chunk(offset, max)).transpose()
    }

    pub fn holds(&self, id: &SegmentId) -> bool {
        self.state().sealed.iter().any(|segment| segment.id == *id)
    }

    /// Takes over segments whose verified, synced files were moved into the folder, and forgets the tail up to `head`. Returns
    /// what lies before a gap now: for [`Self::discard`], once no manifest names it.
    pub fn install(&self, ids: &[SegmentId], head: Head) -> Result<Vec<SegmentFile>, SegmentError> {
        let _one_at_a_time = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut added = Vec::new();
        for id in ids.iter().filter(|id| !self.holds(id)) {
            added.push(file::open(&self.disk, &self.dir.join(id.file_name()))?);
        }
        let mut state = self.state();
        if mutant::is_on(Mutant::SegmentDroppedAtInstall) {
            added.pop();
        }
        added.into_iter().for_each(|segment| keep(&mut state.sealed, segment));
        let apart = cut_before_gap(&mut state.sealed);
        if state.sealed_head().seq >= head.seq {
            state.tail.clear();
            state.tail_bytes = 0;
            state.unsealed_bytes = 0;
        }
        Ok(apart)
    }

    /// Lets go of segments that hold nothing after this seq.
    pub fn trim(&self, upto: Seq) -> Result<(), SegmentError> {
        let _one_at_a_time = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        // The last one stays: the next continues its chain.
        let gone = state.sealed.partition_point(|segment| segment.id.last <= upto).min(state.sealed.len().max(1) - 1);
        let gone: Vec<SegmentFile> = state.sealed.drain(..gone).collect();
        while state.tail.front().is_some_and(|batch| batch.seq <= upto) {
            if let Some(batch) = state.tail.pop_front() {
                state.tail_bytes -= batch.sealed.as_bytes().len();
            }
        }
        drop(state);
        self.discard(&gone)
    }

    /// Removes the files of segments that are no longer served.
    pub fn discard(&self, segments: &[SegmentFile]) -> Result<(), SegmentError> {
        for segment in segments {
            self.index.remove(&segment.id);
            self.disk.remove(&segment.path)?;
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn close_index(&self) {
        self.index.close();
    }
}

/// The segments that a start serves, and those that it removes: what neither is named nor continues the chain, and what lies
/// before a gap.
pub fn select(mut found: Vec<SegmentFile>, named: &[SegmentId]) -> (Vec<SegmentFile>, Vec<SegmentFile>) {
    found.sort_by_key(|segment| (segment.id.last, segment.id.first));
    let mut sealed: Vec<SegmentFile> = Vec::new();
    for segment in &found {
        let next = sealed.last().map_or(Seq(1), |last| last.id.last.next());
        let fits = segment.id.first <= next && segment.id.last >= next;
        if fits || named.contains(&segment.id) {
            keep(&mut sealed, segment.clone());
        }
    }
    cut_before_gap(&mut sealed);
    let leftovers = found.into_iter().filter(|segment| !sealed.iter().any(|kept| kept.id == segment.id)).collect();
    (sealed, leftovers)
}

/// Adds a segment and drops those that it contains, so that first and last seqs both rise.
fn keep(sealed: &mut Vec<SegmentFile>, segment: SegmentFile) {
    sealed.retain(|other| other.id.first < segment.id.first || other.id.last > segment.id.last);
    let at = sealed.partition_point(|other| other.id.last < segment.id.last);
    sealed.insert(at, segment);
}

/// Takes out what lies before the last gap: a snapshot that begins later than this host's events end has been trimmed between.
fn cut_before_gap(sealed: &mut Vec<SegmentFile>) -> Vec<SegmentFile> {
    let gap = sealed.windows(2).rposition(|pair| pair[1].id.first > pair[0].id.last.next());
    gap.map_or_else(Vec::new, |gap| sealed.drain(..=gap).collect())
}
