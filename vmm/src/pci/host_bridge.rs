//! The two functions that make the machine a Q35 to firmware: 00:00.0, the memory controller hub, and 00:1f.0, the
//! ICH9 LPC bridge. Stock OVMF knows three host bridges only and reads the PM timer through PMBASE
//! (reference hazards §7), so their identity is fixed with the machine type.

use std::sync::Mutex;

use super::PciFunction;
use super::bar::BarRange;
use super::config_space::{ConfigError, ConfigSpace, Identity, SavedConfigSpace};
use crate::virtio::locked;

/// ACPI I/O block of the LPC bridge. The PM timer is at +8.
pub const PMBASE: u16 = 0x600;
/// Our vendor's subsystem id is what QEMU's machines show too: guests match on it.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

/// PCIEXBAR: base of ECAM, its length in bits 2:1 and its enable in bit 0.
const PCIEXBAR: u16 = 0x60;
/// Interrupt routing of PIRQA..D and E..H: 0x80 = to no IRQ, which is right, as our functions use MSI.
const PIRQ_ROUTES: [u16; 2] = [0x60, 0x68];
const LPC_PMBASE: u16 = 0x40;
const LPC_ACPI_CONTROL: u16 = 0x44;
/// ACPI enabled, SCI on IRQ 9.
const ACPI_ENABLED_SCI_9: u8 = 0x80;

/// A function without BARs and without behaviour: registers alone.
pub struct FixedFunction {
    space: Mutex<ConfigSpace>,
}

impl FixedFunction {
    /// 00:00.0. `ecam_buses` is 256, 128 or 64: what PCIEXBAR can say.
    ///
    /// The register is read-only in `q-direct-1`: the window is where the machine put it before the guest started.
    pub fn host_bridge(ecam_base: u64, ecam_buses: u16) -> Self {
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem: Some(SUBSYSTEM),
        });
        let length_bits = match ecam_buses {
            256 => 0b00,
            128 => 0b01,
            _ => 0b10,
        };
        let value = ecam_base | length_bits << 1 | 1;
        space.init_u32(PCIEXBAR, value as u32);
        space.init_u32(PCIEXBAR + 4, (value >> 32) as u32);
        Self { space: Mutex::new(space) }
    }

    /// 00:1f.0.
    pub fn lpc_bridge() -> Self {
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: [0x06, 0x01, 0x00],
            subsystem: Some(SUBSYSTEM),
        });
        // Bit 0 says I/O space.
        space.init_u32(LPC_PMBASE, u32::from(PMBASE) | 1);
        space.init_u8(LPC_ACPI_CONTROL, ACPI_ENABLED_SCI_9);
        for routes in PIRQ_ROUTES {
            space.init_u32(routes, 0x8080_8080);
        }
        Self { space: Mutex::new(space) }
    }

    pub fn save(&self) -> SavedConfigSpace {
        locked(&self.space).save()
    }

    pub fn restore(&self, saved: &SavedConfigSpace) -> Result<(), ConfigError> {
        locked(&self.space).restore(saved)
    }
}

impl PciFunction for FixedFunction {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        locked(&self.space).read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) {
        locked(&self.space).write(register, data);
    }

    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn routed(&self, _bar: u8, _base: Option<u64>) {}

    fn reset(&self) {
        locked(&self.space).reset();
    }

    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        serde_json::to_value(FixedFunction::save(self))
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), super::PciError> {
        let saved: SavedConfigSpace = serde_json::from_value(saved)?;
        Ok(FixedFunction::restore(self, &saved)?)
    }
}
