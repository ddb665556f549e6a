//! `/v1/vms`: define, change, start, stop, and why a VM is where it is.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use statemachine::ClusterId;
use statemachine::Epoch;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::State;
use statemachine::VmId;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::ids::MigrationId;
use statemachine::scheduler::Explanation;
use statemachine::state::Desired;
use statemachine::state::DeviceWord;
use statemachine::state::Devices;
use statemachine::state::Disk;
use statemachine::state::DiskFault;
use statemachine::state::ExitReason;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::Migration;
use statemachine::state::MigrationProgress;
use statemachine::state::Nic;
use statemachine::state::Plugs;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::state::Suspension;
use statemachine::state::SuspensionPhase;
use statemachine::state::Vm;
use statemachine::state::VmSpec;
use statemachine::view::VmStatus;
use statemachine::view::vm_status;
use utoipa::ToSchema;

use crate::spec::DiskBody;
use crate::spec::NicBody;
use crate::spec::VmSpecBody;

/// `POST /v1/vms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    pub name: String,
    /// The `Default` cluster, when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub cluster: Option<ClusterId>,
    /// `Always`, `Manual` (default) or `Halted`.
    #[serde(default = "manual")]
    #[schema(value_type = String, example = "Manual")]
    pub run_strategy: RunStrategy,
    pub spec: VmSpecBody,
}

fn manual() -> RunStrategy {
    RunStrategy::Manual
}

/// `PATCH /v1/vms/{id}`: what is left out stays. A changed spec takes effect at the next start; disks and network
/// cards come to a guest that runs, and leave it, at once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub run_strategy: Option<RunStrategy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<VmSpecBody>,
    /// Disks and network cards more, beside those that it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plug: Option<PlugBody>,
    /// Ids of disks and network cards that it is to lose. The guest is asked for them first; its disks are left alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unplug: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PlugBody {
    pub disks: Vec<DiskBody>,
    pub nics: Vec<NicBody>,
}

impl VmPatch {
    pub fn into_change(self) -> VmChange {
        let plug = self.plug.unwrap_or_default();
        let spec = VmSpecChange {
            plug: Devices {
                disks: plug.disks.into_iter().map(Disk::from).collect(),
                nics: plug.nics.into_iter().map(Nic::from).collect(),
            },
            unplug: self.unplug,
            ..self.spec.unwrap_or_default().into()
        };
        VmChange { name: self.name, run_strategy: self.run_strategy, spec }
    }
}

/// `POST /v1/vms/{id}/start`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmStart {
    /// Name or id of the host that it must run on; without it, the scheduler chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// `POST /v1/vms/{id}/stop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStop {
    /// `shutdown` (default): ACPI power button. `power_off`: as pulling the plug.
    #[serde(default = "shutdown")]
    #[schema(value_type = String, example = "shutdown")]
    pub mode: StopMode,
}

fn shutdown() -> StopMode {
    StopMode::Shutdown
}

/// `POST /v1/vms/{id}/migrate`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmMigrate {
    /// Name or id of the host that it is to move to; without it, the scheduler chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// A guest on its way to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationView {
    /// The seq of its beginning.
    #[schema(value_type = u64)]
    pub id: MigrationId,
    pub from: String,
    pub to: String,
    /// The right to run is the target's already.
    pub committed: bool,
    /// What the source said last.
    #[schema(value_type = Option<Object>)]
    pub progress: Option<MigrationProgress>,
}

impl MigrationView {
    fn of(state: &State, migration: &Migration) -> MigrationView {
        let name = |id| state.hosts.get(&id).map_or_else(|| id.to_string(), |host| host.name.clone());
        MigrationView {
            id: migration.id,
            from: name(migration.from),
            to: name(migration.to),
            committed: !migration.is_moving(),
            progress: migration.progress,
        }
    }
}

