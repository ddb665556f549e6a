//! A disk in memory that loses power on demand: what was not synced is gone, or half there.
//!
//! The model: a write reaches the platter in sectors of 512 bytes, in any order, until `sync_data` returns; a name
//! (created, renamed, removed) is volatile until `sync_dir` returns. At a power cut each unsynced sector is kept or
//! lost by a coin of the seed, and unsynced names are undone. Handles from before the cut are dead, as their process is.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::store::disk::Disk;
use crate::store::disk::DiskError;
use crate::store::disk::DiskFile;

const SECTOR_BYTES: usize = 512;

/// Copies share the same platter.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    platter: Arc<Mutex<Platter>>,
    hangs: Arc<watch::Sender<bool>>,
}

#[derive(Default)]
struct Platter {
    files: BTreeMap<u64, Content>,
    next_file: u64,
    names: BTreeMap<PathBuf, u64>,
    synced_names: BTreeMap<PathBuf, u64>,
    /// Paths of the files that are held open, as they were named when they were opened.
    open: Vec<PathBuf>,
    /// Rises at each power cut.
    incarnation: u64,
    /// Changes that still succeed; then the power is gone.
    changes_left: Option<u64>,
    /// The first that did not.
    failed: Option<(&'static str, PathBuf)>,
    changes: u64,
}

#[derive(Default, Clone)]
struct Content {
    bytes: Vec<u8>,
    synced: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Clone)]
enum Pending {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

impl Content {
    fn apply(bytes: &mut Vec<u8>, change: &Pending) {
        match change {
            Pending::SetLen(len) => bytes.resize(*len, 0),
            Pending::Write { offset, bytes: written } => {
                let end = offset + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset..end].copy_from_slice(written);
            }
        }
    }

    fn lose_power(&mut self, coin: &mut impl FnMut() -> bool) {
        for change in std::mem::take(&mut self.pending) {
            match change {
                Pending::SetLen(_) => {
                    if coin() {
                        Self::apply(&mut self.synced, &change);
                    }
                }
                Pending::Write { offset, bytes } => {
                    let mut at = 0;
                    while at < bytes.len() {
                        let sector_end = (offset + at) / SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES;
                        let end = (sector_end - offset).min(bytes.len());
                        if coin() {
                            let piece = Pending::Write { offset: offset + at, bytes: bytes[at..end].to_vec() };
                            Self::apply(&mut self.synced, &piece);
                        }
                        at = end;
                    }
                }
            }
        }
        self.bytes = self.synced.clone();
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    path: PathBuf,
    file: u64,
    incarnation: u64,
}

impl MemoryDisk {
    pub fn new() -> MemoryDisk {
        MemoryDisk::default()
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.platter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process that used it is gone; what it wrote is not.
    pub fn kill(&self) {
        self.platter().incarnation += 1;
    }

    /// Cuts the power and turns it on again. The same seed loses the same sectors. Says how many changes were not synced.
    pub fn power_cut(&self, seed: u64) -> u64 {
        let mut state = seed;
        let mut coin = move || {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) & 1 == 0
        };
        let mut platter = self.platter();
        self.hangs.send_replace(false);
        platter.incarnation += 1;
        platter.changes_left = None;
        platter.names = platter.synced_names.clone();
        let named: Vec<u64> = platter.names.values().copied().collect();
        platter.files.retain(|file, _| named.contains(file));
        let unsynced = platter.files.values().map(|content| content.pending.len() as u64).sum();
        platter.files.values_mut().for_each(|content| content.lose_power(&mut coin));
        unsynced
    }

    /// Another disk with the same content, all of it synced.
    pub fn copy(&self) -> MemoryDisk {
        let platter = self.platter();
        let mut files = platter.files.clone();
        for content in files.values_mut() {
            content.pending.clear();
            content.synced = content.bytes.clone();
        }
        let (names, next_file) = (platter.names.clone(), platter.next_file);
        let copied = Platter { files, next_file, synced_names: names.clone(), names, ..Platter::default() };
        MemoryDisk { platter: Arc::new(Mutex::new(copied)), hangs: Arc::default() }
    }

