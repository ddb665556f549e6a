//! The console as it is saved: what was taken from the keyboard and not yet given to the guest.

use serde::{Deserialize, Serialize};

use super::port::CARRY_BYTES;
use crate::virtio::device::DeviceError;

const DEVICE: &str = "console";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedConsole {
    pub version: u32,
    /// One entry a port.
    pub ports: Vec<SavedPort>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPort {
    pub unread: Vec<u8>,
}

impl SavedConsole {
    pub const VERSION: u32 = 1;

    /// The one port of a saved console of this machine type.
    pub fn into_port(mut self) -> Result<SavedPort, DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        let unfit = |what: String| DeviceError::Unfit { device: DEVICE, what };
        let count = self.ports.len();
        match self.ports.pop() {
            Some(port) if count == 1 && port.unread.len() <= CARRY_BYTES => Ok(port),
            Some(port) if count == 1 => Err(unfit(format!("{} bytes of unread input", port.unread.len()))),
            _ => Err(unfit(format!("it has {count} ports, here is one"))),
        }
    }
}
