//! Events: what was decided or seen. Append-only: a kind number and a version never change meaning.
//!
//! Each event is stored as (kind, version, payload). A new field means a new version and an
//! up-caster in [`Event::decode`]; a new variant means a new feature level (DESIGN §3). The golden
//! bytes of every version of every variant are kept in `tests/golden/`.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::codec;
use crate::codec::CodecError;
use crate::command::HostCandidate;
use crate::command::HostFacts;
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
use crate::scheduler::Explanation;
use crate::state::AbortReason;
use crate::state::Desired;
use crate::state::DeviceWord;
use crate::state::Devices;
use crate::state::DiskFault;
use crate::state::ExitReason;
use crate::state::Fingerprint;
use crate::state::GuestFacts;
use crate::state::GuestStatus;
use crate::state::HostProcessor;
use crate::state::MigrationPolicy;
use crate::state::MigrationProgress;
use crate::state::ReleaseClass;
use crate::state::RunStrategy;
use crate::state::SchedulingPolicy;
use crate::state::TokenPurpose;
use crate::state::VmSpec;

/// An event as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodedEvent {
    pub kind: u16,
    pub version: u8,
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

macro_rules! events {
    ($($(#[$doc:meta])* $kind:literal $name:ident { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

            impl From<$name> for Event {
                fn from(event: $name) -> Event {
                    Event::$name(event)
                }
            }
        )*

        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum Event {
            $($(#[$doc])* $name($name),)*
        }

        impl Event {
            /// Every kind of event: (number, name).
            pub const KINDS: &'static [(u16, &'static str)] = &[$(($kind, stringify!($name)),)*];

            pub fn kind(&self) -> u16 {
                match self { $(Event::$name(_) => $kind,)* }
            }

            /// The name that streams and filters use.
            pub fn name(&self) -> &'static str {
                match self { $(Event::$name(_) => stringify!($name),)* }
            }

            /// Encodes at the newest version of its kind.
            pub fn encode(&self) -> EncodedEvent {
                let payload = match self { $(Event::$name(event) => codec::encode(event),)* };
                EncodedEvent { kind: self.kind(), version: 1, payload }
            }

            /// Decodes any version ever written, up-casting old ones.
            pub fn decode(encoded: &EncodedEvent) -> Result<Event, CodecError> {
                match (encoded.kind, encoded.version) {
                    $(($kind, 1) => codec::decode::<$name>(&encoded.payload).map(Event::$name),)*
                    (kind, version) => Err(CodecError::UnknownEvent { kind, version }),
                }
            }
        }
    };
}

