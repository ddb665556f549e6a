//! When a guest that is copied while it runs may stop: the decisions of pre-copy, pure. No clock, no memory, no socket.
//!
//! A round sends what was dirty when it began, and leaves what the guest has written meanwhile. The guest stops for the last of it once
//! that can be sent within the downtime that was granted; not at once, while another round makes the stop shorter still. Where rounds do
//! not shrink, the vCPUs are slowed down, step by step, as by QEMU's auto-converge; where that does not help either, the copy is given up
//! and the guest goes on where it is. The bounds in time are KubeVirt's defaults: 150 seconds without progress, 800 seconds for each GiB
//! in total.

use std::time::Duration;

/// What is sent in no time worth measuring.
const SMALL_BYTES: u64 = 1 << 20;
const NO_PROGRESS: Duration = Duration::from_secs(150);
const SECONDS_PER_GIB: u64 = 800;
const LEAST_TOTAL: Duration = Duration::from_secs(150);
/// Rounds after what is left could be sent within the downtime: each makes it half as much at least, or was the last.
const SHORTENING_ROUNDS: u32 = 2;
/// A round that leaves more than this share of what it began with has not shrunk it.
const SHRUNK_OF_EIGHT: u64 = 7;
/// Rounds that may fail to shrink before the first step of the throttle.
const PATIENT_ROUNDS: u32 = 1;
const FIRST_THROTTLE_PERCENT: u8 = 20;
const THROTTLE_STEP_PERCENT: u8 = 10;
/// A vCPU that never runs could not finish what others wait for.
pub const MAX_THROTTLE_PERCENT: u8 = 99;

/// What a copy may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The guest may stand for this long while the last of its memory is sent.
    pub downtime: Duration,
    /// From the first byte to the stop of the guest.
    pub total: Duration,
}

impl Limits {
    /// For a guest of so much memory. `total` is by its size when nobody says otherwise.
    pub fn new(downtime: Duration, total: Option<Duration>, memory_bytes: u64) -> Self {
        let by_size = (u128::from(memory_bytes) * u128::from(SECONDS_PER_GIB)) >> 30;
        let by_size = Duration::from_secs(u64::try_from(by_size).unwrap_or(u64::MAX)).max(LEAST_TOTAL);
        Self { downtime, total: total.unwrap_or(by_size) }
    }
}

/// A round that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    pub sent_bytes: u64,
    pub took: Duration,
    /// What the guest has written since the round began.
    pub dirty_bytes: u64,
}

/// What comes after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another one, while vCPUs are kept from running for this share of the time.
    Round {
        throttle_percent: u8,
    },
    /// Stop the guest and send the rest.
    Final,
    GiveUp(GiveUp),
}

/// Why a copy does not come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GiveUp {
    #[error(
        "the guest writes to its memory faster than it is sent: nothing was gained in {seconds} seconds, with its processors held back \
         for {throttle_percent} % of the time"
    )]
    NoProgress { seconds: u64, throttle_percent: u8 },
    #[error("the guest could not be copied within {seconds} seconds while it runs")]
    TooLong { seconds: u64 },
}

/// One copy.
#[derive(Debug, Clone)]
pub struct Precopy {
    limits: Limits,
    elapsed: Duration,
    /// What the last round left; at first everything.
    dirty_bytes: u64,
    /// The least that any round has left, and when.
    least_bytes: u64,
    least_at: Duration,
    /// Rounds that were taken though the guest could have stopped.
    shortening_rounds: u32,
    /// Rounds that did not shrink what was dirty.
    stubborn_rounds: u32,
    throttle_percent: u8,
}

impl Precopy {
    pub fn new(limits: Limits, memory_bytes: u64) -> Self {
        Self {
            limits,
            elapsed: Duration::ZERO,
            dirty_bytes: memory_bytes,
            least_bytes: memory_bytes,
            least_at: Duration::ZERO,
            shortening_rounds: 0,
            stubborn_rounds: 0,
            throttle_percent: 0,
        }
    }

    /// Why the round that has taken so long is not to be ended.
    pub fn overtime(&self, in_round: Duration) -> Option<GiveUp> {
        let seconds = self.limits.total.as_secs();
        (self.elapsed.saturating_add(in_round) > self.limits.total).then_some(GiveUp::TooLong { seconds })
    }

