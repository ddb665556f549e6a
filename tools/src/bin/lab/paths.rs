//! Where a lab keeps things: everything is below one directory, `.lab` of the repository by default.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::state::HostId;

/// The directory of one lab.
#[derive(Debug, Clone)]
pub struct LabDir {
    root: PathBuf,
}

impl LabDir {
    /// `given`, or `.lab` beside the nearest Cargo.lock above the working directory.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        let root = match given {
            Some(path) => std::path::absolute(path)?,
            None => {
                let here = std::env::current_dir().context("find the working directory")?;
                let repository = here.ancestors().find(|path| path.join("Cargo.lock").exists()).unwrap_or(&here);
                repository.join(".lab")
            }
        };
        // A socket's path is at most 107 bytes; ours end in names like `sock/host12.console`.
        if root.as_os_str().len() > 80 {
            bail!("{} is too long a path for sockets: choose a shorter --dir", root.display());
        }
        Ok(Self { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Eight hex digits that tell this lab from others on the machine.
    pub fn tag(&self) -> String {
        blake3::hash(self.root.as_os_str().as_encoded_bytes()).to_hex()[..8].to_owned()
    }

    pub fn state(&self) -> PathBuf {
        self.root.join("state.json")
    }

    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// The file behind a shared export.
    pub fn shared_disk(&self, export: &str) -> PathBuf {
        self.disks().join(format!("{export}.raw"))
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub fn sockets(&self) -> PathBuf {
        self.root.join("sock")
    }

    pub fn control_socket(&self) -> PathBuf {
        self.sockets().join("control")
    }

    /// A host's socket: `qmp`, `serial`, `agent`, `console` or `nbd`.
    pub fn host_socket(&self, host: HostId, kind: &str) -> PathBuf {
        self.sockets().join(format!("{host}.{kind}"))
    }

    pub fn serial_log(&self, host: HostId) -> PathBuf {
        self.logs().join(format!("{host}.serial.log"))
    }

    pub fn qemu_log(&self, host: HostId) -> PathBuf {
        self.logs().join(format!("{host}.qemu.log"))
    }

    pub fn daemon_log(&self) -> PathBuf {
        self.logs().join("daemon.log")
    }

    /// Lines of guests' consoles on a host, with the lab's clock.
    pub fn console_witness(&self, host: HostId) -> PathBuf {
        self.root.join(format!("console-{host}.jsonl"))
    }

    /// Writes to a shared export, with the lab's clock.
    pub fn write_witness(&self, export: &str) -> PathBuf {
        self.root.join(format!("witness-{export}.jsonl"))
    }
}

/// Replaces a file as a whole: a reader sees the old content or the new one.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().context("a path without a directory")?;
    let mut file =
        tempfile::NamedTempFile::new_in(parent).with_context(|| format!("make a file in {}", parent.display()))?;
    file.write_all(content).with_context(|| format!("write {}", path.display()))?;
    file.persist(path).with_context(|| format!("write {}", path.display()))?;
    Ok(())
}
