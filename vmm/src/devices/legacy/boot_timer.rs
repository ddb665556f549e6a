//! The boot timer: a guest's init writes one byte to a port, and the time since the start of the process is kept. Firecracker's
//! definition of boot time, so that figures compare (DESIGN §14).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::bus::PioDevice;

/// The byte that counts; others are ignored, so that a probe of ports does not.
pub const MAGIC: u8 = 123;

/// Shared with whoever reports the figure.
#[derive(Debug)]
pub struct BootTime {
    started: Instant,
    /// Microseconds plus one; 0 until the guest has written.
    reached_us: AtomicU64,
}

impl BootTime {
    /// Counts from `started`, the start of the process.
    pub fn new(started: Instant) -> Arc<Self> {
        Arc::new(Self { started, reached_us: AtomicU64::new(0) })
    }

    /// From the start of the process to the first write.
    pub fn microseconds(&self) -> Option<u64> {
        self.reached_us.load(Ordering::Relaxed).checked_sub(1)
    }

    fn mark(&self) {
        let now = self.started.elapsed().as_micros() as u64 + 1;
        let first = self.reached_us.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        if first.is_ok() {
            tracing::info!(boot_time_us = now - 1, "the guest has booted");
        }
    }
}

pub struct BootTimerPort(pub Arc<BootTime>);

impl PioDevice for BootTimerPort {
    fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _port_offset: u16, data: &[u8]) {
        if data == [MAGIC] {
            self.0.mark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_magic_byte_counts() {
        let time = BootTime::new(Instant::now());
        let mut port = BootTimerPort(time.clone());
        port.write(0, &[1]);
        assert_eq!(time.microseconds(), None);
        port.write(0, &[MAGIC]);
        let first = time.microseconds();
        assert!(first.is_some());
        port.write(0, &[MAGIC]);
        assert_eq!(time.microseconds(), first);
    }
}
