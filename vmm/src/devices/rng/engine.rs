//! What the entropy device does with its one queue. No thread and no clock.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::eventfd::EventFd;

use super::metrics::RngMetrics;
use crate::token_bucket::TokenBucket;
use crate::virtio::device::QueuePosition;
use crate::virtio::worker::{Pass, Work, WorkError};
use crate::virtio::{DeviceQueue, VirtioInterrupt};

/// The most that one request is given. Linux asks for 64 bytes, or a page.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Of all requests together. The host's kernel makes some 500 MB/s on one processor.
pub const BYTES_PER_SECOND: u64 = 1 << 20;
/// What may come at once after a rest.
const BURST_BYTES: u64 = 256 << 10;
/// What a request costs at least, so that those without room are bounded too.
const LEAST_PRICE_BYTES: u64 = 64;
/// Requests served before others get the lock.
const CHAINS_PER_PASS: usize = 16;
/// Buffers of one request. Linux uses one.
pub(super) const MAX_BUFFERS: usize = 64;

/// Where entropy comes from.
pub trait Entropy: Send {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The host's kernel.
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// What the driver gave at DRIVER_OK.
pub struct Active {
    pub queue: DeviceQueue,
    pub kick: Arc<EventFd>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

pub struct Engine {
    active: Option<Active>,
    entropy: Box<dyn Entropy>,
    rate: TokenBucket,
    metrics: Arc<RngMetrics>,
}

impl Engine {
    pub fn new(entropy: Box<dyn Entropy>, metrics: Arc<RngMetrics>) -> Self {
        let rate = TokenBucket::new(BYTES_PER_SECOND, Some(BURST_BYTES));
        Self { active: None, entropy, rate, metrics }
    }

    pub fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    pub fn position(&self) -> Option<QueuePosition> {
        self.active.as_ref().map(|active| active.queue.position())
    }

    fn try_serve(&mut self, now: Duration) -> Result<Pass, WorkError> {
        let Some(Active { queue, .. }) = &mut self.active else {
            return Ok(Pass::Idle);
        };
        queue.disable_doorbell()?;
        self.rate.fill(now);
        let mut served = 0;
        let pass = loop {
            if served == CHAINS_PER_PASS {
                break Pass::More;
            }
            // Before a request is taken: one that waits stays in the ring, where a save finds it.
            let wait = self.rate.wait(MAX_REQUEST_BYTES as u64);
            if !wait.is_zero() {
                self.metrics.limited.add(1);
                break Pass::At(now + wait);
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                break Pass::Idle;
            };
            let mut bytes = [0; MAX_REQUEST_BYTES];
            let bytes = &mut bytes[..chain.writable.len().min(MAX_REQUEST_BYTES as u64) as usize];
            self.entropy.fill(bytes)?;
            let written = if chain.writable.write(queue.memory(), bytes) { bytes.len() } else { 0 };
            queue.complete(chain.head, written as u32)?;
            self.rate.take((written as u64).max(LEAST_PRICE_BYTES));
            self.metrics.requests.add(1);
            self.metrics.bytes.add(written as u64);
            served += 1;
        };
        if served > 0 {
            queue.notify()?;
        }
        Ok(pass)
    }
}

impl Work for Engine {
    fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.active.iter().map(|active| Arc::clone(&active.kick)).collect()
    }

    fn serve(&mut self, now: Duration) -> Result<Pass, WorkError> {
        self.try_serve(now).inspect_err(|_| self.metrics.errors.add(1))
    }

    fn stop(&mut self) -> Option<Arc<dyn VirtioInterrupt>> {
        self.active.take().map(|active| active.interrupt)
    }
}
