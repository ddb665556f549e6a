//! One event segment: an immutable file that holds the original bytes of consecutive batches.
//!
//! ```text
//! header record | batch records as they were sealed | seal record | length of the seal record u32 LE
//! ```
//!
//! The seal names the range, the head of the chain after it and the blake3 hash of all bytes before the seal.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use statemachine::Seq;
use statemachine::batch::Head;
use statemachine::batch::MAX_BATCH_LEN;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::codec::HEADER_LEN;
use statemachine::codec::RecordKind;

use super::SegmentError;
use super::StoredBatch;
use crate::store::disk::Disk;
use crate::store::disk::DiskFile;

/// Version of this layout.
pub const SEGMENT_FORMAT: u16 = 1;
pub const SUFFIX: &str = ".seg";
/// Longest header or seal payload.
const MAX_RECORD_LEN: usize = 1024;
/// One mark for the index each so many bytes.
const MARK_EVERY_BYTES: u64 = 16 << 10;
/// How much is read at once while batches are looked for.
const READ_BYTES: u64 = 64 << 10;

/// A sealed segment, by content: the same on every host that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentId {
    pub first: Seq,
    pub last: Seq,
    /// Length of the whole file.
    pub bytes: u64,
    /// blake3 of everything before the seal.
    pub hash: [u8; 32],
}

impl SegmentId {
    pub fn file_name(&self) -> String {
        format!("{:020}-{:020}{SUFFIX}", self.first.0, self.last.0)
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u16,
    previous: Head,
}

#[derive(Serialize, Deserialize)]
struct Seal {
    first: Seq,
    last: Seq,
    head: Head,
    hash: [u8; 32],
}

/// A segment that is on disk.
#[derive(Clone)]
pub struct SegmentFile {
    pub id: SegmentId,
    /// Head of the chain after its last batch.
    pub head: Head,
    pub path: PathBuf,
    /// Opened for each read: months of events are more files than a process may hold open.
    disk: Arc<dyn Disk>,
    /// First byte after the batches.
    end: u64,
}

/// Where batches begin: (seq, offset), for the index.
pub type Marks = Vec<(Seq, u64)>;

/// Writes batches as one sealed segment; durable on return, name included.
pub fn write(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    previous: Head,
    batches: &[StoredBatch],
) -> Result<(SegmentFile, Marks), SegmentError> {
    let (Some(first), Some(last)) = (batches.first(), batches.last()) else {
        return Err(SegmentError::Empty);
    };
    let mut bytes = codec::seal_value(RecordKind::SegmentHeader, &Header { format: SEGMENT_FORMAT, previous });
    let mut marks = Marks::new();
    for batch in batches {
        mark(&mut marks, batch.seq, bytes.len() as u64);
        bytes.extend_from_slice(batch.sealed.as_bytes());
    }
    let end = bytes.len() as u64;
    let hash = *blake3::hash(&bytes).as_bytes();
    let head = Head { seq: last.seq, hash: last.sealed.hash() };
    let seal = codec::seal_value(RecordKind::SegmentSeal, &Seal { first: first.seq, last: last.seq, head, hash });
    bytes.extend_from_slice(&seal);
    bytes.extend_from_slice(&(seal.len() as u32).to_le_bytes());

    let id = SegmentId { first: first.seq, last: last.seq, bytes: bytes.len() as u64, hash };
    let path = dir.join(id.file_name());
    crate::store::disk::write_atomically(disk.as_ref(), &path, &bytes)?;
    Ok((SegmentFile { id, head, path, disk: disk.clone(), end }, marks))
}

fn mark(marks: &mut Marks, seq: Seq, offset: u64) {
    if marks.last().is_none_or(|(_, marked)| offset - marked >= MARK_EVERY_BYTES) {
        marks.push((seq, offset));
    }
}

/// Opens a sealed segment by its seal. The batches are checked when they are read.
pub fn open(disk: &Arc<dyn Disk>, path: &Path) -> Result<SegmentFile, SegmentError> {
    let damaged = |why: String| SegmentError::Damaged { path: path.to_owned(), why };
    let file = disk.open(path)?;
    let bytes = file.len()?;
    if bytes < 4 {
        return Err(damaged("it has no seal".to_owned()));
    }
    let mut seal_len = [0; 4];
    file.read_at(bytes - 4, &mut seal_len)?;
    let seal_len = u64::from(u32::from_le_bytes(seal_len));
    if seal_len > (MAX_RECORD_LEN + HEADER_LEN) as u64 || seal_len + 4 > bytes {
        return Err(damaged("it has no seal".to_owned()));
    }
    let end = bytes - 4 - seal_len;
    let mut record = vec![0; seal_len as usize];
    file.read_at(end, &mut record)?;
    let seal: Seal = codec::open_value(RecordKind::SegmentSeal, &record, MAX_RECORD_LEN)
        .map_err(|error| damaged(format!("its seal is unreadable: {error}")))?;
    let id = SegmentId { first: seal.first, last: seal.last, bytes, hash: seal.hash };
    Ok(SegmentFile { id, head: seal.head, path: path.to_owned(), disk: disk.clone(), end })
}

/// Checks that bytes are the segment that `id` names, all of them.
pub fn verify(bytes: &[u8], id: &SegmentId) -> bool {
    let Some((rest, seal_len)) = bytes.split_last_chunk::<4>() else { return false };
    let seal_len = u32::from_le_bytes(*seal_len) as usize;
    let Some(end) = rest.len().checked_sub(seal_len) else { return false };
    let (content, seal) = rest.split_at(end);
    let seal: Result<Seal, CodecError> = codec::open_value(RecordKind::SegmentSeal, seal, MAX_RECORD_LEN);
    let sealed = seal.is_ok_and(|seal| seal.first == id.first && seal.last == id.last && seal.hash == id.hash);
    sealed && bytes.len() as u64 == id.bytes && *blake3::hash(content).as_bytes() == id.hash
}

impl SegmentFile {
    fn damaged(&self, why: String) -> SegmentError {
        SegmentError::Damaged { path: self.path.clone(), why }
    }

