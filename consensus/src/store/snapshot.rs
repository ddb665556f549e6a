//! A snapshot is a manifest: one state file and the event segments that lead to it (DESIGN §4, hazard H23).
//!
//! Building one copies no event: it seals the tail, writes the state, and names what is there. A receiver asks for the
//! parts that it lacks, piece by piece, and goes on where it stopped. Installing is: everything synced, then the
//! manifest renamed and its folder synced, then the swap in memory.
//!
//! - [`Snapshots`]: the folder; [`SnapshotHandle`]: what openraft passes around; [`Receiving`]: one on its way in.

use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use serde::Deserialize;
use serde::Serialize;
use statemachine::Fold;
use statemachine::Seq;
use statemachine::Stamp;
use statemachine::State;
use statemachine::batch::Head;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::codec::HEADER_LEN;
use statemachine::codec::MAX_PAYLOAD;
use statemachine::codec::RecordKind;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::digest::Digest;
use statemachine::state::StateImage;
use thiserror::Error;

use crate::store::disk::Disk;
use crate::store::disk::DiskError;
use crate::store::disk::write_atomically;
use crate::store::segments::SegmentError;
use crate::store::segments::Segments;
use crate::store::segments::file as segment_file;
use crate::store::segments::file::SegmentId;
use crate::types::LogId;
use crate::types::Snapshot;
use crate::types::SnapshotMeta;
use crate::types::StoredMembership;

/// Version of the manifest's layout.
pub const MANIFEST_FORMAT: u16 = 4;
/// A segment of four megabytes may grow to four times that while sealing lags; nothing sound is near this.
const MAX_SEGMENT_BYTES: u64 = 64 << 20;
const CURRENT: &str = "current";
const STATE_SUFFIX: &str = ".state";
/// A piece that a peer may ask for at once.
pub const MAX_CHUNK_BYTES: u64 = 1 << 20;

#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("snapshot {path} is unreadable: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: CodecError },
    #[error("the manifest of a snapshot says what cannot be: {why}")]
    Implausible { why: String },
    #[error("snapshot layout version {0} is unknown to this build; upgrade this host")]
    Format(u16),
    #[error("the site is at feature level {level}, and this build knows {FEATURE_LEVEL}; upgrade quorate on this host")]
    LevelTooHigh { level: u32 },
    #[error("the state folds to digest {found}, the log says {expected}: memory or code of this host lies")]
    Digest { expected: Digest, found: Digest },
    #[error("the state takes {bytes} bytes, a snapshot holds at most {limit}")]
    StateTooLarge { bytes: usize, limit: usize },
    #[error("a received part of the snapshot ({part}) does not match its hash; it is fetched again")]
    PartDamaged { part: String },
    #[error("the piece for offset {offset} of {part} does not continue the {have} bytes that are there")]
    PieceMisplaced { part: String, offset: u64, have: u64 },
    #[error("{0} parts of the snapshot have not been received")]
    Incomplete(usize),
}

/// One file of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    State(StateId),
    Segment(SegmentId),
}

/// A state file, by content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateId {
    pub bytes: u64,
    pub hash: [u8; 32],
}

impl Part {
    pub fn bytes(&self) -> u64 {
        match self {
            Part::State(id) => id.bytes,
            Part::Segment(id) => id.bytes,
        }
    }

    fn hash(&self) -> &[u8; 32] {
        match self {
            Part::State(id) => &id.hash,
            Part::Segment(id) => &id.hash,
        }
    }

    fn verify(&self, bytes: &[u8]) -> bool {
        match self {
            Part::State(id) => bytes.len() as u64 == id.bytes && *blake3::hash(bytes).as_bytes() == id.hash,
            Part::Segment(id) => segment_file::verify(bytes, id),
        }
    }
}

impl Part {
    /// A name for requests to other hosts: all that identifies the part, and nothing that could be a path.
    pub fn name(&self) -> String {
        match self {
            Part::State(id) => format!("state-{}-{}", id.bytes, hex(&id.hash)),
            Part::Segment(id) => format!("events-{}-{}-{}-{}", id.first, id.last, id.bytes, hex(&id.hash)),
        }
    }

