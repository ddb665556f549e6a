//! What hosts that openraft does not carry ask of its members, and what they get (DESIGN §4, hazard H24, ADR 13).
//!
//! Voters and standby learners are pushed to. All other hosts pull what was committed, because a leader that pushes to 500
//! hosts commits a hundredth of what it could. Asking and answering are in [`crate::node`]; which of the two a host is shows in
//! its status and nowhere else: both append the same batches to the same fold.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::batch::SealedBatch;

use crate::types::LogId;

/// One answer holds about this much: it travels on the socket of heartbeats, so it stays small (hazard H25).
pub(crate) const PULL_BYTES: usize = 256 << 10;
pub(crate) const PULL_BATCHES: usize = 4096;
/// An asker is held this long at most while there is nothing for it.
pub(crate) const WAIT_MAX_MS: u32 = 2_000;

/// Asks for what was committed after a seq.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    pub after: Seq,
    /// Wait this long for something new before answering with nothing.
    pub wait_ms: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    pub what: Committed,
    pub outlook: Outlook,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Committed {
    /// In order, without a gap. Each names the one before it, so the receiver verifies the chain by appending them. `head` is
    /// what the member has applied.
    Batches { batches: Vec<Arc<SealedBatch>>, head: Seq },
    /// The asker is too far behind, or what it needs was trimmed: the manifest of the member's snapshot.
    Snapshot {
        #[serde(with = "serde_bytes")]
        manifest: Vec<u8>,
    },
}

/// What only members know: who they are, and whom they follow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlook {
    pub leader: Option<HostId>,
    pub voters: Vec<HostId>,
    pub learners: Vec<HostId>,
    /// The committed entry that made them the members.
    pub since: Option<LogId>,
}

impl Outlook {
    /// A host that was a member up to `until` is none any more.
    pub(crate) fn ends_membership_of(&self, host: HostId, until: Option<LogId>) -> bool {
        self.since > until && !self.voters.contains(&host) && !self.learners.contains(&host)
    }
}
