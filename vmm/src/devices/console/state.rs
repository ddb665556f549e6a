//! The console as it is saved: what was taken from the host and not yet given to the guest, and what the driver knows of the ports.

use serde::{Deserialize, Serialize};

use super::config::PORTS;
use super::control::PortControl;
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
    pub control: PortControl,
}

impl SavedConsole {
    /// 2: the agent's port, and control messages.
    pub const VERSION: u32 = 2;

    /// The ports of a saved console of this machine type.
    pub fn into_ports(self) -> Result<[SavedPort; PORTS], DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        let unfit = |what: String| DeviceError::Unfit { device: DEVICE, what };
        if let Some(long) = self.ports.iter().find(|port| port.unread.len() > CARRY_BYTES) {
            return Err(unfit(format!("{} bytes of unread input", long.unread.len())));
        }
        let count = self.ports.len();
        self.ports.try_into().map_err(|_| unfit(format!("it has {count} ports, here are {PORTS}")))
    }
}
