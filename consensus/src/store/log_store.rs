//! openraft's log storage: hands changes to the one writer, serves reads from memory or the write-ahead log.

use std::fmt::Debug;
use std::io;
use std::ops::Bound;
use std::ops::RangeBounds;
use std::sync::Arc;
use std::sync::Mutex;

use futures::Stream;
use futures::StreamExt;
use futures::stream;
use openraft::AsyncRuntime;
use openraft::OptionalSend;
use openraft::errors::LeaderChanged;
use openraft::storage::IOFlushed;
use openraft::storage::LeaderBoundedStreamError;
use openraft::storage::LeaderBoundedStreamResult;
use openraft::storage::LogState;
use openraft::storage::RaftLogReader;
use openraft::storage::RaftLogStorage;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use crate::platform::Platform;
use crate::store::StoreError;
use crate::store::log_view::LogView;
use crate::store::log_view::Source;
use crate::store::log_writer::Job;
use crate::store::log_writer::Work;
use crate::types::Entry;
use crate::types::LeaderId;
use crate::types::LogId;
use crate::types::TypeConfig;
use crate::types::Vote;

/// A reader takes about this much at a time, so that a follower that was away costs no memory here.
const READ_CHUNK_BYTES: usize = 1 << 20;

pub struct LogStore {
    reader: LogReader,
    jobs: mpsc::Sender<Job>,
}

/// Reads the log; many of them, next to the writer.
#[derive(Clone)]
pub struct LogReader {
    platform: Platform,
    view: Arc<Mutex<LogView>>,
}

impl LogStore {
    pub fn new(platform: Platform, view: Arc<Mutex<LogView>>, jobs: mpsc::Sender<Job>) -> LogStore {
        LogStore { reader: LogReader { platform, view }, jobs }
    }

    pub fn reader(&self) -> LogReader {
        self.reader.clone()
    }

    async fn submit(&self, work: Work) -> io::Result<()> {
        let job = Job { submitted_ns: self.reader.platform.clock.boottime_ns(), work };
        self.jobs.send(job).await.map_err(|_| StoreError::WriterStopped.into())
    }

    async fn submit_and_wait(&self, work: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Work) -> io::Result<()> {
        let (done, is_done) = oneshot::channel();
        self.submit(work(done)).await?;
        is_done.await.map_err(|_| io::Error::from(StoreError::WriterStopped))?
    }
}

impl LogReader {
    fn view(&self) -> std::sync::MutexGuard<'_, LogView> {
        self.view.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn vote(&self) -> Option<Vote> {
        self.view().vote
    }

    /// Id of the last entry, durable or not.
    pub fn last(&self) -> Option<LogId> {
        self.view().last
    }

    pub fn purged(&self) -> Option<LogId> {
        self.view().purged
    }

    /// The first entries of `start..end` that are there, about one chunk of them.
    pub async fn read_some(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let source = {
            let view = self.view();
            let (start, end) = view.clamp(start, end);
            match start < end {
                true => view.source(start, end, READ_CHUNK_BYTES),
                false => return Ok(Vec::new()),
            }
        };
        match source {
            Source::Memory(entries) => Ok(entries),
            Source::Missing => Err(self.fatal(StoreError::EntryMissing { index: start })),
            Source::Disk(plan) => {
                let read = self.platform.on_disk(move || plan.read(READ_CHUNK_BYTES)).await;
                match read {
                    Some(Ok(entries)) => Ok(entries),
                    Some(Err(error)) => Err(self.fatal(error.into())),
                    None => Err(StoreError::ShuttingDown.into()),
                }
            }
        }
    }

