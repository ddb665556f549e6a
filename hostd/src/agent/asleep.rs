//! Guests that sleep, as files of this host: `<data_dir>/asleep/<vm>.<suspension>`.
//!
//! A file has its name only when it is whole and on the disk; what an earlier hostd began is cleared when this one starts. What the log does
//! not know any more is discarded by plan ([`super::plan`]), so nobody wakes up from a past.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use backon::ConstantBuilder;
use backon::Retryable;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use thiserror::Error;
use tokio::fs::File;
use tokio::fs::OpenOptions;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::io::copy;
use tokio::io::copy_buf;
use tokio::io::sink;
use vmm_control::Call;

use super::vmm_client::ClientError;
use super::vmm_client::raw_stream;
use crate::migration::carrier::CarryError;
use crate::migration::carrier::handed_over;

/// In one piece from the vmm to the file.
const BUFFER_BYTES: usize = 1 << 20;
/// Most that a vmm says while it takes a guest in.
const ANSWERS_MAX: u64 = 64 << 10;
/// A process that was just started listens within this time.
const READY_EVERY: Duration = Duration::from_millis(100);
const READY_TRIES: usize = 300;
/// Of a file that is not whole.
const PART: &str = "part";

#[derive(Debug, Error)]
pub enum SleepError {
    #[error("cannot write {path}: {source}; is there space?")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Vmm(#[from] ClientError),
    #[error(transparent)]
    NotHandedOver(#[from] CarryError),
}

/// The directory. Only root gets into it: a guest's memory is in its files.
#[derive(Debug, Clone)]
pub struct Asleep {
    dir: PathBuf,
}

impl Asleep {
    pub fn at(dir: PathBuf) -> Asleep {
        Asleep { dir }
    }

    fn path(&self, vm: VmId, suspension: MigrationId) -> PathBuf {
        self.dir.join(format!("{vm}.{suspension}"))
    }

    fn part(&self, vm: VmId, suspension: MigrationId) -> PathBuf {
        self.dir.join(format!("{vm}.{suspension}.{PART}"))
    }

    /// The guests that sleep here; what is not whole is cleared away. Blocking.
    pub fn look(&self) -> io::Result<BTreeSet<(VmId, MigrationId)>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries?,
        };
        let mut known = BTreeSet::new();
        for entry in entries {
            let path = entry?.path();
            match named(&path) {
                Some(sleeper) => {
                    known.insert(sleeper);
                }
                None if path.extension().is_some_and(|extension| extension == PART) => {
                    if let Err(error) = fs::remove_file(&path) {
                        tracing::warn!("{} is not whole and cannot be removed: {error}", path.display());
                    }
                }
                None => tracing::warn!("{} is no sleeping guest, and is left alone", path.display()),
            }
        }
        Ok(known)
    }

    /// Has the guest of this control socket written down, and stand still. Returns the bytes of its file.
    pub async fn save(&self, socket: &Path, vm: VmId, suspension: MigrationId) -> Result<u64, SleepError> {
        let whole = self.path(vm, suspension);
        let part = self.part(vm, suspension);
        let saved = self.write(socket, suspension, &part).await;
        let failed = |source| SleepError::Write { path: whole.clone(), source };
        match saved {
            Ok(bytes) => {
                tokio::fs::rename(&part, &whole).await.map_err(failed)?;
                File::open(&self.dir).await.map_err(failed)?.sync_all().await.map_err(failed)?;
                Ok(bytes)
            }
            Err(error) => {
                // What is left is cleared at the next start.
                let _ = tokio::fs::remove_file(&part).await;
                Err(error)
            }
        }
    }

    /// The directory, and its name in the one above, as lasting as what will lie in it.
    fn make(&self) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        self.dir.parent().map_or(Ok(()), |above| fs::File::open(above)?.sync_all())
    }

    async fn write(&self, socket: &Path, suspension: MigrationId, part: &Path) -> Result<u64, SleepError> {
        let failed = |source| SleepError::Write { path: part.to_owned(), source };
        self.make().map_err(failed)?;
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(part).await.map_err(failed)?;
        let call = Call::SaveAttach { migration: Some(suspension.0), live: None };
        let mut guest = BufReader::with_capacity(BUFFER_BYTES, raw_stream(socket, call).await?);
        let bytes = copy_buf(&mut guest, &mut file).await.map_err(failed)?;
        file.flush().await.map_err(failed)?;
        file.sync_all().await.map_err(failed)?;
        drop(guest);
        handed_over(socket).await?;
        Ok(bytes)
    }

    /// Has the process of this control socket take the guest in. It says itself, by its status or its end, what became of that.
    pub async fn wake(&self, socket: &Path, vm: VmId, suspension: MigrationId) -> Result<(), SleepError> {
        let path = self.path(vm, suspension);
        let failed = |source| SleepError::Read { path: path.clone(), source };
        let mut file = BufReader::with_capacity(BUFFER_BYTES, File::open(&path).await.map_err(failed)?);
        let attach = || raw_stream(socket, Call::RestoreAttach);
        let patience = ConstantBuilder::default().with_delay(READY_EVERY).with_max_times(READY_TRIES);
        let mut guest = attach.retry(patience).when(|error| matches!(error, ClientError::Connect { .. })).await?;
        copy_buf(&mut file, &mut guest).await.map_err(failed)?;
        guest.shutdown().await.map_err(failed)?;
        copy(&mut guest.take(ANSWERS_MAX), &mut sink()).await.map_err(failed)?;
        Ok(())
    }

    /// Also of a file that is being written: first under its first name, so that it has the other one by then, or never gets it. Blocking.
    pub fn discard(&self, vm: VmId, suspension: MigrationId) -> io::Result<()> {
        for path in [self.part(vm, suspension), self.path(vm, suspension)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}

/// `<vm>.<suspension>`.
fn named(path: &Path) -> Option<(VmId, MigrationId)> {
    let (vm, suspension) = path.file_name()?.to_str()?.split_once('.')?;
    Some((vm.parse().ok()?, suspension.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_whole_are_found_and_the_rest_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let asleep = Asleep::at(dir.path().join("asleep"));
        assert_eq!(asleep.look().unwrap(), BTreeSet::new(), "nobody slept here yet");
        fs::create_dir(dir.path().join("asleep")).unwrap();
        let (vm, suspension) = (VmId::default(), MigrationId(17));
        let (whole, part) = (asleep.path(vm, suspension), dir.path().join(format!("asleep/{vm}.18.part")));
        fs::write(&whole, "a guest").unwrap();
        fs::write(&part, "half a gue").unwrap();
        assert_eq!(asleep.look().unwrap(), BTreeSet::from([(vm, suspension)]));
        assert!(whole.exists() && !part.exists());
        let being_written = asleep.part(vm, suspension);
        fs::write(&being_written, "half a gue").unwrap();
        asleep.discard(vm, suspension).unwrap();
        assert!(!whole.exists() && !being_written.exists());
        asleep.discard(vm, suspension).unwrap();
    }
}
