//! Interrupts and doorbells, as devices see them.
//!
//! The KVM side (irqfd, GSI routing, ioeventfd) is in `machine`; tests of devices use [`fake`], which records.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    #[error("no room for {wanted} more interrupt vectors ({used} of {limit} are in use)")]
    NoVectors { wanted: u16, used: usize, limit: usize },
    #[error("vector {index} of a device that has {count}")]
    NoSuchVector { index: u16, count: u16 },
    #[error("cannot create an event descriptor for an interrupt")]
    EventFd(#[source] io::Error),
    #[error("KVM refused the interrupt routing")]
    Routing(#[source] io::Error),
    #[error("cannot deliver the interrupt")]
    Deliver(#[source] io::Error),
}

/// A legacy interrupt line that is pulsed (edge triggered: COM1, RTC).
pub trait IrqLine: Send + Sync {
    fn trigger(&self) -> io::Result<()>;
}

/// A legacy interrupt line that is held (level triggered: the SCI).
pub trait LevelLine: Send + Sync {
    fn set(&self, asserted: bool) -> io::Result<()>;
}

/// Gives message-signalled interrupts to PCI functions.
pub trait MsiSink: Send + Sync {
    /// `vectors` vectors for one function, all masked. Dropping the result gives them back.
    fn allocate(&self, vectors: u16) -> Result<Arc<dyn MsiVectors>, InterruptError>;
}

/// The vectors of one PCI function.
pub trait MsiVectors: Send + Sync {
    /// What the guest wrote to the vector's entry of the MSI-X table. A masked vector delivers nothing; the
    /// pending bit is the caller's.
    fn configure(&self, index: u16, address: u64, data: u32, masked: bool) -> Result<(), InterruptError>;

    /// Delivers the vector, if it is not masked.
    fn trigger(&self, index: u16) -> Result<(), InterruptError>;

    /// The descriptor whose write delivers the vector without this process's help, for vhost and other threads.
    fn irqfd(&self, index: u16) -> Option<&EventFd>;
}

/// Doorbells: a guest's store to `address` becomes a write to `fd`, without leaving the kernel.
pub trait IoEvents: Send + Sync {
    /// With `datamatch` only two-byte stores of that value count; without, any store.
    fn register(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()>;
    fn unregister(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()>;
}

pub mod fake {
    //! Stand-ins for KVM that record what a device did: device tests need no `/dev/kvm`.

    use std::os::fd::AsRawFd;
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// A line that counts.
    #[derive(Debug, Default)]
    pub struct FakeLine {
        state: Mutex<(u64, bool)>,
    }

    impl FakeLine {
        /// Pulses so far.
        pub fn pulses(&self) -> u64 {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).0
        }

        /// Whether the line is held.
        pub fn asserted(&self) -> bool {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).1
        }
    }

    impl IrqLine for FakeLine {
        fn trigger(&self) -> io::Result<()> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
            Ok(())
        }
    }

    impl LevelLine for FakeLine {
        fn set(&self, asserted: bool) -> io::Result<()> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = asserted;
            Ok(())
        }
    }

    /// One vector as the guest configured it.
    #[derive(Debug, Default, Clone, PartialEq, Eq)]
    pub struct FakeVector {
        pub address: u64,
        pub data: u32,
        pub unmasked: bool,
        /// Deliveries while unmasked.
        pub delivered: u64,
    }

    /// An MSI sink that keeps every allocation for the test to look at.
    #[derive(Debug, Default)]
    pub struct FakeMsi {
        allocated: Mutex<Vec<Arc<FakeVectors>>>,
    }

    impl FakeMsi {
        pub fn new() -> Arc<Self> {
            Arc::new(Self::default())
        }

        /// The vectors of the n-th function that asked.
        pub fn function(&self, nth: usize) -> Option<Arc<FakeVectors>> {
            let allocated = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
            allocated.get(nth).cloned()
        }
    }

    impl MsiSink for FakeMsi {
        fn allocate(&self, vectors: u16) -> Result<Arc<dyn MsiVectors>, InterruptError> {
            let new = Arc::new(FakeVectors { vectors: Mutex::new(vec![FakeVector::default(); usize::from(vectors)]) });
            self.allocated.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&new));
            Ok(new)
        }
    }

    /// The vectors of one function.
    #[derive(Debug)]
    pub struct FakeVectors {
        vectors: Mutex<Vec<FakeVector>>,
    }

    impl FakeVectors {
        pub fn vector(&self, index: u16) -> Option<FakeVector> {
            let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
            vectors.get(usize::from(index)).cloned()
        }

        fn change(&self, index: u16, what: impl FnOnce(&mut FakeVector)) -> Result<(), InterruptError> {
            let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
            let count = vectors.len() as u16;
            let vector = vectors.get_mut(usize::from(index)).ok_or(InterruptError::NoSuchVector { index, count })?;
            what(vector);
            Ok(())
        }
    }

    impl MsiVectors for FakeVectors {
        fn configure(&self, index: u16, address: u64, data: u32, masked: bool) -> Result<(), InterruptError> {
            self.change(index, |v| {
                v.address = address;
                v.data = data;
                v.unmasked = !masked;
            })
        }

        fn trigger(&self, index: u16) -> Result<(), InterruptError> {
            self.change(index, |v| v.delivered += u64::from(v.unmasked))
        }

        fn irqfd(&self, _index: u16) -> Option<&EventFd> {
            None
        }
    }

    /// Doorbells that are registered now, as (address, datamatch, descriptor).
    #[derive(Debug, Default)]
    pub struct FakeIoEvents {
        doorbells: Mutex<Vec<(u64, Option<u16>, i32)>>,
    }

    impl FakeIoEvents {
        pub fn new() -> Arc<Self> {
            Arc::new(Self::default())
        }

        pub fn doorbells(&self) -> Vec<(u64, Option<u16>, i32)> {
            self.doorbells.lock().unwrap_or_else(PoisonError::into_inner).clone()
        }
    }

    impl IoEvents for FakeIoEvents {
        fn register(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()> {
            let mut doorbells = self.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
            let new = (address, datamatch, fd.as_raw_fd());
            if doorbells.contains(&new) {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            doorbells.push(new);
            Ok(())
        }

        fn unregister(&self, address: u64, datamatch: Option<u16>, fd: &EventFd) -> io::Result<()> {
            let mut doorbells = self.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
            let old = (address, datamatch, fd.as_raw_fd());
            match doorbells.iter().position(|d| *d == old) {
                Some(at) => {
                    doorbells.remove(at);
                    Ok(())
                }
                None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            }
        }
    }
}
