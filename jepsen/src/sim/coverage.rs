//! What a run must have met to prove anything. A campaign whose counters stay at zero fails (issue 3).

use std::collections::BTreeMap;
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Met {
    LeaderChanges,
    /// A leader that died and came back before anybody else was elected.
    RestoredLeaders,
    /// Decider sessions that ended on a host that still led.
    RefusedProposals,
    SupersededBatches,
    SnapshotInstalls,
    Purges,
    MembershipChanges,
    UnsyncedWritesLost,
    LateAnswers,
    LapsedLeases,
    ResumedLeases,
    // What makes the rest worth something.
    AcceptedCommands,
    UnknownOutcomes,
    GuestStarts,
    PowerCuts,
    HostdKills,
    DiskFailures,
    DiskHangs,
    /// Hosts whose stream began later than the log at the end.
    TrimmedStreams,
    Pauses,
    Partitions,
    HostsLost,
    HostsRemoved,
    /// Batches that hosts outside the Raft group took from a member.
    PulledBatches,
    /// Hosts that pulled first and became members.
    PullersTakenIn,
    /// Guests that went on running on another host.
    Migrations,
    /// Guests that went on from a file.
    Wakings,
    /// Guests that stood still for a migration or a suspension, and went on where they were.
    MigrationsUndone,
}

impl Met {
    /// A campaign fails while one of these is zero.
    pub const REQUIRED: [Met; 19] = [
        Met::LeaderChanges,
        Met::RestoredLeaders,
        Met::RefusedProposals,
        Met::SupersededBatches,
        Met::SnapshotInstalls,
        Met::Purges,
        Met::MembershipChanges,
        Met::UnsyncedWritesLost,
        Met::LateAnswers,
        Met::LapsedLeases,
        Met::ResumedLeases,
        Met::DiskFailures,
        Met::DiskHangs,
        Met::TrimmedStreams,
        Met::PulledBatches,
        Met::PullersTakenIn,
        Met::Migrations,
        Met::Wakings,
        Met::MigrationsUndone,
    ];
}

#[derive(Debug, Clone, Default)]
pub struct Coverage(BTreeMap<Met, u64>);

impl Coverage {
    pub fn add(&mut self, what: Met, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    pub fn merge(&mut self, other: &Coverage) {
        for (what, count) in &other.0 {
            self.add(*what, *count);
        }
    }

    pub fn count(&self, what: Met) -> u64 {
        self.0.get(&what).copied().unwrap_or(0)
    }

    pub fn missing(&self) -> Vec<Met> {
        Met::REQUIRED.into_iter().filter(|what| self.count(*what) == 0).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, count) in &self.0 {
            writeln!(f, "  {:<20} {count:>12}", format!("{what:?}"))?;
        }
        Ok(())
    }
}
