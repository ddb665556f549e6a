//! Reads a data directory whole and says what in it is sound: `quorate store check`. And makes again what can be made from the
//! event segments: `quorate store rebuild`.
//!
//! A check changes nothing: what would have to be opened for writing (redb repairs itself, a torn tail is cut) is opened as a
//! copy in memory. The segments are folded from the first event on, and the snapshot's state must be what they fold to, bit by
//! bit: so the state of a host can always be proved from its events, and made again from them.
//!
//! Votes and the Raft log cannot be made again from anything: a host that lost them has forgotten what it promised, and must
//! join anew.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use statemachine::Fold;
use statemachine::Seq;
use statemachine::batch::Head;
use statemachine::fold::Applied;

use super::StoreError;
use super::disk::Disk;
use super::index::EventIndex;
use super::index::SledIndex;
use super::log_view::LogView;
use super::log_view::Reopen;
use super::memory_disk::MemoryDisk;
use super::meta::Meta;
use super::meta::MetaValues;
use super::segments;
use super::segments::file;
use super::segments::file::SegmentFile;
use super::segments::file::SegmentId;
use super::snapshot::Manifest;
use super::snapshot::Snapshots;
use super::wal::Wal;
use crate::platform::RealDisk;
use crate::types::LogId;

/// What a data directory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Votes and log markers, `meta.redb`.
    Votes,
    /// The Raft log, `wal/`.
    Log,
    /// Events, `segments/`.
    Events,
    /// The snapshot's manifest and state, `snapshots/`.
    State,
    /// Where in the segments to begin reading, `index/`. Not judged: each of its answers is proved when it is used.
    Index,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Votes => "votes and markers",
            Part::Log => "raft log",
            Part::Events => "event segments",
            Part::State => "snapshot",
            Part::Index => "event index",
        }
    }
}

/// What was found in one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub part: Part,
    pub files: usize,
    pub bytes: u64,
    /// What it holds, in words.
    pub holds: String,
    /// Why it is not sound.
    pub damage: Option<String>,
    /// [`Inspection::rebuild`] makes it again.
    pub can_be_rebuilt: bool,
}

impl Finding {
    fn new(part: Part) -> Finding {
        Finding { part, files: 0, bytes: 0, holds: String::new(), damage: None, can_be_rebuilt: false }
    }
}

/// So many of so many bytes of events were read.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// A data directory that nobody else uses while this lives.
pub struct Inspection {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    _lock: Box<dyn std::any::Any + Send + Sync>,
}

/// What the events fold to.
struct Replayed {
    segments: Vec<SegmentFile>,
    /// Of the last batch that was read; `None` before the first of a stream whose beginning was trimmed.
    head: Option<Head>,
    /// `None` when the stream was trimmed: what it folds to rests on what is gone.
    fold: Option<Fold>,
    /// Head and fold of the chain at the snapshot's seq, when the events reach it.
    chain_at_snapshot: Option<Head>,
    at_snapshot: Option<Fold>,
}

impl Inspection {
    /// Takes the directory's lock: hostd must be stopped.
    pub fn begin(dir: &Path) -> Result<Inspection, StoreError> {
        Self::begin_on(Arc::new(RealDisk), dir)
    }

    /// The same on another disk.
    pub fn begin_on(disk: Arc<dyn Disk>, dir: &Path) -> Result<Inspection, StoreError> {
        if !disk.exists(dir)? {
            return Err(StoreError::NoStore { path: dir.to_owned() });
        }
        let lock = super::lock(disk.as_ref(), dir)?;
        Ok(Inspection { dir: dir.to_owned(), disk, _lock: lock })
    }

