//! Vote, last committed id and purge marker, in `redb` with two-phase commit.
//!
//! Two-phase, because redb's default commit opened with an acknowledged commit missing after single bit flips (hazard
//! C11). Each value is a record of ours with its own checksum, since redb checks nothing while it reads; and a whole
//! check is made at each start.

use std::fmt;
use std::io;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use redb::Database;
use redb::Durability;
use redb::ReadableDatabase;
use redb::StorageBackend;
use redb::TableDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::codec;
use statemachine::codec::RecordKind;
use thiserror::Error;

use crate::store::disk::Disk;
use crate::store::disk::DiskError;
use crate::store::disk::DiskFile;
use crate::types::LogId;
use crate::types::Vote;

const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// Three small values: redb's default cache of 1 GiB would be absurd.
const CACHE_BYTES: usize = 256 << 10;
const MAX_VALUE_LEN: usize = 4096;

/// Version of the values below.
const META_FORMAT: u16 = 1;
const FORMAT: &str = "format";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";

#[derive(Debug, Error)]
pub enum MetaError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(
        "{path} (vote and log markers) is damaged: {why}. This host may have forgotten a vote: \
         remove it from the cluster and join it again with an empty data directory",
        path = path.display()
    )]
    Damaged { path: PathBuf, why: String },
    #[error("{path} has layout version {format}, unknown to this build; upgrade this host", path = path.display())]
    Format { path: PathBuf, format: u16 },
    #[error(
        "{path} is missing while the write-ahead log beside it is not: this host has forgotten its votes. \
         Remove it from the cluster and join it again with an empty data directory",
        path = path.display()
    )]
    Missing { path: PathBuf },
    #[error("{path}: cannot write {key}: {why}", path = path.display())]
    Write { path: PathBuf, key: &'static str, why: String },
}

pub struct Meta {
    database: Database,
    path: PathBuf,
}

/// What was stored when the host stopped.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct MetaValues {
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
}

impl Meta {
    /// Opens or creates the file, checks all of it, and reads the values.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<(Meta, MetaValues), MetaError> {
        if disk.exists(path)? {
            return Self::open_guarded(disk.open(path)?, path);
        }
        // Made under another name: a power cut while redb lays out a new file leaves one that it cannot open.
        let staged = path.with_extension("new");
        let (meta, values) = Self::open_guarded(disk.create(&staged)?, path)?;
        meta.save(FORMAT, &META_FORMAT)?;
        disk.rename(&staged, path)?;
        if let Some(dir) = path.parent() {
            disk.sync_dir(dir)?;
        }
        Ok((meta, values))
    }

    /// A damaged file makes redb panic in places (measured): that is damage too, not a crash.
    fn open_guarded(file: Arc<dyn DiskFile>, path: &Path) -> Result<(Meta, MetaValues), MetaError> {
        let opened = catch_unwind(AssertUnwindSafe(|| Self::open_checked(file, path)));
        opened.unwrap_or_else(|_| Err(damaged(path, "redb could not make sense of it")))
    }

    fn open_checked(file: Arc<dyn DiskFile>, path: &Path) -> Result<(Meta, MetaValues), MetaError> {
        let backend = Backend(file);
        let mut database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)
            .map_err(|error| damaged(path, error))?;
        match database.check_integrity() {
            Ok(true) => {}
            Ok(false) => return Err(damaged(path, "its trees did not match their checksums")),
            Err(error) => return Err(damaged(path, error)),
        }
        let meta = Meta { database, path: path.to_owned() };
        if let Some(format) = meta.load::<u16>(FORMAT)?.filter(|format| *format != META_FORMAT) {
            return Err(MetaError::Format { path: path.to_owned(), format });
        }
        let values =
            MetaValues { vote: meta.load(VOTE)?, committed: meta.load(COMMITTED)?, purged: meta.load(PURGED)? };
        Ok((meta, values))
    }

    /// Durable on return.
    pub fn save_vote(&self, vote: &Vote) -> Result<(), MetaError> {
        self.save(VOTE, vote)
    }

    /// Durable on return. Called lazily: the truth about what is committed is with the quorum.
    pub fn save_committed(&self, committed: &LogId) -> Result<(), MetaError> {
        self.save(COMMITTED, committed)
    }

    /// Durable on return.
    pub fn save_purged(&self, purged: &LogId) -> Result<(), MetaError> {
        self.save(PURGED, purged)
    }

    fn save<T: Serialize>(&self, key: &'static str, value: &T) -> Result<(), MetaError> {
        let record = codec::seal_value(RecordKind::RaftMeta, value);
        let failed = |why: String| MetaError::Write { path: self.path.clone(), key, why };
        let mut transaction = self.database.begin_write().map_err(|e| failed(e.to_string()))?;
        transaction.set_durability(Durability::Immediate).map_err(|e| failed(e.to_string()))?;
        transaction.set_two_phase_commit(true);
        {
            let mut table = transaction.open_table(TABLE).map_err(|e| failed(e.to_string()))?;
            table.insert(key, record.as_slice()).map_err(|e| failed(e.to_string()))?;
        }
        transaction.commit().map_err(|e| failed(e.to_string()))
    }

    fn load<T: DeserializeOwned>(&self, key: &'static str) -> Result<Option<T>, MetaError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_read().map_err(|error| damaged(path, error))?;
        let table = match transaction.open_table(TABLE) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(damaged(path, error)),
        };
        let Some(record) = table.get(key).map_err(|error| damaged(path, error))? else {
            return Ok(None);
        };
        let value = codec::open_value(RecordKind::RaftMeta, record.value(), MAX_VALUE_LEN);
        value.map(Some).map_err(|error| damaged(path, format!("{key}: {error}")))
    }
}

fn damaged(path: &Path, why: impl fmt::Display) -> MetaError {
    MetaError::Damaged { path: path.to_owned(), why: why.to_string() }
}

/// redb over our disk, so that a simulated power cut reaches it too.
struct Backend(Arc<dyn DiskFile>);

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Backend")
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len()?)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        Ok(self.0.read_at(offset, out)?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(self.0.set_len(len)?)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(self.0.sync_data()?)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Ok(self.0.write_at(offset, data)?)
    }
}
