//! A disk as it is saved: what the guest may rely on, so that it is only ever resumed on the same disk.

use serde::{Deserialize, Serialize};

use super::config::Geometry;
use crate::virtio::device::DeviceError;

const DEVICE: &str = "block";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBlock {
    pub version: u32,
    pub capacity_sectors: u64,
    pub block_bytes: u32,
    pub read_only: bool,
    pub serial: Vec<u8>,
}

impl SavedBlock {
    pub const VERSION: u32 = 1;

    pub fn of(disk: &Geometry) -> Self {
        Self {
            version: Self::VERSION,
            capacity_sectors: disk.capacity_sectors,
            block_bytes: disk.block_bytes,
            read_only: disk.read_only,
            serial: disk.serial.to_vec(),
        }
    }

    /// Whether `disk` can take the place of the saved one.
    pub fn check(&self, disk: &Geometry) -> Result<(), DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        let here = Self::of(disk);
        if *self != here {
            return Err(DeviceError::Unfit { device: DEVICE, what: format!("saved {self:?}, here {here:?}") });
        }
        Ok(())
    }
}
