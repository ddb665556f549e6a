//! The state machine of a disk: rings on one side, a backend on the other, requests between them.
//!
//! A request is in one of two places: *in flight* (the kernel has it) or *parked* (the kernel gave it back, or never
//! got it; it is submitted when the gate lets it). It leaves with one answer to the driver, or silently after a reset.
//! The engine has no thread and no clock: [`thread`](super::thread) drives it, tests drive it with a backend of their own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::backend::{Backend, Completion, Io, Token};
use super::config::{Geometry, MAX_REQUEST_BYTES, QUEUE_SIZE};
use super::metrics::{BlockMetrics, add};
use super::pending::{Buffers, Pending, Prepared, Step};
use super::request::{Answer, Operation, Parsed, Request, Status, parse};
use crate::lease::quiesce::DiskGate;
use crate::virtio::{DeviceQueue, QueueError};

/// Memory that copies of unaligned requests may take at one time.
const BOUNCE_BYTES: u64 = MAX_REQUEST_BYTES;
/// The drain's own flush.
const DRAIN_FLUSH: Token = 1 << 32;

/// What is open now.
struct Open {
    backend: Box<dyn Backend>,
    /// Alignment of O_DIRECT, if it is in use.
    direct: Option<usize>,
}

/// The device side of a disk.
pub struct Engine {
    disk: Geometry,
    gate: Arc<DiskGate>,
    metrics: Arc<BlockMetrics>,
    open: Option<Open>,
    queue: Option<DeviceQueue>,
    /// The driver does not flush: each write is durable when it ends.
    write_through: bool,
    slots: Vec<Option<Box<Pending>>>,
    free: Vec<usize>,
    parked: VecDeque<usize>,
    in_flight: usize,
    bounce_bytes: u64,
    /// Written through the page cache since the last flush.
    dirty: bool,
    draining: Option<Drain>,
}

/// Counts of a drain that is under way.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    pub completed: u64,
    pub cancelled: u64,
    flushing: bool,
    flush_failed: bool,
}

/// What [`Engine::serve`] left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing to do before the next doorbell or completion.
    Idle,
    /// Requests wait for the gate.
    Stalled,
}

impl Engine {
    pub fn new(disk: Geometry, gate: Arc<DiskGate>, metrics: Arc<BlockMetrics>) -> Self {
        let size = usize::from(QUEUE_SIZE);
        Self {
            disk,
            gate,
            metrics,
            open: None,
            queue: None,
            write_through: false,
            slots: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            parked: VecDeque::new(),
            in_flight: 0,
            bounce_bytes: 0,
            dirty: false,
            draining: None,
        }
    }

