//! What a guest is made of, as clients say it.

use pnet_base::MacAddr;
use serde::Deserialize;
use serde::Serialize;
use statemachine::command::VmSpecChange;
use statemachine::state::BackingImage;
use statemachine::state::Cpu;
use statemachine::state::CpuModel;
use statemachine::state::Disk;
use statemachine::state::DiskFormat;
use statemachine::state::FirstBoot;
use statemachine::state::FirstUser;
use statemachine::state::Interface;
use statemachine::state::MachineType;
use statemachine::state::MemoryPages;
use statemachine::state::MigrationPolicy;
use statemachine::state::Nic;
use statemachine::state::OnError;
use statemachine::state::OnPanic;
use statemachine::state::OnWatchdog;
use statemachine::state::RateLimit;
use statemachine::state::ReleaseClass;
use statemachine::state::Topology;
use statemachine::state::VmSpec;
use utoipa::ToSchema;

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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuBody>,
    /// What guest memory is made of: `any` (default), or huge pages that the host has set aside, `2MiB` or `1GiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "any")]
    pub pages: Option<MemoryPages>,
    /// What the guest is told when it boots for the first time; an empty host name takes it away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_boot: Option<FirstBootBody>,
    /// When its watchdog runs out: `reset` (default), `power_off`, `pause`, `inject_nmi` or `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "reset")]
    pub on_watchdog: Option<OnWatchdog>,
    /// When its kernel panics: `report` (default), `reset`, `power_off` or `pause`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "report")]
    pub on_panic: Option<OnPanic>,
    /// How it may be moved, where that is not as its cluster says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationPolicyBody>,
}

/// The virtual processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuBody {
    /// `cluster` (default: what its hosts have in common, settled at the start: all of it where they are alike, or else the highest named
    /// one that all can run), `host`, `x86-64-v2` or `x86-64-v3`.
    #[schema(value_type = String, example = "cluster")]
    pub model: CpuModel,
    /// Default: one socket, a core a vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<TopologyBody>,
    /// Its part of a busy host's processors beside other guests, 1 to 10000; default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// At most so much, in percent of one CPU thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap_percent: Option<u32>,
}

/// Their product is the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TopologyBody {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

/// A NoCloud seed for cloud-init, as a small read-only disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FirstBootBody {
    #[schema(example = "web1")]
    pub host_name: String,
    /// May do everything, and logs in by key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<FirstUserBody>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceBody>,
    /// IP addresses of name servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// `#cloud-config`, a script, or MIME parts; at most 16 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FirstUserBody {
    pub name: String,
    /// Lines of OpenSSH's `authorized_keys`.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InterfaceBody {
    /// Id of the network card.
    pub nic: String,
    /// As `192.0.2.5/24`; none: by DHCP.
    #[serde(default)]
    pub addresses: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

/// How guests may be moved; what is left out is as the cluster says, and then as below.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationPolicyBody {
    /// The cluster may move it by itself, as from a host that goes into maintenance. Default: it may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub automatic: Option<bool>,
    /// It may stand for this long while the last of its memory is sent. Default 300.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u32>,
    /// At most so fast. Default: as fast as it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mib_per_second: Option<u32>,
    /// Given up after so long for each GiB of its memory. Default 800.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_per_gib: Option<u32>,
}

impl From<CpuBody> for Cpu {
    fn from(body: CpuBody) -> Cpu {
        let CpuBody { model, topology, weight, cap_percent } = body;
        let topology = topology.map(|TopologyBody { sockets, cores, threads }| Topology { sockets, cores, threads });
        Cpu { model, topology, weight, cap_percent }
    }
}

impl From<FirstBootBody> for FirstBoot {
    fn from(body: FirstBootBody) -> FirstBoot {
        let FirstBootBody { host_name, user, interfaces, dns, user_data } = body;
        let user = user.map(|FirstUserBody { name, ssh_keys }| FirstUser { name, ssh_keys });
        let interface = |InterfaceBody { nic, addresses, gateway }| Interface { nic, addresses, gateway };
        FirstBoot { host_name, user, interfaces: interfaces.into_iter().map(interface).collect(), dns, user_data }
    }
}

impl From<MigrationPolicyBody> for MigrationPolicy {
    fn from(body: MigrationPolicyBody) -> MigrationPolicy {
        let MigrationPolicyBody { automatic, downtime_ms, mib_per_second, seconds_per_gib } = body;
        MigrationPolicy { automatic, downtime_ms, mib_per_second, seconds_per_gib }
    }
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
    /// Where the guest finds it, 1 to 23; by default the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
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
    /// Where the guest finds it, 1 to 23; by default the last free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

impl VmSpecBody {
    pub const DEFAULT_MEMORY_MIB: u64 = 512;
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

    /// A new VM's spec. A kernel that is missing is an empty path, which `decide` refuses in words.
    pub fn into_spec(self) -> VmSpec {
        let blank = VmSpec {
            vcpus: 1,
            memory_mib: Self::DEFAULT_MEMORY_MIB,
            cmdline: Self::DEFAULT_CMDLINE.to_owned(),
            ..VmSpec::default()
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
            cpu: body.cpu.map(Cpu::from),
            pages: body.pages,
            first_boot: body.first_boot.map(FirstBoot::from),
            on_watchdog: body.on_watchdog,
            on_panic: body.on_panic,
            migration: body.migration.map(MigrationPolicy::from),
            ..VmSpecChange::default()
        }
    }
}

impl From<NicBody> for Nic {
    fn from(body: NicBody) -> Nic {
        Nic { id: body.id, bridge: body.bridge, mac: body.mac, slot: body.slot }
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
            slot: body.slot,
        }
    }
}
