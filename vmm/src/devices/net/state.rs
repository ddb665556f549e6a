//! A network card as it is saved: what the guest may rely on, so that it is only ever resumed on a card of the same kind.
//! Frames are not saved: one that was on its way is lost, as networks lose frames.

use pnet_base::MacAddr;
use serde::{Deserialize, Serialize};

use super::config::NetConfig;
use crate::virtio::device::DeviceError;

const DEVICE: &str = "net";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedNet {
    pub version: u32,
    pub mac: MacAddr,
    pub mtu: u16,
    pub link_up: bool,
}

impl SavedNet {
    pub const VERSION: u32 = 1;

    pub fn of(card: &NetConfig, link_up: bool) -> Self {
        Self { version: Self::VERSION, mac: card.mac, mtu: card.mtu, link_up }
    }

    /// Whether `card` can take the place of the saved one.
    pub fn check(&self, card: &NetConfig) -> Result<(), DeviceError> {
        if self.version != Self::VERSION {
            return Err(DeviceError::Version { device: DEVICE, found: self.version, known: Self::VERSION });
        }
        let here = Self::of(card, self.link_up);
        if *self != here {
            return Err(DeviceError::Unfit { device: DEVICE, what: format!("saved {self:?}, here {here:?}") });
        }
        Ok(())
    }
}
