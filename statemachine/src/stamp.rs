//! Time as the log knows it.

use serde::Deserialize;
use serde::Serialize;

/// When a batch was decided. `at_ms` never runs backwards in the log; `wall_ms` is what the
/// leader's clock really said (hazard H17). Both in milliseconds since the Unix epoch.
///
/// Nothing in `decide` may turn a difference of stamps into a safety rule: durations that matter
/// run on the leader's monotonic clock and enter the log as commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Stamp {
    pub at_ms: u64,
    pub wall_ms: u64,
}

impl Stamp {
    /// The stamp that follows `self` when the clock says `wall_ms`: never earlier than `self`.
    pub fn advance(self, wall_ms: u64) -> Stamp {
        Stamp { at_ms: self.at_ms.max(wall_ms), wall_ms }
    }
}