    /// Reads everything.
    pub fn check(&self, progress: Progress<'_>) -> Result<Vec<Finding>, StoreError> {
        let (mut state, manifest) = self.read_state()?;
        let (events, replayed) = self.read_events(manifest.as_ref(), progress)?;
        judge_state(&mut state, manifest.as_ref(), replayed.as_ref());
        let (votes, values) = self.read_votes()?;
        let (mut log, last) = self.read_log()?;
        if let Some(values) = values.filter(|_| log.damage.is_none()) {
            let applied = manifest.as_ref().and_then(|manifest| manifest.last_applied);
            let lost = super::nothing_acknowledged_is_missing(&values, last, applied);
            log.damage = lost.err().map(|error| error.to_string());
        }
        Ok(vec![votes, log, events, state, self.look_at_index()?])
    }

    /// Makes the index again, and the snapshot's state if it is damaged. Says what was done.
    pub fn rebuild(&self, progress: Progress<'_>) -> Result<Vec<String>, StoreError> {
        let (mut state, manifest) = self.read_state()?;
        let (events, replayed) = self.read_events(manifest.as_ref(), progress)?;
        judge_state(&mut state, manifest.as_ref(), replayed.as_ref());
        let (None, Some(replayed)) = (&events.damage, replayed) else {
            let why = events.damage.unwrap_or_default();
            return Err(StoreError::CannotRebuild { why: format!("the event segments are damaged: {why}") });
        };
        let mut done = Vec::new();
        if let Some(damage) = state.damage {
            let (Some(manifest), Some(fold), true) = (manifest, &replayed.at_snapshot, state.can_be_rebuilt) else {
                return Err(StoreError::CannotRebuild { why: format!("the snapshot is damaged: {damage}") });
            };
            Snapshots::rewrite_state(self.disk.as_ref(), &self.dir.join("snapshots"), &manifest, fold)?;
            done.push(format!("the state at seq {} was folded again from the events ({damage})", manifest.head.seq));
        }
        if self.disk.is_real() {
            let dir = self.dir.join("index");
            self.disk.remove_dir_all(&dir)?;
            let index = SledIndex::open(self.disk.as_ref(), &dir)
                .map_err(|error| StoreError::CannotRebuild { why: format!("sled: {error}") })?;
            let mut marks = 0;
            for segment in &replayed.segments {
                let found = segment.marks()?;
                marks += found.len();
                index.add(&segment.id, &found);
            }
            index.close();
            done.push(format!("the event index was made again: {marks} marks of {} segments", replayed.segments.len()));
        }
        Ok(done)
    }

    fn files(&self, folder: &str) -> Result<Vec<PathBuf>, StoreError> {
        let dir = self.dir.join(folder);
        if !self.disk.exists(&dir)? {
            return Ok(Vec::new());
        }
        Ok(self.disk.list(&dir)?.into_iter().map(|name| dir.join(name)).collect())
    }

    /// The same files in memory, where opening may write.
    fn copy(&self, paths: &[PathBuf]) -> Result<(Arc<MemoryDisk>, u64), StoreError> {
        let copy = MemoryDisk::new();
        let mut bytes = 0;
        for path in paths {
            let content = self.disk.read(path)?;
            bytes += content.len() as u64;
            copy.create(path)?.write_at(0, &content)?;
        }
        Ok((Arc::new(copy), bytes))
    }

    fn read_votes(&self) -> Result<(Finding, Option<MetaValues>), StoreError> {
        let path = self.dir.join("meta.redb");
        let mut found = Finding::new(Part::Votes);
        if !self.disk.exists(&path)? {
            let has_log = !self.files("wal")?.is_empty();
            found.holds = "nothing".to_owned();
            found.damage = has_log.then(|| "it is missing: this host has forgotten its votes".to_owned());
            return Ok((found, None));
        }
        let (copy, bytes) = self.copy(std::slice::from_ref(&path))?;
        (found.files, found.bytes) = (1, bytes);
        Ok(match Meta::open(copy.as_ref(), &path) {
            Ok((_, values)) => {
                let vote = values.vote.map_or("no vote".to_owned(), |vote| format!("vote {vote}"));
                let index = values.committed.map_or(0, |committed| committed.index);
                found.holds = format!("{vote}, committed up to entry {index}");
                (found, Some(values))
            }
            Err(error) => {
                found.damage = Some(error.to_string());
                (found, None)
            }
        })
    }

