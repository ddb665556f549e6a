//! Virtio 1.x over PCI: how a guest's driver and our devices find each other.
//!
//! Path of a request: the driver fills a ring in guest RAM and rings a doorbell, which is an ioeventfd that the device's own
//! thread waits for; the thread takes a [`chain::Chain`] from its [`queue::DeviceQueue`], does the work, returns the chain,
//! and interrupts through [`device::VirtioInterrupt`]. No vCPU exit is on that path.
//!
//! - [`registers`]: the common configuration as a pure state machine (features, status, queues).
//! - [`pci`]: the transport: capabilities, BAR, MSI-X, ISR, doorbells around those registers.
//! - [`device`]: what a device implements, and what it is given when the driver is ready.
//! - [`worker`]: the thread of a device that needs nothing special of one.
//! - [`queue`], [`chain`]: rings and descriptor chains with every length checked (DESIGN §7: guest input is hostile).
//!
//! A driver's error (a chain that loops, leaves memory or changes direction) sets DEVICE_NEEDS_RESET and stops the device
//! until the driver resets it: a device state, never a panic. Start at [`device::VirtioDevice`].

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod chain;
pub mod device;
mod irq;
pub mod pci;
pub mod queue;
pub mod registers;
pub mod worker;

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Segments};
pub use device::{Activation, ActiveQueue, DeviceKind, VirtioDevice, VirtioInterrupt};
pub use pci::VirtioPci;
pub use queue::{DeviceQueue, QueueError};

/// Locks a mutex. A panic of another thread while it held the lock is reported there; the guest goes on.
pub(crate) fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
