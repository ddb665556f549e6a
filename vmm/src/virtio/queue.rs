//! A queue in the hands of its device.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

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
}

impl DeviceQueue {
    /// `max_buffers` bounds one chain, which an indirect table could make longer than the ring.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestMemory,
        interrupt: Arc<dyn VirtioInterrupt>,
        max_buffers: usize,
    ) -> Self {
        Self { index, queue, memory, interrupt, max_buffers, outstanding: 0 }
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
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

    /// Interrupts the driver, if it wants to know of what was completed.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let wanted = self.queue.needs_notification(&self.memory).map_err(|source| self.ring_error(source))?;
        if wanted {
            self.interrupt.queue_used(self.index);
        }
        Ok(())
    }

    /// Asks for doorbells again. True when something arrived meanwhile: pop again.
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.memory).map_err(|source| self.ring_error(source))
    }

    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&self.memory).map_err(|source| self.ring_error(source))
    }

    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    fn ring_error(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring { index: self.index, source }
    }
}
