//! What the balloon does with its queues. No thread and no clock; each pass does a bounded amount of work.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_control::balloon::GuestMemoryStats;
use vmm_sys_util::eventfd::EventFd;

use super::config::{DEFLATE, INFLATE, QUEUE_SIZES, REPORTING, REPORTS, STATISTICS, STATS};
use super::metrics::BalloonMetrics;
use super::ram::{Ram, Run, discard};
use super::stats;
use crate::memory::GuestMemory;
use crate::virtio::device::QueuePosition;
use crate::virtio::worker::{Pass, Work, WorkError};
use crate::virtio::{Activation, ActiveQueue, Chain, DeviceQueue, QueueError, VirtioInterrupt, locked};

/// How often the guest is asked for statistics.
pub const STATS_INTERVAL: Duration = Duration::from_secs(10);
/// Page numbers of one chain. Linux sends 256, Windows 1024.
pub const MAX_PAGES_PER_CHAIN: usize = 1024;
/// Of one chain of reports. Linux sends 32 buffers of at most 4 MiB; a report is advice, and what is beyond is not taken.
pub const MAX_REPORTED_BYTES: u64 = 128 << 20;
/// Buffers of one chain.
const MAX_BUFFERS: usize = 64;
/// Chains of one queue and pass: a few milliseconds with the worst choice of pages. A lease that ends waits for the pass.
const CHAINS_PER_PASS: usize = 4;
const REPORTS_PER_PASS: usize = 1;

/// The last answer of the guest, and when it came.
pub type LastStats = Mutex<Option<(GuestMemoryStats, Duration)>>;

pub struct Engine {
    ram: Ram,
    metrics: Arc<BalloonMetrics>,
    stats: Arc<LastStats>,
    active: Option<Active>,
}

/// What the driver gave at DRIVER_OK.
struct Active {
    inflate: Option<DeviceQueue>,
    deflate: Option<DeviceQueue>,
    statistics: Option<Statistics>,
    reports: Vec<DeviceQueue>,
    kicks: Vec<Arc<EventFd>>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

/// The driver puts one buffer out with its statistics. To give it back is to ask for new ones.
struct Statistics {
    queue: DeviceQueue,
    held: Option<Chain>,
    ask_at: Duration,
}

impl Active {
    fn new(activation: Activation) -> Self {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let mut kicks = Vec::new();
        let mut take = |index: u16| {
            let ActiveQueue { queue, kick } = queues.get_mut(usize::from(index)).and_then(Option::take)?;
            kicks.push(Arc::new(kick));
            Some(DeviceQueue::new(index, queue, memory.clone(), Arc::clone(&interrupt), MAX_BUFFERS))
        };
        let agreed = |feature: u64| features & feature != 0;
        let inflate = take(INFLATE);
        let deflate = take(DEFLATE);
        let statistics = if agreed(STATS) { take(STATISTICS) } else { None };
        let statistics = statistics.map(|queue| Statistics { queue, held: None, ask_at: Duration::ZERO });
        let reports = if agreed(REPORTING) { REPORTS.into_iter().filter_map(&mut take).collect() } else { Vec::new() };
        Self { inflate, deflate, statistics, reports, kicks, interrupt }
    }

    /// By queue index. A queue that is not served stands at its start.
    fn positions(&self) -> Vec<QueuePosition> {
        let mut positions = vec![QueuePosition::default(); QUEUE_SIZES.len()];
        for (index, queue) in [(INFLATE, &self.inflate), (DEFLATE, &self.deflate)] {
            if let Some(queue) = queue {
                positions[usize::from(index)] = queue.position();
            }
        }
        if let Some(statistics) = &self.statistics {
            let mut position = statistics.queue.position();
            // The buffer that is held is still the driver's last one in the ring: it is found there again.
            position.next_avail = position.next_avail.wrapping_sub(u16::from(statistics.held.is_some()));
            positions[usize::from(STATISTICS)] = position;
        }
        for queue in &self.reports {
            positions[usize::from(queue.index())] = queue.position();
        }
        positions
    }
}

impl Engine {
    pub fn new(ram: Ram, metrics: Arc<BalloonMetrics>, stats: Arc<LastStats>) -> Self {
        Self { ram, metrics, stats, active: None }
    }

    pub fn activate(&mut self, activation: Activation) {
        self.active = Some(Active::new(activation));
    }

    pub fn positions(&self) -> Vec<QueuePosition> {
        self.active.as_ref().map(Active::positions).unwrap_or_default()
    }