    fn read_log(&self) -> Result<(Finding, Option<LogId>), StoreError> {
        let paths = self.files("wal")?;
        let (copy, bytes) = self.copy(&paths)?;
        let mut found = Finding { files: paths.len(), bytes, ..Finding::new(Part::Log) };
        let mut view = LogView::new(0);
        if !paths.is_empty() {
            match Wal::open(copy, &self.dir.join("wal"), 1 << 20, &mut Reopen(&mut view)) {
                Ok((_, opened)) if opened.torn_tail_cut => {
                    found.holds = "; its last write never completed, which is cut at the next start".to_owned();
                }
                Ok(_) => {}
                Err(error) => found.damage = Some(error.to_string()),
            }
        }
        let last = view.last.map_or("no entry".to_owned(), |last| format!("entries up to {}", last.index));
        found.holds.insert_str(0, &last);
        Ok((found, view.last))
    }

    fn read_state(&self) -> Result<(Finding, Option<Manifest>), StoreError> {
        let paths = self.files("snapshots")?;
        let mut found = Finding { files: paths.len(), ..Finding::new(Part::State) };
        for path in &paths {
            found.bytes += self.disk.open(path)?.len()?;
        }
        let dir = self.dir.join("snapshots");
        let manifest = match Snapshots::read_manifest(self.disk.as_ref(), &dir) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => {
                found.holds = "nothing yet".to_owned();
                return Ok((found, None));
            }
            Err(error) => {
                found.damage = Some(error.to_string());
                return Ok((found, None));
            }
        };
        found.holds = format!("state at seq {}, digest {}", manifest.head.seq, manifest.digest);
        found.damage = Snapshots::load(self.disk.as_ref(), &dir).err().map(|error| error.to_string());
        Ok((found, Some(manifest)))
    }

    /// Reads every event, folding it.
    fn read_events(
        &self,
        manifest: Option<&Manifest>,
        progress: Progress<'_>,
    ) -> Result<(Finding, Option<Replayed>), StoreError> {
        let paths = self.files("segments")?.into_iter().filter(|path| path.to_string_lossy().ends_with(file::SUFFIX));
        let mut found = Finding::new(Part::Events);
        let mut segments = Vec::new();
        for path in paths {
            found.files += 1;
            match file::open(&self.disk, &path) {
                Ok(segment) => segments.push(segment),
                Err(error) => found.damage = found.damage.or(Some(error.to_string())),
            }
        }
        let named: &[SegmentId] = manifest.map_or(&[], |manifest| &manifest.segments);
        if let Some(missing) = named.iter().find(|id| !segments.iter().any(|segment| segment.id == **id)) {
            let why = format!("{} is named by the snapshot and missing", missing.file_name());
            found.damage = found.damage.or(Some(why));
        }
        found.bytes = segments.iter().map(|segment| segment.id.bytes).sum();
        if found.damage.is_some() {
            return Ok((found, None));
        }
        // What a start would remove is nobody's loss.
        let (segments, _) = segments::select(segments, named);
        let first = segments.first().map_or(Seq(1), |segment| segment.id.first);
        let (head, fold) = match first == Seq(1) {
            true => (Some(Head::default()), Some(Fold::default())),
            false => (None, None),
        };
        let mut replayed = Replayed { segments: Vec::new(), head, fold, chain_at_snapshot: None, at_snapshot: None };
        let mut read = 0;
        for segment in segments {
            if let Err(damage) = replayed.take(&segment, manifest) {
                found.damage = Some(format!("{}: {damage}", segment.path.display()));
                return Ok((found, None));
            }
            read += segment.id.bytes;
            progress(read, found.bytes);
            replayed.segments.push(segment);
        }
        let last = replayed.head.map_or(Seq::ZERO, |head| head.seq);
        found.holds = match &replayed.fold {
            Some(_) => format!("batches 1 to {last}"),
            None => format!("batches {first} to {last}; older ones are trimmed, so only their chain is proved"),
        };
        Ok((found, Some(replayed)))
    }

    fn look_at_index(&self) -> Result<Finding, StoreError> {
        let holds = "an index and no more: proved whenever it is used".to_owned();
        Ok(Finding { files: self.files("index")?.len(), holds, can_be_rebuilt: true, ..Finding::new(Part::Index) })
    }
}