    /// The part that a name from another host means.
    pub fn from_name(name: &str) -> Option<Part> {
        let fields: Vec<&str> = name.split('-').collect();
        match fields.as_slice() {
            ["state", bytes, hash] => Some(Part::State(StateId { bytes: bytes.parse().ok()?, hash: unhex(hash)? })),
            ["events", first, last, bytes, hash] => Some(Part::Segment(SegmentId {
                first: first.parse().ok()?,
                last: last.parse().ok()?,
                bytes: bytes.parse().ok()?,
                hash: unhex(hash)?,
            })),
            _ => None,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::State(id) => write!(f, "state of {} bytes", id.bytes),
            Part::Segment(id) => write!(f, "events {} to {}", id.first, id.last),
        }
    }
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}

/// What a snapshot consists of. No local name is in it: the same bytes mean the same on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u16,
    pub last_applied: Option<LogId>,
    pub membership: StoredMembership,
    pub head: Head,
    pub digest: Digest,
    pub state: StateId,
    /// Oldest first; together they hold every batch from the oldest that is kept up to `head`.
    pub segments: Vec<SegmentId>,
}

impl Manifest {
    pub fn encode(&self) -> Vec<u8> {
        codec::seal_value(RecordKind::SnapshotManifest, self)
    }

    pub fn decode(bytes: &[u8], path: &Path) -> Result<Manifest, SnapshotError> {
        let manifest: Manifest = codec::open_value(RecordKind::SnapshotManifest, bytes, MAX_PAYLOAD)
            .map_err(|source| SnapshotError::Unreadable { path: path.to_owned(), source })?;
        match manifest.format {
            MANIFEST_FORMAT => Ok(manifest),
            format => Err(SnapshotError::Format(format)),
        }
    }

    /// Whether a manifest of another host may be acted on: nothing that it names is larger or elsewhere than a host could have
    /// written it.
    fn check(&self) -> Result<(), SnapshotError> {
        let refused = |why: String| Err(SnapshotError::Implausible { why });
        if self.state.bytes > (MAX_PAYLOAD + HEADER_LEN) as u64 {
            return refused(format!("a state of {} bytes", self.state.bytes));
        }
        let mut before = Seq::ZERO;
        for id in &self.segments {
            if id.bytes > MAX_SEGMENT_BYTES {
                return refused(format!("{} bytes of events {} to {}", id.bytes, id.first, id.last));
            }
            if id.first > id.last || id.last <= before || id.last > self.head.seq {
                return refused(format!("events {} to {} after {before}, of {}", id.first, id.last, self.head.seq));
            }
            before = id.last;
        }
        Ok(())
    }

    pub fn meta(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.last_applied, last_membership: self.membership.clone() }
    }
}

/// The state file's content.
#[derive(Serialize, Deserialize)]
struct StateFile {
    head: Head,
    stamp: Stamp,
    image: StateImage,
}

/// What the state machine has applied, ready to be written down. Cheap to copy.
#[derive(Debug, Clone, Default)]
pub struct AppliedState {
    pub fold: Fold,
    pub last_applied: Option<LogId>,
    pub membership: StoredMembership,
}

/// What openraft passes around as "the snapshot": a manifest, and the folder in which its parts are.
#[derive(Clone)]
pub struct SnapshotHandle {
    pub manifest: Arc<Manifest>,
    home: Arc<Snapshots>,
}

impl fmt::Debug for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot at seq {}", self.manifest.head.seq)
    }
}

impl SnapshotHandle {
    pub fn snapshot(self) -> Snapshot {
        Snapshot { meta: self.manifest.meta(), snapshot: self }
    }

    /// The same state and events, at another place in the log: that of the host that pulled it, or none.
    pub fn at(self, last_applied: Option<LogId>, membership: StoredMembership) -> SnapshotHandle {
        let manifest = Manifest { last_applied, membership, ..(*self.manifest).clone() };
        SnapshotHandle { manifest: Arc::new(manifest), home: self.home }
    }

    /// A piece of a part, for a peer that pulls it; at most [`MAX_CHUNK_BYTES`].
    pub fn chunk(&self, part: &Part, offset: u64) -> Result<Option<Vec<u8>>, SnapshotError> {
        self.home.chunk(part, offset, MAX_CHUNK_BYTES)
    }
}

/// The folder of snapshots.
pub struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    incoming: PathBuf,
    segments: Arc<Segments>,
    current: Mutex<Option<Arc<Manifest>>>,
    /// Held while a snapshot is built or installed.
    writing: Mutex<()>,
}

