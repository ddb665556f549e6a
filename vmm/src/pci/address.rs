//! Bus, device, function: the name of a PCI function as guests and people write it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The address of one function, in the one segment that a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PciAddress {
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// `None` when the device (0..31) or the function (0..7) is out of range.
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self { bus, device, function }) } else { None }
    }

    /// Function 0 of a device on bus 0. `device` is taken modulo 32.
    pub const fn on_root_bus(device: u8) -> Self {
        Self { bus: 0, device: device & 31, function: 0 }
    }

    pub const fn bus(self) -> u8 {
        self.bus
    }

    pub const fn device(self) -> u8 {
        self.device
    }

    pub const fn function(self) -> u8 {
        self.function
    }

    /// From the value latched at port 0xCF8: (address, register), `None` while the enable bit is clear.
    pub fn from_config_port(latched: u32) -> Option<(Self, u16)> {
        let enabled = latched & 0x8000_0000 != 0;
        enabled.then_some((
            Self { bus: (latched >> 16) as u8, device: (latched >> 11) as u8 & 31, function: (latched >> 8) as u8 & 7 },
            (latched & 0xfc) as u16,
        ))
    }

    /// From an offset into the ECAM window: (address, register).
    pub fn from_ecam_offset(offset: u64) -> (Self, u16) {
        (
            Self { bus: (offset >> 20) as u8, device: (offset >> 15) as u8 & 31, function: (offset >> 12) as u8 & 7 },
            (offset & 0xfff) as u16,
        )
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}
