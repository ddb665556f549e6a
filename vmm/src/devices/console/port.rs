//! One port of the console: bytes between a pair of queues and the host's end, which is the hub or the agent's channel.
//!
//! No thread and no wait: each pass does a bounded amount of work and says whether more is there, so a guest that prints
//! without end cannot keep its thread from a reset.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::config::MAX_CHAIN_BYTES;
use super::metrics::{ConsoleMetrics, PortMetrics};
use crate::console_hub::{ConsoleSink, ConsoleSource};
use crate::virtio::{DeviceQueue, QueueError, Segments};

/// Input that was taken from the hub and waits for a buffer of the guest.
pub const CARRY_BYTES: usize = 4096;
/// Copied at a time from guest memory.
const CHUNK_BYTES: usize = 4096;
/// Work of one pass.
pub const CHAINS_PER_PASS: usize = 64;

/// The queues of a port, while the driver has it.
pub struct PortQueues {
    pub receive: DeviceQueue,
    pub transmit: DeviceQueue,
}

pub struct Port {
    sink: Arc<dyn ConsoleSink>,
    source: Arc<dyn ConsoleSource>,
    /// Its place among the counters.
    index: usize,
    metrics: Arc<ConsoleMetrics>,
    unread: Vec<u8>,
}

/// Whether a pass left work behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Idle,
    More,
}

impl Pass {
    /// Of two parts of one pass.
    pub fn and(self, other: Pass) -> Pass {
        if self == Pass::More { self } else { other }
    }
}

impl Port {
    pub fn new<E>(end: Arc<E>, index: usize, metrics: Arc<ConsoleMetrics>) -> Self
    where
        E: ConsoleSink + ConsoleSource + 'static,
    {
        Self { sink: Arc::clone(&end) as _, source: end, index, metrics, unread: Vec::new() }
    }

    pub fn source(&self) -> &Arc<dyn ConsoleSource> {
        &self.source
    }

    fn metrics(&self) -> &PortMetrics {
        &self.metrics.ports[self.index]
    }

    /// Forgets what was taken from the host's end: it was said by somebody who has left, or to somebody who has.
    pub fn forget_carry(&mut self) {
        self.unread.clear();
    }

    /// Forgets what was typed before the guest could read.
    pub fn discard_input(&mut self) {
        self.forget_carry();
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
        Ok(printed.and(typed))
    }

    /// From the guest to the host's end, as far as that has room. Where it has none, chains stay in the ring and the guest waits.
    fn print(&mut self, queue: &mut DeviceQueue) -> Result<Pass, QueueError> {
        queue.disable_doorbell()?;
        let mut pass = Pass::More;
        let mut served = 0;
        while served < CHAINS_PER_PASS {
            if !self.sink.has_room() {
                // It rings when it has.
                pass = Pass::Idle;
                break;
            }
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                pass = Pass::Idle;
                break;
            };
            let cut = chain.readable.len().saturating_sub(MAX_CHAIN_BYTES);
            self.metrics().bytes_cut.fetch_add(cut, Ordering::Relaxed);
            if let Some(head) = chain.readable.take_front(chain.readable.len() - cut) {
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
            self.metrics().bytes_out.fetch_add(len, Ordering::Relaxed);
        }
    }

    /// From the host's end to the guest, as far as the guest gave buffers. What does not fit stays there, in a bounded queue.
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
            self.metrics().bytes_in.fetch_add(written as u64, Ordering::Relaxed);
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

    /// What was taken from the host's end and not given to the guest.
    pub fn unread(&self) -> &[u8] {
        &self.unread
    }

    pub fn restore(&mut self, unread: Vec<u8>) {
        self.unread = unread;
    }
}