    async fn read_all(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let next = entries.last().map_or(start, |entry| entry.log_id.index + 1);
            if next >= end {
                return Ok(entries);
            }
            let some = self.read_some(next, end).await?;
            if some.is_empty() {
                return Ok(entries);
            }
            entries.extend(some);
        }
    }

    /// A log that cannot be read is a disk error: this host may not go on.
    fn fatal(&self, error: StoreError) -> io::Error {
        self.platform.exit.fatal(&error);
        error.into()
    }

    fn ensure_leader<R: AsyncRuntime>(&self, leader: &LeaderId) -> Result<(), LeaderBoundedStreamError<TypeConfig<R>>> {
        match self.vote() {
            Some(vote) if vote.leader_id == *leader && vote.committed => Ok(()),
            vote => Err(LeaderChanged::new(*leader, vote).into()),
        }
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl<R: AsyncRuntime> RaftLogReader<TypeConfig<R>> for LogReader {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.read_all(start, end).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read_some(start, end).await
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let chunks = stream::unfold((self.clone(), Some(start)), move |(reader, next)| async move {
            let next = next.filter(|next| *next < end)?;
            match reader.read_some(next, end).await {
                Ok(entries) => {
                    let next = entries.last().map(|entry| entry.log_id.index + 1);
                    Some((entries.into_iter().map(Ok).collect::<Vec<_>>(), (reader, next)))
                }
                Err(error) => Some((vec![Err(error)], (reader, None))),
            }
        });
        chunks.map(stream::iter).flatten().boxed()
    }

    async fn leader_bounded_stream<RB>(
        &mut self,
        leader: LeaderId,
        range: RB,
    ) -> impl Stream<Item = LeaderBoundedStreamResult<TypeConfig<R>>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let chunks = stream::unfold((self.clone(), Some(start)), move |(reader, next)| async move {
            let next = next.filter(|next| *next < end)?;
            let read = async {
                reader.ensure_leader::<R>(&leader)?;
                let entries = reader.read_some(next, end).await?;
                // Again: the log may have been cut while it was read.
                reader.ensure_leader::<R>(&leader)?;
                Ok::<_, LeaderBoundedStreamError<TypeConfig<R>>>(entries)
            };
            match read.await {
                Ok(entries) => {
                    let next = entries.last().map(|entry| entry.log_id.index + 1);
                    Some((entries.into_iter().map(Ok).collect::<Vec<_>>(), (reader, next)))
                }
                Err(error) => Some((vec![Err(error)], (reader, None))),
            }
        });
        chunks.map(stream::iter).flatten().boxed()
    }
}

impl<R: AsyncRuntime> RaftLogStorage<TypeConfig<R>> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig<R>>> {
        let view = self.reader.view();
        Ok(LogState { last_purged_log_id: view.purged, last_log_id: view.last })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        self.reader()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let vote = *vote;
        self.submit_and_wait(|done| Work::Vote { vote, done }).await
    }

    /// In memory at once; on disk with a later job of the writer. openraft calls this before each apply, and a commit
    /// that waited for two syncs of the metadata would be twice as slow for a hint.
    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.reader.view().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let view = self.reader.view();
        // Never beyond the log: openraft would look for entries that a snapshot has replaced.
        Ok(view.committed.filter(|committed| view.last.is_some_and(|last| committed.index <= last.index)))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig<R>>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        {
            let mut view = self.reader.view();
            for entry in &entries {
                let index = entry.log_id.index;
                if let Some(next) = view.next_index()
                    && next != index
                {
                    return Err(StoreError::Hole { expected: next, found: index }.into());
                }
                view.push(entry.clone());
            }
        }
        let done = Box::new(move |result| callback.io_completed(result));
        self.submit(Work::Append { entries, done }).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.reader.view().truncate(last);
        self.submit_and_wait(|done| Work::Truncate { last, done }).await
    }

    async fn purge(&mut self, purged: LogId) -> io::Result<()> {
        let reset = {
            let mut view = self.reader.view();
            let reset = view.last.is_none_or(|last| last.index < purged.index);
            view.purge(purged);
            reset
        };
        self.submit_and_wait(|done| Work::Purge { purged, reset, done }).await
    }
}
