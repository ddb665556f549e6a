//! The state machine of a disk: rings on one side, a backend on the other, requests between them.
//!
//! A request is in one of three places: *in flight* (the kernel has it), *parked* (the kernel gave it back, or never got it; it is
//! submitted when gate and rate limit let it) or *held* (it failed, and waits for the guest to be resumed). It leaves with one
//! answer to the driver, or silently after a reset. The engine has no thread and no clock: [`thread`](super::thread) drives it.
//!
//! [`answer`] is the end of a request, [`drain`] the end of all, [`saved`] how they go to another host.

mod answer;
mod drain;
mod saved;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use vmm_control::{DiskFault, OnError};

use self::drain::DRAIN_FLUSH;
pub use self::drain::Drain;
pub use self::saved::Standing;
use super::backend::{Backend, Completion, Io, Token};
use super::config::{BlockConfig, Geometry, MAX_REQUEST_BYTES, QUEUE_SIZE};
use super::limit::Limiter;
use super::metrics::{BlockMetrics, add};
use super::pending::{Buffers, Fare, Pending, Prepared, Step};
use super::request::{Operation, Parsed, Request, Status, parse};
use crate::lease::quiesce::DiskGate;
use crate::virtio::{DeviceQueue, QueueError};

/// Memory that copies of unaligned requests may take at one time.
const BOUNCE_BYTES: u64 = MAX_REQUEST_BYTES;
/// What is open now.
struct Open {
    backend: Box<dyn Backend>,
    /// Alignment of O_DIRECT, if it is in use.
    direct: Option<usize>,
}

/// The device side of a disk.
pub struct Engine {
    name: String,
    disk: Geometry,
    on_error: OnError,
    limiter: Option<Limiter>,
    gate: Arc<DiskGate>,
    metrics: Arc<BlockMetrics>,
    open: Option<Open>,
    queue: Option<DeviceQueue>,
    /// The driver does not flush: each write is durable when it ends.
    write_through: bool,
    slots: Vec<Option<Box<Pending>>>,
    free: Vec<usize>,
    parked: VecDeque<usize>,
    held: VecDeque<usize>,
    /// Why the guest has to stop, until the thread takes it.
    fault: Option<DiskFault>,
    in_flight: usize,
    /// The driver has answers that it was not told of.
    answered: bool,
    bounce_bytes: u64,
    /// Written through the page cache since the last flush.
    dirty: bool,
    draining: Option<Drain>,
}

/// What [`Engine::serve`] left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing to do before the next doorbell or completion.
    Idle,
    /// Requests wait for the gate.
    Stalled,
    /// Requests wait for the rate limit, this long.
    Throttled(Duration),
}

impl Engine {
    pub fn new(config: &BlockConfig, disk: Geometry, gate: Arc<DiskGate>, metrics: Arc<BlockMetrics>) -> Self {
        let size = usize::from(QUEUE_SIZE);
        Self {
            name: config.name.clone(),
            disk,
            on_error: config.on_error,
            limiter: config.rate_limit.as_ref().and_then(Limiter::new),
            gate,
            metrics,
            open: None,
            queue: None,
            write_through: false,
            slots: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            parked: VecDeque::new(),
            held: VecDeque::new(),
            fault: None,
            in_flight: 0,
            answered: false,
            bounce_bytes: 0,
            dirty: false,
            draining: None,
        }
    }

    /// Work goes to `backend` from now on.
    pub fn open(&mut self, backend: Box<dyn Backend>, direct: Option<usize>) {
        self.draining = None;
        self.open = Some(Open { backend, direct });
        // Requests that wait were laid out for the old file's alignment.
        for slot in self.waiting() {
            self.drop_bounce(slot);
        }
    }

    /// Closes the file. Refused while the kernel has requests.
    pub fn close(&mut self) -> bool {
        if self.in_flight == 0 {
            self.open = None;
        }
        self.open.is_none()
    }

    pub fn backend(&self) -> Option<&dyn Backend> {
        self.open.as_ref().map(|open| &*open.backend)
    }

    pub fn activate(&mut self, queue: DeviceQueue, write_through: bool) {
        self.queue = Some(queue);
        self.write_through = write_through;
    }

    /// Forgets the driver's queue. Requests in the kernel go on until [`in_flight`](Self::in_flight) is zero.
    pub fn reset(&mut self) {
        self.queue = None;
        for slot in self.waiting() {
            self.release(slot);
        }
        self.parked.clear();
        self.held.clear();
        for pending in self.slots.iter_mut().flatten() {
            pending.orphan = true;
        }
        self.cancel();
        self.publish();
    }

