//! How much of its memory a guest is asked to make do with, and what it says about it.

use serde::{Deserialize, Serialize};

use crate::host::HugePages;

/// No guest is asked to live with less: Linux would kill its programs one after the other.
pub const MIN_BALLOON_TARGET_BYTES: u64 = 64 << 20;

/// What a guest says of its memory (virtio 1.2, 5.5.6.4). A guest may say anything: for people and for advice, never for safety.
/// What it did not say is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemoryStats {
    /// Unused: not even for caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// What the guest's kernel knows of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// What programs could have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation_stalls: Option<u64>,
}

/// `metrics.balloon`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonCounters {
    /// What the guest is asked to make do with.
    pub target_bytes: u64,
    /// What it says that it makes do with. Not below the target for long, unless it has no driver or no memory left.
    pub actual_bytes: u64,
    /// Pages of 4 KiB that it has given, in all; counted again when given again.
    pub inflated_pages: u64,
    pub deflated_pages: u64,
    /// Pages that it wanted to give and that are not its memory, or were too many at once.
    pub refused_pages: u64,
    /// Free memory that it has reported, and that the host has taken until the guest uses it again.
    pub reported_bytes: u64,
    /// Times that the host did not take memory back.
    pub discard_failures: u64,
    /// Times that the driver broke the protocol.
    pub driver_errors: u64,
    /// The last answer of the guest, and how old it is.
    pub guest: Option<GuestMemoryStats>,
    pub guest_age_ms: Option<u64>,
}

/// Why a target cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BalloonTargetError {
    #[error("the guest has {memory_bytes} bytes of memory, and a balloon takes memory away: {asked} is more")]
    TooLarge { asked: u64, memory_bytes: u64 },
    #[error("a guest is not asked to live with less than {least} bytes, and {asked} is less")]
    TooSmall { asked: u64, least: u64 },
    #[error(
        "the guest's memory is in huge pages, which stay reserved for it: what a balloon takes, nobody else can have"
    )]
    Reserved,
}

/// Whether a guest of so much memory can be asked to make do with `asked` bytes. A guest that is small from the start keeps all.
pub fn check_target(asked: u64, memory_bytes: u64, huge_pages: Option<HugePages>) -> Result<(), BalloonTargetError> {
    let least = MIN_BALLOON_TARGET_BYTES.min(memory_bytes);
    if asked > memory_bytes {
        Err(BalloonTargetError::TooLarge { asked, memory_bytes })
    } else if asked < least {
        Err(BalloonTargetError::TooSmall { asked, least })
    } else if asked < memory_bytes && huge_pages.is_some() {
        Err(BalloonTargetError::Reserved)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_target_lies_between_the_least_and_all_of_memory() {
        for (asked, memory, fits) in [
            (256, 256, true),
            (64, 256, true),
            (63, 256, false),
            (257, 256, false),
            (32, 32, true),
            (31, 32, false),
            (64, 32, false),
        ] {
            assert_eq!(check_target(asked * MIB, memory * MIB, None).is_ok(), fits, "{asked} of {memory}");
        }
        let huge = |asked| check_target(asked, 256 * MIB, Some(HugePages::Mib2));
        assert_eq!(huge(256 * MIB), Ok(()));
        assert_eq!(huge(128 * MIB), Err(BalloonTargetError::Reserved));
    }

    #[test]
    fn what_a_guest_did_not_say_is_left_out() {
        let stats = GuestMemoryStats { free_bytes: Some(5), ..GuestMemoryStats::default() };
        let text = serde_json::to_string(&stats).unwrap();
        assert_eq!(text, r#"{"free_bytes":5}"#);
        assert_eq!(serde_json::from_str::<GuestMemoryStats>(&text).unwrap(), stats);
    }
}
