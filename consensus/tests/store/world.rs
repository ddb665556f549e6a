//! A host's stores on a disk of the test's choice, and batches to feed them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use consensus::platform::Blocking;
use consensus::platform::Exit;
use consensus::platform::Platform;
use consensus::store::Store;
use consensus::store::StoreConfig;
use consensus::store::StoreError;
use consensus::store::memory_disk::MemoryDisk;
use consensus::types::Entry;
use consensus::types::LeaderId;
use consensus::types::LogId;
use consensus::types::Payload;
use consensus::types::Proposal;
use consensus::types::TokioRuntime;
use consensus::types::TypeConfig;
use consensus::types::Vote;
use openraft::storage::IOFlushed;
use openraft::storage::RaftLogReader;
use openraft::storage::RaftLogStorage;
use openraft::storage::RaftStateMachine;
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use statemachine::Batch;
use statemachine::HostId;
use statemachine::Stamp;
use statemachine::batch::Head;
use statemachine::batch::SealedBatch;
use statemachine::command::Actor;
use statemachine::command::IdempotencyKey;
use statemachine::decide::FEATURE_LEVEL;

pub type C = TypeConfig<TokioRuntime>;

/// Remembers why the host would have ended.
#[derive(Default)]
pub struct Fatal(Mutex<Vec<String>>);

impl Fatal {
    pub fn reasons(&self) -> Vec<String> {
        self.0.lock().expect("no test panics with it").clone()
    }
}

impl Exit for Fatal {
    fn fatal(&self, why: &dyn Display) {
        self.0.lock().expect("no test panics with it").push(why.to_string());
    }
}

/// One host's disk and what runs on it.
#[derive(Clone)]
pub struct World {
    pub platform: Platform,
    pub disk: MemoryDisk,
    pub fatal: Arc<Fatal>,
    pub dir: PathBuf,
    pub config: StoreConfig,
}

impl World {
    /// Small segments, so that a short story crosses many of them.
    pub fn new() -> World {
        let disk = MemoryDisk::new();
        let fatal = Arc::new(Fatal::default());
        let platform = Platform {
            disk: Arc::new(disk.clone()),
            exit: fatal.clone(),
            blocking: Blocking::Inline,
            ..Platform::real()
        };
        let config = StoreConfig {
            wal_segment_bytes: 2048,
            wal_group_bytes: 64 << 10,
            log_cache_bytes: 1024,
            event_segment_bytes: 1024,
        };
        World { platform, disk, fatal, dir: PathBuf::from("/data"), config }
    }

    /// After its disk was replaced by another: opens that one.
    pub fn on_its_disk(mut self) -> World {
        self.platform.disk = Arc::new(self.disk.clone());
        self
    }

    pub async fn open(&self) -> Result<Store, StoreError> {
        Store::open_with(self.platform.clone(), &self.dir, self.config.clone()).await
    }
}

/// What became of so many damages or power cuts.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub detected: usize,
    pub harmless: usize,
    pub wrong: usize,
}

/// By the part of the directory that they hit.
#[derive(Default)]
pub struct Tallies(BTreeMap<String, Tally>);

impl Tallies {
    pub fn of(&mut self, path: &Path) -> &mut Tally {
        self.0.entry(part(path)).or_default()
    }

    pub fn print(&self, what: &str) {
        println!("{what:<12} {:>7} {:>9} {:>9} {:>6}", "cases", "detected", "harmless", "wrong");
        for (part, Tally { detected, harmless, wrong }) in &self.0 {
            println!("{part:<12} {:>7} {detected:>9} {harmless:>9} {wrong:>6}", detected + harmless + wrong);
        }
    }
}

/// The folder below the data directory, or the file in it.
fn part(path: &Path) -> String {
    let below = path.strip_prefix("/data").unwrap_or(path);
    below.components().next().map_or("data".into(), |part| part.as_os_str().to_string_lossy().into_owned())
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId::new(term, 1).to_committed(), index)
}

pub fn vote(term: u64) -> Vote {
    Vote { leader_id: LeaderId::new(term, 1), committed: true }
}

pub fn entry(term: u64, index: u64, batches: Vec<SealedBatch>) -> Entry {
    Entry { log_id: log_id(term, index), payload: Payload::Normal(Proposal::new(batches)) }
}

pub fn blank(term: u64, index: u64) -> Entry {
    Entry { log_id: log_id(term, index), payload: Payload::Blank }
}

/// Seals batches one after the other, as a decider would.
#[derive(Clone, Default)]
pub struct Chain {
    pub head: Head,
}

