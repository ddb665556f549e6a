//! Two promises of DESIGN §5, *Start*: one vmm a VM (a lock held for life, hazard H20), and an epoch is started at most once
//! (a marker that is on disk before the guest's first instruction).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, flock, fstat};

use crate::sys;

/// The lock that a vmm takes itself when nobody handed one over.
const OWN_LOCK_FILE: &str = "vmm.lock";

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("descriptor {fd}, said to hold the VM's lock, is not open")]
    NoLockFd {
        fd: RawFd,
        #[source]
        source: io::Error,
    },
    #[error("descriptor {fd}, said to hold the VM's lock, is not a file")]
    NotAFile { fd: RawFd },
    #[error("another process holds the VM's lock: this VM has a vmm already")]
    Locked,
    #[error("cannot lock {what}")]
    Lock {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("epoch {epoch} was started before (marker {path}); ask for a new permit")]
    AlreadyStarted { epoch: u64, path: PathBuf },
    #[error("cannot write the marker {path}; without it the guest must not start")]
    Marker {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Held until the process ends.
#[derive(Debug)]
pub struct VmLock {
    _file: OwnedFd,
}

impl VmLock {
    /// Takes over hostd's descriptor and makes sure that it holds the lock.
    pub fn inherit(fd: RawFd) -> Result<Self, StartError> {
        let file = sys::inherit_fd(fd).map_err(|source| StartError::NoLockFd { fd, source })?;
        let kind = fstat(&file).map(|s| FileType::from_raw_mode(s.st_mode));
        if kind != Ok(FileType::RegularFile) {
            return Err(StartError::NotAFile { fd });
        }
        Self::lock(file, format!("descriptor {fd}"))
    }

    /// Takes the lock in the run directory, for a vmm that was started by hand.
    pub fn take(run_dir: &Path) -> Result<Self, StartError> {
        let path = run_dir.join(OWN_LOCK_FILE);
        let what = path.display().to_string();
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| StartError::Lock { what: what.clone(), source })?;
        Self::lock(file.into(), what)
    }

    /// On a descriptor that shares hostd's lock this succeeds because it is ours; on any other only when it is free.
    fn lock(file: OwnedFd, what: String) -> Result<Self, StartError> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Locked),
            Err(source) => Err(StartError::Lock { what, source: source.into() }),
        }
    }
}

/// Uses the epoch up. After this returns, no process ever starts it again, whatever happens to the host.
pub fn mark_started(path: &Path, epoch: u64) -> Result<(), StartError> {
    let failed = |source| StartError::Marker { path: path.to_owned(), source };
    let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(StartError::AlreadyStarted { epoch, path: path.to_owned() });
        }
        Err(source) => return Err(failed(source)),
    };
    file.sync_all().map_err(failed)?;
    // The name is durable only when its directory is.
    let directory = path.parent().unwrap_or(Path::new("/"));
    File::open(directory).and_then(|d| d.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn an_epoch_starts_once() {
        let dir = tempfile::tempdir().unwrap();
        let marker = dir.path().join("41");
        mark_started(&marker, 41).unwrap();
        assert!(matches!(mark_started(&marker, 41), Err(StartError::AlreadyStarted { epoch: 41, .. })));
        let nowhere = dir.path().join("gone").join("42");
        assert!(matches!(mark_started(&nowhere, 42), Err(StartError::Marker { .. })));
    }

    #[test]
    fn a_vm_has_one_vmm() {
        let dir = tempfile::tempdir().unwrap();
        let first = VmLock::take(dir.path()).unwrap();
        assert!(matches!(VmLock::take(dir.path()), Err(StartError::Locked)));
        drop(first);
        VmLock::take(dir.path()).unwrap();
    }

    #[test]
    fn hostds_lock_is_taken_over_and_a_strangers_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::create(dir.path().join("lock")).unwrap();
        let hostd = open();
        flock(&hostd, FlockOperation::LockExclusive).unwrap();
        let inherited = hostd.try_clone().unwrap().into_raw_fd();
        VmLock::inherit(inherited).unwrap();
        assert!(matches!(VmLock::inherit(open().into_raw_fd()), Err(StartError::Locked)));
        let directory = File::open(dir.path()).unwrap().into_raw_fd();
        assert!(matches!(VmLock::inherit(directory), Err(StartError::NotAFile { .. })));
    }
}
