//! Numbers of the balloon that a guest sees (virtio 1.2, 5.5), and what device and driver tell each other through them.

use std::sync::atomic::{AtomicU32, Ordering};

/// A page of this device, whatever the guest's processor thinks.
pub const PAGE_BYTES: u64 = 4096;

/// The driver tells statistics.
pub const STATS: u64 = 1 << 1;
/// The driver may take pages back when it has no memory left.
pub const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver tells which memory is free.
pub const REPORTING: u64 = 1 << 5;
pub const FEATURES: u64 = STATS | DEFLATE_ON_OOM | REPORTING;

pub const INFLATE: u16 = 0;
pub const DEFLATE: u16 = 1;
pub const STATISTICS: u16 = 2;
/// 3 is for hints of free pages, which are not offered, and 4 for reports. Linux numbers the queues that it has without gaps, so its
/// reports come on 3: both are served as reports.
pub const REPORTS: [u16; 2] = [3, 4];
/// Part of the machine type.
pub const QUEUE_SIZES: &[u16] = &[128, 128, 16, 32, 32];

/// num_pages, actual, and the two registers of features that are not offered.
pub const CONFIG_BYTES: usize = 16;
const ACTUAL: usize = 4;

/// The registers. Read and written by vCPUs while the device works, so they are behind no lock.
#[derive(Debug, Default)]
pub struct Registers {
    /// Pages that the device wants to have.
    wanted: AtomicU32,
    /// Pages that the driver says it has given.
    given: AtomicU32,
}

impl Registers {
    pub fn wanted(&self) -> u32 {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Returns what it was.
    pub fn want(&self, pages: u32) -> u32 {
        self.wanted.swap(pages, Ordering::SeqCst)
    }

    /// The driver's word.
    pub fn given(&self) -> u32 {
        self.given.load(Ordering::SeqCst)
    }

    pub fn set_given(&self, pages: u32) {
        self.given.store(pages, Ordering::SeqCst);
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        config[..ACTUAL].copy_from_slice(&self.wanted().to_le_bytes());
        config[ACTUAL..ACTUAL + 4].copy_from_slice(&self.given().to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    /// Only `actual` is the driver's to write.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut given = self.given().to_le_bytes();
        for (i, byte) in data.iter().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            if let Some(place) = at.checked_sub(ACTUAL).and_then(|at| given.get_mut(at)) {
                *place = *byte;
            }
        }
        self.set_given(u32::from_le_bytes(given));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_reads_the_target_and_writes_what_it_gave() {
        let registers = Registers::default();
        registers.want(0x0102_0304);
        let mut all = [0xff; 20];
        registers.read(0, &mut all);
        assert_eq!(all, [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        registers.write(4, &[1, 2, 0, 0]);
        assert_eq!(registers.given(), 0x201);
        registers.write(6, &[3]);
        assert_eq!(registers.given(), 0x3_0201);
        for (offset, data) in [(0, [9; 4]), (8, [9; 4]), (u64::MAX, [9; 4])] {
            registers.write(offset, &data);
            registers.read(offset, &mut [0; 8]);
        }
        assert_eq!((registers.wanted(), registers.given()), (0x0102_0304, 0x3_0201));
        registers.write(2, &[7; 4]);
        assert_eq!((registers.wanted(), registers.given()), (0x0102_0304, 0x3_0707));
    }
}
