//! The run directory of one VM on this host, `<run_dir>/vm/<vm>`: `lock`, `config.json`, `vmm.log`, and `migration` while a guest is taken
//! in. Below it, `vmm` is the process's own, which is another user: `control.sock`, `console.log`, `exit.json`. Nothing that root opens
//! to write lies there.
//!
//! The lock file is the truth about life: its `flock` is held by the vmm from before it exists until after it is gone, through a
//! descriptor that it inherits (hazard H20). So the file itself is never removed while somebody may hold it.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::fs::flock;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use thiserror::Error;
use vmm_control::ExitReport;
use vmm_control::VmmConfig;

use super::user::GuestUser;

#[derive(Debug, Error)]
pub enum RunDirError {
    #[error("cannot {operation} {path}: {source}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RunDirError + 'a {
    move |source| RunDirError::Io { operation, path: path.to_owned(), source }
}

/// The VM's lock, held. Dropping it frees the lock unless a vmm has inherited it.
#[derive(Debug)]
pub struct Lock {
    pub file: File,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// `vms` is `<run_dir>/vm`.
    pub fn of(vms: &Path, vm: VmId) -> RunDir {
        RunDir { path: vms.join(vm.to_string()) }
    }

    /// The VMs that have a run directory.
    pub fn list(vms: &Path) -> Result<Vec<VmId>, RunDirError> {
        let entries = match fs::read_dir(vms) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", vms)(error)),
        };
        let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        Ok(entries.filter_map(name).collect())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the process writes.
    pub fn of_process(&self) -> PathBuf {
        self.path.join("vmm")
    }

    pub fn control_socket(&self) -> PathBuf {
        self.of_process().join("control.sock")
    }

    pub fn config_file(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// The seed of the guest's first boot, as a disk.
    pub fn seed_file(&self) -> PathBuf {
        self.path.join("seed.img")
    }

    pub fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    fn exit_report(&self) -> PathBuf {
        ExitReport::path(&self.of_process())
    }

    fn lock_file(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Others may pass through it, to what is theirs.
    pub fn create(&self) -> Result<(), RunDirError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o711).create(&self.path).map_err(failed("create", &self.path))
    }

    /// Makes the directory of the process, for the user that it will be.
    pub fn create_for(&self, user: Option<GuestUser>) -> Result<(), RunDirError> {
        let path = self.of_process();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&path).map_err(failed("create", &path))?;
        user.map_or(Ok(()), |user| user.own(&path)).map_err(failed("change the owner of", &path))
    }

    /// Takes the lock; `None` when a process holds it. The directory must exist.
    pub fn try_lock(&self) -> Result<Option<Lock>, RunDirError> {
        let path = self.lock_file();
        let mut options = OpenOptions::new();
        let opened = options.create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = opened.map_err(failed("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed("lock", &path)(error.into())),
        }
    }

    /// Does a process hold the lock? A directory or file that is not there is held by nobody.
    pub fn is_locked(&self) -> Result<bool, RunDirError> {
        if !self.lock_file().exists() {
            return Ok(false);
        }
        Ok(self.try_lock()?.is_none())
    }

    /// Is there while the process here takes in a guest: it holds the migration's number.
    fn migration_file(&self) -> PathBuf {
        self.path.join("migration")
    }

    /// The migration by which the guest of the last vmm here comes, if it does not run yet as far as this directory knows.
    pub fn incoming(&self) -> Option<MigrationId> {
        fs::read_to_string(self.migration_file()).ok()?.trim().parse().ok()
    }

    /// The configuration that the last vmm here was started with; `None` when there is none that can be read.
    pub fn config(&self) -> Option<VmmConfig> {
        let path = self.config_file();
        match self.incoming() {
            Some(_) => VmmConfig::load_incoming(&path).ok(),
            None => VmmConfig::load(&path).ok(),
        }
    }

    /// Writes the configuration, whole or not at all, over what an earlier epoch left. Under the lock.
    pub fn prepare(&self, _lock: &Lock, config: &VmmConfig, incoming: Option<MigrationId>) -> Result<(), RunDirError> {
        for stale in [self.control_socket(), self.exit_report(), self.migration_file()] {
            remove(&stale)?;
        }
        if let Some(migration) = incoming {
            let path = self.migration_file();
            fs::write(&path, migration.to_string()).map_err(failed("write", &path))?;
        }
        self.write_config(config)
    }

    /// Writes the seed of a first boot, before the configuration that names it. Under the lock.
    pub fn write_seed(&self, _lock: &Lock, image: &[u8]) -> Result<(), RunDirError> {
        let path = self.seed_file();
        fs::write(&path, image).map_err(failed("write", &path))
    }

    /// The guest that was taken in runs: the configuration names its permit.
    pub fn settle(&self, config: &VmmConfig) -> Result<(), RunDirError> {
        self.write_config(config)?;
        remove(&self.migration_file())
    }

    fn write_config(&self, config: &VmmConfig) -> Result<(), RunDirError> {
        let path = self.config_file();
        let text =
            serde_json::to_vec_pretty(config).map_err(|error| failed("encode", &path)(io::Error::other(error)))?;
        let new = self.path.join(".config.json.new");
        fs::write(&new, text).map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("rename", &path))
    }

    /// Clears what an epoch left, so that the directory names no epoch any more. Logs stay for whoever wants to read them,
    /// unless the VM itself is gone.
    pub fn clear(&self, _lock: &Lock, vm_exists: bool) -> Result<(), RunDirError> {
        for left in
            [self.control_socket(), self.config_file(), self.exit_report(), self.migration_file(), self.seed_file()]
        {
            remove(&left)?;
        }
        match vm_exists {
            true => Ok(()),
            false => fs::remove_dir_all(&self.path).map_err(failed("remove", &self.path)),
        }
    }

    /// The last words of the vmm's own log, for a process that ended without a report.
    pub fn last_words(&self) -> String {
        let text = fs::read(self.vmm_log()).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(1024)..];
        let tail = String::from_utf8_lossy(tail);
        tail.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
    }
}

fn remove(path: &Path) -> Result<(), RunDirError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}
