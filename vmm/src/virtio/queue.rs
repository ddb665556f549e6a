//! A queue in the hands of its device.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::device::{QueuePosition, VirtioInterrupt};
use crate::memory::GuestMemory;

/// The driver broke the ring's protocol. The device asks for a reset and stops serving.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("queue {index}: the ring is not usable: {source}")]
    Ring { index: u16, source: virtio_queue::Error },
    #[error("queue {index}: more requests are under way than the ring has places")]
    Overrun { index: u16 },
    #[error("queue {index}")]
    Chain {
        index: u16,
        #[source]
        source: ChainError,
    },
}

/// A queue that serves one device: pops checked chains, returns them, interrupts when the driver wants it.
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<dyn VirtioInterrupt>,
    max_buffers: usize,
    outstanding: u16,
    /// The used index up to which the driver was told.
    notified: Wrapping<u16>,
}

/// Offsets in the rings (virtio 1.2, 2.7.6 and 2.7.8).
const AVAIL_RING: u64 = 4;
const USED_RING: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

impl DeviceQueue {
    /// `max_buffers` bounds one chain, which an indirect table could make longer than the ring.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestMemory,
        interrupt: Arc<dyn VirtioInterrupt>,
        max_buffers: usize,
    ) -> Self {
        let notified = Wrapping(queue.next_used());
        Self { index, queue, memory, interrupt, max_buffers, outstanding: 0, notified }
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains that were popped and not returned.
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// The next request, or `None` when the ring is empty.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let index = self.index;
        let mut available = self.queue.iter(&self.memory).map_err(|source| QueueError::Ring { index, source })?;
        let Some(chain) = available.next() else {
            return Ok(None);
        };
        // A head that is offered twice while under way ends here at the latest.
        if self.outstanding >= self.queue.size() {
            return Err(QueueError::Overrun { index });
        }
        let chain =
            Chain::read(chain, &self.memory, self.max_buffers).map_err(|source| QueueError::Chain { index, source })?;
        self.outstanding += 1;
        Ok(Some(chain))
    }

    /// Gives a chain back, with the number of bytes that were written to it.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.queue.add_used(&self.memory, head, written).map_err(|source| self.ring_error(source))
    }

    /// Gives several chains back at once: the driver sees all of them or none. A frame that fills several buffers needs
    /// that (virtio 1.2, 5.1.6.4): a driver that finds the first looks for the others at once.
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((last, written), others)) = used.split_last() else {
            return Ok(());
        };
        let size = self.queue.size();
        let first = self.queue.next_used();
        for (at, (head, written)) in (0u16..).zip(others) {
            let place = u64::from(first.wrapping_add(at) % size) * USED_ELEMENT_BYTES;
            let address = GuestAddress(self.queue.used_ring() + USED_RING + place);
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.memory
                .write_obj(element.to_le(), address)
                .map_err(|source| self.ring_error(virtio_queue::Error::GuestMemory(source)))?;
        }
        // The index that the driver looks at moves with the last one, past all of them.
        self.queue.set_next_used(first.wrapping_add(others.len() as u16));
        self.outstanding = self.outstanding.saturating_sub(others.len() as u16);
        self.complete(*last, *written)
    }

    /// Interrupts the driver, if it wants to know of what was completed.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if self.is_interrupt_wanted().map_err(|source| self.ring_error(source))? {
            self.interrupt.queue_used(self.index);
        }
        Ok(())
    }

    /// Not `Queue::needs_notification`, which counts calls of `add_used` and so would miss chains that were given back
    /// together.
    fn is_interrupt_wanted(&mut self) -> Result<bool, virtio_queue::Error> {
        let used = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.notified, used);
        // What was completed is visible before we read what the driver waits for.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let load = |address: u64| -> Result<u16, virtio_queue::Error> {
            let value = self.memory.load(GuestAddress(address), Ordering::Relaxed);
            value.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
        };
        if self.queue.event_idx_enabled() {
            let event = Wrapping(load(avail + AVAIL_RING + 2 * u64::from(self.queue.size()))?);
            // Whether the driver's event index was passed since the last time (virtio 1.2, 2.7.10.1).
            return Ok(used - event - Wrapping(1) < used - before);
        }
        Ok(load(avail)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks for doorbells again. True when something arrived meanwhile: pop again.
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.memory).map_err(|source| self.ring_error(source))
    }

    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&self.memory).map_err(|source| self.ring_error(source))
    }

    /// Chains that were popped before the guest was saved are under way here.
    pub fn adopt(&mut self, chains: u16) {
        self.outstanding = self.outstanding.saturating_add(chains);
    }

    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    fn ring_error(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring { index: self.index, source }
    }
}