    /// The driver broke the protocol: what it asked for before goes on, without answers.
    pub fn stop_serving(&mut self) {
        self.queue = None;
        for slot in self.waiting() {
            self.release(slot);
        }
        self.parked.clear();
        self.held.clear();
        self.publish();
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Requests that the kernel does not have: parked or held.
    fn waiting(&self) -> Vec<usize> {
        self.parked.iter().chain(&self.held).copied().collect()
    }

    /// Submits what waits and what the ring holds, as far as gate, rate limit and memory allow. `now` counts from any fixed moment.
    pub fn serve(&mut self, now: Duration) -> Result<Served, QueueError> {
        let has_work = self.queue.is_some() || !self.parked.is_empty();
        // Storage that fails is left alone until somebody says that it is well again.
        if !has_work || !self.held.is_empty() {
            return Ok(Served::Idle);
        }
        let gate = Arc::clone(&self.gate);
        // Held over the whole batch: whoever closes the gate waits until the kernel has all of it.
        let Some(_pass) = gate.try_enter().filter(|_| self.open.is_some()) else {
            return Ok(Served::Stalled);
        };
        // Whoever closed the gate to drain has opened it again.
        self.draining = None;
        let mut outcome = Ok(None);
        while let Some(slot) = self.parked.pop_front() {
            outcome = Ok(self.start(slot, now));
            if let Ok(Some(_)) = outcome {
                self.parked.push_front(slot);
                break;
            }
        }
        if self.parked.is_empty() {
            outcome = self.take_from_ring(now);
        }
        self.hand_over();
        self.publish();
        let told = self.tell_driver();
        let outcome = outcome.and_then(|why| told.map(|()| why));
        outcome.map(|why| why.unwrap_or(Served::Idle))
    }

    /// What stopped it is returned: requests go in the order of the ring, so one that has to wait holds up those behind it.
    fn take_from_ring(&mut self, now: Duration) -> Result<Option<Served>, QueueError> {
        let mut stopped = None;
        loop {
            let Some(queue) = self.queue.as_mut() else {
                return Ok(None);
            };
            // A policy may have stopped the disk within this loop.
            if self.free.is_empty() || stopped.is_some() || !self.held.is_empty() {
                break;
            }
            queue.disable_doorbell()?;
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                break;
            };
            let head = chain.head;
            let parsed =
                parse(chain, queue.memory(), &self.disk).map_err(|source| QueueError::Chain { index: 0, source })?;
            match parsed {
                Parsed::Now(answer) => {
                    debug_assert_eq!(answer.head, head);
                    self.answer(&answer)?;
                }
                Parsed::Disk(request) => stopped = self.accept(request, now),
            }
        }
        Ok(stopped)
    }

    /// Gives a request a place, and starts it or parks it.
    fn accept(&mut self, request: Request, now: Duration) -> Option<Served> {
        let (Some(slot), Some(queue)) = (self.free.pop(), self.queue.as_ref()) else {
            return None;
        };
        self.slots[slot] = Some(Box::new(Pending {
            request,
            memory: queue.memory().clone(),
            buffers: Buffers::default(),
            done: 0,
            retries: 0,
            in_flight: false,
            orphan: false,
            write_through: self.write_through,
            fare: Fare::Unpaid,
        }));
        let waits = self.start(slot, now);
        if waits.is_some() {
            self.parked.push_back(slot);
        }
        waits
    }

    /// Pays for a request, unless that was done before. Says how long it has to wait.
    fn pay(&mut self, slot: usize, now: Duration) -> Option<Served> {
        let limiter = self.limiter.as_mut()?;
        let pending = self.slots[slot].as_mut()?;
        let bytes = match (pending.fare, pending.request.operation) {
            // A flush is no work of the guest's choice of size, and what it waits for has been paid for.
            (Fare::Paid, _) | (_, Operation::Flush) => return None,
            (_, Operation::Discard { .. } | Operation::Zero { .. }) => 0,
            (_, Operation::Read { .. } | Operation::Write { .. }) => pending.request.data.len(),
        };
        match (limiter.pay(now, bytes), pending.fare) {
            (Ok(()), fare) => {
                if let Fare::WaitsSince(since) = fare {
                    let waited = now.saturating_sub(since).as_micros();
                    add(&self.metrics.throttled_us, u64::try_from(waited).unwrap_or(u64::MAX));
                }
                pending.fare = Fare::Paid;
                None
            }
            (Err(wait), fare) => {
                if fare == Fare::Unpaid {
                    add(&self.metrics.throttled, 1);
                    pending.fare = Fare::WaitsSince(now);
                }
                Some(Served::Throttled(wait))
            }
        }
    }