events! {
    /// The log of a site begins.
    1 SiteInitialised { site: SiteId, name: String, ca: Fingerprint, feature_level: u32 }
    2 DataCenterCreated { data_center: DataCenterId, name: String }
    3 ClusterCreated { cluster: ClusterId, data_center: DataCenterId, name: String, scheduling: SchedulingPolicy }
    /// Hosts need not keep batches up to here any longer.
    4 EventsTrimmed { upto: Seq }
    /// Every host that is not away can apply what this level allows.
    5 FeatureLevelActivated { level: u32 }
    /// How many hosts vote, where there are as many.
    6 VoterCountChanged { voters: u8 }
    /// The majority of the voters was lost for good, and one host went on alone: a new generation, under a new authority.
    7 SiteRecovered { generation: u32, host: HostId, ca: Fingerprint }
    /// How the guests of a cluster may be moved, where they do not say themselves.
    8 ClusterMigrationPolicyChanged { cluster: ClusterId, policy: MigrationPolicy }

    10 TokenCreated { token: TokenId, purpose: TokenPurpose, secret_hash: [u8; 32], expires_ms: u64, note: String }
    11 TokenRevoked { token: TokenId }
    /// The token admitted a host and is spent.
    12 TokenUsed { token: TokenId, host: HostId }

    20 HostJoined { host: HostId, cluster: ClusterId, candidate: HostCandidate }
    21 CertificateIssued { host: HostId, serial: String, fingerprint: Fingerprint, not_after_ms: u64 }
    /// First word of an incarnation, or changed facts.
    22 HostReported { host: HostId, counter: u64, facts: HostFacts }
    /// It came back as another incarnation: nothing of the old one runs (DESIGN §5, *boot id*).
    23 HostRebooted { host: HostId, from: BootId, to: BootId }
    24 HostSuspected { host: HostId }
    25 HostUnreachable { host: HostId }
    26 HostRecovered { host: HostId }
    27 HostMaintenanceRequested { host: HostId }
    28 HostActivated { host: HostId }
    29 HostRemoved { host: HostId }
    30 HostSpmPriorityChanged { host: HostId, priority: i8 }
    /// Hosts of one domain may fail together: a rack, a power feed. Empty: a domain of its own.
    31 HostFailureDomainChanged { host: HostId, domain: String }
    /// What its processor can be to guests.
    32 HostProcessorReported { host: HostId, counter: u64, processor: HostProcessor }

    40 VmDefined { vm: VmId, name: String, cluster: ClusterId, spec: Arc<VmSpec>, run_strategy: RunStrategy }
    41 VmRenamed { vm: VmId, name: String }
    42 VmSpecChanged { vm: VmId, spec: Arc<VmSpec> }
    43 VmRunStrategyChanged { vm: VmId, run_strategy: RunStrategy }
    44 VmDeleted { vm: VmId }
    45 VmDesiredChanged { vm: VmId, desired: Desired }
    46 VmDesiredReset { vm: VmId }
    /// The scheduler's choice, with its reasons.
    47 VmPlaced { vm: VmId, explanation: Arc<Explanation> }
    /// The right to run; the epoch is the seq of this batch. At most one a batch.
    48 VmPermitGranted { vm: VmId, host: HostId, boot: BootId, release: ReleaseClass }
    49 VmPermitReleased { vm: VmId, epoch: Epoch, evidence: ReleaseEvidence }
    50 VmObservedStatus { vm: VmId, epoch: Epoch, host: HostId, counter: u64, status: GuestStatus }
    51 VmObservedExit { vm: VmId, epoch: Epoch, host: HostId, counter: u64, reason: ExitReason, detail: String }
    /// What the guest's agent says of the guest.
    52 VmObservedGuest { vm: VmId, epoch: Epoch, host: HostId, counter: u64, facts: Arc<GuestFacts> }

    /// Somebody wants it to stand still, or to go on.
    53 VmDesiredPause { vm: VmId, paused: bool }
    /// A guest sets out for another host; the migration's id is the seq of this batch. The explanation is the choice of the target.
    54 MigrationStarted { vm: VmId, epoch: Epoch, from: HostId, to: HostId, to_boot: BootId, explanation: Arc<Explanation> }
    /// How far its source is.
    55 MigrationProgressed { vm: VmId, migration: MigrationId, host: HostId, counter: u64, progress: MigrationProgress }
    /// The right to run is the target's; the epoch is the seq of this batch.
    56 MigrationCommitted { vm: VmId, migration: MigrationId, from: HostId, to: HostId, boot: BootId, release: ReleaseClass, counter: u64 }
    /// The right to run stays where it is.
    57 MigrationAborted { vm: VmId, migration: MigrationId, from: HostId, to: HostId, reason: AbortReason, detail: String }
    /// The error of a disk that holds the guest, or that none does any more.
    58 VmObservedDiskFault { vm: VmId, epoch: Epoch, host: HostId, counter: u64, fault: Option<DiskFault> }

    60 SpmGranted { data_center: DataCenterId, host: HostId }
    61 SpmReleased { data_center: DataCenterId, host: HostId }

    /// The guest that runs gets these devices, and is to give up those: from here on its host sees to it.
    62 VmDesiredDevices { vm: VmId, epoch: Epoch, plug: Devices, unplug: Vec<String> }
    /// What became of that, a device an event.
    63 VmObservedDevice { vm: VmId, epoch: Epoch, host: HostId, counter: u64, device: String, word: DeviceWord }
    /// What the guest that runs is to make do with; all of its memory is the most.
    64 VmDesiredMemory { vm: VmId, mib: u64 }

    /// A guest is to fall asleep on its host; the suspension's id is the seq of this batch.
    65 SuspensionStarted { vm: VmId, epoch: Epoch, host: HostId }
    /// Its host has all of it in a file, and it stands still. The batch releases its permit.
    66 SuspensionCompleted { vm: VmId, suspension: MigrationId, host: HostId, counter: u64, bytes: u64 }
    /// It goes on, if it is still there.
    67 SuspensionAborted { vm: VmId, suspension: MigrationId, host: HostId, reason: AbortReason, detail: String }
    /// What it had in memory is given up.
    68 SuspensionDiscarded { vm: VmId, suspension: MigrationId, host: HostId }
}

/// What proved that an epoch runs no more (invariant R2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseEvidence {
    /// The host that ran it said that it has ended.
    Host,
    /// The host came back as another incarnation.
    BootId,
    /// A person who recovered the site gave their word that the host is off or wiped.
    Operator,
}

