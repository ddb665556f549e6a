//! Marks of used epochs, `<data_dir>/marks/<vm>/<epoch>`, on a disk that survives a reboot.
//!
//! A mark says: this epoch was started on this host, or may have been, or its exit was reported. It is never started (again).
//! The vmm makes it before the guest's first instruction; hostd makes it before it reports an exit that came without one.

use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use thiserror::Error;

use super::user::GuestUser;

/// Marks kept for a VM. Older epochs can never come back: each grant rests on a state in which they were released.
const KEPT: usize = 8;

#[derive(Debug, Error)]
#[error("cannot {operation} {path}: {source}")]
pub struct MarkError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> MarkError + 'a {
    move |source| MarkError { operation, path: path.to_owned(), source }
}

#[derive(Debug, Clone)]
pub struct Marks {
    dir: PathBuf,
}

impl Marks {
    /// `dir` is `<data_dir>/marks`.
    pub fn at(dir: impl Into<PathBuf>) -> Marks {
        Marks { dir: dir.into() }
    }

    pub fn path(&self, vm: VmId, epoch: Epoch) -> PathBuf {
        self.dir.join(vm.to_string()).join(epoch.to_string())
    }

    pub fn contains(&self, vm: VmId, epoch: Epoch) -> bool {
        // Whoever makes it may be another user: what is there is not followed.
        self.path(vm, epoch).symlink_metadata().is_ok()
    }

    /// All marks of this host.
    pub fn load(&self) -> Result<BTreeSet<(VmId, Epoch)>, MarkError> {
        let mut marks = BTreeSet::new();
        for vm in names::<VmId>(&self.dir)? {
            marks.extend(self.of(vm)?.into_iter().map(|epoch| (vm, epoch)));
        }
        Ok(marks)
    }

    /// The epochs of one VM that were used here.
    pub fn of(&self, vm: VmId) -> Result<Vec<Epoch>, MarkError> {
        names(&self.dir.join(vm.to_string()))
    }

    /// Makes the directory in which the vmm will leave its mark, durably, and drops marks that are long over.
    pub fn prepare(&self, vm: VmId) -> Result<(), MarkError> {
        let dir = self.dir.join(vm.to_string());
        if !dir.exists() {
            fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
            for made in [&dir, &self.dir].into_iter().map(PathBuf::as_path).chain(self.dir.parent()) {
                sync(made)?;
            }
        }
        let mut epochs = names::<Epoch>(&dir)?;
        epochs.sort_unstable();
        for over in epochs.iter().rev().skip(KEPT) {
            let path = self.path(vm, *over);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        Ok(())
    }

    /// Likewise, for a vmm that is this user.
    pub fn prepare_for(&self, vm: VmId, user: Option<GuestUser>) -> Result<(), MarkError> {
        self.prepare(vm)?;
        let dir = self.dir.join(vm.to_string());
        user.map_or(Ok(()), |user| user.own(&dir)).map_err(failed("change the owner of", &dir))
    }

    /// Uses an epoch up. Durable when this returns.
    pub fn burn(&self, vm: VmId, epoch: Epoch) -> Result<(), MarkError> {
        self.prepare(vm)?;
        let path = self.path(vm, epoch);
        match OpenOptions::new().create_new(true).write(true).open(&path) {
            Ok(file) => file.sync_all().map_err(failed("sync", &path))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create", &path)(error)),
        }
        sync(&self.dir.join(vm.to_string()))
    }
}

fn sync(dir: &Path) -> Result<(), MarkError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync", dir))
}

/// Entries of a directory whose names read as `T`; none when it is not there.
fn names<T: std::str::FromStr>(dir: &Path) -> Result<Vec<T>, MarkError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("list", dir)(error)),
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_burnt_epoch_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let marks = Marks::at(dir.path().join("marks"));
        let vm = VmId(Uuid::from_u128(1));
        assert_eq!(marks.load().unwrap(), BTreeSet::new());
        marks.burn(vm, Epoch(41)).unwrap();
        marks.burn(vm, Epoch(41)).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, marks.path(vm, Epoch(43))).unwrap();
        marks.burn(vm, Epoch(43)).unwrap();
        assert!(marks.contains(vm, Epoch(43)) && !elsewhere.exists(), "a mark is not followed");
        std::fs::remove_file(marks.path(vm, Epoch(43))).unwrap();
        assert!(marks.contains(vm, Epoch(41)) && !marks.contains(vm, Epoch(42)));
        assert_eq!(marks.load().unwrap(), BTreeSet::from([(vm, Epoch(41))]));
    }

    #[test]
    fn only_the_newest_marks_of_a_vm_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let marks = Marks::at(dir.path());
        let vm = VmId(Uuid::from_u128(1));
        for epoch in 95..=110 {
            marks.burn(vm, Epoch(epoch)).unwrap();
        }
        marks.prepare(vm).unwrap();
        let left: Vec<u64> = marks.load().unwrap().iter().map(|(_, epoch)| epoch.0).collect();
        assert_eq!(left, (103..=110).collect::<Vec<_>>());
    }
}