    /// Every file and its size in bytes.
    pub fn files(&self) -> Vec<(PathBuf, usize)> {
        let platter = self.platter();
        let size = |file| platter.files.get(file).map_or(0, |content| content.bytes.len());
        platter.names.iter().map(|(path, file)| (path.clone(), size(file))).collect()
    }

    /// Lets this many changes (writes, syncs, names) succeed; all I/O after them fails until [`Self::power_cut`].
    pub fn fail_after(&self, changes: u64) {
        self.platter().changes_left = Some(changes);
    }

    /// From now on nothing that is asked of it ends, until it goes on.
    pub fn hang(&self, hangs: bool) {
        self.hangs.send_replace(hangs);
    }

    /// Takes a coming failure back.
    pub fn mend(&self) {
        self.platter().changes_left = None;
    }

    /// Changes that were made so far, to place a failure at each of them.
    pub fn changes(&self) -> u64 {
        self.platter().changes
    }

    /// The change that met the failure first: what it was, and of which file.
    pub fn failed_at(&self) -> Option<(&'static str, PathBuf)> {
        self.platter().failed.clone()
    }

    /// What is held open: nothing of a store that was closed.
    pub fn open_files(&self) -> Vec<PathBuf> {
        self.platter().open.clone()
    }

    /// Damages one bit of a file, below all caches.
    pub fn flip_bit(&self, path: &Path, bit: u64) -> bool {
        let mut platter = self.platter();
        let Some(file) = platter.names.get(path).copied() else { return false };
        let Some(content) = platter.files.get_mut(&file) else { return false };
        let at = (bit / 8) as usize;
        for bytes in [&mut content.bytes, &mut content.synced] {
            match bytes.get_mut(at) {
                Some(byte) => *byte ^= 1 << (bit % 8),
                None => return false,
            }
        }
        true
    }

    fn change<T>(
        &self,
        operation: &'static str,
        path: &Path,
        change: impl FnOnce(&mut Platter) -> io::Result<T>,
    ) -> Result<T, DiskError> {
        let mut platter = self.platter();
        let spent = match platter.changes_left {
            Some(0) => {
                platter.failed.get_or_insert_with(|| (operation, path.to_owned()));
                Err(io::Error::other("the power is gone"))
            }
            left => {
                platter.changes_left = left.map(|left| left - 1);
                Ok(())
            }
        };
        platter.changes += 1;
        spent.and_then(|()| change(&mut platter)).map_err(|source| DiskError::new(operation, path, source))
    }

