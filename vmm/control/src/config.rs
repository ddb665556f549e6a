//! The configuration of one vmm process: everything about the guest and its permit, in one file of JSON.
//!
//! Unknown fields are refused: a newer hostd that asks for something must not be half understood.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use pnet_base::MacAddr;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cpu::{CpuConfig, CpuModel};
use crate::disk::DiskConfig;
use crate::host::HugePages;

/// Bounds of a configuration. They are far above use, and keep a damaged file from asking for the impossible.
pub const MAX_CONFIG_BYTES: u64 = 256 << 10;
pub const MAX_VCPUS: u16 = 254;
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
pub const MAX_MEMORY_BYTES: u64 = 16 << 40;
/// A guest's RAM is a whole number of these.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;
/// Linux on x86 takes 2047 bytes; the vmm appends nothing.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// One root port a disk. As many as there are without network cards.
pub const MAX_DISKS: usize = MAX_DISKS_AND_NICS;
pub const MAX_NICS: usize = 8;
/// Root ports for disks and network cards together; the console has one more.
pub const MAX_DISKS_AND_NICS: usize = 23;
/// Every IPv6 link carries this much, and virtio asks devices for no less (virtio 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 1280;
/// The most that Linux lets a tap have: 65535 bytes less the Ethernet header.
pub const MAX_MTU: u16 = 65521;
pub const DEFAULT_MTU: u16 = 1500;
pub const MAX_NAME_BYTES: usize = 255;
/// A virtio-blk serial has room for 20 bytes.
pub const MAX_DISK_SERIAL_BYTES: usize = 20;
pub const MAX_SMBIOS_STRING_BYTES: usize = 64;
/// Paths are handed to the kernel: PATH_MAX.
pub const MAX_PATH_BYTES: usize = 4095;

/// The virtual hardware of a guest, versioned: a guest that was defined with one keeps it for life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineType {
    #[serde(rename = "q-direct-1")]
    QDirect1,
}

/// What may end the permit without this host's word (DESIGN §5). Only a `lease` guest stops by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseClass {
    Lease,
    Power,
    Storage,
    Operator,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// One network card of the guest. Its tap is not named here: hostd opens it and hands the descriptor over
/// (`--tap-fd ID=FD`), so that the vmm needs no right over the host's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Name in logs, metrics, errors and on the command line.
    pub id: String,
    pub mac: MacAddr,
    /// Bytes of a frame behind its Ethernet header, as the guest is told. hostd gives the tap the same.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Where the guest finds the card ([`slots`](crate::slots)). The last free slot when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

fn default_mtu() -> u16 {
    DEFAULT_MTU
}

/// What follows when the guest's kernel says that it has panicked, beside the notice. A crash kernel that takes over is let
/// go on in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPanic {
    /// Nothing: the guest restarts by itself, or stays as it is for somebody to look at its console.
    #[default]
    Report,
    Reset,
    /// Ends the guest, with `guest_panicked` as the reason.
    PowerOff,
    Pause,
}

impl OnPanic {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A watchdog that the guest's own software feeds (Linux: i6300esb). One that is not started does nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogConfig {
    #[serde(default)]
    pub action: WatchdogAction,
}

/// What follows when the watchdog runs out, beside the notice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogAction {
    #[default]
    Reset,
    /// Ends the guest, with `watchdog_expired` as the reason.
    PowerOff,
    Pause,
    /// A non-maskable interrupt to every vCPU, on which a kernel can panic and dump.
    InjectNmi,
    None,
}

