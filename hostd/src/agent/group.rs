//! The control group of a guest: all of its processes, and nothing else. An exit is reported only when it is empty (hazard H20).
//!
//! Where systemd rules, each guest is a scope of its own in `quorate.slice`; elsewhere a directory `quorate/<vm>` of the
//! cgroup v2 tree. A kernel without cgroup v2 leaves the lock alone to tell.

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use statemachine::ids::VmId;

/// Who puts a guest's process into its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manager {
    /// `systemd-run --scope`.
    Systemd,
    /// hostd, by a directory of its own.
    Hostd,
}

/// Where guests' groups are on this host.
#[derive(Debug, Clone)]
pub struct Groups {
    /// Mount point of cgroup v2.
    root: Option<PathBuf>,
    manager: Manager,
}

impl Groups {
    pub fn detect() -> Groups {
        let systemd = Path::new("/run/systemd/system").is_dir();
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        let root = roots
            .into_iter()
            .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists());
        Groups { root, manager: if systemd { Manager::Systemd } else { Manager::Hostd } }
    }

    pub fn of(&self, vm: VmId) -> Group {
        let unit = format!("quorate-vm-{vm}.scope");
        let dir = self.root.as_ref().map(|root| match self.manager {
            Manager::Systemd => root.join("quorate.slice").join(&unit),
            Manager::Hostd => root.join("quorate").join(vm.to_string()),
        });
        Group { dir, manager: self.manager, unit }
    }
}

#[derive(Debug, Clone)]
pub struct Group {
    dir: Option<PathBuf>,
    manager: Manager,
    unit: String,
}

impl Group {
    /// What goes before the vmm's own command line.
    pub fn launch_prefix(&self) -> Vec<String> {
        match self.manager {
            Manager::Hostd => Vec::new(),
            Manager::Systemd => {
                let unit = format!("--unit={}", self.unit);
                let fixed = ["systemd-run", "--scope", "--collect", "--quiet", "--slice=quorate.slice"];
                let mut prefix: Vec<String> = fixed.iter().map(|word| (*word).to_owned()).collect();
                prefix.extend([unit, "--".to_owned()]);
                prefix
            }
        }
    }

    /// Makes the group where hostd makes it; the file into which the new process writes itself.
    pub fn prepare(&self) -> io::Result<Option<PathBuf>> {
        match (&self.dir, self.manager) {
            (Some(dir), Manager::Hostd) => {
                fs::create_dir_all(dir)?;
                Ok(Some(dir.join("cgroup.procs")))
            }
            _ => Ok(None),
        }
    }

    /// No process is left, as far as the kernel tells. A group that is not there is empty.
    pub fn is_empty(&self) -> io::Result<bool> {
        let Some(dir) = &self.dir else { return Ok(true) };
        match fs::read_to_string(dir.join("cgroup.events")) {
            Ok(text) => Ok(!text.lines().any(|line| line == "populated 1")),
            // ENODEV: it was removed between open and read.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// Kills every process of the group. False where this kernel has no group to kill.
    pub fn kill(&self) -> io::Result<bool> {
        let Some(dir) = &self.dir else { return Ok(false) };
        match fs::write(dir.join("cgroup.kill"), "1") {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes an empty group that hostd made.
    pub fn remove(&self) {
        if let (Some(dir), Manager::Hostd) = (&self.dir, self.manager) {
            // It may be gone, or never made; a group that is not empty cannot be removed.
            let _ = fs::remove_dir(dir);
        }
    }
}
