//! What a host keeps on its disk, and what survives what (the table is in README.md).
//!
//! ```text
//! append -> log_store -> log_writer -> wal (one fdatasync a group) -> durable -> openraft commits
//! commit -> state_machine -> fold + segments (tail in memory) -> published -> answered
//! snapshot = seal the tail + state file + manifest -> the log may be purged up to it
//! ```
//!
//! Files of the data directory: `meta.redb`, `wal/`, `segments/`, `snapshots/`, `incoming/` (a snapshot on its way in),
//! `index/` (sled; may be deleted at any time while the host is down), `lock`.
//!
//! - [`disk`]: file operations, each with its durability; [`memory_disk`]: one that loses power on demand.
//! - [`wal`], [`meta`], [`log_view`], [`log_writer`], [`log_store`]: the Raft log.
//! - [`segments`], [`index`], [`event_store`]: events. [`snapshot`], [`snapshot_service`], [`state_machine`]: the fold.
//! - [`entry_codec`]: a log entry as bytes; [`health`]: numbers; [`check`]: is a directory sound? [`alone`]: a host without the others.
//!
//! Start reading at [`Store::open`].

pub mod alone;
pub mod check;
pub mod disk;
pub mod entry_codec;
pub mod event_store;
pub mod health;
pub mod index;
pub mod log_store;
pub mod log_view;
pub mod log_writer;
pub mod memory_disk;
pub mod meta;
pub mod segments;
pub mod snapshot;
pub mod snapshot_service;
pub mod state_machine;
pub mod wal;

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use statemachine::Fold;
use statemachine::Seq;
use statemachine::fold::ApplyError;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::sync::watch;

use self::event_store::EventStore;
use self::health::Health;
use self::index::EventIndex;
use self::index::MemoryIndex;
use self::index::SledIndex;
use self::log_store::LogStore;
use self::log_view::LogView;
use self::log_view::Reopen;
use self::log_writer::QUEUE_LEN;
use self::log_writer::Writer;
use self::meta::Meta;
use self::meta::MetaError;
use self::meta::MetaValues;
use self::segments::SegmentError;
use self::segments::Segments;
use self::snapshot::SnapshotError;
use self::snapshot::Snapshots;
use self::snapshot_service::SnapshotService;
use self::state_machine::StateMachine;
use self::wal::Wal;
use self::wal::WalError;
use crate::platform::DiskError;
use crate::platform::Platform;
use crate::types::LogId;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("{path} is in use by another process: stop the hostd that runs with this data directory first", path = path.display())]
    InUse { path: PathBuf },
    #[error("{path} holds no store of hostd; is `data_dir` another?", path = path.display())]
    NoStore { path: PathBuf },
    #[error("{why}. Remove this host from the cluster and join it again with an empty data directory")]
    CannotRebuild { why: String },
    #[error("log entry {index} is neither in memory nor in the write-ahead log")]
    EntryMissing { index: u64 },
    #[error("log entry {found} was appended where {expected} must follow")]
    Hole { expected: u64, found: u64 },
    #[error(
        "the write-ahead log ends at entry {last}, but entry {committed} was committed here: acknowledged entries are \
         lost. Remove this host from the cluster and join it again with an empty data directory"
    )]
    CommittedLost { last: u64, committed: u64 },
    #[error(
        "the write-ahead log was purged up to entry {purged}, and no snapshot covers it: what it held is lost here. Remove \
         this host from the cluster and join it again with an empty data directory"
    )]
    SnapshotLost { purged: u64 },
    #[error("the raft log cannot be read or changed")]
    Log(#[source] io::Error),
    #[error("the log writer has stopped")]
    WriterStopped,
    #[error("this host is shutting down")]
    ShuttingDown,
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> io::Error {
        io::Error::other(error)
    }
}

/// Sizes; the defaults are the product's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// Preallocated size of a write-ahead log segment.
    pub wal_segment_bytes: u64,
    /// Appends that wait are written together up to this size.
    pub wal_group_bytes: usize,
    /// Newest entries kept in memory for followers and apply.
    pub log_cache_bytes: usize,
    /// An event segment is sealed at this size; as much of the stream's end stays in memory.
    pub event_segment_bytes: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            wal_segment_bytes: 16 << 20,
            wal_group_bytes: 1 << 20,
            log_cache_bytes: 4 << 20,
            event_segment_bytes: 4 << 20,
        }
    }
}

/// An open data directory. `log` and `state_machine` go to openraft, the rest is shared.
pub struct Store {
    pub log: LogStore,
    pub state_machine: StateMachine,
    pub events: Arc<EventStore>,
    pub fold: watch::Receiver<Arc<Fold>>,
    pub snapshots: Arc<Snapshots>,
    /// The same, as the transport serves and pulls them.
    pub snapshot_files: Arc<SnapshotService>,
    pub health: Arc<Health>,
    pub closing: Closing,
}

/// Tells when the data directory is no longer in use.
#[derive(Clone)]
pub struct Closing {
    ended: watch::Receiver<bool>,
    segments: Arc<Segments>,
}

impl Closing {
    /// Waits until openraft has dropped the log store and the writer has ended; the directory may be opened again.
    pub async fn closed(mut self) {
        // An error means that the writer is gone, which is what is waited for.
        let _ = self.ended.wait_for(|ended| *ended).await;
        self.segments.close_index();
    }
}

/// What opening reads, before anything runs.
struct OpenParts {
    writer: Writer,
    segments: Arc<Segments>,
    snapshots: Arc<Snapshots>,
    applied: snapshot::AppliedState,
}