    fn file(&self) -> Result<Arc<dyn DiskFile>, SegmentError> {
        Ok(self.disk.open(&self.path)?)
    }

    /// First byte after the header record.
    fn batches_start(&self, file: &dyn DiskFile) -> Result<u64, SegmentError> {
        let mut bytes = vec![0; self.end.min((MAX_RECORD_LEN + HEADER_LEN) as u64) as usize];
        file.read_at(0, &mut bytes)?;
        let opened = codec::open_prefix(RecordKind::SegmentHeader, &bytes, MAX_RECORD_LEN)
            .and_then(|(payload, used)| codec::decode::<Header>(payload).map(|header| (header, used)));
        match opened {
            Ok((header, used)) if header.format == SEGMENT_FORMAT => Ok(used as u64),
            Ok((header, _)) => {
                Err(self
                    .damaged(format!("layout version {} is unknown to this build; upgrade this host", header.format)))
            }
            Err(error) => Err(self.damaged(format!("its header is unreadable: {error}"))),
        }
    }

    /// Reads all batches once and says where they begin.
    pub fn marks(&self) -> Result<Marks, SegmentError> {
        let mut marks = Marks::new();
        let mut seq = self.id.first;
        let file = self.file()?;
        let start = self.batches_start(file.as_ref())?;
        self.walk(file.as_ref(), start, |offset, _| {
            mark(&mut marks, seq, offset);
            seq = seq.next();
            true
        })?;
        match seq == self.id.last.next() {
            true => Ok(marks),
            false => Err(self.damaged(format!("it holds batches up to {}, sealed up to {}", seq.0 - 1, self.id.last))),
        }
    }

    /// Reads batches after `after`, beginning the walk at a mark. `None` when the mark does not lead to the batch.
    pub fn read(
        &self,
        mark: Option<(Seq, u64)>,
        after: Seq,
        limit_batches: usize,
        limit_bytes: usize,
    ) -> Result<Option<Vec<StoredBatch>>, SegmentError> {
        let file = self.file()?;
        let (mut seq, start) = match mark {
            Some(mark) => mark,
            None => (self.id.first, self.batches_start(file.as_ref())?),
        };
        let mut batches: Vec<StoredBatch> = Vec::new();
        let mut bytes = 0;
        let mut fits = true;
        self.walk(file.as_ref(), start, |_, record| {
            if seq > after {
                bytes += record.len();
                if !batches.is_empty() && (batches.len() >= limit_batches || bytes > limit_bytes) {
                    return false;
                }
                let sealed = SealedBatch::from_bytes(record.to_vec());
                // The first one proves that the mark was right; the chain of records carries the rest.
                if batches.is_empty() && sealed.previous().map(|head| head.seq.next()) != Ok(seq) {
                    fits = false;
                    return false;
                }
                batches.push(StoredBatch { seq, sealed: Arc::new(sealed) });
            }
            seq = seq.next();
            true
        })?;
        Ok((fits && !batches.is_empty()).then_some(batches))
    }

    /// Visits batch records from an offset on, while `visit` says so.
    fn walk(
        &self,
        file: &dyn DiskFile,
        start: u64,
        mut visit: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), SegmentError> {
        let limit = MAX_BATCH_LEN;
        let mut window: Vec<u8> = Vec::new();
        let mut window_at = start;
        let mut offset = start;
        while offset < self.end {
            let have = &window[(offset - window_at) as usize..];
            match codec::open_prefix(RecordKind::Batch, have, limit) {
                Ok((_, used)) => {
                    if !visit(offset, &have[..used]) {
                        return Ok(());
                    }
                    offset += used as u64;
                }
                Err(CodecError::Truncated { need, .. }) if offset + need as u64 <= self.end => {
                    let len = READ_BYTES.max(need as u64).min(self.end - offset);
                    window = vec![0; len as usize];
                    window_at = offset;
                    file.read_at(offset, &mut window)?;
                }
                Err(error) => return Err(self.damaged(format!("the batch at byte {offset} is unreadable: {error}"))),
            }
        }
        Ok(())
    }

    /// Bytes of the file, for a peer that pulls it.
    pub fn chunk(&self, offset: u64, max: u64) -> Result<Vec<u8>, SegmentError> {
        let len = self.id.bytes.saturating_sub(offset).min(max);
        let mut bytes = vec![0; len as usize];
        self.file()?.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }
}
