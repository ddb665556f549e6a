//! The lab's clock: CLOCK_MONOTONIC of this machine in nanoseconds. Every witness record carries
//! it, and `lab clock` prints it, so that tests can order what hosts did by a clock that no fault
//! of theirs touches.

use rustix::time::{ClockId, clock_gettime};

pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