impl Event {
    /// The feature level that a site needs before this may enter its log (DESIGN §3, *Schema*).
    pub fn feature_level(&self) -> u32 {
        match self {
            Event::VoterCountChanged(_) | Event::SiteRecovered(_) | Event::HostFailureDomainChanged(_) => 2,
            Event::VmDefined(VmDefined { spec, .. }) | Event::VmSpecChanged(VmSpecChanged { spec, .. }) => {
                spec.feature_level()
            }
            Event::VmObservedGuest(_)
            | Event::VmObservedDiskFault(_)
            | Event::VmDesiredPause(_)
            | Event::VmDesiredDevices(_)
            | Event::VmObservedDevice(_)
            | Event::VmDesiredMemory(_)
            | Event::HostProcessorReported(_)
            | Event::ClusterMigrationPolicyChanged(_)
            | Event::SuspensionStarted(_)
            | Event::SuspensionCompleted(_)
            | Event::SuspensionAborted(_)
            | Event::SuspensionDiscarded(_)
            | Event::MigrationStarted(_)
            | Event::MigrationProgressed(_)
            | Event::MigrationCommitted(_)
            | Event::MigrationAborted(_) => 3,
            _ => 1,
        }
    }

    /// Names of the things that the event is about, for filters of the stream: `vm/<id>`, `host/<id>`, ...
    pub fn entities(&self) -> Vec<String> {
        let host = |id: &HostId| format!("host/{id}");
        let vm = |id: &VmId| format!("vm/{id}");
        match self {
            Event::SiteInitialised(e) => vec![format!("site/{}", e.site)],
            Event::DataCenterCreated(e) => vec![format!("data_center/{}", e.data_center)],
            Event::ClusterCreated(e) => vec![format!("cluster/{}", e.cluster)],
            Event::EventsTrimmed(_) | Event::FeatureLevelActivated(_) | Event::VoterCountChanged(_) => Vec::new(),
            Event::SiteRecovered(e) => vec![host(&e.host)],
            Event::HostFailureDomainChanged(e) => vec![host(&e.host)],
            Event::TokenCreated(e) => vec![format!("token/{}", e.token)],
            Event::TokenRevoked(e) => vec![format!("token/{}", e.token)],
            Event::TokenUsed(e) => vec![format!("token/{}", e.token), host(&e.host)],
            Event::HostJoined(e) => vec![host(&e.host)],
            Event::CertificateIssued(e) => vec![host(&e.host)],
            Event::HostReported(e) => vec![host(&e.host)],
            Event::HostRebooted(e) => vec![host(&e.host)],
            Event::HostSuspected(e) => vec![host(&e.host)],
            Event::HostUnreachable(e) => vec![host(&e.host)],
            Event::HostRecovered(e) => vec![host(&e.host)],
            Event::HostMaintenanceRequested(e) => vec![host(&e.host)],
            Event::HostActivated(e) => vec![host(&e.host)],
            Event::HostRemoved(e) => vec![host(&e.host)],
            Event::HostSpmPriorityChanged(e) => vec![host(&e.host)],
            Event::VmDefined(e) => vec![vm(&e.vm)],
            Event::VmRenamed(e) => vec![vm(&e.vm)],
            Event::VmSpecChanged(e) => vec![vm(&e.vm)],
            Event::VmRunStrategyChanged(e) => vec![vm(&e.vm)],
            Event::VmDeleted(e) => vec![vm(&e.vm)],
            Event::VmDesiredChanged(e) => vec![vm(&e.vm)],
            Event::VmDesiredReset(e) => vec![vm(&e.vm)],
            Event::VmPlaced(e) => vec![vm(&e.vm)],
            Event::VmPermitGranted(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmPermitReleased(e) => vec![vm(&e.vm)],
            Event::VmObservedStatus(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmObservedExit(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmObservedGuest(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmObservedDiskFault(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmDesiredPause(e) => vec![vm(&e.vm)],
            Event::VmDesiredDevices(e) => vec![vm(&e.vm)],
            Event::VmObservedDevice(e) => vec![vm(&e.vm), host(&e.host)],
            Event::VmDesiredMemory(e) => vec![vm(&e.vm)],
            Event::HostProcessorReported(e) => vec![host(&e.host)],
            Event::ClusterMigrationPolicyChanged(e) => vec![format!("cluster/{}", e.cluster)],
            Event::MigrationStarted(e) => vec![vm(&e.vm), host(&e.from), host(&e.to)],
            Event::MigrationProgressed(e) => vec![vm(&e.vm), host(&e.host)],
            Event::MigrationCommitted(e) => vec![vm(&e.vm), host(&e.from), host(&e.to)],
            Event::MigrationAborted(e) => vec![vm(&e.vm), host(&e.from), host(&e.to)],
            Event::SuspensionStarted(e) => vec![vm(&e.vm), host(&e.host)],
            Event::SuspensionCompleted(e) => vec![vm(&e.vm), host(&e.host)],
            Event::SuspensionAborted(e) => vec![vm(&e.vm), host(&e.host)],
            Event::SuspensionDiscarded(e) => vec![vm(&e.vm), host(&e.host)],
            Event::SpmGranted(e) => vec![format!("data_center/{}", e.data_center), host(&e.host)],
            Event::SpmReleased(e) => vec![format!("data_center/{}", e.data_center), host(&e.host)],
        }
    }
}
