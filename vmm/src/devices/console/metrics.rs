//! Counters of the virtio console.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::config::{AGENT, CONSOLE, PORTS};

#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    pub ports: [PortMetrics; PORTS],
    /// Control messages of the driver that meant nothing, and buffers of its that were too small for ours.
    pub control_ignored: AtomicU64,
    /// Times that the driver broke the protocol.
    pub driver_errors: AtomicU64,
}

#[derive(Debug, Default)]
pub struct PortMetrics {
    /// Printed or said by the guest.
    pub bytes_out: AtomicU64,
    /// Typed or said to the guest.
    pub bytes_in: AtomicU64,
    /// Beyond the longest chain that is read.
    pub bytes_cut: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ConsoleCounters {
    pub console: PortCounters,
    pub agent: PortCounters,
    pub control_ignored: u64,
    pub driver_errors: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PortCounters {
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub bytes_cut: u64,
}

impl ConsoleMetrics {
    pub fn counters(&self) -> ConsoleCounters {
        ConsoleCounters {
            console: self.ports[CONSOLE].counters(),
            agent: self.ports[AGENT].counters(),
            control_ignored: self.control_ignored.load(Ordering::Relaxed),
            driver_errors: self.driver_errors.load(Ordering::Relaxed),
        }
    }
}

impl PortMetrics {
    fn counters(&self) -> PortCounters {
        PortCounters {
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_cut: self.bytes_cut.load(Ordering::Relaxed),
        }
    }
}
