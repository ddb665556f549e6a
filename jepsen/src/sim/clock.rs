//! A host's clock: its own rate, its own idea of the date, and boots.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use consensus::platform::Clock;

/// 2026-01-01, where every simulated calendar begins.
const CALENDAR_MS: u64 = 1_767_225_600_000;
const MILLION: u64 = 1_000_000;

/// What the code on a host reads. The simulator moves it between turns.
#[derive(Default)]
pub struct HostClock {
    boottime_ns: AtomicU64,
    wall_ms: AtomicU64,
}

impl Clock for HostClock {
    fn wall_ms(&self) -> u64 {
        self.wall_ms.load(Ordering::Relaxed)
    }

    fn boottime_ns(&self) -> u64 {
        self.boottime_ns.load(Ordering::Relaxed)
    }
}

impl HostClock {
    pub fn set(&self, local_ns: u64, wall_ms: u64) {
        self.boottime_ns.store(local_ns, Ordering::Relaxed);
        self.wall_ms.store(wall_ms, Ordering::Relaxed);
    }
}

/// How a host's oscillator relates to true time.
#[derive(Debug, Clone, Copy)]
pub struct Oscillator {
    /// Parts per million; a million is exact.
    pub rate_ppm: u64,
    /// The calendar's error; jumps change it.
    pub wall_offset_ms: i64,
    /// True time at which this boot began.
    pub booted_ms: u64,
}

impl Oscillator {
    /// Nanoseconds since boot as this host counts them. A boot takes a while before anything of ours runs.
    pub fn local_ns(&self, true_ms: u64) -> u64 {
        (true_ms.saturating_sub(self.booted_ms) + 1_000) * self.rate_ppm
    }

    /// The true time, rounded down, at which this host counts so many nanoseconds since boot.
    pub fn true_ms(&self, local_ns: u64) -> u64 {
        (local_ns / self.rate_ppm).saturating_sub(1_000) + self.booted_ms
    }

    pub fn wall_ms(&self, true_ms: u64) -> u64 {
        let drift = true_ms as i64 * (self.rate_ppm as i64 - MILLION as i64) / MILLION as i64;
        (CALENDAR_MS as i64 + true_ms as i64 + drift + self.wall_offset_ms).max(0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_clock_counts_more_and_a_boot_starts_it_anew() {
        let exact = Oscillator { rate_ppm: 1_000_000, wall_offset_ms: 0, booted_ms: 0 };
        let fast = Oscillator { rate_ppm: 1_010_000, ..exact };
        assert_eq!(exact.local_ns(9_000), 10_000 * MILLION);
        assert_eq!(fast.local_ns(9_000), 10_100 * MILLION);
        assert_eq!(fast.true_ms(fast.local_ns(9_000)), 9_000);
        assert_eq!(fast.wall_ms(10_000) - exact.wall_ms(10_000), 100);
        assert_eq!(Oscillator { booted_ms: 9_000, ..exact }.local_ns(9_000), 1_000 * MILLION);
    }
}
