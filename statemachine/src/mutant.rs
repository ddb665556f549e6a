//! Deliberate faults, to show that the simulation would see them (what is never caught is not tested).
//!
//! A build without the feature `mutants` has none of them: [`is_on`] is the constant `false`. With it, one can be switched on
//! for the thread that runs a simulation, and nowhere else: no file, flag or environment of a daemon reaches it.

/// One broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutant {
    /// A vote is answered before it is on disk.
    VoteNotSynced,
    /// A log entry is said to be durable before it is synced.
    AppendNotSynced,
    /// A client is told yes when the leader has decided, before a majority has it.
    AcknowledgeBeforeQuorum,
    /// A rejection is told before what it rests on is applied (hazard C13).
    AnswerBeforeGround,
    /// A decider begins on what happens to be applied (hazard C2).
    DeciderWithoutBarrier,
    /// A restarted leader leads on in its old term (hazard C2).
    LeaderRestore,
    /// A snapshot installs one segment less than it names.
    SegmentDroppedAtInstall,
    /// The mark of a used epoch is not looked at (hazard C5).
    EpochStartedTwice,
    /// A guest is started on a permit without a grant that names it (hazard C5).
    StartWithoutGrant,
    /// A leader grants by the age of what it heard, without a round (hazard C4).
    GrantByAge,
    /// A host whose loss is being decided is granted on (hazard C3).
    GrantWhileFencing,
    /// A lease counts from the answer's arrival (hazard C6).
    LeaseFromReceive,
    /// The id of a removed host is given to the next (hazard C13).
    HostIdReused,
    /// Memory of guests that are placed and not up yet is not booked.
    CapacityIgnoresPending,
    /// An old host's report about an epoch that is over is believed (hazard H16).
    LateReportBelieved,
    /// A guest runs at its target as soon as all of it is there, before the log says whose it is (DESIGN §5).
    RunBeforeCommit,
    /// A guest that stands for a migration goes on where it was, though nobody gave the migration up (DESIGN §5).
    GoOnWithoutAbort,
}

impl Mutant {
    pub const ALL: [Mutant; 17] = [
        Mutant::VoteNotSynced,
        Mutant::AppendNotSynced,
        Mutant::AcknowledgeBeforeQuorum,
        Mutant::AnswerBeforeGround,
        Mutant::DeciderWithoutBarrier,
        Mutant::LeaderRestore,
        Mutant::SegmentDroppedAtInstall,
        Mutant::EpochStartedTwice,
        Mutant::StartWithoutGrant,
        Mutant::GrantByAge,
        Mutant::GrantWhileFencing,
        Mutant::LeaseFromReceive,
        Mutant::HostIdReused,
        Mutant::CapacityIgnoresPending,
        Mutant::LateReportBelieved,
        Mutant::RunBeforeCommit,
        Mutant::GoOnWithoutAbort,
    ];
}

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    pub fn is_on(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }

    /// For this thread.
    pub fn switch_on(mutant: Option<Mutant>) {
        ON.set(mutant);
    }
}

#[cfg(feature = "mutants")]
pub use switch::is_on;
#[cfg(feature = "mutants")]
pub use switch::switch_on;

#[cfg(not(feature = "mutants"))]
pub const fn is_on(_mutant: Mutant) -> bool {
    false
}
