//! The log as readers see it: the newest entries in memory, the others by their place in the write-ahead log.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::store::disk::DiskFile;
use crate::store::wal::Follow;
use crate::store::wal::index::ReadPlan;
use crate::store::wal::index::WalIndex;
use crate::types::Entry;
use crate::types::LogId;
use crate::types::Payload;
use crate::types::Vote;

/// What an entry costs in memory beside its batches.
const ENTRY_OVERHEAD_BYTES: usize = 128;

pub struct LogView {
    pub purged: Option<LogId>,
    pub last: Option<LogId>,
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub index: WalIndex,
    /// Index of the oldest entry; meaningful while there is one.
    first: u64,
    /// The newest entries, contiguous up to `last`. All that is not durable yet is here.
    cache: VecDeque<Entry>,
    cache_bytes: usize,
    cache_limit_bytes: usize,
    /// Entries below this index are in the write-ahead log.
    durable_end: u64,
}

/// Where the entries of a range come from.
pub enum Source {
    Memory(Vec<Entry>),
    Disk(ReadPlan),
    Missing,
}

impl LogView {
    pub fn new(cache_limit_bytes: usize) -> LogView {
        LogView {
            purged: None,
            last: None,
            vote: None,
            committed: None,
            index: WalIndex::default(),
            first: 0,
            cache: VecDeque::new(),
            cache_bytes: 0,
            cache_limit_bytes,
            durable_end: 0,
        }
    }

    /// Adds an entry at the end, readable at once.
    pub fn push(&mut self, entry: Entry) {
        if self.is_empty() {
            self.first = entry.log_id.index;
        }
        self.last = Some(entry.log_id);
        self.cache_bytes += entry_bytes(&entry);
        self.cache.push_back(entry);
    }

    /// Index that the next entry must have; any is fine for a log that never held one.
    pub fn next_index(&self) -> Option<u64> {
        self.last.map(|last| last.index + 1)
    }

    /// The part of `start..end` that is there.
    pub fn clamp(&self, start: u64, end: u64) -> (u64, u64) {
        match self.last {
            Some(last) if !self.is_empty() => (start.max(self.first), end.min(last.index + 1)),
            _ => (start, start),
        }
    }

    /// The first entries of a clamped, non-empty range: about `limit_bytes` of them, at least one.
    pub fn source(&self, start: u64, end: u64, limit_bytes: usize) -> Source {
        let cached_from = self.cache.front().map_or(u64::MAX, |entry| entry.log_id.index);
        if start < cached_from {
            let upto = (end - 1).min(cached_from - 1);
            return self.index.plan(start, upto, limit_bytes).map_or(Source::Missing, Source::Disk);
        }
        let mut entries = Vec::new();
        let mut taken = 0;
        for entry in self.cache.range((start - cached_from) as usize..(end - cached_from) as usize) {
            let bytes = entry_bytes(entry);
            if taken > 0 && taken + bytes > limit_bytes {
                break;
            }
            taken += bytes;
            entries.push(entry.clone());
        }
        Source::Memory(entries)
    }

    /// Drops entries after `last`.
    pub fn truncate(&mut self, last: Option<LogId>) {
        let from = last.map_or(0, |last| last.index + 1);
        if self.last.is_none_or(|own| own.index < from) {
            return;
        }
        while self.cache.back().is_some_and(|entry| entry.log_id.index >= from) {
            self.forget_newest();
        }
        self.last = last.or(self.purged);
    }

    /// Drops entries up to `purged`.
    pub fn purge(&mut self, purged: LogId) {
        if self.purged.is_some_and(|own| own.index >= purged.index) {
            return;
        }
        while self.cache.front().is_some_and(|entry| entry.log_id.index <= purged.index) {
            self.forget_oldest();
        }
        self.purged = Some(purged);
        self.first = purged.index + 1;
        if self.last.is_none_or(|last| last.index <= purged.index) {
            self.last = Some(purged);
        }
    }

    /// Entries below `end` are durable now: the oldest may leave memory.
    pub fn durable_upto(&mut self, end: u64) {
        self.durable_end = end;
        while self.cache_bytes > self.cache_limit_bytes
            && self.cache.front().is_some_and(|entry| entry.log_id.index < end)
        {
            self.forget_oldest();
        }
    }

    /// Whether an entry is on disk, or was purged behind a snapshot that is.
    pub fn is_durable(&self, index: u64) -> bool {
        index < self.durable_end || self.purged.is_some_and(|purged| index <= purged.index)
    }

    pub fn durable_end(&self) -> u64 {
        self.durable_end
    }

    fn is_empty(&self) -> bool {
        self.last.is_none() || self.last == self.purged
    }

    fn forget_oldest(&mut self) {
        if let Some(entry) = self.cache.pop_front() {
            self.cache_bytes -= entry_bytes(&entry);
        }
    }

    fn forget_newest(&mut self) {
        if let Some(entry) = self.cache.pop_back() {
            self.cache_bytes -= entry_bytes(&entry);
        }
    }
}

pub fn entry_bytes(entry: &Entry) -> usize {
    ENTRY_OVERHEAD_BYTES
        + match &entry.payload {
            Payload::Normal(proposal) => proposal.size_bytes(),
            Payload::Blank | Payload::Membership(_) => 0,
        }
}

/// Rebuilds the view while the write-ahead log is opened.
pub struct Reopen<'a>(pub &'a mut LogView);

impl Follow for Reopen<'_> {
    fn entry(
        &mut self,
        segment: u64,
        file: &Arc<dyn DiskFile>,
        entry: &Entry,
        offset: u64,
        len: u64,
    ) -> Result<(), String> {
        let index = entry.log_id.index;
        if let Some(next) = self.0.next_index()
            && next != index
        {
            return Err(format!("entry {next} is missing, entry {index} is in its place"));
        }
        self.0.index.add(segment, file, index, offset, len);
        self.0.push(entry.clone());
        self.0.durable_upto(index + 1);
        Ok(())
    }

    fn truncate(&mut self, last: Option<LogId>) {
        self.0.truncate(last);
        self.0.index.truncate_from(last.map_or(0, |last| last.index + 1));
    }

    fn reset(&mut self, purged: LogId) {
        self.0.purge(purged);
        self.0.index.truncate_from(0);
    }
}

/// Notes in the index what the writer has made durable; the rest of the view is already ahead of it.
pub struct Written<'a>(pub &'a std::sync::Mutex<LogView>);

impl Written<'_> {
    fn view(&self) -> std::sync::MutexGuard<'_, LogView> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Follow for Written<'_> {
    fn entry(
        &mut self,
        segment: u64,
        file: &Arc<dyn DiskFile>,
        entry: &Entry,
        offset: u64,
        len: u64,
    ) -> Result<(), String> {
        let index = entry.log_id.index;
        let mut view = self.view();
        view.index.add(segment, file, index, offset, len);
        view.durable_upto(index + 1);
        Ok(())
    }

    fn truncate(&mut self, last: Option<LogId>) {
        let from = last.map_or(0, |last| last.index + 1);
        let mut view = self.view();
        view.index.truncate_from(from);
        let end = view.durable_end().min(from);
        view.durable_upto(end);
    }

    fn reset(&mut self, purged: LogId) {
        let mut view = self.view();
        view.index.truncate_from(0);
        view.durable_upto(purged.index + 1);
    }
}
