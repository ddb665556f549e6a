//! Counters of the entropy device.

use serde::Serialize;

use crate::metrics::Counter;

#[derive(Debug, Default)]
pub struct RngMetrics {
    pub requests: Counter,
    /// Given to the guest.
    pub bytes: Counter,
    /// Times that the device waited for its rate.
    pub limited: Counter,
    /// Times that the driver broke the protocol, or the host gave no entropy.
    pub errors: Counter,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RngCounters {
    pub requests: u64,
    pub bytes: u64,
    pub limited: u64,
    pub errors: u64,
}

impl RngMetrics {
    pub fn counters(&self) -> RngCounters {
        RngCounters {
            requests: self.requests.get(),
            bytes: self.bytes.get(),
            limited: self.limited.get(),
            errors: self.errors.get(),
        }
    }
}
