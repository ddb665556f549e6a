//! A guest on its way from one host to another (DESIGN §5, *Migration*).

use serde::Deserialize;
use serde::Serialize;

use crate::ids::BootId;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::MigrationId;

/// Exactly one of `MigrationCommitted` and `MigrationAborted` is decided for an id. While it moves, its memory is booked on both hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    pub id: MigrationId,
    /// The permit that the guest runs under at its source.
    pub epoch: Epoch,
    pub from: HostId,
    pub to: HostId,
    /// The incarnation of the target that prepares for it: another one knows nothing of it.
    pub to_boot: BootId,
    pub phase: MigrationPhase,
    /// What the source said last.
    pub progress: Option<MigrationProgress>,
}

impl Migration {
    /// OpenShift's and oVirt's limits: migrations out of a host, into a host, and in a cluster, at one time.
    pub const MAX_OUT_OF_HOST: usize = 2;
    pub const MAX_INTO_HOST: usize = 2;
    pub const MAX_IN_CLUSTER: usize = 5;

    pub fn is_moving(&self) -> bool {
        self.phase == MigrationPhase::Moving
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// The source has the permit.
    Moving,
    /// The target has the permit, of this epoch, and has not said yet that the guest runs.
    Committed { epoch: Epoch },
}

/// How far the source is. Bounded by its type; the ground of no decision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationProgress {
    /// Passes over the guest's memory, the present one included.
    pub round: u32,
    /// Bytes of guest memory sent, in all rounds.
    pub sent_bytes: u64,
    /// Bytes that the guest has changed since they were sent.
    pub remaining_bytes: u64,
    /// How fast it changes them, bytes a second.
    pub dirty_bytes_per_second: u64,
    /// Share of time that its vCPUs are held back, percent.
    pub throttle_percent: u8,
    /// How long the guest stood still, microseconds; 0 before it does.
    pub downtime_us: u64,
}

/// Why a migration came to nothing. The guest goes on at its source, if that is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AbortReason {
    /// By command, or because the guest is to stop.
    Cancelled,
    /// One of the two hosts said that it cannot be done.
    Failed,
    /// The guest ended at its source.
    GuestEnded,
    /// The target does not answer, or came back as another incarnation.
    TargetLost,
    /// The source is known to run it no more.
    SourceLost,
}