/// `POST /v1/vms/{id}/reset`, and other bodies that say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NoBody {}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    #[schema(value_type = String, format = Uuid)]
    pub id: VmId,
    pub name: String,
    /// oVirt's `VMStatus`: `Down`, `WaitForLaunch`, `PoweringUp`, `Up`, `Paused`, `PoweringDown`, `SavingState`, `Suspended`,
    /// `RestoringState`, `MigratingFrom`, `MigratingTo`, `Unknown`.
    #[schema(value_type = String, example = "Up")]
    pub status: VmStatus,
    #[schema(value_type = u64)]
    pub cluster: ClusterId,
    pub cluster_name: String,
    #[schema(value_type = String)]
    pub run_strategy: RunStrategy,
    pub desired: DesiredView,
    /// The host that has the right to run it.
    #[schema(value_type = Option<u64>)]
    pub host: Option<HostId>,
    pub host_name: Option<String>,
    /// Fencing token of that right.
    #[schema(value_type = Option<u64>)]
    pub epoch: Option<Epoch>,
    /// What may end that right without the host's word.
    #[schema(value_type = String)]
    pub release: ReleaseClass,
    /// What the host saw of the guest last.
    #[schema(value_type = Option<String>)]
    pub observed: Option<GuestStatus>,
    pub last_exit: Option<ExitView>,
    /// Present while it moves to another host.
    pub migration: Option<MigrationView>,
    /// Present while it falls asleep, sleeps, or wakes up.
    pub suspension: Option<SuspensionView>,
    /// The error of a disk that holds it. It goes on when that is mended, or at once with `resume`.
    #[schema(value_type = Option<Object>)]
    pub disk_fault: Option<DiskFault>,
    /// What its agent says of it: host name, operating system, addresses, file systems. Nobody vouches for a guest's word.
    #[schema(value_type = Option<Object>)]
    pub guest: Option<Arc<GuestFacts>>,
    #[schema(value_type = Object)]
    pub spec: Arc<VmSpec>,
    /// It runs with an older spec, until its next start.
    pub spec_pending: bool,
    /// Disks and network cards that came while it runs, or are to come, or to leave.
    pub devices: Vec<DeviceView>,
    /// What it is to make do with of its memory.
    pub memory_target_mib: Option<u64>,
}

/// A guest that is a file of its host, or is to be one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SuspensionView {
    #[schema(value_type = u64)]
    pub id: MigrationId,
    /// The host of the file: it wakes up there alone.
    pub host_name: String,
    /// Of the file, once there is one.
    pub bytes: Option<u64>,
}

impl SuspensionView {
    fn of(state: &State, suspension: &Suspension) -> SuspensionView {
        let bytes = match &suspension.phase {
            SuspensionPhase::Saving { .. } => None,
            SuspensionPhase::Asleep(saved) | SuspensionPhase::Waking { saved, .. } => Some(saved.bytes),
        };
        let host = state.hosts.get(&suspension.host);
        let host_name = host.map_or_else(|| suspension.host.to_string(), |host| host.name.clone());
        SuspensionView { id: suspension.id, host_name, bytes }
    }
}

/// A device of a guest that runs, of which something has been said since its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceView {
    pub id: String,
    /// `plugged`, `plugging`, `not_plugged`, `leaving`, `kept`.
    #[schema(example = "plugged")]
    pub state: String,
    /// Why it is not as it should be; it is tried again.
    pub why: Option<String>,
}

impl DeviceView {
    fn of_all(plugs: &Plugs) -> Vec<DeviceView> {
        let said = plugs.said.keys().chain(&plugs.coming).chain(&plugs.leaving).collect::<BTreeSet<_>>();
        said.into_iter().map(|id| DeviceView::of(plugs, id)).collect()
    }

    fn of(plugs: &Plugs, id: &str) -> DeviceView {
        let (state, why) = match plugs.said.get(id) {
            Some(DeviceWord::Kept(why)) => ("kept", Some(why.clone())),
            _ if plugs.leaving.contains(id) => ("leaving", None),
            Some(DeviceWord::NotPlugged(why)) => ("not_plugged", Some(why.clone())),
            Some(DeviceWord::Plugged | DeviceWord::Unplugged) => ("plugged", None),
            None => ("plugging", None),
        };
        DeviceView { id: id.to_owned(), state: state.to_owned(), why }
    }
}

