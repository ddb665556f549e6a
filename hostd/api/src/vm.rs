//! `/v1/vms`: define, change, start, stop, and why a VM is where it is.

use std::sync::Arc;

use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Serialize;
use statemachine::ClusterId;
use statemachine::Epoch;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::State;
use statemachine::VmId;
use statemachine::command::VmSpecChange;
use statemachine::ids::MigrationId;
use statemachine::scheduler::Explanation;
use statemachine::state::BackingImage;
use statemachine::state::Desired;
use statemachine::state::Disk;
use statemachine::state::DiskFault;
use statemachine::state::DiskFormat;
use statemachine::state::ExitReason;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::MachineType;
use statemachine::state::Migration;
use statemachine::state::MigrationProgress;
use statemachine::state::Nic;
use statemachine::state::OnError;
use statemachine::state::RateLimit;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::state::Vm;
use statemachine::state::VmSpec;
use statemachine::view::VmStatus;
use statemachine::view::vm_status;
use utoipa::ToSchema;

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

/// What a guest is made of. On `PATCH`, what is left out stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmSpecBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "q-direct-1")]
    pub machine: Option<MachineType>,
    /// Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Default 512; a multiple of 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Path on the hosts, under an allowed directory; needed to create.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// An empty text takes it away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Default `console=ttyS0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// All disks; a `PATCH` with disks replaces them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskBody>>,
    /// All network cards; a `PATCH` with cards replaces them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nics: Option<Vec<NicBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub highly_available: Option<bool>,
    /// `lease`, `power`, `storage` or `operator`; by default `lease` for highly available VMs, `operator` for the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub release: Option<ReleaseClass>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskBody {
    /// Name within the VM; the guest sees it as the disk's serial.
    pub id: String,
    /// Path on the hosts, under an allowed directory, or a device that all hosts share.
    pub path: String,
    #[serde(default)]
    pub read_only: bool,
    /// More than one VM may write it.
    #[serde(default)]
    pub shareable: bool,
    /// `raw` (default) or `qcow2`. It is never found out by looking.
    #[serde(default)]
    #[schema(value_type = String, example = "raw")]
    pub format: DiskFormat,
    /// The images under a qcow2 disk, nearest first, by the paths that their headers name.
    #[serde(default)]
    pub backing: Vec<BackingImageBody>,
    /// What an error of the storage does: `stop` (default) pauses the guest and tries again until it succeeds, `report` tells the
    /// guest, `ignore` tells it that all went well, `enospc` stops it where there is no space and reports the rest.
    #[serde(default)]
    #[schema(value_type = String, example = "stop")]
    pub on_error: OnError,
    /// How much it may do; what is left out has no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimitBody>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackingImageBody {
    pub path: String,
    #[schema(value_type = String, example = "qcow2")]
    pub format: DiskFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimitBody {
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes read and written a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Requests that may go at once after a pause; by default what a tenth of a second gives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_iops: Option<u64>,
    /// Bytes likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicBody {
    /// Name within the VM.
    pub id: String,
    /// A bridge that every host that may run the VM has.
    #[schema(example = "br0")]
    pub bridge: String,
    /// Hardware address; by default one that follows from the VM and the card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "52:54:00:12:34:56")]
    pub mac: Option<MacAddr>,
}

impl VmSpecBody {
    pub const DEFAULT_MEMORY_MIB: u64 = 512;
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

    /// A new VM's spec. A kernel that is missing is an empty path, which `decide` refuses in words.
    pub fn into_spec(self) -> VmSpec {
        let blank = VmSpec {
            machine: MachineType::QDirect1,
            vcpus: 1,
            memory_mib: Self::DEFAULT_MEMORY_MIB,
            kernel: String::new(),
            initrd: None,
            cmdline: Self::DEFAULT_CMDLINE.to_owned(),
            disks: Vec::new(),
            nics: Vec::new(),
            highly_available: false,
            release: None,
        };
        VmSpecChange::from(self).over(&blank)
    }
}

impl From<VmSpecBody> for VmSpecChange {
    fn from(body: VmSpecBody) -> VmSpecChange {
        VmSpecChange {
            machine: body.machine,
            vcpus: body.vcpus,
            memory_mib: body.memory_mib,
            kernel: body.kernel,
            initrd: body.initrd,
            cmdline: body.cmdline,
            disks: body.disks.map(|disks| disks.into_iter().map(Disk::from).collect()),
            highly_available: body.highly_available,
            release: body.release,
            nics: body.nics.map(|nics| nics.into_iter().map(Nic::from).collect()),
        }
    }
}

impl From<NicBody> for Nic {
    fn from(body: NicBody) -> Nic {
        Nic { id: body.id, bridge: body.bridge, mac: body.mac }
    }
}

impl From<DiskBody> for Disk {
    fn from(body: DiskBody) -> Disk {
        let image = |image: BackingImageBody| BackingImage { path: image.path, format: image.format };
        let limit = |limit: RateLimitBody| {
            let RateLimitBody { iops, bytes_per_second, burst_iops, burst_bytes } = limit;
            RateLimit { iops, bytes_per_second, burst_iops, burst_bytes }
        };
        Disk {
            id: body.id,
            path: body.path,
            read_only: body.read_only,
            shareable: body.shareable,
            format: body.format,
            backing: body.backing.into_iter().map(image).collect(),
            on_error: body.on_error,
            rate_limit: body.rate_limit.map(limit),
        }
    }
}

/// `PATCH /v1/vms/{id}`: what is left out stays. A changed spec takes effect at the next start.
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
    /// oVirt's `VMStatus`: `Down`, `WaitForLaunch`, `PoweringUp`, `Up`, `Paused`, `PoweringDown`, `Unknown`.
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
            disk_fault: state.disk_faults.get(&id).cloned(),
            guest: state.guests.get(&id).cloned(),
            spec: vm.spec.clone(),
            spec_pending: vm.granted_spec.as_ref().is_some_and(|granted| *granted != vm.spec),
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
        let changed = VmSpecChange::from(patch.spec.unwrap()).over(&spec);
        assert_eq!((changed.vcpus, changed.initrd.as_deref()), (2, None));
        assert_eq!((changed.kernel, changed.disks), (spec.kernel, spec.disks));
    }

    #[test]
    fn a_misspelt_field_is_refused_not_ignored() {
        assert!(serde_json::from_str::<VmCreate>(r#"{"name":"a","spec":{"kernel":"/k","memory":5}}"#).is_err());
        assert!(serde_json::from_str::<VmPatch>(r#"{"run_strategie":"Always"}"#).is_err());
        assert!(serde_json::from_str::<VmStop>(r#"{"mode":"kill"}"#).is_err());
        assert_eq!(serde_json::from_str::<VmStop>("{}").unwrap().mode, StopMode::Shutdown);
    }
}