    fn handle(&self, platter: &mut Platter, path: &Path, file: u64) -> Arc<dyn DiskFile> {
        platter.open.push(path.to_owned());
        let incarnation = platter.incarnation;
        Arc::new(MemoryFile { disk: self.clone(), path: path.to_owned(), file, incarnation })
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Disk for MemoryDisk {
    fn create_dir_all(&self, _dir: &Path) -> Result<(), DiskError> {
        Ok(())
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError> {
        let mut platter = self.platter();
        match platter.names.get(path).copied() {
            Some(file) => Ok(self.handle(&mut platter, path, file)),
            None => Err(DiskError::new("open", path, not_found())),
        }
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.change("create", path, |platter| {
            let file = match platter.names.get(path) {
                Some(file) => *file,
                None => {
                    platter.next_file += 1;
                    platter.next_file
                }
            };
            platter.names.insert(path.to_owned(), file);
            let content = platter.files.entry(file).or_default();
            content.bytes.clear();
            content.pending.push(Pending::SetLen(0));
            Ok(self.handle(platter, path, file))
        })
    }

    fn preallocate(&self, path: &Path, len: u64) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.create(path)?;
        file.set_len(len)?;
        file.sync_data()?;
        Ok(file)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, DiskError> {
        let platter = self.platter();
        let content = platter.names.get(path).and_then(|file| platter.files.get(file));
        content.map(|content| content.bytes.clone()).ok_or_else(|| DiskError::new("read", path, not_found()))
    }

    fn exists(&self, path: &Path) -> Result<bool, DiskError> {
        // A folder is there when something is in it.
        Ok(self.platter().names.keys().any(|name| name.starts_with(path)))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError> {
        let platter = self.platter();
        let inside = platter.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        self.change("rename", from, |platter| {
            let file = platter.names.remove(from).ok_or_else(not_found)?;
            platter.names.insert(to.to_owned(), file);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        self.change("remove", path, |platter| platter.names.remove(path).map(drop).ok_or_else(not_found))
    }

    fn remove_dir_all(&self, dir: &Path) -> Result<(), DiskError> {
        self.change("remove folder", dir, |platter| {
            platter.names.retain(|path, _| !path.starts_with(dir));
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError> {
        self.change("sync folder", dir, |platter| {
            platter.synced_names.retain(|path, _| path.parent() != Some(dir));
            let now = platter.names.iter().filter(|(path, _)| path.parent() == Some(dir));
            let now: Vec<(PathBuf, u64)> = now.map(|(path, file)| (path.clone(), *file)).collect();
            platter.synced_names.extend(now);
            Ok(())
        })
    }

    fn lock(&self, _path: &Path) -> Result<Box<dyn Any + Send + Sync>, DiskError> {
        Ok(Box::new(()))
    }

    fn hangs(&self) -> Option<BoxFuture<'static, ()>> {
        let mut hangs = self.hangs.subscribe();
        if !*hangs.borrow_and_update() {
            return None;
        }
        // An error means that the disk is gone, and with it whoever waits.
        Some(async move { drop(hangs.wait_for(|hangs| !hangs).await) }.boxed())
    }

    fn is_real(&self) -> bool {
        false
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let open = &mut self.disk.platter().open;
        if let Some(at) = open.iter().position(|path| *path == self.path) {
            open.swap_remove(at);
        }
    }
}

impl MemoryFile {
    fn change(
        &self,
        operation: &'static str,
        change: impl FnOnce(&mut Content) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        self.disk.change(operation, &self.path, |platter| {
            if platter.incarnation != self.incarnation {
                return Err(io::Error::other("the power was cut since this file was opened"));
            }
            change(platter.files.get_mut(&self.file).ok_or_else(not_found)?)
        })
    }
}

impl DiskFile for MemoryFile {
    fn len(&self) -> Result<u64, DiskError> {
        let platter = self.disk.platter();
        let content = platter.files.get(&self.file);
        content.map(|c| c.bytes.len() as u64).ok_or_else(|| DiskError::new("size of", &self.path, not_found()))
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let platter = self.disk.platter();
        let offset = offset as usize;
        let source = platter.files.get(&self.file).and_then(|c| c.bytes.get(offset..offset + bytes.len()));
        let Some(source) = source else {
            let error = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(DiskError::new("read", &self.path, error));
        };
        bytes.copy_from_slice(source);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.change("write", |content| {
            let change = Pending::Write { offset: offset as usize, bytes: bytes.to_vec() };
            Content::apply(&mut content.bytes, &change);
            content.pending.push(change);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<(), DiskError> {
        self.change("resize", |content| {
            let change = Pending::SetLen(len as usize);
            Content::apply(&mut content.bytes, &change);
            content.pending.push(change);
            Ok(())
        })
    }

    fn sync_data(&self) -> Result<(), DiskError> {
        self.change("sync", |content| {
            for change in std::mem::take(&mut content.pending) {
                Content::apply(&mut content.synced, &change);
            }
            Ok(())
        })
    }
}
