//! Where each entry of the write-ahead log lies, in little memory: a mark every 64 KiB, and a scan between marks.
//!
//! A *run* is a stretch of one segment whose entries have rising indexes. A truncation cuts runs from the end; entries
//! written later begin a new run, so a reader never meets an entry that was overruled.

use std::sync::Arc;

use super::WalError;
use super::record;
use super::record::WalRecord;
use crate::store::disk::DiskFile;
use crate::types::Entry;

/// Distance of marks.
const MARK_EVERY_BYTES: u64 = 64 << 10;

struct Run {
    segment: u64,
    file: Arc<dyn DiskFile>,
    /// Index of the first and the last entry.
    first: u64,
    last: u64,
    /// End of the last entry that was written into this run.
    end: u64,
    /// (index, offset), rising; the first is the run's first entry.
    marks: Vec<(u64, u64)>,
}

/// All runs, oldest first, contiguous by index.
#[derive(Default)]
pub struct WalIndex {
    runs: Vec<Run>,
    /// The next entry begins a run of its own.
    cut: bool,
}

/// What to read for a range of entries: made under a lock, used outside of it.
#[derive(Clone)]
pub struct ReadPlan {
    segment: u64,
    file: Arc<dyn DiskFile>,
    from: u64,
    upto: u64,
    start: u64,
    stop: u64,
}

impl WalIndex {
    /// Notes an entry. The caller has checked that its index follows.
    pub fn add(&mut self, segment: u64, file: &Arc<dyn DiskFile>, index: u64, offset: u64, len: u64) {
        match self.runs.last_mut() {
            Some(run) if run.segment == segment && !self.cut => {
                run.last = index;
                run.end = offset + len;
                if run.marks.last().is_none_or(|(_, marked)| offset - marked >= MARK_EVERY_BYTES) {
                    run.marks.push((index, offset));
                }
            }
            _ => {
                let marks = vec![(index, offset)];
                let end = offset + len;
                self.runs.push(Run { segment, file: file.clone(), first: index, last: index, end, marks });
                self.cut = false;
            }
        }
    }

    /// Forgets entries from `index` on.
    pub fn truncate_from(&mut self, index: u64) {
        while self.runs.last().is_some_and(|run| run.first >= index) {
            self.runs.pop();
        }
        if let Some(run) = self.runs.last_mut() {
            run.last = run.last.min(index.saturating_sub(1));
            run.marks.retain(|(marked, _)| *marked < index);
        }
        self.cut = true;
    }

    /// Forgets runs that end before `index`.
    pub fn purge_before(&mut self, index: u64) {
        self.runs.retain(|run| run.last >= index);
    }

    /// Oldest segment that holds an entry which is still needed.
    pub fn oldest_segment(&self) -> Option<u64> {
        self.runs.iter().map(|run| run.segment).min()
    }

    /// The piece of one run that holds the first entries of `from..=upto`, not much longer than the limit.
    pub fn plan(&self, from: u64, upto: u64, limit_bytes: usize) -> Option<ReadPlan> {
        let at = self.runs.partition_point(|run| run.last < from);
        let run = self.runs.get(at).filter(|run| run.first <= from)?;
        let upto = upto.min(run.last);
        let mark = run.marks.partition_point(|(index, _)| *index <= from).saturating_sub(1);
        let start = run.marks[mark].1;
        let enough =
            |(index, offset): &(u64, u64)| *index > upto || (*index > from && (offset - start) as usize >= limit_bytes);
        let stop = run.marks[mark..].iter().copied().find(enough).map_or(run.end, |(_, offset)| offset);
        let file = run.file.clone();
        Some(ReadPlan { segment: run.segment, file, from, upto, start, stop })
    }
}

impl ReadPlan {
    /// Reads the planned entries, at least one, stopping after about `limit_bytes`.
    pub fn read(&self, limit_bytes: usize) -> Result<Vec<Entry>, WalError> {
        let mut bytes = vec![0; (self.stop - self.start) as usize];
        self.file.read_at(self.start, &mut bytes)?;
        let mut entries = Vec::new();
        let mut offset = 0;
        let mut taken = 0;
        while offset < bytes.len() {
            let damaged = |why: String| WalError::Damaged { segment: self.segment, why };
            let (_, record, used) = record::decode_prefix(&bytes[offset..]).map_err(|why| {
                damaged(format!("the record at byte {} is unreadable: {why}", self.start + offset as u64))
            })?;
            offset += used;
            let WalRecord::Entry(entry) = record else { continue };
            let index = entry.log_id.index;
            if index < self.from {
                continue;
            }
            if index > self.upto || (taken > 0 && taken + used > limit_bytes) {
                break;
            }
            let expected = self.from + entries.len() as u64;
            if index != expected {
                return Err(damaged(format!("entry {expected} is missing, entry {index} is in its place")));
            }
            taken += used;
            entries.push(entry);
        }
        match entries.is_empty() {
            false => Ok(entries),
            true => Err(WalError::Damaged {
                segment: self.segment,
                why: format!("entry {} is not where it was written", self.from),
            }),
        }
    }
}
