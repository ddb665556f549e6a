//! The three ways in: ports 0xCF8..0xCFF, the ECAM window, and the memory windows of the BARs.

use std::sync::{Arc, Mutex};

use super::{PciAddress, PciBus, PciError};
use crate::bus::{MmioBus, MmioDevice, PioBus, PioDevice};

pub const CONFIG_PORT: u16 = 0xcf8;
const CONFIG_PORTS: u16 = 8;
/// Offset of the data register behind the address register.
const DATA: u16 = 4;

/// Ports 0xCF8 (address) and 0xCFC (data).
struct ConfigPorts {
    bus: Arc<PciBus>,
    latched: u32,
}

impl ConfigPorts {
    /// The function and register that a data access means; `None` while the enable bit is clear.
    fn target(&self, port_offset: u16) -> Option<(PciAddress, u16)> {
        let (address, register) = PciAddress::from_config_port(self.latched)?;
        Some((address, register + (port_offset - DATA)))
    }
}

impl PioDevice for ConfigPorts {
    fn read(&mut self, port_offset: u16, data: &mut [u8]) {
        if port_offset < DATA {
            // Only the whole register is there: bytes of it belong to other devices (0xCF9).
            match <&mut [u8; 4]>::try_from(data) {
                Ok(all) if port_offset == 0 => *all = self.latched.to_le_bytes(),
                Ok(all) => all.fill(0xff),
                Err(_) => {}
            }
            return;
        }
        match self.target(port_offset) {
            Some((address, register)) => self.bus.config_read(address, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, port_offset: u16, data: &[u8]) {
        if port_offset == 0 {
            if let Ok(all) = <[u8; 4]>::try_from(data) {
                self.latched = u32::from_le_bytes(all);
            }
            return;
        }
        if port_offset < DATA {
            return;
        }
        if let Some((address, register)) = self.target(port_offset) {
            self.bus.config_write(address, register, data);
        }
    }
}

struct EcamWindow(Arc<PciBus>);

impl MmioDevice for EcamWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (address, register) = PciAddress::from_ecam_offset(offset);
        self.0.config_read(address, register, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (address, register) = PciAddress::from_ecam_offset(offset);
        self.0.config_write(address, register, data);
    }
}

struct BarWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl MmioDevice for BarWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bus.mmio_read(self.base + offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bus.mmio_write(self.base + offset, data);
    }
}

impl PciBus {
    /// Places the configuration ports, ECAM and the memory windows.
    pub fn insert_into(self: &Arc<Self>, pio: &PioBus, mmio: &MmioBus) -> Result<(), PciError> {
        let ports = ConfigPorts { bus: Arc::clone(self), latched: 0 };
        pio.insert(u64::from(CONFIG_PORT), u64::from(CONFIG_PORTS), Arc::new(Mutex::new(ports)))?;
        let map = self.map();
        mmio.insert(map.ecam_base, map.ecam_bytes(), Arc::new(Mutex::new(EcamWindow(Arc::clone(self)))))?;
        for window in [&map.mmio32, &map.mmio64] {
            if window.is_empty() {
                continue;
            }
            let device = BarWindow { bus: Arc::clone(self), base: window.start };
            mmio.insert(window.start, window.end - window.start, Arc::new(Mutex::new(device)))?;
        }
        Ok(())
    }
}