impl Snapshots {
    /// Reads the current snapshot's manifest.
    pub fn read_manifest(disk: &dyn Disk, dir: &Path) -> Result<Option<Manifest>, SnapshotError> {
        let path = dir.join(CURRENT);
        if !disk.exists(&path)? {
            return Ok(None);
        }
        Ok(Some(Manifest::decode(&disk.read(&path)?, &path)?))
    }

    /// Writes the state of a manifest again, which must come out as the very bytes that the manifest names.
    pub fn rewrite_state(disk: &dyn Disk, dir: &Path, manifest: &Manifest, fold: &Fold) -> Result<(), SnapshotError> {
        let (state, record) = encode_state(fold)?;
        if state != manifest.state {
            return Err(SnapshotError::Digest { expected: manifest.digest, found: fold.state.digest() });
        }
        Ok(write_atomically(disk, &state_path(dir, &state), &record)?)
    }

    /// Reads the current snapshot of a folder, whole: its manifest and its state.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Option<(Manifest, AppliedState)>, SnapshotError> {
        disk.create_dir_all(dir)?;
        let Some(manifest) = Self::read_manifest(disk, dir)? else { return Ok(None) };
        let path = state_path(dir, &manifest.state);
        let state = decode_state(&manifest, &disk.read(&path)?, &path)?;
        Ok(Some((manifest, state)))
    }

    pub fn new(
        disk: Arc<dyn Disk>,
        dir: &Path,
        incoming: &Path,
        segments: Arc<Segments>,
        current: Option<Manifest>,
    ) -> Result<Arc<Snapshots>, SnapshotError> {
        disk.create_dir_all(incoming)?;
        let current = Mutex::new(current.map(Arc::new));
        let (dir, incoming) = (dir.to_owned(), incoming.to_owned());
        Ok(Arc::new(Snapshots { disk, dir, incoming, segments, current, writing: Mutex::new(()) }))
    }

    /// The newest durable snapshot. The Raft log may be purged up to its `last_applied`.
    pub fn current(self: &Arc<Self>) -> Option<SnapshotHandle> {
        let manifest = self.lock_current().clone()?;
        Some(SnapshotHandle { manifest, home: self.clone() })
    }

    fn lock_current(&self) -> MutexGuard<'_, Option<Arc<Manifest>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a snapshot of what was applied; durable on return. Blocks.
    pub fn build(self: &Arc<Self>, applied: &AppliedState) -> Result<SnapshotHandle, SnapshotError> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = self.current()
            && current.manifest.last_applied >= applied.last_applied
            && current.manifest.head.seq >= applied.fold.head.seq
            && current.manifest.membership == applied.membership
        {
            return Ok(current);
        }
        let fold = &applied.fold;
        let digest = fold.state.digest();
        let found = fold.state.recompute_digest();
        if digest != found {
            return Err(SnapshotError::Digest { expected: digest, found });
        }
        self.segments.seal_up_to(fold.head.seq)?;
        let (state, record) = encode_state(fold)?;
        let trimmed_upto = fold.state.site.as_ref().map_or(Seq::ZERO, |site| site.trimmed_upto);
        let kept = |id: &SegmentId| id.last > trimmed_upto;
        write_atomically(self.disk.as_ref(), &state_path(&self.dir, &state), &record)?;
        let handle = self.publish(Manifest {
            format: MANIFEST_FORMAT,
            last_applied: applied.last_applied,
            membership: applied.membership.clone(),
            head: fold.head,
            digest,
            state,
            segments: self.segments.ids_up_to(fold.head.seq).into_iter().filter(kept).collect(),
        })?;
        // No manifest of this host names them any more.
        self.segments.trim(trimmed_upto)?;
        Ok(handle)
    }

    /// The moment at which a snapshot counts.
    fn publish(self: &Arc<Self>, manifest: Manifest) -> Result<SnapshotHandle, SnapshotError> {
        write_atomically(self.disk.as_ref(), &self.dir.join(CURRENT), &manifest.encode())?;
        let manifest = Arc::new(manifest);
        let before = self.lock_current().replace(manifest.clone());
        // The one before stays: a peer may be pulling it.
        let kept = [Some(&manifest), before.as_ref()];
        let kept: Vec<PathBuf> = kept.into_iter().flatten().map(|kept| state_path(&self.dir, &kept.state)).collect();
        for name in self.disk.list(&self.dir)? {
            let path = self.dir.join(&name);
            if name.ends_with(STATE_SUFFIX) && !kept.contains(&path) {
                self.disk.remove(&path)?;
            }
        }
        Ok(SnapshotHandle { manifest, home: self.clone() })
    }

    /// A piece of a part; `None` when this host no longer has it. Blocks.
    pub fn chunk(&self, part: &Part, offset: u64, max: u64) -> Result<Option<Vec<u8>>, SnapshotError> {
        match part {
            Part::Segment(id) => Ok(self.segments.chunk(id, offset, max)?),
            Part::State(id) => {
                let path = state_path(&self.dir, id);
                if !self.disk.exists(&path)? {
                    return Ok(None);
                }
                let mut bytes = vec![0; id.bytes.saturating_sub(offset).min(max) as usize];
                self.disk.open(&path)?.read_at(offset, &mut bytes)?;
                Ok(Some(bytes))
            }
        }
    }

    /// Begins, or goes on with, receiving the snapshot of a peer.
    pub fn receive(self: &Arc<Self>, manifest: &[u8]) -> Result<Receiving, SnapshotError> {
        let manifest = Manifest::decode(manifest, &self.incoming.join("manifest"))?;
        manifest.check()?;
        let own = self.segments.sealed_head().seq;
        let lacking = manifest.segments.iter().filter(|id| id.last > own && !self.segments.holds(id));
        let parts = lacking.map(|id| Part::Segment(*id)).chain([Part::State(manifest.state)]).collect();
        Ok(Receiving { home: self.clone(), manifest: Arc::new(manifest), parts })
    }

    /// Makes a received snapshot the current one. Blocks; the caller swaps its state for the one that is returned.
    pub fn install(self: &Arc<Self>, handle: SnapshotHandle) -> Result<AppliedState, SnapshotError> {
        let handle = match Arc::ptr_eq(&handle.home, self) {
            true => handle,
            false => self.copy_from(handle)?,
        };
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let manifest = handle.manifest;
        let state_file = state_path(&self.dir, &manifest.state);
        let staged = self.done_path(&Part::State(manifest.state));
        if self.disk.exists(&staged)? {
            self.disk.rename(&staged, &state_file)?;
        }
        let state = decode_state(&manifest, &self.disk.read(&state_file)?, &state_file)?;
        let mut arrived = Vec::new();
        for id in &manifest.segments {
            let staged = self.done_path(&Part::Segment(*id));
            if self.disk.exists(&staged)? {
                self.disk.rename(&staged, &self.segments.dir().join(id.file_name()))?;
                arrived.push(*id);
            }
        }
        // Names before the manifest that counts on them.
        self.disk.sync_dir(self.segments.dir())?;
        self.disk.sync_dir(&self.dir)?;
        let apart = self.segments.install(&arrived, manifest.head)?;
        let own = Manifest { segments: self.segments.ids_up_to(manifest.head.seq), ..Manifest::clone(&manifest) };
        self.publish(own)?;
        self.segments.discard(&apart)?;
        self.forget_received()?;
        Ok(state)
    }

    /// Lets go of what was received and is not needed. Blocks.
    pub fn forget_received(&self) -> Result<(), SnapshotError> {
        for name in self.disk.list(&self.incoming)? {
            self.disk.remove(&self.incoming.join(name))?;
        }
        Ok(())
    }

    fn copy_from(self: &Arc<Self>, handle: SnapshotHandle) -> Result<SnapshotHandle, SnapshotError> {
        let receiving = self.receive(&handle.manifest.encode())?;
        while let Some((part, offset)) = receiving.wants()? {
            let piece = handle.chunk(&part, offset)?;
            receiving.write(&part, offset, &piece.ok_or(SnapshotError::Incomplete(1))?)?;
        }
        receiving.finish()
    }

    fn part_path(&self, part: &Part) -> PathBuf {
        self.incoming.join(format!("{}.part", hex(part.hash())))
    }

    fn done_path(&self, part: &Part) -> PathBuf {
        self.incoming.join(format!("{}.done", hex(part.hash())))
    }
}

