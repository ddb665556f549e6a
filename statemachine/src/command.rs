//! Commands: what somebody wants, or what a host saw. One accepted command is one batch of events.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::ids::BootId;
use crate::ids::ClusterId;
use crate::ids::DataCenterId;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::MigrationId;
use crate::ids::Seq;
use crate::ids::SiteId;
use crate::ids::TokenId;
use crate::ids::VmId;
use crate::state::Capacity;
use crate::state::Cpu;
use crate::state::DeviceWord;
use crate::state::Devices;
use crate::state::Disk;
use crate::state::DiskFault;
use crate::state::ExitReason;
use crate::state::Fingerprint;
use crate::state::FirstBoot;
use crate::state::GuestFacts;
use crate::state::GuestStatus;
use crate::state::HostProcessor;
use crate::state::MachineType;
use crate::state::MemoryPages;
use crate::state::MigrationPolicy;
use crate::state::MigrationProgress;
use crate::state::Nic;
use crate::state::OnPanic;
use crate::state::OnWatchdog;
use crate::state::ReleaseClass;
use crate::state::RunStrategy;
use crate::state::StopMode;
use crate::state::TokenPurpose;
use crate::state::VmSpec;

/// Who asks. It is part of every batch, and rules depend on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Actor {
    /// root on a host's Unix socket.
    Root(HostId),
    /// The bearer of an API token.
    Token(TokenId),
    /// A host about itself and its guests, proven by its certificate.
    Host(HostId),
    /// A duty of the leader (planner, grant keeper), which runs on this host.
    Duty(HostId),
    /// A machine that joins, before it is a host; the token it shows is in the command.
    Joiner,
}

/// A retry with the same key and the same body is answered as the first time was; the same key with another
/// body is a conflict (hazard H16).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyKey {
    /// Chosen by the client, at most [`IdempotencyKey::MAX_LEN`] bytes.
    pub key: String,
    /// blake3 of the request body as the client sent it.
    pub body_hash: [u8; 32],
}

impl IdempotencyKey {
    pub const MAX_LEN: usize = 128;
}

/// A command on its way to the decider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub actor: Actor,
    /// The host whose API or agent received it.
    pub origin: HostId,
    pub idempotency: Option<IdempotencyKey>,
    pub command: Command,
}

impl Request {
    /// May a peer that proved to be `host` have sent this? A host forwards what its own API, agent or duty asks; in
    /// another's name it speaks never. Bearers of tokens and joiners have no host: the one that heard them vouches.
    pub fn may_come_from(&self, host: HostId) -> bool {
        // Who recovers a site is its only member: nobody else may take the others out of it.
        if matches!(self.command, Command::SiteRecover { .. }) {
            return false;
        }
        match self.actor {
            Actor::Root(actor) | Actor::Host(actor) | Actor::Duty(actor) => actor == host,
            Actor::Token(_) | Actor::Joiner => true,
        }
    }
}

/// A host's report carries its incarnation and a counter that only rises within it; `decide` drops older ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportId {
    pub host: HostId,
    pub boot: BootId,
    pub counter: u64,
}

/// What a host tells about itself when it joins and at each boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    pub boot: BootId,
    pub capacity: Capacity,
    /// Highest feature level that this build can apply.
    pub feature_level: u32,
    pub version: String,
    /// CLOCK_BOOTTIME runs while the host does not (metal with tsc; hazard C6).
    pub clock_runs_while_stopped: bool,
    /// An armed watchdog, nowayout, with this timeout.
    pub watchdog_timeout_ms: Option<u32>,
}