impl Chain {
    pub fn next(&mut self) -> SealedBatch {
        self.seal(Vec::new())
    }

    /// The batch with which a site begins.
    pub fn born(&mut self) -> SealedBatch {
        let (site, ca) = (statemachine::SiteId(Default::default()), statemachine::state::Fingerprint([1; 32]));
        let born =
            statemachine::event::SiteInitialised { site, name: "site".to_owned(), ca, feature_level: FEATURE_LEVEL };
        self.seal(vec![born.into()])
    }

    pub fn seal(&mut self, events: Vec<statemachine::Event>) -> SealedBatch {
        let seq = self.head.seq.next();
        let batch = Batch {
            previous: self.head,
            stamp: Stamp { at_ms: seq.0, wall_ms: seq.0 },
            actor: Actor::Root(HostId(1)),
            origin: HostId(1),
            // The state remembers keys, so each batch changes it.
            idempotency: Some(IdempotencyKey { key: format!("key {seq}"), body_hash: [seq.0 as u8; 32] }),
            created: None,
            events,
        };
        let sealed = batch.seal();
        self.head = Head { seq, hash: sealed.hash() };
        sealed
    }

    /// Entries `indexes` of `term`, two batches each.
    pub fn entries(&mut self, term: u64, indexes: std::ops::Range<u64>) -> Vec<Entry> {
        let mut entry = |index| {
            let proposal = Proposal::new(vec![self.next(), self.next()]);
            Entry { log_id: log_id(term, index), payload: Payload::Normal(proposal) }
        };
        indexes.map(&mut entry).collect()
    }
}

/// Hands entries to the log; the future that is returned ends when they are durable.
pub async fn begin_append(
    store: &mut Store,
    entries: Vec<Entry>,
) -> std::io::Result<impl Future<Output = std::io::Result<()>> + use<>> {
    let (done, is_done) = C::oneshot();
    let callback: IOFlushed<C> = IOFlushed::signal(done);
    RaftLogStorage::<C>::append(&mut store.log, entries, callback).await?;
    Ok(async move { is_done.await.map_err(|_| std::io::Error::other("the writer has stopped"))? })
}

/// Appends and waits until the entries are durable.
pub async fn append(store: &mut Store, entries: Vec<Entry>) -> std::io::Result<()> {
    begin_append(store, entries).await?.await
}

pub async fn save_vote(store: &mut Store, term: u64) -> std::io::Result<()> {
    RaftLogStorage::<C>::save_vote(&mut store.log, &vote(term)).await
}

pub async fn truncate(store: &mut Store, last: Option<LogId>) -> std::io::Result<()> {
    RaftLogStorage::<C>::truncate_after(&mut store.log, last).await
}

pub async fn purge(store: &mut Store, upto: LogId) -> std::io::Result<()> {
    RaftLogStorage::<C>::purge(&mut store.log, upto).await
}

pub async fn apply(store: &mut Store, entries: Vec<Entry>) -> std::io::Result<()> {
    let items = futures::stream::iter(entries.into_iter().map(|entry| Ok((entry, None))));
    RaftStateMachine::<C>::apply(&mut store.state_machine, items).await
}

pub async fn build_snapshot(store: &mut Store) -> std::io::Result<consensus::types::Snapshot> {
    let mut builder = RaftStateMachine::<C>::get_snapshot_builder(&mut store.state_machine).await;
    openraft::storage::RaftSnapshotBuilder::<C>::build_snapshot(&mut builder).await
}

/// All entries that the log holds.
pub async fn all_entries(store: &Store) -> Vec<Entry> {
    let mut reader = store.log.reader();
    RaftLogReader::<C>::try_get_log_entries(&mut reader, ..).await.expect("the log is readable")
}

/// Seqs of all events that are served, read in small steps from the oldest.
pub async fn all_seqs(store: &Store) -> Vec<u64> {
    let mut after = statemachine::Seq(store.events.oldest().0 - 1);
    let mut seqs = Vec::new();
    loop {
        let batches = store.events.read(after, 3, 600).await.expect("events are readable");
        let Some(last) = batches.last() else { return seqs };
        after = last.seq;
        for batch in batches {
            assert_eq!(batch.sealed.previous().map(|head| head.seq.next()), Ok(batch.seq), "a batch is its seq");
            seqs.push(batch.seq.0);
        }
    }
}

/// Closes the stores as a host does that stops.
pub async fn close(store: Store) {
    let closing = store.closing.clone();
    drop(store);
    closing.closed().await;
}
