//! The configuration of one vmm process: everything about the guest and its permit, in one file of JSON.
//!
//! Unknown fields are refused: a newer hostd that asks for something must not be half understood.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Bounds of a configuration. They are far above use, and keep a damaged file from asking for the impossible.
pub const MAX_CONFIG_BYTES: u64 = 256 << 10;
pub const MAX_VCPUS: u16 = 254;
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
pub const MAX_MEMORY_BYTES: u64 = 16 << 40;
/// A guest's RAM is a whole number of these.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;
/// Linux on x86 takes 2047 bytes; the vmm appends nothing.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// One root port a disk, on bus 0 beside the fixed devices.
pub const MAX_DISKS: usize = 24;
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

/// One disk of the guest, in the order of its root ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name in logs, metrics and errors.
    pub id: String,
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    /// What the guest sees as the disk's serial number.
    #[serde(default)]
    pub serial: String,
    /// Whether another host can open the same storage. Those disks are closed when the lease ends.
    #[serde(default)]
    pub shared: bool,
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

fn invalid(field: impl Into<String>, why: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { field: field.into(), why: why.into() }
}

impl VmmConfig {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut text = Vec::new();
        File::open(path).map_err(read)?.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong { path: path.to_owned() });
        }
        Self::parse(&text)
    }

    /// Decodes and checks.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(text).map_err(ConfigError::Parse)?;
        config.check()?;
        Ok(config)
    }

    /// What memory may grow to.
    pub fn max_memory_bytes(&self) -> u64 {
        self.max_memory_bytes.unwrap_or(self.memory_bytes)
    }

    /// Every bound of this module.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_text("name", &self.name, MAX_NAME_BYTES)?;
        if self.epoch == 0 {
            return Err(invalid("epoch", "no permit has the epoch 0"));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(invalid("vcpus", format!("must be 1 to {MAX_VCPUS}")));
        }
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
        match (self.release, self.lease) {
            (ReleaseClass::Lease, None) => {
                Err(invalid("lease", "a guest of release class lease needs its first deadline"))
            }
            (ReleaseClass::Lease, Some(_)) | (_, None) => Ok(()),
            (_, Some(_)) => Err(invalid("lease", "only a guest of release class lease has a deadline")),
        }
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
        Ok(())
    }

    fn check_disks(&self) -> Result<(), ConfigError> {
        if self.disks.len() > MAX_DISKS {
            return Err(invalid("disks", format!("more than {MAX_DISKS}")));
        }
        let mut ids = BTreeSet::new();
        for (at, disk) in self.disks.iter().enumerate() {
            let field = |name: &str| format!("disks[{at}].{name}");
            check_text(&field("id"), &disk.id, MAX_NAME_BYTES)?;
            if disk.id.is_empty() || !ids.insert(&disk.id) {
                return Err(invalid(field("id"), "empty, or used twice"));
            }
            check_text(&field("serial"), &disk.serial, MAX_DISK_SERIAL_BYTES)?;
            check_path(&field("path"), &disk.path)?;
        }
        Ok(())
    }
}

fn check_text(field: &str, text: &str, limit: usize) -> Result<(), ConfigError> {
    if text.len() > limit {
        return Err(invalid(field, format!("longer than {limit} bytes")));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "has control characters"));
    }
    Ok(())
}

fn check_path(field: &str, path: &Path) -> Result<(), ConfigError> {
    let len = path.as_os_str().len();
    if !path.is_absolute() || len > MAX_PATH_BYTES {
        let why = format!("must be an absolute path of at most {MAX_PATH_BYTES} bytes");
        return Err(invalid(field, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn example() -> Value {
        json!({
            "vm": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d",
            "name": "web1",
            "epoch": 41,
            "machine": "q-direct-1",
            "vcpus": 2,
            "memory_bytes": 268435456u64,
            "kernel": "/var/lib/quorate/vmlinuz",
            "cmdline": "console=ttyS0 quorate.epoch=41",
            "disks": [{"id": "root", "path": "/dev/nbd0", "shared": true}],
            "identity": {"uuid": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d"},
            "release": "operator",
            "started_marker": "/var/lib/quorate/started/41",
            "run_dir": "/run/quorate/vm/web1"
        })
    }

    fn with(field: &str, value: Value) -> Result<VmmConfig, ConfigError> {
        let mut config = example();
        config[field] = value;
        VmmConfig::parse(config.to_string().as_bytes())
    }

    #[test]
    fn a_configuration_survives_being_written_and_read() {
        let config = VmmConfig::parse(example().to_string().as_bytes()).unwrap();
        let again = serde_json::to_vec(&config).unwrap();
        assert_eq!(VmmConfig::parse(&again).unwrap(), config);
        assert_eq!(config.machine, MachineType::QDirect1);
    }

    #[test]
    fn an_unknown_field_is_refused() {
        assert!(matches!(with("tpm", json!(true)), Err(ConfigError::Parse(_))));
    }

    #[test]
    fn a_lease_belongs_to_the_lease_class_and_to_no_other() {
        assert!(with("release", json!("lease")).is_err());
        assert!(with("lease", json!({"deadline_boottime_ns": 1})).is_err());
        let mut config = example();
        config["release"] = json!("lease");
        config["lease"] = json!({"deadline_boottime_ns": 1});
        VmmConfig::parse(config.to_string().as_bytes()).unwrap();
    }

    #[test]
    fn bounds_are_kept() {
        for (field, value) in [
            ("epoch", json!(0)),
            ("vcpus", json!(0)),
            ("vcpus", json!(255)),
            ("memory_bytes", json!(4096)),
            ("memory_bytes", json!(268435457u64)),
            ("max_memory_bytes", json!(134217728u64)),
            ("cmdline", json!("x".repeat(2048))),
            ("cmdline", json!("a\nb")),
            ("name", json!("n".repeat(256))),
            ("kernel", json!("vmlinuz")),
            ("disks", json!([{"id": "a", "path": "/x"}, {"id": "a", "path": "/y"}])),
            ("disks", json!([{"id": "a", "path": "/x", "serial": "s".repeat(21)}])),
        ] {
            let shown = value.to_string();
            assert!(matches!(with(field, value), Err(ConfigError::Invalid { .. })), "{field} = {shown}");
        }
    }
}