fn state_path(dir: &Path, state: &StateId) -> PathBuf {
    dir.join(format!("{}{STATE_SUFFIX}", hex(&state.hash)))
}

/// The same state is the same bytes on every host.
fn encode_state(fold: &Fold) -> Result<(StateId, Vec<u8>), SnapshotError> {
    let file = StateFile { head: fold.head, stamp: fold.stamp, image: StateImage::from(&fold.state) };
    let content = codec::encode(&file);
    if content.len() > MAX_PAYLOAD {
        return Err(SnapshotError::StateTooLarge { bytes: content.len(), limit: MAX_PAYLOAD });
    }
    let record = codec::seal(RecordKind::SnapshotState, &content);
    Ok((StateId { bytes: record.len() as u64, hash: *blake3::hash(&record).as_bytes() }, record))
}

fn decode_state(manifest: &Manifest, bytes: &[u8], path: &Path) -> Result<AppliedState, SnapshotError> {
    if !Part::State(manifest.state).verify(bytes) {
        return Err(SnapshotError::Unreadable { path: path.to_owned(), source: CodecError::BadChecksum });
    }
    let file: StateFile = codec::open_value(RecordKind::SnapshotState, bytes, MAX_PAYLOAD)
        .map_err(|source| SnapshotError::Unreadable { path: path.to_owned(), source })?;
    let state = State::from(file.image);
    let level = state.site.as_ref().map_or(0, |site| site.feature_level);
    if level > FEATURE_LEVEL {
        return Err(SnapshotError::LevelTooHigh { level });
    }
    let found = state.recompute_digest();
    if found != manifest.digest || file.head != manifest.head {
        return Err(SnapshotError::Digest { expected: manifest.digest, found });
    }
    let fold = Fold { state, head: file.head, stamp: file.stamp };
    Ok(AppliedState { fold, last_applied: manifest.last_applied, membership: manifest.membership.clone() })
}

