//! The control group of a guest: all of its processes, and nothing else. An exit is reported only when it is empty (hazard H20).
//!
//! Where systemd rules, each guest is a scope of its own in `quorate.slice`; elsewhere a directory `quorate/<vm>` of the
//! cgroup v2 tree. A kernel without cgroup v2 leaves the lock alone to tell.
//!
//! The group also bounds what a guest takes: its number of threads, and by [`CpuShares`] its part of the processors.

use std::fs;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use statemachine::ids::VmId;
use thiserror::Error;

/// Threads of a vmm beside its vCPUs, and those that the kernel starts for its I/O: far more than they are, far fewer than a host bears.
const OTHER_TASKS_MAX: u32 = 1024;
/// Of `cpu.max`, in microseconds: the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// Controllers that hold a guest in its bounds.
const CONTROLLERS: &str = "+cpu +pids";

/// A guest's part of its host's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuShares {
    weight: u16,
    cap_percent: Option<u32>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpuSharesError {
    #[error("a weight of {0} is not between 1 and 10000; 100 is that of a guest whose definition names none")]
    Weight(u16),
    #[error("a cap of 0 percent would stop the guest; leave it out for none, 100 is one processor")]
    Cap,
}

impl CpuShares {
    /// As much as any other guest whose definition names none.
    pub const EQUAL_WEIGHT: u16 = 100;

    /// `weight`, 1 to 10000, is set against those of the other guests when processors are short; `cap_percent` of one processor is never passed.
    pub fn new(weight: u16, cap_percent: Option<u32>) -> Result<CpuShares, CpuSharesError> {
        if !(1..=10_000).contains(&weight) {
            return Err(CpuSharesError::Weight(weight));
        }
        if cap_percent == Some(0) {
            return Err(CpuSharesError::Cap);
        }
        Ok(CpuShares { weight, cap_percent })
    }

    /// As `cpu.max` takes it: microseconds in each period.
    fn cpu_max(self) -> String {
        match self.cap_percent {
            Some(percent) => format!("{} {CPU_PERIOD_US}", u64::from(percent) * CPU_PERIOD_US / 100),
            None => format!("max {CPU_PERIOD_US}"),
        }
    }
}

/// What a guest may take of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    pub vcpus: u32,
    pub cpu: CpuShares,
}

