//! Where the files of a disk come from: the process opens them by their paths, or they were handed to it.
//!
//! A process in its sandbox opens nothing. It has the files that it opened before it went in, or that came with a plug, and keeps them through
//! resets of the guest. What it lets go of it has to ask for, and hostd has it handed over:
//!
//! ```text
//!            the lease ends, the disk is unplugged, another host still writes it
//!   Here ------------------------------------------------------------------------> Gone
//!     ^                                                                              |  the lease is confirmed,
//!     |  `disk_files`                                                                |  the guest is to run here
//!     +-------------------------------- Wanted <-------------------------------------+
//! ```
//!
//! Files that nobody wants are refused: the disk may not be this guest's any more (S2).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{OFlags, fcntl_getfl};
use vmm_control::DiskConfig;

use super::disk::FileFacts;
use crate::virtio::locked;

/// Told that a disk wants its files. Must not wait.
pub type OnWant = Arc<dyn Fn(&str) + Send + Sync>;

/// Why files that were handed over were not taken. They are closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilesRefusal {
    #[error("disk {disk} does not want its files: it has them, or its guest may not run now")]
    NotWanted { disk: String },
    #[error("disk {disk} has {expected} files, and {came} came")]
    Count { disk: String, expected: usize, came: usize },
    #[error("disk {disk} is written, and its file was opened for reading only")]
    ReadOnly { disk: String },
}

/// The files of one disk, for as long as the guest has it.
pub enum DiskFiles {
    /// The process opens them whenever it wants to.
    ByPath,
    Handed(HandedFiles),
}

pub struct HandedFiles {
    disk: String,
    layers: usize,
    writes: bool,
    held: Mutex<Held>,
    on_want: OnWant,
}

#[derive(Default)]
struct Held {
    /// Empty when they are gone.
    files: Vec<File>,
    wanted: bool,
    /// Of the disk, when it was last looked at.
    facts: Option<FileFacts>,
}

impl DiskFiles {
    pub fn by_path() -> Arc<Self> {
        Arc::new(Self::ByPath)
    }

    /// Those of a process that opens nothing, which may be for looking only.
    pub fn handed(config: &DiskConfig, files: Vec<OwnedFd>, on_want: OnWant) -> Result<Arc<Self>, FilesRefusal> {
        let handed = HandedFiles {
            disk: config.id.clone(),
            layers: config.backing.len() + 1,
            writes: !config.read_only,
            held: Mutex::default(),
            on_want,
        };
        locked(&handed.held).files = handed.counted(files)?;
        Ok(Arc::new(Self::Handed(handed)))
    }

    fn held(&self) -> Option<MutexGuard<'_, Held>> {
        match self {
            Self::ByPath => None,
            Self::Handed(handed) => Some(locked(&handed.held)),
        }
    }

    /// A file of the disk, of the caller's own: 0 is the disk's, the others are those under it. `None` when they are gone.
    pub fn open(&self, layer: usize, path: &Path, write: bool) -> io::Result<Option<File>> {
        match self.held() {
            None => OpenOptions::new().read(true).write(write).open(path).map(Some),
            Some(held) => held.files.get(layer).map(File::try_clone).transpose(),
        }
    }

    /// Whether the disk can be opened now.
    pub fn are_here(&self) -> bool {
        self.held().is_none_or(|held| !held.files.is_empty())
    }

    /// From now on they are taken, if they are not here.
    pub fn want(&self) {
        let Self::Handed(handed) = self else {
            return;
        };
        {
            let mut held = locked(&handed.held);
            held.wanted = held.files.is_empty();
            if !held.wanted {
                return;
            }
        }
        (handed.on_want)(&handed.disk);
    }

    pub fn is_wanted(&self) -> bool {
        self.held().is_some_and(|held| held.wanted)
    }

    /// Takes files that are wanted.
    pub fn hand(&self, files: Vec<OwnedFd>) -> Result<(), FilesRefusal> {
        match self {
            // Nobody gets here: no disk of such a process wants any.
            Self::ByPath => Err(FilesRefusal::NotWanted { disk: String::new() }),
            Self::Handed(handed) => handed.take(files),
        }
    }

    /// Closes them. What a disk has open is its own affair.
    pub fn let_go(&self) {
        if let Some(mut held) = self.held() {
            held.files.clear();
            held.wanted = false;
        }
    }

    /// What was found when they were here.
    pub fn facts(&self) -> Option<FileFacts> {
        self.held()?.facts
    }

    pub fn note(&self, facts: FileFacts) {
        if let Some(mut held) = self.held() {
            held.facts = Some(facts);
        }
    }
}

impl HandedFiles {
    fn take(&self, files: Vec<OwnedFd>) -> Result<(), FilesRefusal> {
        let files = self.counted(files)?;
        let may_write = |file: &File| fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        if self.writes && !files.first().is_some_and(may_write) {
            return Err(FilesRefusal::ReadOnly { disk: self.disk.clone() });
        }
        let mut held = locked(&self.held);
        if !held.wanted {
            return Err(FilesRefusal::NotWanted { disk: self.disk.clone() });
        }
        held.wanted = false;
        held.files = files;
        Ok(())
    }

    fn counted(&self, files: Vec<OwnedFd>) -> Result<Vec<File>, FilesRefusal> {
        let (expected, came) = (self.layers, files.len());
        match came == expected {
            true => Ok(files.into_iter().map(File::from).collect()),
            false => Err(FilesRefusal::Count { disk: self.disk.clone(), expected, came }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vmm_control::open::{Access, open_files};

    use super::*;

    fn disk(dir: &tempfile::TempDir) -> DiskConfig {
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 4096]).unwrap();
        DiskConfig { id: "data".to_owned(), path, ..DiskConfig::default() }
    }

    #[test]
    fn files_are_taken_when_they_are_wanted_and_at_no_other_time() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir);
        let wants = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&wants);
        let on_want: OnWant = Arc::new(move |disk| {
            assert_eq!(disk, "data");
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let usable = || open_files(&disk, Access::Use).unwrap();
        let files = DiskFiles::handed(&disk, usable(), on_want).unwrap();
        assert!(files.are_here() && files.open(0, Path::new("/nowhere"), true).unwrap().is_some());
        let not_wanted = FilesRefusal::NotWanted { disk: "data".to_owned() };
        assert_eq!(files.hand(usable()), Err(not_wanted.clone()), "it has them");
        files.let_go();
        assert!(files.open(0, &disk.path, true).unwrap().is_none(), "a path is not even looked at");
        assert_eq!(files.hand(usable()), Err(not_wanted.clone()), "nobody asked for them");
        files.want();
        assert!(!files.are_here() && files.is_wanted());
        assert_eq!(wants.load(Ordering::SeqCst), 1);
        let looked = open_files(&disk, Access::Look).unwrap();
        assert_eq!(files.hand(looked), Err(FilesRefusal::ReadOnly { disk: "data".to_owned() }));
        let two = usable().into_iter().chain(usable()).collect();
        assert_eq!(files.hand(two), Err(FilesRefusal::Count { disk: "data".to_owned(), expected: 1, came: 2 }));
        files.hand(usable()).unwrap();
        assert!(files.are_here() && !files.is_wanted());
        files.let_go();
        files.want();
        files.let_go();
        assert_eq!(files.hand(usable()), Err(not_wanted), "the lease ended once more before they came");
    }
}