/// A snapshot on its way in. What has arrived stays when the transfer breaks off.
pub struct Receiving {
    home: Arc<Snapshots>,
    manifest: Arc<Manifest>,
    parts: Vec<Part>,
}

impl Receiving {
    /// The next piece to ask for: a part, and from where. `None` when all is here. Blocks.
    pub fn wants(&self) -> Result<Option<(Part, u64)>, SnapshotError> {
        for part in &self.parts {
            if self.home.disk.exists(&self.home.done_path(part))? {
                continue;
            }
            let path = self.home.part_path(part);
            let have = match self.home.disk.exists(&path)? {
                true => self.home.disk.open(&path)?.len()?,
                false => 0,
            };
            if have >= part.bytes() {
                // It was complete but not yet checked when the transfer broke off.
                self.check(part)?;
                continue;
            }
            return Ok(Some((*part, have)));
        }
        Ok(None)
    }

    /// Adds a piece; the last one of a part has it checked and synced. Blocks.
    pub fn write(&self, part: &Part, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let path = self.home.part_path(part);
        let file = match self.home.disk.exists(&path)? {
            true => self.home.disk.open(&path)?,
            false => self.home.disk.create(&path)?,
        };
        let have = file.len()?;
        if offset != have || bytes.is_empty() || offset + bytes.len() as u64 > part.bytes() {
            return Err(SnapshotError::PieceMisplaced { part: part.to_string(), offset, have });
        }
        file.write_at(offset, bytes)?;
        match offset + bytes.len() as u64 == part.bytes() {
            true => self.check(part),
            false => Ok(()),
        }
    }

    fn check(&self, part: &Part) -> Result<(), SnapshotError> {
        let disk = &self.home.disk;
        let path = self.home.part_path(part);
        if !part.verify(&disk.read(&path)?) {
            disk.remove(&path)?;
            return Err(SnapshotError::PartDamaged { part: part.to_string() });
        }
        disk.open(&path)?.sync_data()?;
        disk.rename(&path, &self.home.done_path(part))?;
        Ok(disk.sync_dir(&self.home.incoming)?)
    }

    /// Everything is here, checked and synced: what to hand to openraft. Blocks.
    pub fn finish(&self) -> Result<SnapshotHandle, SnapshotError> {
        let mut lacking = 0;
        for part in &self.parts {
            lacking += usize::from(!self.home.disk.exists(&self.home.done_path(part))?);
        }
        match lacking {
            0 => Ok(SnapshotHandle { manifest: self.manifest.clone(), home: self.home.clone() }),
            lacking => Err(SnapshotError::Incomplete(lacking)),
        }
    }
}
