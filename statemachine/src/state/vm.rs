//! A virtual machine: definition, desire, permit, observation.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::ids::BootId;
use crate::ids::ClusterId;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::scheduler::Explanation;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    pub name: String,
    pub cluster: ClusterId,
    pub spec: Arc<VmSpec>,
    pub run_strategy: RunStrategy,
    /// What its users want now; changed at `desired_at`.
    pub desired: Desired,
    pub desired_at: Seq,
    /// Seq of the last reset that was asked for; done once by the host that holds the permit.
    pub reset_at: Option<Seq>,
    /// The right to run, and the spec that it was granted for.
    pub permit: Option<Permit>,
    pub granted_spec: Option<Arc<VmSpec>>,
    /// What the permit's host saw last.
    pub observed: Option<Observed>,
    pub last_exit: Option<Exit>,
    /// Why the scheduler chose as it did, at the last placement.
    pub placement: Option<Arc<Explanation>>,
}

impl Vm {
    /// Does it go on running, on some host, after this exit?
    pub fn restarts_after(&self, reason: ExitReason) -> bool {
        match (self.run_strategy, reason) {
            (RunStrategy::Always, _) => true,
            (RunStrategy::Halted, _) => false,
            // Whoever powered it off meant it.
            (RunStrategy::Manual, ExitReason::GuestPoweredOff | ExitReason::PoweredOff) => false,
            (
                RunStrategy::Manual,
                ExitReason::GuestFault
                | ExitReason::StartFailed
                | ExitReason::Lost
                | ExitReason::HostRebooted
                | ExitReason::HostGone,
            ) => self.spec.highly_available,
        }
    }
}

/// What a guest is made of. Frozen into the permit when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    pub machine: MachineType,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Host paths, or devices that all hosts share, under the hosts' allowed directories.
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub disks: Vec<Disk>,
    /// Restarted by the cluster after its host is lost.
    pub highly_available: bool,
    /// What may end its permit without its host's word; `None` takes the default of [`VmSpec::release_class`].
    pub release: Option<ReleaseClass>,
}

impl VmSpec {
    pub const MAX_VCPUS: u32 = 64;
    pub const MAX_MEMORY_MIB: u64 = 4 << 20;
    pub const MAX_DISKS: usize = 16;
    /// A huge page: guest RAM is a whole number of them.
    pub const MEMORY_GRANULE_MIB: u64 = 2;
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
}

/// Machine types are versioned and frozen (DESIGN §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineType {
    #[serde(rename = "q-direct-1")]
    QDirect1,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Name within the VM; the guest sees it as the disk's serial.
    pub id: String,
    pub path: String,
    pub read_only: bool,
    /// More than one VM may write it (S2's exception).
    pub shareable: bool,
}

/// KubeVirt's run strategies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunStrategy {
    /// Runs whenever a host can be found; started again after any exit.
    Always,
    /// Started and stopped by command.
    Manual,
    /// Never runs.
    Halted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Desired {
    Running,
    Stopped(StopMode),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// ACPI power button.
    Shutdown,
    /// As pulling the plug.
    PowerOff,
}

/// The right to run a VM on one host (DESIGN §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    pub epoch: Epoch,
    pub host: HostId,
    /// The incarnation of the host that it was granted to.
    pub boot: BootId,
    pub release: ReleaseClass,
}

/// What may end a permit without its host's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseClass {
    Lease,
    Power,
    Storage,
    Operator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    pub epoch: Epoch,
    pub host: HostId,
    pub status: GuestStatus,
    pub at: Seq,
}

/// What the host that holds the permit sees of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestStatus {
    PoweringUp,
    Up,
    /// The lease ended; quiesced, waiting for a grant that names the epoch.
    PausedLease,
    /// A disk failed and its policy says stop.
    PausedIo,
    /// Somebody asked.
    PausedUser,
    PoweringDown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub epoch: Epoch,
    pub host: HostId,
    pub reason: ExitReason,
    pub detail: String,
    pub at: Seq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off, or obeyed the power button.
    GuestPoweredOff,
    /// Stopped by command.
    PoweredOff,
    /// KVM or the guest's virtual hardware could not go on.
    GuestFault,
    /// The vmm refused to start: a missing image, a bad definition.
    StartFailed,
    /// The vmm is gone without a word; the epoch may not be started again.
    Lost,
    /// The host came back as another incarnation.
    HostRebooted,
    /// The site was recovered without it: a person gave their word that it is off.
    HostGone,
}
