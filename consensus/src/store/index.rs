//! The serving index over event segments: where in a segment to begin reading (ADR 0002).
//!
//! It is rebuilt from the segments whenever it is missing, stale or wrong, so it may lose anything at any time. A mark
//! that it gives is proved by the batch that is read there.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use statemachine::Seq;

use super::disk::Disk;
use super::segments::file::SegmentId;

pub trait EventIndex: Send + Sync + 'static {
    /// Remembers where batches of a segment begin: (seq, offset), rising.
    fn add(&self, segment: &SegmentId, marks: &[(Seq, u64)]);

    /// The last mark of the segment at or before `seq`; `None` when the segment is not known.
    fn find(&self, segment: &SegmentId, seq: Seq) -> Option<(Seq, u64)>;

    /// Forgets the marks of a segment that is gone.
    fn remove(&self, segment: &SegmentId);

    /// Lets go of files; the index answers `None` afterwards.
    fn close(&self);
}

/// Segment, then seq: the marks of a segment are one range of keys.
fn key(segment: &SegmentId, seq: Seq) -> [u8; 24] {
    let mut key = [0; 24];
    // A segment is its content: 8 bytes of its hash keep a stale entry of another apart.
    key[..8].copy_from_slice(&segment.first.0.to_be_bytes());
    key[8..16].copy_from_slice(&segment.hash[..8]);
    key[16..].copy_from_slice(&seq.0.to_be_bytes());
    key
}

fn seq_of(key: &[u8]) -> Option<Seq> {
    Some(Seq(u64::from_be_bytes(*key.get(16..)?.first_chunk::<8>()?)))
}

/// In memory: for simulation, for tests, and when sled cannot be opened.
#[derive(Default)]
pub struct MemoryIndex {
    marks: Mutex<BTreeMap<[u8; 24], u64>>,
}

impl EventIndex for MemoryIndex {
    fn add(&self, segment: &SegmentId, marks: &[(Seq, u64)]) {
        let mut map = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        map.extend(marks.iter().map(|(seq, offset)| (key(segment, *seq), *offset)));
    }

    fn find(&self, segment: &SegmentId, seq: Seq) -> Option<(Seq, u64)> {
        let map = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let (found, offset) = map.range(key(segment, Seq::ZERO)..=key(segment, seq)).next_back()?;
        Some((seq_of(found)?, *offset))
    }

    fn remove(&self, segment: &SegmentId) {
        let mut map = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        map.retain(|key, _| *key < self::key(segment, Seq::ZERO) || *key > self::key(segment, Seq(u64::MAX)));
    }

    fn close(&self) {}
}

/// In sled, with a small cache.
pub struct SledIndex {
    tree: Mutex<Option<sled::Tree>>,
    dir: PathBuf,
}

/// sled's default cache is 1 GiB; the marks of 10 million events are a few MiB.
const CACHE_BYTES: u64 = 4 << 20;

impl SledIndex {
    /// Opens the index of a folder; removes and begins again what sled cannot read.
    pub fn open(disk: &dyn Disk, dir: &Path) -> Result<SledIndex, sled::Error> {
        let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(Some(1000));
        let opened = catch_unwind(AssertUnwindSafe(|| config.open()?.open_tree("marks")));
        let tree = match opened {
            Ok(Ok(tree)) => tree,
            Ok(Err(sled::Error::Io(error))) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(sled::Error::Io(error));
            }
            // sled panics on some damage; either way only an index is lost.
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(dir = %dir.display(), "the event index was unreadable; it is built again from the segments");
                disk.remove_dir_all(dir).map_err(|error| sled::Error::Io(error.into()))?;
                config.open()?.open_tree("marks")?
            }
        };
        Ok(SledIndex { tree: Mutex::new(Some(tree)), dir: dir.to_owned() })
    }

    fn tree(&self) -> Option<sled::Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn failed(&self, what: &str, error: &sled::Error) {
        tracing::warn!(dir = %self.dir.display(), "the event index cannot {what} ({error}); reads go to the segments");
        self.close();
    }
}

impl EventIndex for SledIndex {
    fn add(&self, segment: &SegmentId, marks: &[(Seq, u64)]) {
        let Some(tree) = self.tree() else { return };
        let mut batch = sled::Batch::default();
        for (seq, offset) in marks {
            batch.insert(&key(segment, *seq), &offset.to_be_bytes());
        }
        if let Err(error) = tree.apply_batch(batch) {
            self.failed("be written", &error);
        }
    }

    fn find(&self, segment: &SegmentId, seq: Seq) -> Option<(Seq, u64)> {
        let tree = self.tree()?;
        match tree.range(key(segment, Seq::ZERO)..=key(segment, seq)).next_back()? {
            Ok((found, offset)) => Some((seq_of(&found)?, u64::from_be_bytes(*offset.first_chunk::<8>()?))),
            Err(error) => {
                self.failed("be read", &error);
                None
            }
        }
    }

    fn remove(&self, segment: &SegmentId) {
        let Some(tree) = self.tree() else { return };
        let mut batch = sled::Batch::default();
        for found in tree.range(key(segment, Seq::ZERO)..=key(segment, Seq(u64::MAX))).keys() {
            match found {
                Ok(found) => batch.remove(found),
                Err(error) => return self.failed("be read", &error),
            }
        }
        if let Err(error) = tree.apply_batch(batch) {
            self.failed("be written", &error);
        }
    }

    fn close(&self) {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
