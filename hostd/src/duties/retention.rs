//! Trimming the stream: how long events are kept, and up to where they may go now (DESIGN §4).
//!
//! The leader looks now and then and proposes `EventsTrim`; every host lets go with its next snapshot. Whoever reads behind the
//! trim is told the oldest cursor (410).

use std::future::Future;
use std::time::Duration;

use consensus::store::event_store::EventStore;
use consensus::store::event_store::EventStoreError;
use statemachine::ids::Seq;

/// Of time, what one look lets go at most. A leader whose clock is wrong by weeks then costs an hour of history before it is
/// noticed, and not all of it (hazard H17).
const AT_ONCE_MS: u64 = 3_600_000;

/// What is kept of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Batches younger than this are kept,
    pub keep_for: Duration,
    /// but never more than so many.
    pub keep_batches: u64,
    /// Between two looks of the leader.
    pub look_every: Duration,
}

impl Default for Retention {
    /// DESIGN §4: 30 days, 10 million events.
    fn default() -> Retention {
        Retention {
            keep_for: Duration::from_secs(30 * 24 * 3600),
            keep_batches: 10_000_000,
            look_every: Duration::from_secs(600),
        }
    }
}

impl Retention {
    /// The last batch that need not be kept, if there is one from `oldest` on. `stamp_ms` tells when a batch was decided; stamps
    /// never run backwards, so the place is found by halving.
    async fn trim_upto<E, F>(
        &self,
        oldest: Seq,
        head: Seq,
        now_ms: u64,
        stamp_ms: impl Fn(Seq) -> F,
    ) -> Result<Option<Seq>, E>
    where
        F: Future<Output = Result<u64, E>>,
    {
        let too_many = head.0.saturating_sub(self.keep_batches);
        let (first, last) = (oldest.0.max(1), head.0.max(1));
        if last <= first {
            return Ok(None);
        }
        let within_reach_ms = stamp_ms(Seq(first)).await?.saturating_add(AT_ONCE_MS);
        let old_before_ms = now_ms.saturating_sub(self.keep_for.as_millis() as u64).min(within_reach_ms);
        // All below `low` are too old, none from `high` on; the head itself stays.
        let (mut low, mut high) = (first, last);
        while low < high {
            let middle = low + (high - low) / 2;
            match stamp_ms(Seq(middle)).await? < old_before_ms {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        let upto = too_many.max(low - 1).min(head.0.saturating_sub(1));
        Ok((upto >= oldest.0).then_some(Seq(upto)))
    }

    /// What the stream of this host may lose now.
    pub async fn look(&self, events: &EventStore, now_ms: u64) -> Result<Option<Seq>, EventStoreError> {
        let stamp_ms = |seq: Seq| async move {
            let read = events.read(Seq(seq.0 - 1), 1, 1).await?;
            // A batch that does not decode would have stopped this host long ago.
            Ok(read.first().and_then(|batch| batch.sealed.open().ok()).map_or(u64::MAX, |batch| batch.stamp.at_ms))
        };
        self.trim_upto(events.oldest(), events.head(), now_ms, stamp_ms).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream with a batch each second.
    async fn trimmed(oldest: u64, head: u64, now_s: u64, keep_s: u64, keep_batches: u64) -> Option<u64> {
        let retention = Retention { keep_for: Duration::from_secs(keep_s), keep_batches, ..Retention::default() };
        let stamp = |seq: Seq| async move {
            assert!((oldest..=head).contains(&seq.0), "{seq} is not there to be read");
            Ok::<u64, ()>(seq.0 * 1000)
        };
        retention.trim_upto(Seq(oldest), Seq(head), now_s * 1000, stamp).await.unwrap().map(|upto| upto.0)
    }

    #[tokio::test]
    async fn what_is_old_goes_and_what_is_young_stays() {
        assert_eq!(trimmed(1, 100, 100, 50, 1000).await, Some(49), "batch 50 is just young enough");
        assert_eq!(trimmed(1, 100, 100, 200, 1000).await, None);
        assert_eq!(trimmed(60, 100, 100, 50, 1000).await, None, "gone already");
        assert_eq!(trimmed(40, 100, 100, 50, 1000).await, Some(49));
    }

    #[tokio::test]
    async fn a_clock_that_is_wrong_by_weeks_costs_an_hour_a_look() {
        assert_eq!(trimmed(1, 9_000, 9_000_000, 10, 10_000).await, Some(3_600));
        assert_eq!(trimmed(3_601, 9_000, 9_000_000, 10, 10_000).await, Some(7_200));
    }

    #[tokio::test]
    async fn there_are_never_more_than_so_many_and_always_the_last() {
        assert_eq!(trimmed(1, 100, 100, 1000, 30).await, Some(70));
        assert_eq!(trimmed(1, 100, 3_000, 10, 30).await, Some(99), "the head stays, however old");
        assert_eq!(trimmed(1, 1, 9_000, 10, 30).await, None);
        assert_eq!(trimmed(1, 0, 9_000, 10, 30).await, None, "an empty stream");
    }
}
