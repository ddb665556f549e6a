//! A virtual machine: desire, permit, observation.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::ids::BootId;
use crate::ids::ClusterId;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::scheduler::Explanation;
use crate::state::CpuModel;
use crate::state::VmSpec;

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
    /// The guest was started with what its definition does not say any more.
    pub fn runs_with_another_spec(&self) -> bool {
        let Some(granted) = &self.granted_spec else { return false };
        let mut wanted = VmSpec::clone(&self.spec);
        if wanted.cpu.model == CpuModel::Cluster {
            // Settled when it started.
            wanted.cpu.model = granted.cpu.model;
        }
        wanted != **granted
    }

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
