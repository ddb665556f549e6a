//! Statuses that users see, with oVirt's names. Each is folded from facts; none is an event, so none
//! can be stale (DESIGN §3).

use serde::Deserialize;
use serde::Serialize;

use crate::ids::VmId;
use crate::state::Administrative;
use crate::state::Desired;
use crate::state::GuestStatus;
use crate::state::Host;
use crate::state::Liveness;
use crate::state::MigrationPhase;
use crate::state::State;
use crate::state::SuspensionPhase;
use crate::state::Vm;

/// oVirt's `VDSStatus`, as far as hosts reach it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostStatus {
    Initializing,
    Up,
    PreparingForMaintenance,
    Maintenance,
    Connecting,
    NonResponsive,
}

/// oVirt's `VMStatus`, as far as VMs reach it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmStatus {
    Down,
    WaitForLaunch,
    PoweringUp,
    Up,
    Paused,
    PoweringDown,
    /// On its way, run by the source still.
    MigratingFrom,
    /// The permit is the target's, which has not said yet that it runs.
    MigratingTo,
    /// It falls asleep.
    SavingState,
    /// It sleeps: a file of its host.
    Suspended,
    /// It wakes up.
    RestoringState,
    /// Its host does not answer; it may run.
    Unknown,
}

impl std::fmt::Display for HostStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl std::fmt::Display for VmStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

pub fn host_status(host: &Host) -> HostStatus {
    match (host.liveness, host.administrative) {
        (Liveness::Unreachable, _) => HostStatus::NonResponsive,
        (Liveness::Suspected, _) => HostStatus::Connecting,
        (Liveness::New, _) => HostStatus::Initializing,
        (Liveness::Alive, Administrative::Active) => HostStatus::Up,
        (Liveness::Alive, Administrative::Maintenance) if host.usage.vms > 0 => HostStatus::PreparingForMaintenance,
        (Liveness::Alive, Administrative::Maintenance) => HostStatus::Maintenance,
    }
}

pub fn vm_status(state: &State, id: VmId, vm: &Vm) -> VmStatus {
    let suspension = state.suspensions.get(&id).map(|suspension| &suspension.phase);
    let Some(permit) = vm.permit else {
        return match vm.desired {
            Desired::Running => VmStatus::WaitForLaunch,
            Desired::Stopped(_) if suspension.is_some() => VmStatus::Suspended,
            Desired::Stopped(_) => VmStatus::Down,
        };
    };
    if state.hosts.get(&permit.host).is_none_or(|host| host.liveness == Liveness::Unreachable) {
        return VmStatus::Unknown;
    }
    match (state.migrations.get(&id).map(|migration| migration.phase), vm.observed) {
        (Some(MigrationPhase::Moving), _) => return VmStatus::MigratingFrom,
        (Some(MigrationPhase::Committed { .. }), None) => return VmStatus::MigratingTo,
        _ => {}
    }
    match suspension {
        Some(SuspensionPhase::Saving { .. }) => return VmStatus::SavingState,
        Some(SuspensionPhase::Waking { .. }) => return VmStatus::RestoringState,
        Some(SuspensionPhase::Asleep(_)) | None => {}
    }
    match (vm.observed.map(|observed| observed.status), vm.desired) {
        (Some(GuestStatus::PausedLease | GuestStatus::PausedIo | GuestStatus::PausedUser), _) => VmStatus::Paused,
        (_, Desired::Stopped(_)) | (Some(GuestStatus::PoweringDown), _) => VmStatus::PoweringDown,
        (None, Desired::Running) => VmStatus::WaitForLaunch,
        (Some(GuestStatus::PoweringUp), Desired::Running) => VmStatus::PoweringUp,
        (Some(GuestStatus::Up), Desired::Running) => VmStatus::Up,
    }
}

pub fn may_be_spm(host: &Host) -> bool {
    host_status(host) == HostStatus::Up && host.spm_priority >= 0
}