/// A host that asks to belong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCandidate {
    pub name: String,
    /// `address:port`, where its 7443 is reached.
    pub address: String,
    /// blake3 of the host's public key (DER SubjectPublicKeyInfo).
    pub public_key: Fingerprint,
    pub facts: HostFacts,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    // -- site, hosts
    /// First command of every log: the site, `Default` data center and cluster, and the first host.
    SiteInit {
        site: SiteId,
        name: String,
        ca: Fingerprint,
        first_host: HostCandidate,
    },
    TokenCreate {
        purpose: TokenPurpose,
        secret_hash: [u8; 32],
        ttl_ms: u64,
        note: String,
    },
    TokenRevoke {
        token: TokenId,
    },
    /// Consumes a join token. Asked again with the same key pair it is answered with the same host.
    HostJoin {
        secret_hash: [u8; 32],
        candidate: HostCandidate,
    },
    CertificateIssue {
        host: HostId,
        serial: String,
        fingerprint: Fingerprint,
        not_after_ms: u64,
    },
    HostMaintenance {
        host: HostId,
    },
    HostActivate {
        host: HostId,
    },
    /// The host is out: its certificate is refused from here on. Needs maintenance, and no guest.
    HostRemove {
        host: HostId,
    },
    HostChange {
        host: HostId,
        change: HostChange,
    },
    /// How many hosts vote: 3 or 5.
    VoterCount {
        voters: u8,
    },
    /// First command of a host that goes on alone after the majority was lost (`quorate recover`). Every other host is off or
    /// wiped: a person gave their word. They leave the site, and what ran on them runs no more.
    SiteRecover {
        generation: u32,
        ca: Fingerprint,
    },
    /// First word of a host in an incarnation, or a change of its facts. Another boot id releases its permits.
    ReportHost {
        report: ReportId,
        facts: HostFacts,
    },

    // -- duties of the leader about hosts (DESIGN §5, monotonic clock)
    HostSuspect {
        host: HostId,
    },
    HostLost {
        host: HostId,
    },
    HostRecover {
        host: HostId,
    },

    // -- virtual machines
    VmDefine {
        name: String,
        cluster: Option<ClusterId>,
        spec: VmSpec,
        run_strategy: RunStrategy,
    },
    VmChange {
        vm: VmId,
        change: VmChange,
    },
    VmDelete {
        vm: VmId,
    },
    VmStart {
        vm: VmId,
        host: Option<HostId>,
    },
    VmStop {
        vm: VmId,
        mode: StopMode,
    },
    VmReset {
        vm: VmId,
    },
    /// Duty of the leader: give a VM that should run a host.
    VmPlace {
        vm: VmId,
    },
    ReportVmStatus {
        report: ReportId,
        vm: VmId,
        epoch: Epoch,
        status: GuestStatus,
    },
    ReportVmExited {
        report: ReportId,
        vm: VmId,
        epoch: Epoch,
        reason: ExitReason,
        detail: String,
    },

    // -- the site, duties of the leader
    /// Every host that is not away supports the level.
    FeatureLevelActivate {
        level: u32,
    },
    // -- the stream
    /// Batches up to here are no longer wanted.
    EventsTrim {
        upto: Seq,
    },

    // -- storage manager
    SpmGrant {
        data_center: DataCenterId,
        host: HostId,
    },
    SpmRelease {
        data_center: DataCenterId,
    },

    // -- since level 3: a variant's number never changes either
    /// What a guest's agent says of the guest.
    ReportVmGuest {
        report: ReportId,
        vm: VmId,
        epoch: Epoch,
        facts: Arc<GuestFacts>,
    },
    /// The error of a disk that holds a guest, or that none does any more.
    ReportVmDiskFault {
        report: ReportId,
        vm: VmId,
        epoch: Epoch,
        fault: Option<DiskFault>,
    },
    /// Stand still, or go on: after a pause, or where an error of a disk stopped it.
    VmPause {
        vm: VmId,
        paused: bool,
    },
    /// Move a running guest; without a host, the scheduler chooses.
    VmMigrate {
        vm: VmId,
        host: Option<HostId>,
    },
    VmCancelMigration {
        vm: VmId,
    },
    /// The source, now and then.
    ReportMigrationProgress {
        report: ReportId,
        vm: VmId,
        migration: MigrationId,
        progress: MigrationProgress,
    },
    /// The target: it holds all state, so the source stands still and its disks are quiet.
    ReportMigrationLoaded {
        report: ReportId,
        vm: VmId,
        migration: MigrationId,
    },
    /// Source or target: it cannot be done.
    ReportMigrationFailed {
        report: ReportId,
        vm: VmId,
        migration: MigrationId,
        detail: String,
    },
    /// What a guest that runs is to make do with.
    VmMemory {
        vm: VmId,
        mib: u64,
    },
    /// What became of a device that was to come to a guest, or to leave it.
    ReportVmDevice {
        report: ReportId,
        vm: VmId,
        epoch: Epoch,
        device: String,
        word: DeviceWord,
    },
    /// What a host's processor can be to guests.
    ReportProcessor {
        report: ReportId,
        processor: HostProcessor,
    },
    /// How the guests of a cluster may be moved.
    ClusterMigrationPolicy {
        cluster: ClusterId,
        policy: MigrationPolicy,
    },
    /// Put a running guest to sleep: it becomes a file of its host.
    VmSuspend {
        vm: VmId,
    },
    /// Its host: the file is whole, of so many bytes, and the guest stands still.
    ReportVmSuspended {
        report: ReportId,
        vm: VmId,
        suspension: MigrationId,
        bytes: u64,
    },
    /// Its host: it cannot be done.
    ReportSuspensionFailed {
        report: ReportId,
        vm: VmId,
        suspension: MigrationId,
        detail: String,
    },
}

