//! How fast a disk may be: two token buckets. Time comes in with each call.
//!
//! A request goes when every bucket has its price ([`TokenBucket::wait`]), and takes it from both.

use std::time::Duration;

use vmm_control::RateLimit;

use crate::token_bucket::TokenBucket;

/// The limits of one disk.
#[derive(Debug, Clone)]
pub struct Limiter {
    requests: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl Limiter {
    /// `None` when there is nothing to limit.
    pub fn new(limit: &RateLimit) -> Option<Self> {
        let bucket = |rate: Option<u64>, burst| rate.map(|rate| TokenBucket::new(rate, burst));
        let limiter = Self {
            requests: bucket(limit.iops, limit.burst_iops),
            bytes: bucket(limit.bytes_per_second, limit.burst_bytes),
        };
        (limiter.requests.is_some() || limiter.bytes.is_some()).then_some(limiter)
    }

    /// Pays for one request, or says how long it has to wait. `now` counts from any fixed moment, which is the same in each call.
    pub fn pay(&mut self, now: Duration, bytes: u64) -> Result<(), Duration> {
        let mut wait = Duration::ZERO;
        for (bucket, price) in [(&mut self.requests, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(price));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        if let Some(requests) = &mut self.requests {
            requests.take(1);
        }
        if let Some(all) = &mut self.bytes {
            all.take(bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limiter(iops: Option<u64>, bytes_per_second: Option<u64>) -> Limiter {
        Limiter::new(&RateLimit { iops, bytes_per_second, ..RateLimit::default() }).unwrap()
    }

    /// Requests of `bytes` that get through until `end`, by a caller that waits exactly as long as it is told.
    fn requests_until(limiter: &mut Limiter, end: Duration, bytes: u64) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        while now < end {
            match limiter.pay(now, bytes) {
                Ok(()) => count += 1,
                Err(wait) => {
                    assert!(!wait.is_zero());
                    now += wait;
                }
            }
        }
        count
    }

    #[test]
    fn no_limit_is_no_limiter() {
        assert!(Limiter::new(&RateLimit::default()).is_none());
    }

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate_holds() {
        let mut limiter = limiter(Some(100), None);
        for _ in 0..10 {
            limiter.pay(Duration::ZERO, 0).unwrap();
        }
        let wait = limiter.pay(Duration::ZERO, 0).unwrap_err();
        assert!(wait <= Duration::from_millis(10), "{wait:?}");
        limiter.pay(wait, 0).unwrap();
    }

    #[test]
    fn an_idle_disk_saves_up_no_more_than_a_burst() {
        let mut limiter = limiter(Some(100), None);
        let later = SECOND * 3600;
        assert_eq!((0..1000).take_while(|_| limiter.pay(later, 0).is_ok()).count(), 10);
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_and_those_behind_it_wait() {
        let mut limiter = limiter(None, Some(1 << 20));
        limiter.pay(Duration::ZERO, 16 << 20).unwrap();
        let wait = limiter.pay(Duration::ZERO, 1).unwrap_err();
        assert!(wait > SECOND * 15 && wait < SECOND * 16, "{wait:?}");
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let mut limiter = limiter(Some(10), None);
        limiter.pay(SECOND, 0).unwrap();
        assert!(limiter.pay(SECOND, 0).is_err());
        assert!(limiter.pay(Duration::ZERO, 0).is_err());
    }

    proptest! {
        /// Over any time, what gets through is the rate, give or take one burst and one request.
        #[test]
        fn the_rate_is_exact(iops in 1u64..100_000, mbytes in 1u64..4096, bytes in 1u64..(1 << 20), seconds in 1u32..20) {
            let end = SECOND * seconds;
            let count = requests_until(&mut limiter(Some(iops), None), end, bytes);
            let (rate, burst) = (iops * u64::from(seconds), iops / 10 + 1);
            prop_assert!(count >= rate.saturating_sub(1) && count <= rate + burst + 1, "{count} requests, {rate} wanted");

            let per_second = mbytes << 20;
            let moved = requests_until(&mut limiter(None, Some(per_second)), end, bytes.max(4096)) * bytes.max(4096);
            let (rate, burst) = (per_second * u64::from(seconds), per_second / 10 + (1 << 20));
            prop_assert!(moved + (1 << 20) >= rate && moved <= rate + burst + (1 << 20), "{moved} bytes, {rate} wanted");
        }
    }
}
