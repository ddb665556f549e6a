//! How guests may be moved.

use serde::Deserialize;
use serde::Serialize;

/// What is left out is the cluster's, and what that leaves out is as [`MigrationPolicy::DEFAULT`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationPolicy {
    /// The cluster may move it by itself, as from a host that goes into maintenance.
    pub automatic: Option<bool>,
    /// The guest may stand for this long while the last of its memory is sent.
    pub downtime_ms: Option<u32>,
    /// At most so fast.
    pub mib_per_second: Option<u32>,
    /// Given up after so many seconds for each GiB of the guest's memory.
    pub seconds_per_gib: Option<u32>,
}

impl MigrationPolicy {
    pub const DEFAULT: MigrationPolicy =
        MigrationPolicy { automatic: Some(true), downtime_ms: Some(300), mib_per_second: None, seconds_per_gib: None };
    pub const MAX_DOWNTIME_MS: u32 = 60_000;
    pub const MAX_MIB_PER_SECOND: u32 = 100_000;
    pub const MAX_SECONDS_PER_GIB: u32 = 86_400;

    /// This, and where it says nothing, the other.
    pub fn or(self, other: MigrationPolicy) -> MigrationPolicy {
        MigrationPolicy {
            automatic: self.automatic.or(other.automatic),
            downtime_ms: self.downtime_ms.or(other.downtime_ms),
            mib_per_second: self.mib_per_second.or(other.mib_per_second),
            seconds_per_gib: self.seconds_per_gib.or(other.seconds_per_gib),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_says_what_its_cluster_does_not_have_to() {
        let cluster =
            MigrationPolicy { automatic: Some(false), mib_per_second: Some(50), ..MigrationPolicy::default() };
        let guest = MigrationPolicy { downtime_ms: Some(20), mib_per_second: Some(10), ..MigrationPolicy::default() };
        let both = guest.or(cluster).or(MigrationPolicy::DEFAULT);
        assert_eq!((both.automatic, both.downtime_ms, both.mib_per_second), (Some(false), Some(20), Some(10)));
    }
}