/// What may change on a host; `None` keeps.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostChange {
    /// -1 never, 0 to 10.
    pub spm_priority: Option<i8>,
    /// Hosts of one domain may fail together; empty: it shares none.
    pub failure_domain: Option<String>,
}

/// What may change on a defined VM; `None` keeps.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmChange {
    pub name: Option<String>,
    pub run_strategy: Option<RunStrategy>,
    /// Takes effect at the next start, but for disks and network cards: those come to a guest that runs, and leave it, at once.
    pub spec: VmSpecChange,
}

/// What may change of what a guest is made of; `None` keeps. It is put over the spec that the VM has when this is decided: of two
/// who change different things at once, neither undoes the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmSpecChange {
    pub machine: Option<MachineType>,
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u64>,
    pub kernel: Option<String>,
    /// An empty path takes it away.
    pub initrd: Option<String>,
    pub cmdline: Option<String>,
    /// All of them.
    pub disks: Option<Vec<Disk>>,
    pub highly_available: Option<bool>,
    pub release: Option<ReleaseClass>,
    /// All of them.
    pub nics: Option<Vec<Nic>>,
    pub cpu: Option<Cpu>,
    pub pages: Option<MemoryPages>,
    /// An empty host name takes it away.
    pub first_boot: Option<FirstBoot>,
    pub on_watchdog: Option<OnWatchdog>,
    pub on_panic: Option<OnPanic>,
    pub migration: Option<MigrationPolicy>,
    /// Devices more, beside those that it has.
    pub plug: Devices,
    /// Ids of devices that it is to lose.
    pub unplug: Vec<String>,
}

impl VmSpecChange {
    pub fn over(&self, present: &VmSpec) -> VmSpec {
        let changed = self.clone();
        let spec = VmSpec {
            machine: changed.machine.unwrap_or(present.machine),
            vcpus: changed.vcpus.unwrap_or(present.vcpus),
            memory_mib: changed.memory_mib.unwrap_or(present.memory_mib),
            kernel: changed.kernel.unwrap_or_else(|| present.kernel.clone()),
            initrd: match changed.initrd {
                Some(initrd) => (!initrd.is_empty()).then_some(initrd),
                None => present.initrd.clone(),
            },
            cmdline: changed.cmdline.unwrap_or_else(|| present.cmdline.clone()),
            disks: changed.disks.unwrap_or_else(|| present.disks.clone()),
            nics: changed.nics.unwrap_or_else(|| present.nics.clone()),
            highly_available: changed.highly_available.unwrap_or(present.highly_available),
            release: changed.release.or(present.release),
            cpu: changed.cpu.unwrap_or(present.cpu),
            pages: changed.pages.unwrap_or(present.pages),
            first_boot: match changed.first_boot {
                Some(first_boot) => (!first_boot.host_name.is_empty()).then_some(first_boot),
                None => present.first_boot.clone(),
            },
            on_watchdog: changed.on_watchdog.unwrap_or(present.on_watchdog),
            on_panic: changed.on_panic.unwrap_or(present.on_panic),
            migration: changed.migration.unwrap_or(present.migration),
        };
        changed.unplug.iter().fold(spec, |spec, id| spec.without(id)).with(&changed.plug)
    }
}
