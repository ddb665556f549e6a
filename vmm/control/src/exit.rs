//! How a guest ended: the report that the vmm leaves in `exit.json`, and the exit code of the process.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Name of the report in the run directory.
pub const EXIT_REPORT_FILE: &str = "exit.json";
/// A report with the registers of 254 vCPUs stays below this.
const MAX_REPORT_BYTES: u64 = 1 << 20;
/// The part of a fault's description that is kept.
pub const MAX_DETAIL_BYTES: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest entered S5: shut down from inside, or after the power button.
    GuestPoweredOff,
    /// `power_off` over the control socket, or SIGTERM.
    PoweredOff,
    /// The epoch's marker was there: this permit has been used. Nothing was started; a new permit is needed.
    AlreadyStarted,
    /// The guest did what this KVM or machine cannot carry out. `detail` holds the registers.
    GuestFault,
    /// The guest's kernel panicked, and its configuration says to end it then.
    GuestPanicked,
    /// The guest's watchdog ran out, likewise.
    WatchdogExpired,
    /// The vmm could not start the guest. `detail` says why.
    StartFailed,
    /// The vmm itself failed while the guest ran. `detail` says how.
    Internal,
    /// A guest that came from elsewhere could not be taken over. It never ran here, and no epoch was used. `detail` says why.
    RestoreFailed,
}

impl ExitReason {
    /// The process's exit code. 0 says that the guest wanted to end.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::GuestPoweredOff | Self::PoweredOff => 0,
            Self::StartFailed => 2,
            Self::AlreadyStarted => 3,
            Self::GuestFault => 4,
            Self::Internal => 5,
            Self::RestoreFailed => 6,
            Self::GuestPanicked => 7,
            Self::WatchdogExpired => 8,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    pub vm: Uuid,
    pub epoch: u64,
    pub reason: ExitReason,
    /// For people: what happened and why, at most [`MAX_DETAIL_BYTES`].
    #[serde(default)]
    pub detail: String,
    /// Whether the guest executed anything under this epoch.
    pub ran: bool,
    /// Whether all I/O had ended when the process left. False means that a write may still be in the kernel.
    pub drained: bool,
    /// How often the guest's kernel panicked under this epoch, whatever followed.
    #[serde(default)]
    pub panics: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ExitError {
    #[error("cannot write the exit report {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read the exit report {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the exit report {path} is damaged")]
    Parse {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl ExitReport {
    /// Where the report of a run directory is.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join(EXIT_REPORT_FILE)
    }

    /// Writes the report so that it is there whole or not at all: file synced, renamed, directory synced.
    pub fn write(&self, run_dir: &Path) -> Result<(), ExitError> {
        let path = Self::path(run_dir);
        self.write_at(run_dir, &path).map_err(|source| ExitError::Write { path, source })
    }

    fn write_at(&self, run_dir: &Path, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        let temporary = run_dir.join(".exit.json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(run_dir)?.sync_all()
    }

    /// The report of a run directory; `None` when there is none.
    pub fn read(run_dir: &Path) -> Result<Option<Self>, ExitError> {
        let path = Self::path(run_dir);
        // Who writes it may have put something else in its place.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match File::options().read(true).custom_flags(flags.bits() as i32).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ExitError::Read { path, source }),
        };
        let mut text = Vec::new();
        if let Err(source) = file.take(MAX_REPORT_BYTES).read_to_end(&mut text) {
            return Err(ExitError::Read { path, source });
        }
        serde_json::from_slice(&text).map(Some).map_err(|source| ExitError::Parse { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_by_whoever_looks_after_the_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ExitReport::read(dir.path()).unwrap(), None);
        let report = ExitReport {
            vm: Uuid::nil(),
            epoch: 7,
            reason: ExitReason::GuestFault,
            detail: "rip=0x10".into(),
            ran: true,
            drained: true,
            panics: 1,
        };
        report.write(dir.path()).unwrap();
        assert_eq!(ExitReport::read(dir.path()).unwrap(), Some(report));
        let path = ExitReport::path(dir.path());
        fs::write(&path, b"{").unwrap();
        assert!(matches!(ExitReport::read(dir.path()), Err(ExitError::Parse { .. })));
        fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(matches!(ExitReport::read(dir.path()), Err(ExitError::Read { .. })), "it leads elsewhere");
    }
}
