//! Counters of a network card. Written by its thread alone, read by whoever asks. Bytes are those of frames, without virtio's header.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Live counters.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// To the guest.
    pub rx_frames: AtomicU64,
    pub rx_bytes: AtomicU64,
    /// Frames for the guest that did not fit its buffers, or that it has not agreed to.
    pub rx_dropped: AtomicU64,
    /// Receive buffers too small for a header, given back empty.
    pub rx_bad_buffers: AtomicU64,
    /// From the guest.
    pub tx_frames: AtomicU64,
    pub tx_bytes: AtomicU64,
    /// Frames of the guest that are too long or too short, or whose header is wrong; and all while the link is down.
    pub tx_dropped: AtomicU64,
    /// Frames of the guest that the host's kernel did not take.
    pub tx_refused: AtomicU64,
    /// Times that the driver broke the protocol.
    pub driver_errors: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NetCounters {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_dropped: u64,
    pub rx_bad_buffers: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
    pub tx_refused: u64,
    pub driver_errors: u64,
}

pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

impl NetMetrics {
    pub fn counters(&self) -> NetCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped: get(&self.rx_dropped),
            rx_bad_buffers: get(&self.rx_bad_buffers),
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_dropped: get(&self.tx_dropped),
            tx_refused: get(&self.tx_refused),
            driver_errors: get(&self.driver_errors),
        }
    }
}
