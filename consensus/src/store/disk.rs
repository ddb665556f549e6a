//! The file operations that the stores are built from, each with its durability said.
//!
//! Start at [`Disk`]. [`RealDisk`] is the machine's; [`crate::store::memory_disk::MemoryDisk`] loses on a power cut
//! whatever was not synced.

use std::any::Any;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use thiserror::Error;

/// Zeros are written in pieces of this size when a file is preallocated.
const ZERO_CHUNK_BYTES: usize = 256 << 10;

#[derive(Debug, Error)]
#[error("disk: {operation} {path}: {source}", path = path.display())]
pub struct DiskError {
    pub operation: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl DiskError {
    pub fn new(operation: &'static str, path: &Path, source: io::Error) -> DiskError {
        DiskError { operation, path: path.to_owned(), source }
    }
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> io::Error {
        io::Error::new(error.source.kind(), error)
    }
}

pub trait Disk: Send + Sync + 'static {
    fn create_dir_all(&self, dir: &Path) -> Result<(), DiskError>;
    /// Opens a file that exists, for reading and writing.
    fn open(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// Creates a file, or empties the one that is there. The name is durable after [`Disk::sync_dir`].
    fn create(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// Creates a file of `len` zero bytes whose blocks are written and synced, so that a later write into it changes
    /// no metadata and one `fdatasync` costs one device flush. The name is durable after [`Disk::sync_dir`].
    fn preallocate(&self, path: &Path, len: u64) -> Result<Arc<dyn DiskFile>, DiskError>;
    fn read(&self, path: &Path) -> Result<Vec<u8>, DiskError>;
    fn exists(&self, path: &Path) -> Result<bool, DiskError>;
    /// Names of the files and folders in a folder, sorted.
    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError>;
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError>;
    fn remove(&self, path: &Path) -> Result<(), DiskError>;
    /// Removes a folder and all in it; fine when it is not there.
    fn remove_dir_all(&self, dir: &Path) -> Result<(), DiskError>;
    /// Makes created, renamed and removed names in this folder durable.
    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError>;
    /// Takes a lock on a file that lasts until the value is dropped; an error when another process holds it.
    fn lock(&self, path: &Path) -> Result<Box<dyn Any + Send + Sync>, DiskError>;
    /// When this disk hangs: what ends when it goes on. The machine's own disk hangs in the call itself, on a thread of the pool;
    /// a simulated one cannot block its only thread.
    fn hangs(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }
    /// The paths are the operating system's: sled, which opens files by itself, can use them.
    fn is_real(&self) -> bool;
}

pub trait DiskFile: Send + Sync + 'static {
    fn len(&self) -> Result<u64, DiskError>;
    fn is_empty(&self) -> Result<bool, DiskError> {
        Ok(self.len()? == 0)
    }
    /// Fills `bytes` from `offset`; an error when the file ends before.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError>;
    /// Hands bytes to the operating system. Durable after [`DiskFile::sync_data`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    fn set_len(&self, len: u64) -> Result<(), DiskError>;
    /// `fdatasync`: everything written so far survives a power cut when this returns.
    fn sync_data(&self) -> Result<(), DiskError>;
}

/// Replaces a small file so that a power cut leaves the old one or the new one.
pub fn write_atomically(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let staged = path.with_extension("tmp");
    let file = disk.create(&staged)?;
    file.write_at(0, bytes)?;
    file.sync_data()?;
    disk.rename(&staged, path)?;
    match path.parent() {
        Some(dir) => disk.sync_dir(dir),
        None => Ok(()),
    }
}

/// The machine's own disk.
#[derive(Debug, Clone, Copy)]
pub struct RealDisk;

struct RealFile {
    file: File,
    path: PathBuf,
}

impl RealDisk {
    fn with(path: &Path, file: File) -> Arc<dyn DiskFile> {
        Arc::new(RealFile { file, path: path.to_owned() })
    }
}

impl Disk for RealDisk {
    fn create_dir_all(&self, dir: &Path) -> Result<(), DiskError> {
        std::fs::create_dir_all(dir).map_err(|e| DiskError::new("create folder", dir, e))?;
        match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.sync_dir(parent),
            _ => Ok(()),
        }
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self::with(path, file.map_err(|e| DiskError::new("open", path, e))?))
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        Ok(Self::with(path, file.map_err(|e| DiskError::new("create", path, e))?))
    }

    fn preallocate(&self, path: &Path, len: u64) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.create(path)?;
        let zeros = vec![0; ZERO_CHUNK_BYTES];
        let mut offset = 0;
        while offset < len {
            let chunk = (len - offset).min(ZERO_CHUNK_BYTES as u64);
            file.write_at(offset, &zeros[..chunk as usize])?;
            offset += chunk;
        }
        file.sync_data()?;
        Ok(file)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, DiskError> {
        std::fs::read(path).map_err(|e| DiskError::new("read", path, e))
    }

    fn exists(&self, path: &Path) -> Result<bool, DiskError> {
        path.try_exists().map_err(|e| DiskError::new("look for", path, e))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError> {
        let error = |e| DiskError::new("list", dir, e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(error)? {
            names.push(entry.map_err(error)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        std::fs::rename(from, to).map_err(|e| DiskError::new("rename", from, e))
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        std::fs::remove_file(path).map_err(|e| DiskError::new("remove", path, e))
    }

    fn remove_dir_all(&self, dir: &Path) -> Result<(), DiskError> {
        match std::fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(DiskError::new("remove folder", dir, e)),
            _ => Ok(()),
        }
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError> {
        let folder = File::open(dir).map_err(|e| DiskError::new("open folder", dir, e))?;
        folder.sync_all().map_err(|e| DiskError::new("sync folder", dir, e))
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn Any + Send + Sync>, DiskError> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| DiskError::new("open", path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(file)),
            Err(error) => Err(DiskError::new("lock", path, error.into())),
        }
    }

    fn is_real(&self) -> bool {
        true
    }
}

impl DiskFile for RealFile {
    fn len(&self) -> Result<u64, DiskError> {
        let metadata = self.file.metadata().map_err(|e| DiskError::new("size of", &self.path, e))?;
        Ok(metadata.len())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(bytes, offset).map_err(|e| DiskError::new("read", &self.path, e))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, offset).map_err(|e| DiskError::new("write", &self.path, e))
    }

    fn set_len(&self, len: u64) -> Result<(), DiskError> {
        self.file.set_len(len).map_err(|e| DiskError::new("resize", &self.path, e))
    }

    fn sync_data(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::new("sync", &self.path, e))
    }
}
