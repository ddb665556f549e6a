//! The balloon as it is saved. Which pages the guest has given is not part of it: they are zeros, and saved as such.

use serde::{Deserialize, Serialize};

use super::config::Registers;
use crate::virtio::device::DeviceError;

const DEVICE: &str = "balloon";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBalloon {
    pub version: u32,
    /// The registers.
    pub wanted_pages: u32,
    pub given_pages: u32,
}

impl SavedBalloon {
    pub const VERSION: u32 = 1;

    pub fn of(registers: &Registers) -> Self {
        Self { version: Self::VERSION, wanted_pages: registers.wanted(), given_pages: registers.given() }
    }

    /// For a guest that has so many pages.
    pub fn check(&self, memory_pages: u64) -> Result<(), DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        if u64::from(self.wanted_pages) > memory_pages {
            let what = format!("it wants {} pages of a guest that has {memory_pages}", self.wanted_pages);
            return Err(DeviceError::Unfit { device: DEVICE, what });
        }
        Ok(())
    }
}
