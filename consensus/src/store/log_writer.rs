//! The one writer: every change of vote, log and markers in the order in which it was asked for (openraft's rule that
//! write I/O is serialized; a vote that overtakes an append can lose data).
//!
//! Appends that wait together become one write group with one `fdatasync`.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use statemachine::mutant;
use statemachine::mutant::Mutant;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;

use crate::platform::Blocking;
use crate::platform::Platform;
use crate::store::StoreError;
use crate::store::health::Health;
use crate::store::log_view::LogView;
use crate::store::log_view::Written;
use crate::store::meta::Meta;
use crate::store::wal::Wal;
use crate::types::Entry;
use crate::types::LogId;
use crate::types::Vote;

/// Jobs that may wait; openraft awaits beyond.
pub const QUEUE_LEN: usize = 256;
/// `committed` goes to disk at most once a second: it is a hint for the next start.
const SAVE_COMMITTED_EVERY_NS: u64 = 1_000_000_000;

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

pub struct Job {
    pub submitted_ns: u64,
    pub work: Work,
}

pub enum Work {
    Append {
        entries: Vec<Entry>,
        done: Done,
    },
    Vote {
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    Truncate {
        last: Option<LogId>,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// `reset`: nothing of the log is left, it continues after the purged id.
    Purge {
        purged: LogId,
        reset: bool,
        done: oneshot::Sender<io::Result<()>>,
    },
}

pub struct Writer {
    pub platform: Platform,
    pub wal: Wal,
    pub meta: Meta,
    pub view: Arc<Mutex<LogView>>,
    pub health: Arc<Health>,
    pub group_bytes: usize,
    pub saved_committed: Option<LogId>,
    pub saved_committed_ns: u64,
    /// Ends with the next segment that is being laid out beside the writer.
    pub spare: Option<oneshot::Receiver<()>>,
    /// The data directory is in use. The last field, so that it is dropped last: redb writes once more when it closes.
    pub lock: Box<dyn std::any::Any + Send + Sync>,
}

impl Writer {
    /// Runs until every [`crate::store::log_store::LogStore`] is gone or the disk fails. The receiver turns true then.
    pub fn spawn(mut self, mut jobs: mpsc::Receiver<Job>) -> watch::Receiver<bool> {
        let (ended, has_ended) = watch::channel(false);
        match self.platform.blocking {
            Blocking::Threads => drop(tokio::task::spawn_blocking(move || {
                while let Some(job) = jobs.blocking_recv() {
                    if !self.round(job, &mut jobs) {
                        break;
                    }
                }
                self.finish();
                ended.send_replace(true);
            })),
            Blocking::Inline => drop(tokio::spawn(async move {
                while let Some(job) = jobs.recv().await {
                    if let Some(goes_on) = self.platform.disk.hangs() {
                        self.health.append_began(job.submitted_ns);
                        goes_on.await;
                    }
                    if !self.round(job, &mut jobs) {
                        break;
                    }
                }
                self.finish();
                ended.send_replace(true);
            })),
        }
        has_ended
    }

    /// Does one job and all that wait behind it. False when the disk failed.
    fn round(&mut self, first: Job, jobs: &mut mpsc::Receiver<Job>) -> bool {
        self.health.append_began(first.submitted_ns);
        let mut waiting = vec![first];
        while waiting.len() < QUEUE_LEN
            && let Ok(job) = jobs.try_recv()
        {
            waiting.push(job);
        }
        let done = self.work(waiting);
        self.health.append_ended();
        match done {
            Ok(()) => true,
            Err(error) => {
                self.platform.exit.fatal(&error);
                false
            }
        }
    }

    fn work(&mut self, waiting: Vec<Job>) -> Result<(), StoreError> {
        let mut group = Group::default();
        for job in waiting {
            match job.work {
                Work::Append { entries, done } => {
                    group.add(entries, done);
                    if group.bytes >= self.group_bytes {
                        self.write(&mut group)?;
                    }
                }
                Work::Vote { vote, done } => {
                    self.write(&mut group)?;
                    let saved = match mutant::is_on(Mutant::VoteNotSynced) {
                        true => Ok(()),
                        false => self.meta.save_vote(&vote).map_err(StoreError::from),
                    };
                    if saved.is_ok() {
                        self.view().vote = Some(vote);
                    }
                    report(saved, done)?;
                }
                Work::Truncate { last, done } => {
                    self.write(&mut group)?;
                    let cut = self.wal.truncate(last, &mut Written(&self.view)).map_err(StoreError::from);
                    report(cut, done)?;
                }
                Work::Purge { purged, reset, done } => {
                    self.write(&mut group)?;
                    let purge = self.purge(purged, reset);
                    report(purge, done)?;
                }
            }
        }
        self.write(&mut group)?;
        self.save_committed(false)?;
        self.prepare_spare()
    }

    fn write(&mut self, group: &mut Group) -> Result<(), StoreError> {
        if group.entries.is_empty() && group.done.is_empty() {
            return Ok(());
        }
        let Group { entries, done, .. } = std::mem::take(group);
        let began_ns = self.platform.clock.boottime_ns();
        let written = self.wal.append(&entries, &mut Written(&self.view));
        match written {
            Ok(bytes) => {
                let took_ns = self.platform.clock.boottime_ns().saturating_sub(began_ns);
                self.health.synced(entries.len(), bytes, took_ns);
                self.health.wal_size(self.wal.disk_bytes());
                done.into_iter().for_each(|done| done(Ok(())));
                Ok(())
            }
            Err(error) => {
                let error = StoreError::from(error);
                done.into_iter().for_each(|done| done(Err(io::Error::other(error.to_string()))));
                Err(error)
            }
        }
    }

    /// The marker becomes durable before any file goes, so a start never misses entries that it expects.
    fn purge(&mut self, purged: LogId, reset: bool) -> Result<(), StoreError> {
        if reset {
            self.wal.reset(purged, &mut Written(&self.view))?;
        }
        self.meta.save_purged(&purged)?;
        let oldest_needed = {
            let mut view = self.view();
            view.index.purge_before(purged.index + 1);
            view.index.oldest_segment()
        };
        self.wal.unlink_before(oldest_needed.unwrap_or(self.wal.number()))?;
        self.health.wal_size(self.wal.disk_bytes());
        Ok(())
    }

    fn save_committed(&mut self, at_once: bool) -> Result<(), StoreError> {
        let now_ns = self.platform.clock.boottime_ns();
        let due = at_once || now_ns.saturating_sub(self.saved_committed_ns) >= SAVE_COMMITTED_EVERY_NS;
        let committed = {
            let view = self.view();
            // Never ahead of the log: a start that finds less than what was saved as committed takes it for lost.
            view.committed.filter(|committed| view.is_durable(committed.index)).or(self.saved_committed)
        };
        if !due || committed == self.saved_committed {
            return Ok(());
        }
        if let Some(committed) = &committed {
            self.meta.save_committed(committed)?;
        }
        self.saved_committed = committed;
        self.saved_committed_ns = now_ns;
        Ok(())
    }

    fn prepare_spare(&mut self) -> Result<(), StoreError> {
        let Some(work) = self.wal.spare_work() else { return Ok(()) };
        match self.platform.blocking {
            Blocking::Inline => work()?,
            Blocking::Threads => {
                let exit = self.platform.exit.clone();
                let (done, spare) = oneshot::channel();
                self.spare = Some(spare);
                drop(tokio::task::spawn_blocking(move || {
                    if let Err(error) = work() {
                        exit.fatal(&error);
                    }
                    drop(done);
                }));
            }
        }
        Ok(())
    }

    /// When this returns, nothing of the data directory is open or written any more.
    fn finish(mut self) {
        // A hint only: failing to write it loses nothing.
        if let Err(error) = self.save_committed(true) {
            tracing::warn!("the last committed position was not saved: {error}");
        }
        if let Some(spare) = self.spare.take() {
            // Its sender is dropped, never used.
            let _ = spare.blocking_recv();
        }
    }

    fn view(&self) -> std::sync::MutexGuard<'_, LogView> {
        self.view.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Group {
    entries: Vec<Entry>,
    done: Vec<Done>,
    bytes: usize,
}

impl Group {
    fn add(&mut self, entries: Vec<Entry>, done: Done) {
        self.bytes += entries.iter().map(crate::store::log_view::entry_bytes).sum::<usize>();
        self.entries.extend(entries);
        self.done.push(done);
    }
}

/// Answers the caller, and stops the writer on an error.
fn report(result: Result<(), StoreError>, done: oneshot::Sender<io::Result<()>>) -> Result<(), StoreError> {
    let answer = match &result {
        Ok(()) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    };
    // A caller that is gone has no use for the answer.
    let _ = done.send(answer);
    result
}
