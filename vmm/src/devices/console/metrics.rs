//! Counters of the virtio console.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    /// Printed by the guest.
    pub bytes_out: AtomicU64,
    /// Typed to the guest.
    pub bytes_in: AtomicU64,
    /// Times that the driver broke the protocol.
    pub driver_errors: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ConsoleCounters {
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub driver_errors: u64,
}

impl ConsoleMetrics {
    pub fn counters(&self) -> ConsoleCounters {
        ConsoleCounters {
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            driver_errors: self.driver_errors.load(Ordering::Relaxed),
        }
    }
}