    /// Queues a request for the kernel. Says why, when it has to wait.
    fn start(&mut self, slot: usize, now: Duration) -> Option<Served> {
        let waits = self.pay(slot, now);
        if waits.is_some() {
            return waits;
        }
        let Some(open) = self.open.as_mut() else {
            return Some(Served::Stalled);
        };
        let pending = self.slots[slot].as_mut()?;
        let room = BOUNCE_BYTES.saturating_sub(self.bounce_bytes);
        match pending.prepare(open.direct, room) {
            Prepared::Ready { bounced } => {
                self.bounce_bytes += bounced;
                if bounced > 0 {
                    add(&self.metrics.bounced, 1);
                }
            }
            Prepared::NoRoom => return Some(Served::Stalled),
            Prepared::Unusable => {
                // Of the guest's own making, or ours: storage has not failed, and no policy applies.
                let result = self.finish(slot, Status::IoError);
                self.log_lost_answer(result);
                return None;
            }
        }
        let pending = self.slots[slot].as_mut()?;
        let writes = !matches!(pending.request.operation, Operation::Read { .. } | Operation::Flush);
        // SAFETY: the slot keeps list, bounce buffer and guest memory until its completion was reaped, and the
        // engine's owner does not drop it before (see `Engine::abandon`).
        match unsafe { open.backend.start(slot as Token, pending.io()) } {
            Ok(()) => {
                pending.in_flight = true;
                self.in_flight += 1;
                self.dirty |= writes && open.direct.is_none();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(Served::Stalled),
            Err(error) => {
                tracing::warn!(%error, "a request could not be given to the kernel");
                let result = self.failed(slot, libc::EIO);
                self.log_lost_answer(result);
            }
        }
        None
    }

    fn log_lost_answer(&self, result: Result<(), QueueError>) {
        if let Err(error) = result {
            tracing::warn!(disk = %self.name, %error, "a failed request could not be answered");
        }
    }

    fn hand_over(&mut self) {
        if let Some(open) = self.open.as_mut()
            && let Err(error) = open.backend.submit()
        {
            // Nothing is lost: the requests stay queued in the ring and are tried again with the next submit.
            tracing::warn!(%error, "the kernel does not take requests");
        }
    }

    /// Collects what has ended, answers the driver, and serves again. The error is the driver's.
    pub fn reap(&mut self) -> Result<(), QueueError> {
        let mut ended = Vec::new();
        if let Some(open) = self.open.as_mut() {
            open.backend.reap(&mut ended);
        }
        let mut first_error = Ok(());
        for completion in ended {
            let result = self.completed(completion);
            if first_error.is_ok() {
                first_error = result;
            }
        }
        let told = self.tell_driver();
        first_error = first_error.and(told);
        self.go_on_draining();
        self.publish();
        first_error
    }

    fn completed(&mut self, completion: Completion) -> Result<(), QueueError> {
        if completion.token == DRAIN_FLUSH {
            self.in_flight = self.in_flight.saturating_sub(1);
            if let Some(drain) = self.draining.as_mut() {
                drain.flushing = false;
                drain.flush_failed = completion.result < 0;
            }
            self.dirty &= completion.result < 0;
            return Ok(());
        }
        let slot = completion.token as usize;
        let Some(pending) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(());
        };
        if !std::mem::take(&mut pending.in_flight) {
            return Ok(());
        }
        self.in_flight -= 1;
        // Before anything else, and whatever the result: a read that failed, was cancelled, or belongs to a driver that is gone may
        // have written a part, and a migration copies no page that is not marked.
        let is_mapped = pending.mark_written();
        if pending.orphan {
            self.release(slot);
            return Ok(());
        }
        match pending.advance(completion.result) {
            Step::Failed(errno) => self.failed(slot, errno),
            Step::End(Status::Ok) if !is_mapped => self.finish(slot, Status::IoError),
            Step::Park => {
                self.parked.push_back(slot);
                if let Some(drain) = self.draining.as_mut() {
                    drain.cancelled += 1;
                }
                Ok(())
            }
            Step::Again => {
                // Through the gate like any other; a closed gate keeps it parked.
                self.parked.push_back(slot);
                Ok(())
            }
            Step::End(status) => {
                if let Some(drain) = self.draining.as_mut() {
                    drain.completed += 1;
                }
                self.finish(slot, status)
            }
        }
    }

    fn drop_bounce(&mut self, slot: usize) {
        if let Some(pending) = self.slots[slot].as_mut()
            && let Some(bounce) = std::mem::take(&mut pending.buffers).bounce
        {
            self.bounce_bytes -= bounce.len() as u64;
            // What the old copy held of a read that was cut short is lost with it.
            pending.done = 0;
        }
    }

    fn release(&mut self, slot: usize) -> Option<Box<Pending>> {
        self.drop_bounce(slot);
        let pending = self.slots[slot].take()?;
        self.free.push(slot);
        Some(pending)
    }

    /// At the end of the thread: what the kernel still writes to must stay mapped until the process ends.
    pub fn abandon(self) {
        if self.in_flight > 0 {
            std::mem::forget(self);
        }
    }
}