    /// Decides after a round.
    pub fn after(&mut self, round: Round) -> Next {
        let Round { sent_bytes, took, dirty_bytes } = round;
        self.elapsed = self.elapsed.saturating_add(took);
        let overtime = self.overtime(Duration::ZERO);
        if dirty_bytes < SMALL_BYTES {
            return Next::Final;
        }
        if fits(dirty_bytes, sent_bytes, took, self.limits.downtime) {
            let halved = dirty_bytes <= self.dirty_bytes / 2;
            if !halved || self.shortening_rounds == SHORTENING_ROUNDS || overtime.is_some() {
                return Next::Final;
            }
            self.shortening_rounds += 1;
        }
        if let Some(reason) = overtime {
            return Next::GiveUp(reason);
        }
        if dirty_bytes < self.least_bytes {
            (self.least_bytes, self.least_at) = (dirty_bytes, self.elapsed);
        }
        let stuck = self.elapsed.saturating_sub(self.least_at);
        if stuck >= NO_PROGRESS {
            let (seconds, throttle_percent) = (stuck.as_secs(), self.throttle_percent);
            return Next::GiveUp(GiveUp::NoProgress { seconds, throttle_percent });
        }
        if dirty_bytes > self.dirty_bytes / 8 * SHRUNK_OF_EIGHT {
            self.stubborn_rounds = self.stubborn_rounds.saturating_add(1);
            if self.stubborn_rounds > PATIENT_ROUNDS {
                self.throttle_percent = match self.throttle_percent {
                    0 => FIRST_THROTTLE_PERCENT,
                    now => now.saturating_add(THROTTLE_STEP_PERCENT).min(MAX_THROTTLE_PERCENT),
                };
            }
        }
        self.dirty_bytes = dirty_bytes;
        Next::Round { throttle_percent: self.throttle_percent }
    }
}