impl Replayed {
    /// Follows a segment's batches, and keeps the fold at the snapshot's head.
    fn take(&mut self, segment: &SegmentFile, manifest: Option<&Manifest>) -> Result<(), String> {
        let bytes = segment.chunk(0, segment.id.bytes).map_err(|error| error.to_string())?;
        if !file::verify(&bytes, &segment.id) {
            return Err("its content is not what its seal says".to_owned());
        }
        let before = Seq(segment.id.first.0.saturating_sub(1));
        if let Some(head) = self.head.filter(|head| before > head.seq) {
            return Err(format!("it begins at {}, the one before ends at {}", segment.id.first, head.seq));
        }
        let batches = segment.read(None, before, usize::MAX, usize::MAX).map_err(|error| error.to_string())?;
        for stored in batches.unwrap_or_default() {
            // Two segments may share batches: an installed snapshot brings its own cut of the stream.
            if self.head.is_some_and(|head| stored.seq <= head.seq) {
                continue;
            }
            let previous = stored.sealed.previous().map_err(|error| format!("batch {}: {error}", stored.seq))?;
            if self.head.is_some_and(|head| previous != head) {
                return Err(format!("batch {} does not follow the one before", stored.seq));
            }
            let head = Head { seq: stored.seq, hash: stored.sealed.hash() };
            self.head = Some(head);
            let is_snapshots = manifest.is_some_and(|manifest| manifest.head.seq == stored.seq);
            self.chain_at_snapshot = self.chain_at_snapshot.or(is_snapshots.then_some(head));
            let Some(fold) = &mut self.fold else { continue };
            match fold.apply_sealed(&stored.sealed) {
                Ok(Applied::Applied(seq)) if seq == stored.seq => {}
                other => return Err(format!("batch {} does not follow the one before: {other:?}", stored.seq)),
            }
            if is_snapshots {
                self.at_snapshot = Some(fold.clone());
            }
        }
        match self.head.filter(|head| head.seq == segment.head.seq && *head != segment.head) {
            Some(head) => Err(format!("its chain ends in {}, its seal says {}", head.hash, segment.head.hash)),
            None => Ok(()),
        }
    }
}

/// What the events say of the snapshot, and whether its state can be made again from them.
fn judge_state(state: &mut Finding, manifest: Option<&Manifest>, replayed: Option<&Replayed>) {
    let (Some(manifest), Some(replayed)) = (manifest, replayed) else { return };
    if manifest.head == Head::default() {
        return;
    }
    let disagreement = disagreement(manifest, replayed);
    state.can_be_rebuilt = disagreement.is_none() && replayed.at_snapshot.is_some();
    state.damage = state.damage.take().or(disagreement);
}

/// Why the snapshot is not what the events lead to.
fn disagreement(manifest: &Manifest, replayed: &Replayed) -> Option<String> {
    let Some(head) = replayed.chain_at_snapshot else {
        let last = replayed.head.map_or(Seq::ZERO, |head| head.seq);
        return Some(format!("it is at seq {}, the events end at {last}", manifest.head.seq));
    };
    if head != manifest.head {
        return Some(format!("it stands on batch {}, the events have {} there", manifest.head.hash, head.hash));
    }
    let digest = replayed.at_snapshot.as_ref().map(|fold| fold.state.digest()).filter(|it| *it != manifest.digest);
    digest.map(|digest| format!("its digest is {}, the events fold to {digest}", manifest.digest))
}