impl Bounds {
    fn tasks_max(self) -> u32 {
        self.vcpus.saturating_add(OTHER_TASKS_MAX)
    }
}

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
    pub fn launch_prefix(&self, bounds: Bounds) -> Vec<String> {
        match self.manager {
            Manager::Hostd => Vec::new(),
            Manager::Systemd => {
                let unit = format!("--unit={}", self.unit);
                let fixed = ["systemd-run", "--scope", "--collect", "--quiet", "--slice=quorate.slice"];
                let mut prefix: Vec<String> = fixed.iter().map(|word| (*word).to_owned()).collect();
                prefix.push(unit);
                prefix.push(format!("--property=TasksMax={}", bounds.tasks_max()));
                prefix.push(format!("--property=CPUWeight={}", bounds.cpu.weight));
                prefix.extend(bounds.cpu.cap_percent.map(|percent| format!("--property=CPUQuota={percent}%")));
                prefix.push("--".to_owned());
                prefix
            }
        }
    }

    /// Makes the group where hostd makes it; the file into which the new process writes itself. A kernel that lends no controller to it
    /// leaves the guest without bounds, which is said.
    pub fn prepare(&self, bounds: Bounds) -> io::Result<Option<PathBuf>> {
        let (Some(dir), Manager::Hostd) = (&self.dir, self.manager) else { return Ok(None) };
        fs::create_dir_all(dir)?;
        let bounded = self.lend_controllers(dir).and_then(|()| {
            set(dir, "pids.max", &bounds.tasks_max().to_string())?;
            self.share_cpu(bounds.cpu)
        });
        if let Err(error) = bounded {
            tracing::warn!(group = %dir.display(), "a guest starts without bounds on its threads and processors: {error}");
        }
        Ok(Some(dir.join("cgroup.procs")))
    }

    /// From the root of the tree down to the directory of all guests.
    fn lend_controllers(&self, dir: &Path) -> io::Result<()> {
        let above: Vec<&Path> = dir.ancestors().skip(1).take(2).collect();
        above.into_iter().rev().try_for_each(|dir| set(dir, "cgroup.subtree_control", CONTROLLERS))
    }

    fn share_cpu(&self, shares: CpuShares) -> io::Result<()> {
        let (Some(dir), Manager::Hostd) = (&self.dir, self.manager) else { return Ok(()) };
        set(dir, "cpu.weight", &shares.weight.to_string())?;
        set(dir, "cpu.max", &shares.cpu_max())
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

fn set(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    // Not created: where the kernel has not made it, it has no such controller.
    let written =
        fs::OpenOptions::new().write(true).open(dir.join(file)).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the files that the kernel makes in a group.
    fn group(files: &[&str]) -> (tempfile::TempDir, Group) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("quorate").join("vm");
        fs::create_dir_all(&dir).unwrap();
        for above in [root.path(), &root.path().join("quorate")] {
            fs::write(above.join("cgroup.subtree_control"), "").unwrap();
        }
        for file in files {
            fs::write(dir.join(file), "").unwrap();
        }
        (root, Group { dir: Some(dir), manager: Manager::Hostd, unit: "quorate-vm.scope".to_owned() })
    }

    fn bounds(weight: u16, cap_percent: Option<u32>) -> Bounds {
        Bounds { vcpus: 4, cpu: CpuShares::new(weight, cap_percent).unwrap() }
    }

    #[test]
    fn a_guest_is_held_in_its_bounds_and_they_can_change() {
        let (root, group) = group(&["pids.max", "cpu.weight", "cpu.max"]);
        let dir = root.path().join("quorate").join("vm");
        let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
        assert_eq!(group.prepare(bounds(100, None)).unwrap(), Some(dir.join("cgroup.procs")));
        assert_eq!(
            (read("pids.max"), read("cpu.weight"), read("cpu.max")),
            ("1028".into(), "100".into(), "max 100000".into())
        );
        for above in [root.path(), dir.parent().unwrap()] {
            assert_eq!(fs::read_to_string(above.join("cgroup.subtree_control")).unwrap(), CONTROLLERS);
        }
        fs::write(dir.join("cpu.weight"), "").unwrap();
        fs::write(dir.join("cpu.max"), "").unwrap();
        group.share_cpu(CpuShares::new(9999, Some(150)).unwrap()).unwrap();
        assert_eq!((read("cpu.weight"), read("cpu.max")), ("9999".into(), "150000 100000".into()));
    }

    #[test]
    fn a_kernel_without_the_controllers_still_has_a_group() {
        let (root, group) = group(&[]);
        assert!(group.prepare(bounds(100, None)).unwrap().is_some());
        let error = group.share_cpu(CpuShares::new(100, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("cpu.weight"), "{error}");
        assert!(!root.path().join("quorate").join("vm").join("cpu.weight").exists());
    }

    #[test]
    fn systemd_is_told_the_same_bounds() {
        let group = Group { dir: None, manager: Manager::Systemd, unit: "quorate-vm.scope".to_owned() };
        let prefix = group.launch_prefix(bounds(7, Some(50)));
        for word in ["--property=TasksMax=1028", "--property=CPUWeight=7", "--property=CPUQuota=50%"] {
            assert!(prefix.iter().any(|said| said == word), "{prefix:?}");
        }
        assert_eq!(prefix.last().map(String::as_str), Some("--"));
        assert!(!group.launch_prefix(bounds(7, None)).iter().any(|said| said.contains("CPUQuota")));
    }

    #[test]
    fn shares_that_the_kernel_would_refuse_are_refused_in_words() {
        assert_eq!(CpuShares::new(0, None), Err(CpuSharesError::Weight(0)));
        assert_eq!(CpuShares::new(10_001, None), Err(CpuSharesError::Weight(10_001)));
        assert_eq!(CpuShares::new(1, Some(0)), Err(CpuSharesError::Cap));
        CpuShares::new(10_000, Some(1)).unwrap();
    }
}
