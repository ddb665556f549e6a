//! A disk as it is saved: what the guest may rely on, so that it is only ever resumed on the same disk, and the requests that it
//! waits for.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::config::Geometry;
use super::request::{Operation, Request};
use crate::virtio::Segments;
use crate::virtio::chain::Segment;
use crate::virtio::device::DeviceError;

const DEVICE: &str = "block";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBlock {
    pub version: u32,
    pub capacity_sectors: u64,
    pub block_bytes: u32,
    pub read_only: bool,
    pub serial: Vec<u8>,
    /// Taken from the ring and not answered, in the order in which they are started.
    #[serde(default)]
    pub pending: Vec<SavedRequest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRequest {
    head: u16,
    operation: Operation,
    /// Guest addresses and lengths.
    data: Vec<(u64, u32)>,
    status: Vec<(u64, u32)>,
}

fn pieces(segments: &Segments) -> Vec<(u64, u32)> {
    segments.iter().map(|segment| (segment.address.0, segment.len)).collect()
}

fn segments(pieces: Vec<(u64, u32)>) -> Segments {
    pieces.into_iter().map(|(address, len)| Segment { address: GuestAddress(address), len }).collect()
}

impl From<&Request> for SavedRequest {
    fn from(request: &Request) -> Self {
        let Request { head, operation, data, status } = request;
        Self { head: *head, operation: *operation, data: pieces(data), status: pieces(status) }
    }
}

impl From<SavedRequest> for Request {
    fn from(saved: SavedRequest) -> Self {
        let SavedRequest { head, operation, data, status } = saved;
        Self { head, operation, data: segments(data), status: segments(status) }
    }
}

impl SavedBlock {
    /// 2: requests that wait.
    pub const VERSION: u32 = 2;

    pub fn of(disk: &Geometry, pending: &[Request]) -> Self {
        Self {
            version: Self::VERSION,
            capacity_sectors: disk.capacity_sectors,
            block_bytes: disk.block_bytes,
            read_only: disk.read_only,
            serial: disk.serial.to_vec(),
            pending: pending.iter().map(SavedRequest::from).collect(),
        }
    }

    /// Whether `disk` can take the place of the saved one.
    pub fn check(&self, disk: &Geometry) -> Result<(), DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        let here = Self { pending: self.pending.clone(), ..Self::of(disk, &[]) };
        if *self != here {
            return Err(DeviceError::Unfit { device: DEVICE, what: format!("saved {self:?}, here {here:?}") });
        }
        Ok(())
    }

    /// The requests. Each is checked when the driver's queue is there.
    pub fn requests(self) -> Vec<Request> {
        self.pending.into_iter().map(Request::from).collect()
    }
}
