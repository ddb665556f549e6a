//! From an address to a device: one map for ports, one for memory.
//!
//! A vCPU takes a shared lock for the length of a binary search and a reference count, never while a device runs;
//! so a device may move itself (a BAR written through config space) from inside its own access.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device behind I/O ports. `port_offset` counts from the base that it was inserted at.
pub trait PioDevice: Send {
    fn read(&mut self, port_offset: u16, data: &mut [u8]);
    fn write(&mut self, port_offset: u16, data: &[u8]);
}

/// A device behind memory addresses. `offset` counts from the base that it was inserted at.
pub trait MmioDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Ports of a guest.
pub type PioBus = Bus<dyn PioDevice>;
/// Memory addresses of a guest that are not RAM.
pub type MmioBus = Bus<dyn MmioDevice>;

/// More ranges than any machine of ours has; a guest that moves BARs cannot grow the map beyond it.
const MAX_RANGES: usize = 1024;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("the range {base:#x}+{len:#x} is empty or leaves the address space")]
    BadRange { base: u64, len: u64 },
    #[error("the range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x} without lying inside it")]
    Overlap { base: u64, len: u64, other_base: u64, other_len: u64 },
    #[error("the bus is full ({MAX_RANGES} ranges)")]
    Full,
}

/// A range map. A range may lie inside another one and then hides that part of it: port 0xCF9 (reset) lies inside
/// 0xCF8..0xCFF (PCI configuration), and an access goes to the innermost range that holds all of it.
pub struct Bus<D: ?Sized> {
    /// Sorted by (base, wider first), so that the last entry at or before an address is the innermost.
    ranges: RwLock<Vec<Range<D>>>,
}

struct Range<D: ?Sized> {
    base: u64,
    len: u64,
    device: Arc<Mutex<D>>,
}

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Self { ranges: RwLock::new(Vec::new()) }
    }
}

impl<D: ?Sized> Bus<D> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Puts a device at `base`. Allowed while vCPUs run.
    pub fn insert(&self, base: u64, len: u64, device: Arc<Mutex<D>>) -> Result<(), BusError> {
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(BusError::BadRange { base, len }),
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if ranges.len() >= MAX_RANGES {
            return Err(BusError::Full);
        }
        for other in ranges.iter() {
            let other_end = other.base + other.len;
            let apart = end <= other.base || base >= other_end;
            let same = base == other.base && end == other_end;
            let inside = base >= other.base && end <= other_end;
            let around = base <= other.base && end >= other_end;
            if !apart && (same || !(inside || around)) {
                return Err(BusError::Overlap { base, len, other_base: other.base, other_len: other.len });
            }
        }
        let at = ranges.partition_point(|r| (r.base, u64::MAX - r.len) < (base, u64::MAX - len));
        ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// Takes away the device at exactly this range. Accesses that are inside it end normally.
    pub fn remove(&self, base: u64, len: u64) -> Option<Arc<Mutex<D>>> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.iter().position(|r| r.base == base && r.len == len)?;
        Some(ranges.remove(at).device)
    }

    /// The device for an access of `len` bytes at `address`, and the offset in it.
    pub fn lookup(&self, address: u64, len: usize) -> Option<(Arc<Mutex<D>>, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let candidates = ranges.partition_point(|r| r.base <= address);
        ranges[..candidates].iter().rev().find_map(|r| {
            let offset = address - r.base;
            let fits = offset < r.len && len as u64 <= r.len - offset;
            fits.then(|| (Arc::clone(&r.device), offset))
        })
    }
}

impl PioBus {
    /// Answers an `in`. Returns false, with all ones as an empty bus gives, when no device is there.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        match self.lookup(u64::from(port), data.len()) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.read(offset as u16, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Carries out an `out`. Returns false when no device is there: the write is lost, as on a real bus.
    pub fn write(&self, port: u16, data: &[u8]) -> bool {
        match self.lookup(u64::from(port), data.len()) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.write(offset as u16, data);
                true
            }
            None => false,
        }
    }
}

impl MmioBus {
    /// Answers a load. Returns false, with all ones, when no device is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.lookup(address, data.len()) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Carries out a store. Returns false when no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.lookup(address, data.len()) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last write, and answers reads with its name.
    struct Named(u8, Vec<(u16, Vec<u8>)>);

    impl PioDevice for Named {
        fn read(&mut self, _port_offset: u16, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&mut self, port_offset: u16, data: &[u8]) {
            self.1.push((port_offset, data.to_vec()));
        }
    }

    fn named(name: u8) -> Arc<Mutex<Named>> {
        Arc::new(Mutex::new(Named(name, Vec::new())))
    }

    #[test]
    fn the_reset_port_hides_one_byte_of_pci_configuration() {
        let bus = PioBus::new();
        let (config, reset) = (named(1), named(2));
        bus.insert(0xcf9, 1, reset.clone()).unwrap();
        bus.insert(0xcf8, 8, config.clone()).unwrap();

        bus.write(0xcf8, &[0, 0, 0, 0x80]);
        bus.write(0xcf9, &[6]);
        bus.write(0xcfa, &[1, 2]);
        assert_eq!(config.lock().unwrap().1, [(0, vec![0, 0, 0, 0x80]), (2, vec![1, 2])]);
        assert_eq!(reset.lock().unwrap().1, [(0, vec![6])]);
    }

    #[test]
    fn an_access_that_leaves_its_device_hits_nothing() {
        let bus = PioBus::new();
        bus.insert(0x70, 2, named(7)).unwrap();
        let mut data = [0; 4];
        assert!(!bus.read(0x70, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(bus.read(0x71, &mut data[..1]));
        assert_eq!(data[0], 7);
    }

    #[test]
    fn ranges_that_cross_or_repeat_are_refused() {
        let bus = PioBus::new();
        bus.insert(0x100, 0x10, named(1)).unwrap();
        assert!(matches!(bus.insert(0x108, 0x10, named(2)), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.insert(0x100, 0x10, named(2)), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, named(2)), Err(BusError::BadRange { .. })));
        bus.remove(0x100, 0x10).expect("it was there");
        bus.insert(0x108, 0x10, named(2)).unwrap();
    }
}
