//! How fast something may be: a token bucket, pure. Time comes in with each call.
//!
//! What costs more than the bucket holds is delayed until it is full and never refused; the debt that is left makes the rate
//! over time exact. There is no least time between refills, so that a small bucket gives its rate too (peers-vmm §4.2 rule 36).

use std::time::Duration;

const NANOS: i128 = 1_000_000_000;
/// A bucket without a size of its own holds the share of a second that this divides.
const DEFAULT_BURST_OF_RATE: u64 = 10;

/// One rate.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_second: u64,
    burst: u64,
    /// Billionths of a token, so that no refill is rounded. Negative while in debt.
    level: i128,
    filled_at: Duration,
}

impl TokenBucket {
    /// Full at the start. `burst` is what it holds.
    pub fn new(per_second: u64, burst: Option<u64>) -> Self {
        let per_second = per_second.max(1);
        let burst = burst.unwrap_or(per_second / DEFAULT_BURST_OF_RATE).max(1);
        Self { per_second, burst, level: i128::from(burst) * NANOS, filled_at: Duration::ZERO }
    }

    /// Adds what came since the last time. `now` counts from any fixed moment, which is the same in each call.
    pub fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_nanos() as i128;
        self.filled_at = self.filled_at.max(now);
        let full = i128::from(self.burst) * NANOS;
        self.level = (self.level + elapsed * i128::from(self.per_second)).min(full);
    }

    /// Until it holds so much, or is full.
    pub fn wait(&self, tokens: u64) -> Duration {
        let missing = i128::from(tokens.min(self.burst)) * NANOS - self.level;
        let nanos = u128::try_from(missing).unwrap_or(0).div_ceil(u128::from(self.per_second));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes the whole price, even where that leaves a debt.
    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * NANOS;
    }
}
