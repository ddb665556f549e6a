//! Frozen file systems, as a pure state machine and the guard that a snapshot holds. A guest that stays frozen stands still for its
//! users, so every way out of it leads to a thaw: the guard is released, dropped, or its time is over; the connection ends; hostd ends
//! and a later one finds the guest frozen. A thaw that fails is tried again until the agent says that nothing is frozen.

use std::time::Duration;

use tokio::sync::oneshot;

use super::AgentError;

/// The longest that a guest may stand. A snapshot of a disk takes less than a second; Windows gives up after ten.
pub const MAX_FROZEN: Duration = Duration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_EVERY_MAX: Duration = Duration::from_secs(30);

/// A time on the caller's monotonic clock.
pub type At = Duration;

/// What is known of a guest's file systems.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Freeze {
    #[default]
    Thawed,
    /// Asked to freeze, or frozen: to be thawed at the latest then.
    Held { until: At },
    /// To be thawed, from then on again and again.
    Thawing { from: At, failures: u32 },
}

impl Freeze {
    /// Before the agent is told to freeze: its answer may be lost, and then the guest is frozen all the same. `within` is the longest
    /// that freezing takes.
    pub fn begins(&mut self, now: At, within: Duration, limit: Duration) {
        *self = Freeze::Held { until: now + within + limit.min(MAX_FROZEN) };
    }

    pub fn holds(&mut self, now: At, limit: Duration) {
        *self = Freeze::Held { until: now + limit.min(MAX_FROZEN) };
    }

    /// Nobody needs it any more, or nobody knows whether it is so.
    pub fn ends(&mut self, now: At) {
        *self = Freeze::Thawing { from: now, failures: self.failures() };
    }

    /// The agent said that nothing is frozen now.
    pub fn thawed(&mut self) {
        *self = Freeze::Thawed;
    }

    pub fn thaw_failed(&mut self, now: At) {
        let failures = self.failures();
        let wait = RETRY_AFTER * 2u32.saturating_pow(failures.min(16));
        *self = Freeze::Thawing { from: now + wait.min(RETRY_EVERY_MAX), failures: failures.saturating_add(1) };
    }

    fn failures(&self) -> u32 {
        match *self {
            Freeze::Thawing { failures, .. } => failures,
            Freeze::Thawed | Freeze::Held { .. } => 0,
        }
    }

    /// A new connection found it so. What an earlier conversation froze has nobody who waits for it.
    pub fn found(&mut self, frozen: bool, now: At) {
        match frozen {
            true => self.ends(now),
            false => self.thawed(),
        }
    }

    /// The connection ended: whoever holds it cannot rely on it.
    pub fn disconnected(&mut self, now: At) {
        if *self != Freeze::Thawed {
            self.ends(now);
        }
    }

    pub fn thaw_is_due(&self, now: At) -> bool {
        self.next().is_some_and(|next| next <= now)
    }

    /// When a thaw is due.
    pub fn next(&self) -> Option<At> {
        match *self {
            Freeze::Thawed => None,
            Freeze::Held { until } => Some(until),
            Freeze::Thawing { from, .. } => Some(from),
        }
    }

    /// The agent answers only to a few commands.
    pub fn is_frozen(&self) -> bool {
        *self != Freeze::Thawed
    }
}

/// Where the answer to a thaw goes.
pub type ThawReply = oneshot::Sender<Result<u64, AgentError>>;

/// File systems of a guest that are frozen while this lives, and at most until its limit. Dropping it thaws them.
#[derive(Debug)]
pub struct FrozenGuard {
    filesystems: u64,
    release: oneshot::Sender<ThawReply>,
}

impl FrozenGuard {
    /// A guard, and where its end is heard: an error there means that it was dropped.
    pub(super) fn new(filesystems: u64) -> (FrozenGuard, oneshot::Receiver<ThawReply>) {
        let (release, released) = oneshot::channel();
        (FrozenGuard { filesystems, release }, released)
    }

    /// How many were frozen. With none, a snapshot is no more consistent than without.
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// Thaws. An error says that what was done under the guard cannot be relied on, or that the guest could not be thawed yet, which is
    /// then tried again without the caller.
    pub async fn thaw(self) -> Result<(), AgentError> {
        let (reply, answer) = oneshot::channel();
        self.release.send(reply).map_err(|_| AgentError::ThawedEarly)?;
        let thawed = answer.await.map_err(|_| AgentError::ThawedEarly)??;
        // Fewer than were frozen: something in the guest thawed them before us.
        if thawed < self.filesystems { Err(AgentError::ThawedEarly) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_freeze_is_held_and_ends() {
        let mut freeze = Freeze::default();
        freeze.begins(s(100), s(60), s(5));
        assert!(freeze.is_frozen() && !freeze.thaw_is_due(s(164)) && freeze.thaw_is_due(s(165)));
        freeze.holds(s(101), s(5));
        assert!(!freeze.thaw_is_due(s(105)) && freeze.thaw_is_due(s(106)));
        freeze.thaw_failed(s(106));
        assert!(!freeze.thaw_is_due(s(106)) && freeze.thaw_is_due(s(107)));
        freeze.ends(s(107));
        freeze.thaw_failed(s(107));
        assert!(!freeze.thaw_is_due(s(108)) && freeze.thaw_is_due(s(109)), "less and less often");
        freeze.thawed();
        assert_eq!((freeze.is_frozen(), freeze.next()), (false, None));
    }

    #[test]
    fn what_a_new_connection_finds_frozen_is_thawed() {
        let mut freeze = Freeze::default();
        freeze.found(true, s(1));
        assert!(freeze.thaw_is_due(s(1)));
        freeze.found(false, s(2));
        assert!(!freeze.is_frozen());
        freeze.holds(s(3), s(60));
        freeze.disconnected(s(4));
        assert!(freeze.thaw_is_due(s(4)));
    }

    proptest! {
        /// Nothing is frozen longer than the limits without a thaw being due, whatever is asked for.
        #[test]
        fn a_thaw_is_always_near(now in 0u64..1000, limit in 0u64..1_000_000, steps in prop::collection::vec(0u8..5, 0..20)) {
            let within = s(60);
            let mut freeze = Freeze::default();
            for step in steps {
                match step {
                    0 => freeze.begins(s(now), within, s(limit)),
                    1 => freeze.holds(s(now), s(limit)),
                    2 => freeze.ends(s(now)),
                    3 => freeze.thaw_failed(s(now)),
                    _ => freeze.disconnected(s(now)),
                }
                prop_assert!(!freeze.is_frozen() || freeze.thaw_is_due(s(now) + within + MAX_FROZEN));
            }
        }
    }
}
