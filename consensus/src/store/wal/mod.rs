//! The write-ahead log: entries in preallocated segment files, one `fdatasync` a write group.
//!
//! Nothing is ever overwritten: a truncation is a record of its own, so a power cut between truncation and the entries
//! that replace the old ones cannot bring the old ones back. One writer owns [`Wal`]; readers share [`WalIndex`].
//!
//! - [`record`]: the bytes; [`scan`]: reading them at start; [`index`]: finding them later.

pub mod index;
pub mod record;
pub mod scan;

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use statemachine::codec;
use statemachine::codec::RecordKind;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use thiserror::Error;

use self::record::RecordRef;
use self::record::SegmentHeader;
use self::record::WAL_FORMAT;
use self::record::WalRecord;
use self::scan::Damage;
use crate::store::disk::Disk;
use crate::store::disk::DiskError;
use crate::store::disk::DiskFile;
use crate::types::Entry;
use crate::types::LogId;

const SUFFIX: &str = ".wal";
const SPARE: &str = "spare.tmp";
const STAGED: &str = "next.tmp";

#[derive(Debug, Error)]
pub enum WalError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(
        "write-ahead log segment {segment} is damaged: {why}. Acknowledged entries may be lost here: \
         remove this host from the cluster and join it again with an empty data directory"
    )]
    Damaged { segment: u64, why: String },
}

/// Told about the log's content, in order, while it is opened and written.
pub trait Follow {
    /// Refuses, in words, an entry that cannot follow the one before it.
    fn entry(
        &mut self,
        segment: u64,
        file: &Arc<dyn DiskFile>,
        entry: &Entry,
        offset: u64,
        len: u64,
    ) -> Result<(), String>;
    fn truncate(&mut self, last: Option<LogId>);
    fn reset(&mut self, purged: LogId);
}

/// The next segment's file, made ready while the present one fills.
#[derive(Clone, Default)]
struct Spare(Arc<std::sync::Mutex<SpareState>>);

#[derive(Default)]
enum SpareState {
    #[default]
    None,
    Preparing,
    Ready(Arc<dyn DiskFile>),
}

impl Spare {
    fn state(&self) -> std::sync::MutexGuard<'_, SpareState> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes the file if it is ready. One that is being prepared is left for the next time.
    fn take(&self) -> Option<Arc<dyn DiskFile>> {
        let mut state = self.state();
        match std::mem::take(&mut *state) {
            SpareState::Ready(file) => Some(file),
            other => {
                *state = other;
                None
            }
        }
    }
}

pub struct Wal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    /// Segments on disk, rising; the last is the one that is written.
    segments: Vec<u64>,
    file: Arc<dyn DiskFile>,
    file_len: u64,
    end: u64,
    spare: Spare,
}

/// What opening found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// A tail that never became durable was cut.
    pub torn_tail_cut: bool,
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016}{SUFFIX}"))
}

impl Wal {
    /// Whether a folder holds a log.
    pub fn exists(disk: &dyn Disk, dir: &Path) -> Result<bool, DiskError> {
        disk.create_dir_all(dir)?;
        Ok(disk.list(dir)?.iter().any(|name| name.ends_with(SUFFIX)))
    }