/// `POST /v1/vms/{id}/memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmMemory {
    /// What the running guest is to make do with; at most what it was started with.
    pub mib: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DesiredView {
    Running,
    Shutdown,
    PowerOff,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExitView {
    #[schema(value_type = String, example = "guest_powered_off")]
    pub reason: ExitReason,
    pub detail: String,
    #[schema(value_type = u64)]
    pub host: HostId,
    #[schema(value_type = u64)]
    pub epoch: Epoch,
    #[schema(value_type = u64)]
    pub at: Seq,
}

impl VmView {
    pub fn of(state: &State, id: VmId, vm: &Vm) -> VmView {
        let host = vm.permit.map(|permit| permit.host);
        VmView {
            id,
            name: vm.name.clone(),
            status: vm_status(state, id, vm),
            cluster: vm.cluster,
            cluster_name: state.clusters.get(&vm.cluster).map(|cluster| cluster.name.clone()).unwrap_or_default(),
            run_strategy: vm.run_strategy,
            desired: match vm.desired {
                Desired::Running => DesiredView::Running,
                Desired::Stopped(StopMode::Shutdown) => DesiredView::Shutdown,
                Desired::Stopped(StopMode::PowerOff) => DesiredView::PowerOff,
            },
            host,
            host_name: host.and_then(|host| state.hosts.get(&host)).map(|host| host.name.clone()),
            epoch: vm.permit.map(|permit| permit.epoch),
            release: vm.permit.map_or_else(|| vm.spec.release_class(), |permit| permit.release),
            observed: vm.observed.map(|observed| observed.status),
            last_exit: vm.last_exit.as_ref().map(|exit| ExitView {
                reason: exit.reason,
                detail: exit.detail.clone(),
                host: exit.host,
                epoch: exit.epoch,
                at: exit.at,
            }),
            migration: state.migrations.get(&id).map(|migration| MigrationView::of(state, migration)),
            suspension: state.suspensions.get(&id).map(|suspension| SuspensionView::of(state, suspension)),
            disk_fault: state.disk_faults.get(&id).cloned(),
            guest: state.guests.get(&id).cloned(),
            spec: vm.spec.clone(),
            spec_pending: vm.runs_with_another_spec(),
            devices: state.plugs.get(&id).map(DeviceView::of_all).unwrap_or_default(),
            memory_target_mib: state.memory_targets.get(&id).copied(),
        }
    }
}

/// `GET /v1/vms/{id}/why`: the scheduler's reasons at the last placement, as they were stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhyView {
    #[schema(value_type = String, format = Uuid)]
    pub vm: VmId,
    pub name: String,
    #[schema(value_type = String)]
    pub status: VmStatus,
    pub host_name: Option<String>,
    /// `None`: it was never placed, or nothing fits now; `waiting` says which.
    #[schema(value_type = Option<Object>)]
    pub placement: Option<Arc<Explanation>>,
    /// A VM that waits for a host: what the scheduler says now.
    #[schema(value_type = Option<Object>)]
    pub waiting: Option<Explanation>,
}

impl WhyView {
    pub fn of(state: &State, seq: Seq, id: VmId, vm: &Vm) -> WhyView {
        let waits = vm.permit.is_none() && vm.desired == Desired::Running;
        let now = waits.then(|| statemachine::scheduler::place(state, vm, None, seq));
        WhyView {
            vm: id,
            name: vm.name.clone(),
            status: vm_status(state, id, vm),
            host_name: vm.permit.and_then(|permit| state.hosts.get(&permit.host)).map(|host| host.name.clone()),
            placement: vm.placement.clone(),
            waiting: now.and_then(Result::err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_changes_what_it_names_and_keeps_the_rest() {
        let create: VmCreate = serde_json::from_str(
            r#"{"name":"web1","spec":{"kernel":"/vm/vmlinuz","initrd":"/vm/initrd","disks":[{"id":"root","path":"/vm/web1.raw"}]}}"#,
        )
        .unwrap();
        assert_eq!(create.run_strategy, RunStrategy::Manual);
        let spec = create.spec.into_spec();
        assert_eq!((spec.vcpus, spec.memory_mib, spec.disks.len()), (1, 512, 1));

        let patch: VmPatch = serde_json::from_str(r#"{"spec":{"vcpus":2,"initrd":""}}"#).unwrap();
        let changed = patch.into_change().spec.over(&spec);
        assert_eq!((changed.vcpus, changed.initrd.as_deref()), (2, None));
        assert_eq!((&changed.kernel, &changed.disks), (&spec.kernel, &spec.disks));

        let swap = r#"{"plug":{"disks":[{"id":"data","path":"/vm/data.raw"}]},"unplug":["root"]}"#;
        let swapped = serde_json::from_str::<VmPatch>(swap).unwrap().into_change().spec.over(&spec);
        assert_eq!(swapped.device_ids().collect::<Vec<_>>(), ["data"]);
    }

    #[test]
    fn a_misspelt_field_is_refused_not_ignored() {
        assert!(serde_json::from_str::<VmCreate>(r#"{"name":"a","spec":{"kernel":"/k","memory":5}}"#).is_err());
        assert!(serde_json::from_str::<VmPatch>(r#"{"run_strategie":"Always"}"#).is_err());
        assert!(serde_json::from_str::<VmStop>(r#"{"mode":"kill"}"#).is_err());
        assert_eq!(serde_json::from_str::<VmStop>("{}").unwrap().mode, StopMode::Shutdown);
    }
}
