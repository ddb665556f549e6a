//! Requests of a guest that is saved: those that were taken from the ring and not answered go with it.

use super::{Engine, Fare, Pending};
use crate::devices::block::pending::Buffers;
use crate::devices::block::request::Request;
use crate::memory::GuestMemory;
use crate::virtio::device::QueuePosition;

/// Where a disk stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// `None` without a driver.
    pub position: Option<QueuePosition>,
    /// In the order in which they are to be started.
    pub pending: Vec<Request>,
}

impl Engine {
    /// Where the disk stands, once the kernel has nothing of it. Requests that failed and wait for the guest to be resumed are tried
    /// again wherever it goes on. What one of them has done before is done again: its result was not told.
    pub fn standing(&self) -> Option<Standing> {
        if self.in_flight > 0 {
            return None;
        }
        let waiting = self.held.iter().chain(&self.parked);
        let pending = waiting.filter_map(|slot| Some(self.slots[*slot].as_ref()?.request.clone())).collect();
        Some(Standing { position: self.queue.as_ref().map(|queue| queue.position()), pending })
    }

    /// Takes over the requests of a saved guest, whose driver was activated. The caller has checked them.
    pub fn adopt(&mut self, requests: Vec<Request>) {
        let Some(queue) = self.queue.as_mut() else {
            return;
        };
        let memory: GuestMemory = queue.memory().clone();
        for request in requests {
            let Some(slot) = self.free.pop() else {
                break;
            };
            queue.adopt(1);
            self.slots[slot] = Some(Box::new(Pending {
                request,
                memory: memory.clone(),
                buffers: Buffers::default(),
                done: 0,
                retries: 0,
                in_flight: false,
                orphan: false,
                write_through: self.write_through,
                fare: Fare::Unpaid,
            }));
            self.parked.push_back(slot);
        }
        self.publish();
    }
}