    /// Opens the log of a folder, or begins one, and tells `follow` all that it holds.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        segment_bytes: u64,
        follow: &mut dyn Follow,
    ) -> Result<(Wal, Opened), WalError> {
        disk.create_dir_all(dir)?;
        let mut segments = Vec::new();
        for name in disk.list(dir)? {
            match name.strip_suffix(SUFFIX).and_then(|stem| stem.parse().ok()) {
                Some(number) => segments.push(number),
                None => disk.remove(&dir.join(name))?,
            }
        }
        segments.sort_unstable();
        let Some(last) = segments.last().copied() else {
            let (file, end) = Self::create_segment(disk.as_ref(), dir, segment_bytes, 1, 0, None)?;
            let file_len = file.len()?;
            let spare = Spare::default();
            let dir = dir.to_owned();
            let wal = Wal { disk, dir, segment_bytes, segments: vec![1], file, file_len, end, spare };
            return Ok((wal, Opened::default()));
        };
        let mut previous: Option<(u64, u64)> = None;
        let mut opened = Opened::default();
        for number in segments.iter().copied() {
            let damaged = |why: String| WalError::Damaged { segment: number, why };
            let path = segment_path(dir, number);
            let file = disk.open(&path)?;
            let bytes = disk.read(&path)?;
            let (header, start) = scan::header(&bytes).map_err(|damage| damaged(damage.to_string()))?;
            if header.number != number || previous.is_some_and(|(before, _)| before + 1 != number) {
                return Err(damaged("a segment before it is missing or out of order".to_owned()));
            }
            if let Some((before, end)) = previous
                && header.previous_end != end
            {
                let why = format!("it ends at byte {end}, it ended at byte {} when it was closed", header.previous_end);
                return Err(WalError::Damaged { segment: before, why });
            }
            let scanned = scan::records(&bytes, start, |offset, len, record| {
                match record {
                    WalRecord::Entry(entry) => {
                        follow.entry(number, &file, &entry, offset as u64, len as u64).map_err(damaged)?;
                    }
                    WalRecord::Truncate(last) => follow.truncate(last),
                    WalRecord::Reset(purged) => follow.reset(purged),
                }
                Ok::<(), WalError>(())
            })?;
            let scanned = scanned.map_err(|damage: Damage| damaged(damage.to_string()))?;
            if scanned.torn {
                if number != last {
                    return Err(damaged(format!("the record at byte {} is unreadable", scanned.end)));
                }
                // Zeros up to the file's end: a later write must never be followed by bytes of this one.
                file.write_at(scanned.end as u64, &vec![0; bytes.len() - scanned.end])?;
                file.sync_data()?;
                opened.torn_tail_cut = true;
            }
            previous = Some((number, scanned.end as u64));
        }
        let end = previous.map_or(0, |(_, end)| end);
        let file = disk.open(&segment_path(dir, last))?;
        let file_len = file.len()?;
        let spare = Spare::default();
        Ok((Wal { disk, dir: dir.to_owned(), segment_bytes, segments, file, file_len, end, spare }, opened))
    }

    /// Appends entries; durable on return. Returns how many bytes were written.
    pub fn append(&mut self, entries: &[Entry], follow: &mut dyn Follow) -> Result<usize, WalError> {
        let mut group = Vec::new();
        let mut placed: Vec<(usize, u64, u64)> = Vec::new();
        let mut written = 0;
        for (position, entry) in entries.iter().enumerate() {
            let mut record = record::encode(self.end as u32, RecordRef::Entry(entry));
            if !self.fits(group.len() + record.len()) {
                written += self.write_group(&mut group)?;
                self.tell(&mut placed, entries, follow)?;
                self.make_room(record.len())?;
                record = record::encode(self.end as u32, RecordRef::Entry(entry));
            }
            placed.push((position, self.end + group.len() as u64, record.len() as u64));
            group.extend_from_slice(&record);
        }
        written += self.write_group(&mut group)?;
        self.tell(&mut placed, entries, follow)?;
        Ok(written)
    }

    /// Drops entries after `last`; durable on return.
    pub fn truncate(&mut self, last: Option<LogId>, follow: &mut dyn Follow) -> Result<(), WalError> {
        self.control(RecordRef::Truncate(last))?;
        follow.truncate(last);
        Ok(())
    }

    /// Empties the log, which continues after `purged`; durable on return.
    pub fn reset(&mut self, purged: LogId, follow: &mut dyn Follow) -> Result<(), WalError> {
        self.control(RecordRef::Reset(purged))?;
        follow.reset(purged);
        Ok(())
    }

    /// Unlinks segments before `oldest_needed`; never the one that is written.
    pub fn unlink_before(&mut self, oldest_needed: u64) -> Result<(), WalError> {
        let current = self.number();
        while let Some(oldest) = self.segments.first().copied().filter(|number| *number < oldest_needed.min(current)) {
            self.disk.remove(&segment_path(&self.dir, oldest))?;
            // One by one, so that after a power cut the remaining numbers have no gap.
            self.disk.sync_dir(&self.dir)?;
            self.segments.remove(0);
        }
        Ok(())
    }

    /// Number of the segment that is written.
    pub fn number(&self) -> u64 {
        self.segments.last().copied().unwrap_or(1)
    }

    /// Bytes on disk, preallocated ones included.
    pub fn disk_bytes(&self) -> u64 {
        self.segments.len() as u64 * self.segment_bytes
    }

    /// Work that makes the next segment ready, when half of this one is full and none is ready yet.
    pub fn spare_work(&self) -> Option<impl FnOnce() -> Result<(), DiskError> + Send + 'static> {
        if self.end * 2 < self.file_len {
            return None;
        }
        let mut state = self.spare.state();
        if !matches!(*state, SpareState::None) {
            return None;
        }
        *state = SpareState::Preparing;
        let (disk, path) = (self.disk.clone(), self.dir.join(SPARE));
        let (bytes, spare) = (self.segment_bytes, self.spare.clone());
        Some(move || {
            let file = disk.preallocate(&path, bytes)?;
            *spare.state() = SpareState::Ready(file);
            Ok(())
        })
    }

    fn fits(&self, len: usize) -> bool {
        self.end + len as u64 <= self.file_len
    }

    fn write_group(&mut self, group: &mut Vec<u8>) -> Result<usize, WalError> {
        if group.is_empty() {
            return Ok(0);
        }
        self.file.write_at(self.end, group)?;
        if !mutant::is_on(Mutant::AppendNotSynced) {
            self.file.sync_data()?;
        }
        let written = group.len();
        self.end += written as u64;
        group.clear();
        Ok(written)
    }

    fn tell(
        &self,
        placed: &mut Vec<(usize, u64, u64)>,
        entries: &[Entry],
        follow: &mut dyn Follow,
    ) -> Result<(), WalError> {
        let segment = self.number();
        for (position, offset, len) in placed.drain(..) {
            let followed = follow.entry(segment, &self.file, &entries[position], offset, len);
            followed.map_err(|why| WalError::Damaged { segment, why })?;
        }
        Ok(())
    }

    fn control(&mut self, record: RecordRef<'_>) -> Result<(), WalError> {
        let len = record::encode(self.end as u32, record).len();
        if !self.fits(len) {
            self.make_room(len)?;
        }
        self.write_group(&mut record::encode(self.end as u32, record))?;
        Ok(())
    }

    /// Goes on in a new segment that holds at least `len` bytes of records.
    fn make_room(&mut self, len: usize) -> Result<(), WalError> {
        let number = self.number() + 1;
        let need = len as u64 + 128;
        let spare = if need <= self.segment_bytes { self.spare.take() } else { None };
        let bytes = self.segment_bytes.max(need);
        let (file, end) = Self::create_segment(self.disk.as_ref(), &self.dir, bytes, number, self.end, spare)?;
        self.file_len = file.len()?;
        self.file = file;
        self.end = end;
        self.segments.push(number);
        Ok(())
    }

    /// The new segment's name appears only after its header is durable.
    fn create_segment(
        disk: &dyn Disk,
        dir: &Path,
        bytes: u64,
        number: u64,
        previous_end: u64,
        spare: Option<Arc<dyn DiskFile>>,
    ) -> Result<(Arc<dyn DiskFile>, u64), WalError> {
        let (file, staged) = match spare {
            Some(file) => (file, dir.join(SPARE)),
            None => {
                let staged = dir.join(STAGED);
                (disk.preallocate(&staged, bytes)?, staged)
            }
        };
        let header = SegmentHeader { format: WAL_FORMAT, number, previous_end };
        let record = codec::seal_value(RecordKind::WalHeader, &header);
        file.write_at(0, &record)?;
        file.sync_data()?;
        disk.rename(&staged, &segment_path(dir, number))?;
        disk.sync_dir(dir)?;
        Ok((file, record.len() as u64))
    }
}