    /// Work goes to `backend` from now on.
    pub fn open(&mut self, backend: Box<dyn Backend>, direct: Option<usize>) {
        self.draining = None;
        self.open = Some(Open { backend, direct });
        // Parked requests were laid out for the old file's alignment.
        for slot in self.parked.clone() {
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
        for slot in std::mem::take(&mut self.parked) {
            self.release(slot);
        }
        for pending in self.slots.iter_mut().flatten() {
            pending.orphan = true;
        }
        self.cancel();
        self.publish();
    }

    /// The driver broke the protocol: what it asked for before goes on, without answers.
    pub fn stop_serving(&mut self) {
        self.queue = None;
        for slot in std::mem::take(&mut self.parked) {
            self.release(slot);
        }
        self.publish();
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    pub fn queue(&self) -> Option<&DeviceQueue> {
        self.queue.as_ref()
    }

    /// Submits what waits and what the ring holds, as far as gate and memory allow.
    pub fn serve(&mut self) -> Result<Served, QueueError> {
        let has_work = self.queue.is_some() || !self.parked.is_empty();
        if !has_work {
            return Ok(Served::Idle);
        }
        let gate = Arc::clone(&self.gate);
        // Held over the whole batch: whoever closes the gate waits until the kernel has all of it.
        let Some(_pass) = gate.try_enter().filter(|_| self.open.is_some()) else {
            return Ok(Served::Stalled);
        };
        while let Some(slot) = self.parked.pop_front() {
            if !self.start(slot) {
                self.parked.push_front(slot);
                break;
            }
        }
        let result = self.take_from_ring();
        self.hand_over();
        self.publish();
        result.map(|()| if self.parked.is_empty() { Served::Idle } else { Served::Stalled })
    }

    fn take_from_ring(&mut self) -> Result<(), QueueError> {
        let mut answered = false;
        loop {
            let Some(queue) = self.queue.as_mut() else {
                return Ok(());
            };
            // A request that found no memory for its copy is before those in the ring.
            if self.free.is_empty() || !self.parked.is_empty() {
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
                    answered = true;
                }
                Parsed::Disk(request) => self.accept(request),
            }
        }
        match self.queue.as_mut() {
            Some(queue) if answered => queue.notify(),
            _ => Ok(()),
        }
    }

    /// Gives a request a place, and starts it or parks it.
    fn accept(&mut self, request: Request) {
        let (Some(slot), Some(queue)) = (self.free.pop(), self.queue.as_ref()) else {
            return;
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
        }));
        if !self.start(slot) {
            self.parked.push_back(slot);
        }
    }

    /// Queues a request for the kernel. False when it has to wait.
    fn start(&mut self, slot: usize) -> bool {
        let Some(open) = self.open.as_mut() else {
            return false;
        };
        let Some(pending) = self.slots[slot].as_mut() else {
            return true;
        };
        let room = BOUNCE_BYTES.saturating_sub(self.bounce_bytes);
        match pending.prepare(open.direct, room) {
            Prepared::Ready { bounced } => {
                self.bounce_bytes += bounced;
                if bounced > 0 {
                    add(&self.metrics.bounced, 1);
                }
            }
            Prepared::NoRoom => return false,
            Prepared::Unusable => {
                self.end_later(slot, -i64::from(libc::EIO));
                return true;
            }
        }
        let Some(pending) = self.slots[slot].as_mut() else {
            return true;
        };
        let writes = !matches!(pending.request.operation, Operation::Read { .. } | Operation::Flush);
        // SAFETY: the slot keeps list, bounce buffer and guest memory until its completion was reaped, and the
        // engine's owner does not drop it before (see `Engine::abandon`).
        match unsafe { open.backend.start(slot as Token, pending.io()) } {
            Ok(()) => {
                pending.in_flight = true;
                self.in_flight += 1;
                self.dirty |= writes && open.direct.is_none();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                tracing::warn!(%error, "a request could not be given to the kernel");
                self.end_later(slot, -i64::from(libc::EIO));
            }
        }
        true
    }

    /// A request that fails before the kernel saw it ends like one that failed in it.
    fn end_later(&mut self, slot: usize, result: i64) {
        if let Some(pending) = self.slots[slot].as_mut() {
            pending.in_flight = true;
            self.in_flight += 1;
        }
        if let Err(error) = self.completed(Completion { token: slot as Token, result }) {
            tracing::warn!(%error, "a failed request could not be answered");
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
        let any = !ended.is_empty();
        let mut first_error = Ok(());
        for completion in ended {
            let result = self.completed(completion);
            if first_error.is_ok() {
                first_error = result;
            }
        }
        if any && let Some(queue) = self.queue.as_mut() {
            let notified = queue.notify();
            first_error = first_error.and(notified);
        }
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
        if pending.orphan {
            self.release(slot);
            return Ok(());
        }
        match pending.advance(completion.result) {
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

    fn finish(&mut self, slot: usize, mut status: Status) -> Result<(), QueueError> {
        let Some(pending) = self.slots[slot].as_mut() else {
            return Ok(());
        };
        let len = pending.request.data.len();
        let mut written = 0;
        if let (Operation::Read { .. }, Status::Ok) = (pending.request.operation, status) {
            if pending.deliver() {
                written = len as u32;
            } else {
                status = Status::IoError;
            }
        }
        self.count(slot, status, len);
        let Some(pending) = self.release(slot) else {
            return Ok(());
        };
        self.answer(&Answer { head: pending.request.head, status, status_at: pending.request.status.clone(), written })
    }

    fn answer(&mut self, answer: &Answer) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut() else {
            return Ok(());
        };
        if !answer.status_at.write(queue.memory(), &[answer.status.byte()]) {
            return Err(QueueError::Chain {
                index: 0,
                source: crate::virtio::chain::ChainError::Copy { head: answer.head },
            });
        }
        if answer.status == Status::IoError {
            add(&self.metrics.errors, 1);
        }
        queue.complete(answer.head, answer.written.saturating_add(1))
    }

    fn count(&self, slot: usize, status: Status, len: u64) {
        let Some(pending) = self.slots[slot].as_ref() else {
            return;
        };
        if status != Status::Ok {
            return;
        }
        let metrics = &self.metrics;
        match pending.request.operation {
            Operation::Read { .. } => {
                add(&metrics.reads, 1);
                add(&metrics.bytes_read, len);
            }
            Operation::Write { .. } => {
                add(&metrics.writes, 1);
                add(&metrics.bytes_written, len);
            }
            Operation::Flush => add(&metrics.flushes, 1),
            Operation::Discard { .. } | Operation::Zero { .. } => add(&metrics.discards, 1),
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

    fn publish(&self) {
        let metrics = &self.metrics;
        // A drain whose sync failed leaves data that may still go out: it counts as one request that does not end.
        let unsynced = self.draining.is_some_and(|drain| drain.flush_failed);
        metrics.in_flight.store(self.in_flight as u64 + u64::from(unsynced), Ordering::SeqCst);
        metrics.parked.store(self.parked.len() as u64, Ordering::Relaxed);
    }

    /// Asks the kernel for everything back.
    fn cancel(&mut self) {
        let tokens: Vec<Token> = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.as_ref().is_some_and(|p| p.in_flight))
            .map(|(slot, _)| slot as Token)
            .collect();
        if tokens.is_empty() {
            return;
        }
        if let Some(open) = self.open.as_mut()
            && let Err(error) = open.backend.cancel(&tokens)
        {
            tracing::warn!(%error, "the kernel was not asked to cancel");
        }
    }

    /// Begins to take everything back from the kernel. The gate is closed.
    pub fn begin_drain(&mut self) {
        self.draining = Some(Drain::default());
        self.cancel();
        self.go_on_draining();
        self.publish();
    }

    /// When requests are back and dirty pages remain, syncs them: the kernel would write them out later, onto a disk
    /// that may have another writer by then (hazard C8).
    fn go_on_draining(&mut self) {
        let Some(drain) = self.draining.as_mut() else {
            return;
        };
        if self.in_flight > 0 || !self.dirty || drain.flushing || drain.flush_failed {
            return;
        }
        let Some(open) = self.open.as_mut() else {
            return;
        };
        // SAFETY: a flush has no buffers.
        let started = unsafe { open.backend.start(DRAIN_FLUSH, Io::Flush) };
        match started.and_then(|()| open.backend.submit()) {
            Ok(()) => {
                drain.flushing = true;
                self.in_flight += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "the drain's flush was not taken");
                drain.flush_failed = true;
            }
        }
    }

    /// The end of the drain: its counts, or `None` while it goes on (or cannot end, because the sync failed).
    pub fn drained(&self) -> Option<Drain> {
        let drain = self.draining?;
        (self.in_flight == 0 && !self.dirty).then_some(drain)
    }

    /// At the end of the thread: what the kernel still writes to must stay mapped until the process ends.
    pub fn abandon(self) {
        if self.in_flight > 0 {
            std::mem::forget(self);
        }
    }
}
