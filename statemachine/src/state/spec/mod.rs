//! What a guest is made of, and how that is written down.
//!
//! Specs lie in events, in the state of a snapshot and under the digest, and hosts of two releases must agree on the bytes of all
//! three. So a spec carries the number of its layout before its fields (ADR 0015), and is always written in the oldest layout that
//! can say it: a spec that uses nothing new has the bytes that it always had. A spec of a newer layout enters the log only at the
//! feature level that [`VmSpec::feature_level`] names.

mod cpu;
mod disk;
mod first_boot;
mod incident;
mod layout;
mod migration_policy;
mod nic;

use serde::Deserialize;
use serde::Serialize;

pub use cpu::Cpu;
pub use cpu::CpuModel;
pub use cpu::HostProcessor;
pub use cpu::MemoryPages;
pub use cpu::Topology;
pub use cpu::common_model;
pub use disk::BackingImage;
pub use disk::Disk;
pub use disk::DiskFormat;
pub use disk::OnError;
pub use disk::RateLimit;
pub use first_boot::FirstBoot;
pub use first_boot::FirstUser;
pub use first_boot::Interface;
pub use incident::OnPanic;
pub use incident::OnWatchdog;
use layout::Layout;
pub use migration_policy::MigrationPolicy;
pub use nic::Nic;

use crate::state::ReleaseClass;

/// What a guest is made of. Frozen into the permit when it starts. The default is an empty one, which no VM can have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct VmSpec {
    pub machine: MachineType,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Host paths, or devices that all hosts share, under the hosts' allowed directories.
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub disks: Vec<Disk>,
    /// Network cards; without any the guest has no network.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Restarted by the cluster after its host is lost.
    pub highly_available: bool,
    /// What may end its permit without its host's word; `None` takes the default of [`VmSpec::release_class`].
    pub release: Option<ReleaseClass>,
    #[serde(default)]
    pub cpu: Cpu,
    #[serde(default)]
    pub pages: MemoryPages,
    #[serde(default)]
    pub first_boot: Option<FirstBoot>,
    #[serde(default)]
    pub on_watchdog: OnWatchdog,
    #[serde(default)]
    pub on_panic: OnPanic,
    /// Before its cluster's.
    #[serde(default)]
    pub migration: MigrationPolicy,
}

impl VmSpec {
    pub const MAX_VCPUS: u32 = 64;
    pub const MIN_MEMORY_MIB: u64 = 16;
    pub const MAX_MEMORY_MIB: u64 = 4 << 20;
    /// A running guest is asked to make do with this at least, or with all of it: with less its kernel cannot give anything back.
    pub const MIN_MEMORY_TARGET_MIB: u64 = 64;
    pub const MAX_DISKS: usize = 16;
    pub const MAX_NICS: usize = 8;
    /// Slots of the machine type for both, and for the seed of a first boot.
    pub const SLOTS: u8 = 23;
    /// Linux takes 2047 bytes; the host appends the epoch.
    pub const MAX_CMDLINE: usize = 2000;

    /// DESIGN §5: `lease` for highly available guests, `operator` for the rest.
    pub fn release_class(&self) -> ReleaseClass {
        match self.release {
            Some(class) => class,
            None if self.highly_available => ReleaseClass::Lease,
            None => ReleaseClass::Operator,
        }
    }

    /// The feature level that a site needs before this spec may enter its log.
    pub fn feature_level(&self) -> u32 {
        Layout::of(self).feature_level()
    }
}

/// Machine types are versioned and frozen (DESIGN §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MachineType {
    #[default]
    #[serde(rename = "q-direct-1")]
    QDirect1,
}
