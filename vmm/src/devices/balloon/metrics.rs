//! Counters of the balloon.

use crate::metrics::Counter;

/// Live counters. What each counts is told at [`BalloonCounters`](vmm_control::balloon::BalloonCounters).
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    pub inflated_pages: Counter,
    pub deflated_pages: Counter,
    pub refused_pages: Counter,
    pub reported_bytes: Counter,
    pub discard_failures: Counter,
    pub driver_errors: Counter,
}
