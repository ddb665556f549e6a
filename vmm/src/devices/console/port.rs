//! One port of the console: bytes between a pair of queues and the hub.
//!
//! No thread and no wait: each pass does a bounded amount of work and says whether more is there, so a guest that prints
//! without end cannot keep its thread from a reset.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::config::MAX_CHAIN_BYTES;
use super::metrics::ConsoleMetrics;
use super::state::SavedPort;
use crate::console_hub::{ConsoleSink, ConsoleSource};
use crate::virtio::{DeviceQueue, QueueError, Segments};

/// Input that was taken from the hub and waits for a buffer of the guest.
pub const CARRY_BYTES: usize = 4096;
/// Copied at a time from guest memory.
const CHUNK_BYTES: usize = 4096;
/// Work of one pass.
const CHAINS_PER_PASS: usize = 64;

/// The queues of a port, while the driver has it.
pub struct PortQueues {
    pub receive: DeviceQueue,
    pub transmit: DeviceQueue,
}

pub struct Port {
    sink: Arc<dyn ConsoleSink>,
    source: Arc<dyn ConsoleSource>,
    metrics: Arc<ConsoleMetrics>,
    unread: Vec<u8>,
}

/// Whether a pass left work behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Idle,
    More,
}

impl Port {
    pub fn new(sink: Arc<dyn ConsoleSink>, source: Arc<dyn ConsoleSource>, metrics: Arc<ConsoleMetrics>) -> Self {
        Self { sink, source, metrics, unread: Vec::new() }
    }

    pub fn source(&self) -> &Arc<dyn ConsoleSource> {
        &self.source
    }

    /// Forgets what was typed before the guest could read.
    pub fn discard_input(&mut self) {
        self.unread.clear();
        let mut buffer = [0; CHUNK_BYTES];
        // Bounded by the hub's queue; what arrives meanwhile is new.
        for _ in 0..crate::console_hub::INPUT_QUEUE_BYTES / CHUNK_BYTES {
            if self.source.read(&mut buffer) == 0 {
                break;
            }
        }
    }

    /// Moves bytes both ways.
    pub fn serve(&mut self, queues: &mut PortQueues) -> Result<Pass, QueueError> {
        let printed = self.print(&mut queues.transmit)?;
        let typed = self.deliver(&mut queues.receive)?;
        Ok(if printed == Pass::More || typed == Pass::More { Pass::More } else { Pass::Idle })
    }

    /// From the guest to the hub.
    fn print(&mut self, queue: &mut DeviceQueue) -> Result<Pass, QueueError> {
        queue.disable_doorbell()?;
        let mut pass = Pass::More;
        let mut served = 0;
        while served < CHAINS_PER_PASS {
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                pass = Pass::Idle;
                break;
            };
            if let Some(head) = chain.readable.take_front(chain.readable.len().min(MAX_CHAIN_BYTES)) {
                self.copy_out(queue, head);
            }
            queue.complete(chain.head, 0)?;
            served += 1;
        }
        if served > 0 {
            queue.notify()?;
        }
        Ok(pass)
    }

    fn copy_out(&self, queue: &DeviceQueue, mut data: Segments) {
        let mut buffer = [0; CHUNK_BYTES];
        let mut left = data.len();
        while left > 0 {
            let len = left.min(CHUNK_BYTES as u64);
            left -= len;
            let bytes = &mut buffer[..len as usize];
            match data.take_front(len) {
                Some(part) if part.read(queue.memory(), bytes) => self.sink.write(bytes),
                _ => return,
            }
            self.metrics.bytes_out.fetch_add(len, Ordering::Relaxed);
        }
    }

    /// From the hub to the guest, as far as the guest gave buffers. What does not fit stays in the hub's bounded queue.
    fn deliver(&mut self, queue: &mut DeviceQueue) -> Result<Pass, QueueError> {
        queue.disable_doorbell()?;
        let mut pass = Pass::More;
        let mut served = 0;
        while served < CHAINS_PER_PASS {
            self.refill();
            if self.unread.is_empty() {
                pass = Pass::Idle;
                break;
            }
            let Some(chain) = queue.pop()? else {
                // A buffer will ring the doorbell.
                if queue.enable_doorbell()? {
                    continue;
                }
                pass = Pass::Idle;
                break;
            };
            let len = chain.writable.len().min(self.unread.len() as u64) as usize;
            let written = if chain.writable.write(queue.memory(), &self.unread[..len]) { len } else { 0 };
            self.unread.drain(..len);
            self.metrics.bytes_in.fetch_add(written as u64, Ordering::Relaxed);
            queue.complete(chain.head, written as u32)?;
            served += 1;
        }
        if served > 0 {
            queue.notify()?;
        }
        Ok(pass)
    }

    fn refill(&mut self) {
        if self.unread.is_empty() {
            self.unread.resize(CARRY_BYTES, 0);
            let taken = self.source.read(&mut self.unread);
            self.unread.truncate(taken);
        }
    }

    pub fn save(&self) -> SavedPort {
        SavedPort { unread: self.unread.clone() }
    }

    pub fn restore(&mut self, saved: SavedPort) {
        self.unread = saved.unread;
    }
}
