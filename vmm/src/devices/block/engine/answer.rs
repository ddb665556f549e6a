//! The end of a request: its result for the driver, or what the policy makes of an error.

use std::sync::atomic::Ordering;

use vmm_control::DiskFault;

use super::{Engine, add};
use crate::devices::block::fault::{Verdict, describe, verdict};
use crate::devices::block::request::{Answer, Operation, Status};
use crate::virtio::QueueError;

impl Engine {
    /// Storage failed a request.
    pub(super) fn failed(&mut self, slot: usize, errno: i32) -> Result<(), QueueError> {
        let Some(pending) = self.slots[slot].as_mut() else {
            return Ok(());
        };
        match verdict(self.on_error, errno) {
            Verdict::Report => self.finish(slot, Status::IoError),
            Verdict::Ignore => {
                add(&self.metrics.ignored, 1);
                self.finish(slot, Status::Ok)
            }
            Verdict::Stop => {
                pending.retries = 0;
                let fault = describe(&self.name, pending.request.operation, pending.request.data.len(), errno);
                if self.held.is_empty() {
                    add(&self.metrics.stops, 1);
                    self.fault = Some(fault);
                }
                self.held.push_back(slot);
                if let Some(drain) = self.draining.as_mut() {
                    drain.cancelled += 1;
                }
                Ok(())
            }
        }
    }

    /// The error that stops the guest, once.
    pub fn take_fault(&mut self) -> Option<DiskFault> {
        self.fault.take()
    }

    /// Requests that failed are tried again, before all others.
    pub fn retry(&mut self) {
        while let Some(slot) = self.held.pop_back() {
            self.parked.push_front(slot);
        }
        self.publish();
    }

    pub(super) fn finish(&mut self, slot: usize, mut status: Status) -> Result<(), QueueError> {
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

    pub(super) fn answer(&mut self, answer: &Answer) -> Result<(), QueueError> {
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
        self.answered = true;
        queue.complete(answer.head, answer.written.saturating_add(1))
    }

    /// Interrupts the driver, if there is something for it.
    pub(super) fn tell_driver(&mut self) -> Result<(), QueueError> {
        match self.queue.as_mut() {
            Some(queue) if std::mem::take(&mut self.answered) => queue.notify(),
            _ => Ok(()),
        }
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

    pub(super) fn publish(&self) {
        let metrics = &self.metrics;
        // A drain whose sync failed leaves data that may still go out: it counts as one request that does not end.
        let unsynced = self.draining.is_some_and(|drain| drain.flush_failed);
        metrics.in_flight.store(self.in_flight as u64 + u64::from(unsynced), Ordering::SeqCst);
        metrics.parked.store(self.parked.len() as u64, Ordering::Relaxed);
        metrics.held.store(self.held.len() as u64, Ordering::Relaxed);
    }
}