/// Whether so much goes within `budget`, as fast as the last round went. A round that sent nothing has measured nothing.
fn fits(dirty_bytes: u64, sent_bytes: u64, took: Duration, budget: Duration) -> bool {
    sent_bytes > 0
        && u128::from(dirty_bytes).saturating_mul(took.as_nanos())
            <= u128::from(sent_bytes).saturating_mul(budget.as_nanos())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const MEMORY: u64 = 1 << 30;
    const SECOND: Duration = Duration::from_secs(1);

    fn precopy() -> Precopy {
        Precopy::new(Limits::new(Duration::from_millis(300), None, MEMORY), MEMORY)
    }

    fn round(sent_mib: u64, millis: u64, dirty_mib: u64) -> Round {
        Round { sent_bytes: sent_mib * MIB, took: Duration::from_millis(millis), dirty_bytes: dirty_mib * MIB }
    }

    #[test]
    fn a_guest_that_hardly_writes_stops_after_the_first_round() {
        assert_eq!(precopy().after(round(1024, 1000, 0)), Next::Final);
        assert_eq!(precopy().after(round(1024, 1000, 310)), Next::Round { throttle_percent: 0 });
        // Nothing is known of the bandwidth, and it does not matter.
        let little = Round { dirty_bytes: MIB - 1, ..round(0, 1000, 0) };
        assert_eq!(precopy().after(little), Next::Final);
        assert_eq!(precopy().after(round(0, 0, 2)), Next::Round { throttle_percent: 0 });
        // All of it was written meanwhile, and goes in no time.
        assert_eq!(precopy().after(round(1, 0, 1024)), Next::Final);
    }

    #[test]
    fn a_guest_that_could_stop_is_copied_on_while_that_halves_what_is_left() {
        let on = Next::Round { throttle_percent: 0 };
        let mut halving = precopy();
        assert_eq!(halving.after(round(1024, 1000, 300)), on);
        assert_eq!(halving.after(round(300, 300, 150)), on);
        assert_eq!(halving.after(round(150, 150, 75)), Next::Final, "not for ever");

        let mut steady = precopy();
        assert_eq!(steady.after(round(1024, 1000, 300)), on);
        assert_eq!(steady.after(round(300, 300, 160)), Next::Final);

        let mut late = precopy();
        assert_eq!(late.after(round(8192, 801_000, 2)), Next::Final, "what can end now is not given up");
    }

    #[test]
    fn processors_are_held_back_from_the_second_round_that_did_not_shrink() {
        let mut precopy = precopy();
        let mut throttle = Vec::new();
        for dirty_mib in [500, 500, 500, 400, 500, 500, 500, 500, 500, 500, 500, 500, 500] {
            match precopy.after(round(100, 1000, dirty_mib)) {
                Next::Round { throttle_percent } => throttle.push(throttle_percent),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(throttle, [0, 0, 20, 20, 30, 40, 50, 60, 70, 80, 90, 99, 99]);
    }

    #[test]
    fn a_copy_that_gains_nothing_is_given_up() {
        let mut precopy = precopy();
        assert!(matches!(precopy.after(round(1024, 100_000, 500)), Next::Round { .. }));
        assert!(matches!(precopy.after(round(500, 100_000, 500)), Next::Round { .. }));
        let given_up = Next::GiveUp(GiveUp::NoProgress { seconds: 150, throttle_percent: 0 });
        assert_eq!(precopy.after(round(500, 50_000, 500)), given_up);

        let mut gaining = self::precopy();
        for dirty_mib in (493..500).rev() {
            assert!(matches!(gaining.after(round(500, 100_000, dirty_mib)), Next::Round { .. }));
        }
        assert_eq!(gaining.overtime(SECOND * 100), None);
        assert_eq!(gaining.overtime(SECOND * 101), Some(GiveUp::TooLong { seconds: 800 }));
        let too_long = Next::GiveUp(GiveUp::TooLong { seconds: 800 });
        assert_eq!(gaining.after(round(500, 101_000, 400)), too_long);
        assert_eq!(gaining.after(round(500, 1, 0)), Next::Final, "what can end now is not given up");
    }

    #[test]
    fn the_time_for_all_grows_with_the_memory() {
        let total = |memory| Limits::new(SECOND, None, memory).total;
        assert_eq!(total(16 * MIB), SECOND * 150);
        assert_eq!(total(2 << 30), SECOND * 1600);
        assert!(total(u64::MAX) > SECOND);
        assert_eq!(Limits::new(SECOND, Some(SECOND), MEMORY).total, SECOND);
    }

    proptest! {
        /// Whatever is measured: the throttle only grows and has its bounds; a guest is stopped only for what fits in its downtime; and the
        /// copy ends when its time is over.
        #[test]
        fn every_copy_ends_within_its_bounds(
            rounds in proptest::collection::vec((any::<u64>(), 1u64..40_000_000, prop_oneof![0..4 * MIB, any::<u64>()]), 1..60),
            downtime_ms in 1u64..10_000,
        ) {
            let downtime = Duration::from_millis(downtime_ms);
            let limits = Limits::new(downtime, None, MEMORY);
            let mut precopy = Precopy::new(limits, MEMORY);
            let (mut before, mut elapsed) = (0, Duration::ZERO);
            for (sent_bytes, micros, dirty_bytes) in rounds {
                let took = Duration::from_micros(micros);
                elapsed += took;
                match precopy.after(Round { sent_bytes, took, dirty_bytes }) {
                    Next::Round { throttle_percent } => {
                        prop_assert!(throttle_percent >= before && throttle_percent <= MAX_THROTTLE_PERCENT);
                        prop_assert!(throttle_percent == 0 || throttle_percent >= FIRST_THROTTLE_PERCENT);
                        prop_assert!(elapsed <= limits.total);
                        before = throttle_percent;
                    }
                    Next::Final => {
                        let needs = took.as_secs_f64() * dirty_bytes as f64 / sent_bytes as f64;
                        prop_assert!(dirty_bytes < MIB || needs <= downtime.as_secs_f64() * 1.000_001);
                        break;
                    }
                    Next::GiveUp(GiveUp::TooLong { .. }) => {
                        prop_assert!(elapsed > limits.total);
                        break;
                    }
                    Next::GiveUp(GiveUp::NoProgress { .. }) => {
                        prop_assert!(elapsed >= NO_PROGRESS);
                        break;
                    }
                }
            }
        }

        /// A guest that writes at a rate, and less of it the more it is held back: it moves if at the last step it writes clearly
        /// less than the downtime lets through, and is left alone otherwise; in a bounded number of rounds.
        #[test]
        fn a_guest_that_can_be_slowed_enough_moves(writes_mib in 0u64..100_000, mib_per_second in 10u64..1000) {
            let mut precopy = precopy();
            let (mut sending, mut throttle) = (MEMORY, 0u8);
            let mut end = None;
            for _ in 0..10_000 {
                let took = Duration::from_secs_f64(sending as f64 / (mib_per_second * MIB) as f64);
                let written = writes_mib as f64 * MIB as f64 * took.as_secs_f64() * f64::from(100 - throttle) / 100.0;
                let dirty_bytes = (written as u64).min(MEMORY / 2);
                match precopy.after(Round { sent_bytes: sending, took, dirty_bytes }) {
                    Next::Round { throttle_percent } => (sending, throttle) = (dirty_bytes, throttle_percent),
                    other => {
                        end = Some(other);
                        break;
                    }
                }
            }
            let can = writes_mib < mib_per_second * 50;
            prop_assert!(end.is_some());
            prop_assert!(!can || mib_per_second < 100 || end == Some(Next::Final), "{end:?}");
        }
    }
}