    fn try_serve(&mut self, now: Duration) -> Result<Pass, WorkError> {
        let Self { ram, metrics, stats, active } = self;
        let Some(active) = active else {
            return Ok(Pass::Idle);
        };
        let taker = Taker { ram, metrics };
        let mut pass = Pass::Idle;
        if let Some(queue) = &mut active.inflate {
            pass = pass.and(serve_chains(queue, CHAINS_PER_PASS, |memory, chain| taker.inflate(memory, chain))?);
        }
        if let Some(queue) = &mut active.deflate {
            let count = |_: &GuestMemory, chain: &Chain| metrics.deflated_pages.add(chain.readable.len() / 4);
            pass = pass.and(serve_chains(queue, CHAINS_PER_PASS, count)?);
        }
        for queue in &mut active.reports {
            pass = pass.and(serve_chains(queue, REPORTS_PER_PASS, |memory, chain| taker.take_reported(memory, chain))?);
        }
        if let Some(statistics) = &mut active.statistics {
            pass = pass.and(statistics.serve(now, stats)?);
        }
        Ok(pass)
    }
}

/// Answers up to `limit` chains, each with nothing written.
fn serve_chains(
    queue: &mut DeviceQueue,
    limit: usize,
    mut each: impl FnMut(&GuestMemory, &Chain),
) -> Result<Pass, QueueError> {
    queue.disable_doorbell()?;
    let (mut pass, mut served) = (Pass::More, 0);
    while served < limit {
        let Some(chain) = queue.pop()? else {
            if queue.enable_doorbell()? {
                continue;
            }
            pass = Pass::Idle;
            break;
        };
        each(queue.memory(), &chain);
        queue.complete(chain.head, 0)?;
        served += 1;
    }
    if served > 0 {
        queue.notify()?;
    }
    Ok(pass)
}

/// Takes memory that the guest gives.
struct Taker<'a> {
    ram: &'a Ram,
    metrics: &'a BalloonMetrics,
}

impl Taker<'_> {
    fn inflate(&self, memory: &GuestMemory, chain: &Chain) {
        let named = chain.readable.len() / 4;
        let count = named.min(MAX_PAGES_PER_CHAIN as u64);
        let mut bytes = vec![0; count as usize * 4];
        if !chain.readable.read(memory, &mut bytes) {
            self.metrics.refused_pages.add(named);
            return;
        }
        let mut pages: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let (runs, refused) = self.ram.runs(&mut pages);
        self.metrics.refused_pages.add(refused + (named - count));
        for run in runs {
            if self.discard(memory, run) {
                self.metrics.inflated_pages.add(run.bytes / super::config::PAGE_BYTES);
            }
        }
    }

    /// The buffers of a report are the free memory itself.
    fn take_reported(&self, memory: &GuestMemory, chain: &Chain) {
        let mut left = MAX_REPORTED_BYTES;
        for segment in chain.writable.iter() {
            let Some(run) = self.ram.whole_pages(segment.address.0, u64::from(segment.len)) else {
                continue;
            };
            if run.bytes > left {
                return;
            }
            left -= run.bytes;
            if self.discard(memory, run) {
                self.metrics.reported_bytes.add(run.bytes);
            }
        }
    }

    fn discard(&self, memory: &GuestMemory, run: Run) -> bool {
        if crate::memory::is_reserved(memory) {
            // Nobody else could have it, and a hole in a huge page is none: it stays as it is, with what it holds.
            return false;
        }
        let discarded = discard(memory, run);
        if let Err(error) = &discarded {
            self.metrics.discard_failures.add(1);
            tracing::debug!(%error, base = run.base, bytes = run.bytes, "the host does not take memory back");
        }
        discarded.is_ok()
    }
}

impl Statistics {
    fn serve(&mut self, now: Duration, last: &LastStats) -> Result<Pass, QueueError> {
        if self.held.is_some() && now >= self.ask_at {
            self.ask()?;
        }
        if self.held.is_none() {
            let Some(chain) = self.next_answer()? else {
                return Ok(Pass::Idle);
            };
            let mut bytes = vec![0; chain.readable.len().min(stats::MAX_BYTES as u64) as usize];
            if chain.readable.read(self.queue.memory(), &mut bytes) {
                *locked(last) = Some((stats::decode(&bytes), now));
            }
            self.held = Some(chain);
            self.ask_at = now + STATS_INTERVAL;
        }
        Ok(Pass::At(self.ask_at))
    }

    fn ask(&mut self) -> Result<(), QueueError> {
        if let Some(held) = self.held.take() {
            self.queue.complete(held.head, 0)?;
            self.queue.notify()?;
        }
        Ok(())
    }

    fn next_answer(&mut self) -> Result<Option<Chain>, QueueError> {
        loop {
            if let Some(chain) = self.queue.pop()? {
                return Ok(Some(chain));
            }
            if !self.queue.enable_doorbell()? {
                return Ok(None);
            }
        }
    }
}

impl Work for Engine {
    fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.active.as_ref().map(|active| active.kicks.clone()).unwrap_or_default()
    }

    fn serve(&mut self, now: Duration) -> Result<Pass, WorkError> {
        self.try_serve(now).inspect_err(|_| self.metrics.driver_errors.add(1))
    }

    fn stop(&mut self) -> Option<Arc<dyn VirtioInterrupt>> {
        *locked(&self.stats) = None;
        self.active.take().map(|active| active.interrupt)
    }
}