/// What SMBIOS tells the guest about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub uuid: Uuid,
    #[serde(default)]
    pub serial: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseConfig {
    /// The first deadline, in nanoseconds of this host's `CLOCK_BOOTTIME`.
    pub deadline_boottime_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmConfig {
    pub vm: Uuid,
    pub name: String,
    /// The permit that this process runs under. Started at most once.
    pub epoch: u64,
    pub machine: MachineType,
    pub vcpus: u16,
    pub memory_bytes: u64,
    /// The most that memory can ever grow to: the 64-bit PCI window follows it, so it must not change for a defined guest.
    /// Equal to `memory_bytes` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_bytes: Option<u64>,
    pub kernel: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    #[serde(default)]
    pub cmdline: String,
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// In the order of their root ports, which are counted from the other end than those of the disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicConfig>,
    pub identity: Identity,
    pub release: ReleaseClass,
    /// Created, once, before the guest's first instruction; the name holds the epoch. On a disk that survives a reboot.
    pub started_marker: PathBuf,
    /// Holds `console.log` and `exit.json`.
    pub run_dir: PathBuf,
    /// Present exactly when `release` is `lease`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseConfig>,
    #[serde(default)]
    pub log_level: LogLevel,
    #[serde(default, skip_serializing_if = "OnPanic::is_default")]
    pub on_panic: OnPanic,
    /// The VM generation ID. Another one than when the guest was saved tells it that it was taken back to an earlier moment or copied,
    /// and must not use its random numbers again; a guest that is migrated keeps its own. Left out, it is the VM's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Uuid>,
    /// A guest without one has no such device; its address stays free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogConfig>,
    /// What its processors are. Left out, they are the host's, one socket of `vcpus` cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuConfig>,
    /// Puts the guest's memory into pages that the host keeps apart, all of it before the guest starts. A matter of this host: where the
    /// guest moves to, it may be otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the configuration {path} is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong { path: PathBuf },
    #[error("the configuration is not what this version understands")]
    Parse(#[source] serde_json::Error),
    #[error("the configuration's {field} is wrong: {why}")]
    Invalid { field: String, why: String },
}

pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { field: field.into(), why: why.into() }
}

impl VmmConfig {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&Self::read(path)?)
    }

    /// Reads and checks the configuration of a guest that comes from elsewhere.
    pub fn load_incoming(path: &Path) -> Result<Self, ConfigError> {
        Self::parse_incoming(&Self::read(path)?)
    }

    fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut text = Vec::new();
        File::open(path).map_err(read)?.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong { path: path.to_owned() });
        }
        Ok(text)
    }

    /// Decodes and checks.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(text).map_err(ConfigError::Parse)?;
        config.check()?;
        Ok(config)
    }

    /// Decodes and checks, for a guest that comes from elsewhere: its epoch, its marker and its first deadline come with
    /// [`crate::Call::Run`]. Those of the file are not used; `epoch` is in the exit report of a process whose guest never ran.
    pub fn parse_incoming(text: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(text).map_err(ConfigError::Parse)?;
        config.check_incoming()?;
        Ok(config)
    }

    /// What memory may grow to.
    pub fn max_memory_bytes(&self) -> u64 {
        self.max_memory_bytes.unwrap_or(self.memory_bytes)
    }

    /// The VM generation ID.
    pub fn generation(&self) -> Uuid {
        self.generation.unwrap_or(self.vm)
    }

    /// What its processors are.
    pub fn cpu(&self) -> CpuConfig {
        self.cpu.unwrap_or_else(|| CpuConfig::of(CpuModel::Host, self.vcpus))
    }

    /// Every bound of this module.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_guest()?;
        match (self.release, self.lease) {
            (ReleaseClass::Lease, None) => {
                Err(invalid("lease", "a guest of release class lease needs its first deadline"))
            }
            (ReleaseClass::Lease, Some(_)) | (_, None) => Ok(()),
            (_, Some(_)) => Err(invalid("lease", "only a guest of release class lease has a deadline")),
        }
    }

    /// Every bound of the configuration of a guest that comes from elsewhere.
    pub fn check_incoming(&self) -> Result<(), ConfigError> {
        self.check_guest()?;
        match self.lease {
            None => Ok(()),
            Some(_) => Err(invalid(
                "lease",
                "the first deadline of a guest that comes from elsewhere is given when it may run",
            )),
        }
    }

    /// Everything but the lease, which a guest from elsewhere is given when it may run.
    pub fn check_guest(&self) -> Result<(), ConfigError> {
        check_text("name", &self.name, MAX_NAME_BYTES)?;
        if self.epoch == 0 {
            return Err(invalid("epoch", "no permit has the epoch 0"));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(invalid("vcpus", format!("must be 1 to {MAX_VCPUS}")));
        }
        self.cpu().check(self.vcpus)?;
        self.check_memory()?;
        if self.cmdline.len() > MAX_CMDLINE_BYTES {
            let why = format!("longer than the {MAX_CMDLINE_BYTES} bytes that Linux takes");
            return Err(invalid("cmdline", why));
        }
        if self.cmdline.chars().any(|c| c.is_control()) {
            return Err(invalid("cmdline", "has control characters"));
        }
        check_text("identity.serial", &self.identity.serial, MAX_SMBIOS_STRING_BYTES)?;
        self.check_disks()?;
        self.check_nics()?;
        crate::slots::check(&self.disks, &self.nics)?;
        for (field, path) in [
            ("kernel", Some(&self.kernel)),
            ("initrd", self.initrd.as_ref()),
            ("started_marker", Some(&self.started_marker)),
            ("run_dir", Some(&self.run_dir)),
        ] {
            if let Some(path) = path {
                check_path(field, path)?;
            }
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), ConfigError> {
        for (field, bytes) in [("memory_bytes", self.memory_bytes), ("max_memory_bytes", self.max_memory_bytes())] {
            if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
                let why = format!("must be {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}");
                return Err(invalid(field, why));
            }
            if !bytes.is_multiple_of(MEMORY_GRANULE_BYTES) {
                let why = format!("must be a multiple of {MEMORY_GRANULE_BYTES}");
                return Err(invalid(field, why));
            }
        }
        if self.max_memory_bytes() < self.memory_bytes {
            return Err(invalid("max_memory_bytes", "below memory_bytes"));
        }
        if let Some(pages) = self.huge_pages
            && !self.memory_bytes.is_multiple_of(pages.bytes())
        {
            let why = format!("must be a multiple of {} where the guest is in pages of that size", pages.bytes());
            return Err(invalid("memory_bytes", why));
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), ConfigError> {
        if self.disks.len() > MAX_DISKS {
            return Err(invalid("disks", format!("more than {MAX_DISKS}")));
        }
        let mut ids = BTreeSet::new();
        for (at, disk) in self.disks.iter().enumerate() {
            let field = |name: &str| format!("disks[{at}].{name}");
            disk.check(field)?;
            if disk.id.is_empty() || !ids.insert(&disk.id) {
                return Err(invalid(field("id"), "empty, or used twice"));
            }
        }
        Ok(())
    }

    fn check_nics(&self) -> Result<(), ConfigError> {
        if self.nics.len() > MAX_NICS {
            return Err(invalid("nics", format!("more than {MAX_NICS}")));
        }
        let together = self.disks.len() + self.nics.len();
        if together > MAX_DISKS_AND_NICS {
            let why = format!("{together} disks and network cards, and there are {MAX_DISKS_AND_NICS} slots for both");
            return Err(invalid("nics", why));
        }
        let (mut ids, mut macs) = (BTreeSet::new(), BTreeSet::new());
        for (at, nic) in self.nics.iter().enumerate() {
            let field = |name: &str| format!("nics[{at}].{name}");
            check_text(&field("id"), &nic.id, MAX_NAME_BYTES)?;
            // The command line writes ID=FD.
            if nic.id.is_empty() || nic.id.contains('=') || !ids.insert(&nic.id) {
                return Err(invalid(field("id"), "empty, with a `=`, or used twice"));
            }
            if nic.mac.is_zero() || nic.mac.is_multicast() || !macs.insert(nic.mac) {
                return Err(invalid(field("mac"), format!("{} is zero, a group address, or used twice", nic.mac)));
            }
            if !(MIN_MTU..=MAX_MTU).contains(&nic.mtu) {
                return Err(invalid(field("mtu"), format!("must be {MIN_MTU} to {MAX_MTU}")));
            }
        }
        Ok(())
    }
}

pub(crate) fn check_text(field: &str, text: &str, limit: usize) -> Result<(), ConfigError> {
    if text.len() > limit {
        return Err(invalid(field, format!("longer than {limit} bytes")));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "has control characters"));
    }
    Ok(())
}

pub(crate) fn check_path(field: &str, path: &Path) -> Result<(), ConfigError> {
    let len = path.as_os_str().len();
    if !path.is_absolute() || len > MAX_PATH_BYTES {
        let why = format!("must be an absolute path of at most {MAX_PATH_BYTES} bytes");
        return Err(invalid(field, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
