//! Counters of a disk. Written by its thread alone, read by whoever asks.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Live counters.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    /// Requests that ended with an error status.
    pub errors: AtomicU64,
    /// Requests that storage failed and that were answered as successes, by policy.
    pub ignored: AtomicU64,
    /// Times that an error stopped the guest.
    pub stops: AtomicU64,
    /// Requests that the rate limit delayed.
    pub throttled: AtomicU64,
    /// What those waited, all together.
    pub throttled_us: AtomicU64,
    /// Requests that went through a copy, because their buffers were not aligned for O_DIRECT.
    pub bounced: AtomicU64,
    /// In the kernel now.
    pub in_flight: AtomicU64,
    /// Taken back by the kernel, to be submitted again.
    pub parked: AtomicU64,
    /// Failed, and kept for another try when the guest is resumed.
    pub held: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BlockCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub errors: u64,
    pub ignored: u64,
    pub stops: u64,
    pub throttled: u64,
    pub throttled_us: u64,
    pub bounced: u64,
    pub in_flight: u64,
    pub parked: u64,
    pub held: u64,
}

pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

impl BlockMetrics {
    pub fn counters(&self) -> BlockCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockCounters {
            reads: get(&self.reads),
            writes: get(&self.writes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            bytes_read: get(&self.bytes_read),
            bytes_written: get(&self.bytes_written),
            errors: get(&self.errors),
            ignored: get(&self.ignored),
            stops: get(&self.stops),
            throttled: get(&self.throttled),
            throttled_us: get(&self.throttled_us),
            bounced: get(&self.bounced),
            in_flight: get(&self.in_flight),
            parked: get(&self.parked),
            held: get(&self.held),
        }
    }
}