impl Store {
    /// Opens a data directory, or begins one: checks everything that it will rely on, cuts a torn tail, and refuses,
    /// in words, to go on without something that was acknowledged.
    pub async fn open(platform: Platform, dir: &Path) -> Result<Store, StoreError> {
        Self::open_with(platform, dir, StoreConfig::default()).await
    }

    /// The same with other sizes.
    pub async fn open_with(platform: Platform, dir: &Path, config: StoreConfig) -> Result<Store, StoreError> {
        let health = Arc::new(Health::default());
        let parts = {
            let own = platform.clone();
            let (dir, health) = (dir.to_owned(), health.clone());
            let open = move || Self::open_parts(&own, &dir, &config, health);
            platform.on_disk(open).await.ok_or(StoreError::ShuttingDown)??
        };
        let OpenParts { writer, segments, snapshots, applied } = parts;
        let (jobs, queue) = mpsc::channel(QUEUE_LEN);
        let log = LogStore::new(platform.clone(), writer.view.clone(), jobs);
        let ended = writer.spawn(queue);
        let (head_sender, head) = watch::channel(applied.fold.head.seq);
        let (fold_sender, fold) = watch::channel(Arc::new(applied.fold.clone()));
        let events = Arc::new(EventStore::new(platform.clone(), segments.clone(), head));
        let snapshot_files = Arc::new(SnapshotService::new(platform.clone(), snapshots.clone()));
        let closing = Closing { ended, segments: segments.clone() };
        let state_machine = StateMachine {
            platform,
            applied,
            pulled_upto: Seq::ZERO,
            segments,
            snapshots: snapshots.clone(),
            health: health.clone(),
            fold: fold_sender,
            head: head_sender,
        };
        Ok(Store { log, state_machine, events, fold, snapshots, snapshot_files, health, closing })
    }

    fn open_parts(
        platform: &Platform,
        dir: &Path,
        config: &StoreConfig,
        health: Arc<Health>,
    ) -> Result<OpenParts, StoreError> {
        let disk = &platform.disk;
        disk.create_dir_all(dir)?;
        let lock = lock(disk.as_ref(), dir)?;
        let (manifest, applied) = match Snapshots::load(disk.as_ref(), &dir.join("snapshots"))? {
            Some((manifest, applied)) => (Some(manifest), applied),
            None => (None, snapshot::AppliedState::default()),
        };
        let named = manifest.as_ref().map_or(&[][..], |manifest| &manifest.segments);
        let index = open_index(platform, &dir.join("index"));
        let segments = Segments::open(disk.clone(), &dir.join("segments"), index, config.event_segment_bytes, named)?;
        let segments = Arc::new(segments);
        let snapshots =
            Snapshots::new(disk.clone(), &dir.join("snapshots"), &dir.join("incoming"), segments.clone(), manifest)?;

        let (meta_path, wal_dir) = (dir.join("meta.redb"), dir.join("wal"));
        if !disk.exists(&meta_path)? && Wal::exists(disk.as_ref(), &wal_dir)? {
            return Err(MetaError::Missing { path: meta_path }.into());
        }
        let (meta, values) = Meta::open(disk.as_ref(), &meta_path)?;
        let mut view = LogView::new(config.log_cache_bytes);
        let (wal, opened) = Wal::open(disk.clone(), &wal_dir, config.wal_segment_bytes, &mut Reopen(&mut view))?;
        if let Some(purged) = values.purged {
            view.purge(purged);
        }
        view.vote = values.vote;
        view.committed = values.committed;
        if opened.torn_tail_cut {
            tracing::info!(last = ?view.last, "the write-ahead log ended in a write that never completed; cut");
        }
        nothing_acknowledged_is_missing(&values, view.last, applied.last_applied)?;
        health.wal_size(wal.disk_bytes());
        let writer = Writer {
            platform: platform.clone(),
            wal,
            meta,
            view: Arc::new(Mutex::new(view)),
            health,
            group_bytes: config.wal_group_bytes,
            saved_committed: values.committed,
            saved_committed_ns: 0,
            spare: None,
            lock,
        };
        Ok(OpenParts { writer, segments, snapshots, applied })
    }
}

/// Votes, log and snapshot fit together: what was known as committed is in the log or in the snapshot, and so is what was purged.
fn nothing_acknowledged_is_missing(
    values: &MetaValues,
    last: Option<LogId>,
    last_applied: Option<LogId>,
) -> Result<(), StoreError> {
    let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
    let known = index(last).max(index(last_applied));
    if index(values.committed) > known {
        return Err(StoreError::CommittedLost { last: known, committed: index(values.committed) });
    }
    if index(values.purged) > index(last_applied) {
        return Err(StoreError::SnapshotLost { purged: index(values.purged) });
    }
    Ok(())
}

/// One process uses a data directory.
fn lock(disk: &dyn disk::Disk, dir: &Path) -> Result<Box<dyn std::any::Any + Send + Sync>, StoreError> {
    disk.lock(&dir.join("lock")).map_err(|error| match error.source.kind() {
        io::ErrorKind::WouldBlock => StoreError::InUse { path: dir.to_owned() },
        _ => StoreError::Disk(error),
    })
}

/// sled where there is a real folder for it; it may fail, since it is an index and no more (ADR 0002).
fn open_index(platform: &Platform, dir: &Path) -> Arc<dyn EventIndex> {
    if !platform.disk.is_real() {
        return Arc::new(MemoryIndex::default());
    }
    match SledIndex::open(platform.disk.as_ref(), dir) {
        Ok(index) => Arc::new(index),
        Err(error) => {
            tracing::warn!("the event index does not open ({error}); it is kept in memory this time");
            Arc::new(MemoryIndex::default())
        }
    }
}
