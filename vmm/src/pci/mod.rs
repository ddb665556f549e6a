//! The PCI Express hierarchy of a guest: what firmware and Linux find at 0xCF8 and in the ECAM window.
//!
//! ```text
//! 00:00.0  8086:29c0  Q35 host bridge, PCIEXBAR        00:01.0  kept for graphics
//! 00:1f.0  8086:2918  ICH9 LPC, PMBASE 0x600           00:02.0  kept for USB
//! 00:03.0 .. 00:1a.0  root ports: slot n (0 to 23) is device 3+n, its bus is n+1, one device each
//! 00:1b.0  8086:25ab  watchdog, where the guest has one
//! 00:1c.0  1af4:1044  entropy                          00:1d.0  1af4:1045  balloon
//! 00:1e.0  kept for another fixed function
//! ```
//!
//! What can be plugged sits behind a root port. What every guest has is a function of the root complex: it needs no bus of its own,
//! which Linux would probe, and no slot. Such a function says that it is a root complex integrated endpoint, or is a conventional
//! one (the bridges, the watchdog).
//!
//! Every slot has its port from the start, with or without a device: bus numbers and windows are the same in each guest, and any
//! slot can take a device later ([`topology::PciBus::insert`]).
//!
//! An address follows from the slot number alone, which the VM's definition keeps: a guest finds its disk where it was, whatever
//! was added or removed meanwhile (DESIGN §7, peers-vmm §4.2 rule 23).
//!
//! How the machine uses it:
//!
//! ```ignore
//! let mut topology = Topology::new(PciMap { ecam_base, ecam_buses: 64, mmio32, mmio64 }, msi_sink)?;
//! let (disk, handle) = Block::open(config, …)?;              // devices::block
//! topology.add_root_port_device(0, disk)?;                   // 00:03.0 -> 01:00.0
//! let bus = topology.build();                                // Arc<PciBus>
//! bus.program()?;                                            // what firmware does: buses, windows, BARs
//! bus.insert_into(&pio_bus, &mmio_bus)?;                     // 0xCF8..0xCFF, ECAM, both windows
//! ```
//!
//! Data path of an access: [`access`] (ports, ECAM) -> [`topology::PciBus`] -> a [`PciFunction`], whose registers are
//! a [`config_space::ConfigSpace`]. Loads and stores to BARs are found by the bus in the routes it computed from the
//! guest's own settings: BAR, memory enable, the port's windows, slot power. No lock is held while a device runs. ACPI has to name the same bus
//! range and windows, reserve ECAM, and grant native hot plug in `_OSC`.

use std::sync::Arc;

pub mod access;
pub mod address;
pub mod bar;
pub mod config_space;
pub mod express;
pub mod firmware;
pub mod host_bridge;
pub mod msix;
pub mod root_port;
pub mod slot;
pub mod topology;

#[cfg(test)]
mod plug_tests;
#[cfg(test)]
mod tests;

pub use address::PciAddress;
pub use bar::{Bar, BarKind, BarRange};
pub use topology::{PciBus, PciMap, Topology};

use config_space::ConfigError;
use msix::MsixError;
use root_port::RootPort;

/// Why the hierarchy cannot be built, programmed, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error("slot {slot} does not exist; slots are 0 to {last}", last = topology::MAX_SLOTS - 1)]
    NoSuchSlot { slot: u8 },
    #[error("slot {slot} is taken; give the device another slot in the VM's definition")]
    SlotTaken { slot: u8 },
    #[error("slot {slot} is empty")]
    SlotEmpty { slot: u8 },
    #[error("device {device:#04x} of bus 0 is not one that fixed functions have")]
    NotAFixedDevice { device: u8 },
    #[error("device {device:#04x} of bus 0 is taken by another fixed function")]
    FixedDeviceTaken { device: u8 },
    #[error(
        "the PCI map is not usable: {why} (ECAM {ecam_base:#x}, 32-bit window {mmio32:x?}, 64-bit window {mmio64:x?})"
    )]
    BadMap { why: &'static str, ecam_base: u64, mmio32: std::ops::Range<u64>, mmio64: std::ops::Range<u64> },
    #[error("BAR {bar} of {address} ({size:#x} bytes) does not fit into the window of its port")]
    NoWindow { address: PciAddress, bar: u8, size: u64 },
    #[error("cannot lay out configuration space")]
    Config(#[from] ConfigError),
    #[error("cannot take over the saved interrupt vectors")]
    Msix(#[from] MsixError),
    #[error("cannot allocate interrupt vectors for a PCI function")]
    Interrupt(#[from] crate::interrupt::InterruptError),
    #[error("cannot place the PCI bus in the guest's address map")]
    Bus(#[from] crate::bus::BusError),
    #[error("the saved state of {what} has version {found}; this program reads {known}")]
    Version { what: &'static str, found: u32, known: u32 },
    #[error("the saved state has a device in a slot that is empty here, or the other way round")]
    SlotDiffers,
    #[error("the saved state of a device is not usable: {0}")]
    Device(String),
    #[error("cannot read or write the saved state of a PCI function")]
    Encoding(#[from] serde_json::Error),
}

/// One function of the hierarchy. Called from vCPU threads, several at once.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. `register` is below 4096; what does not exist reads as zero.
    fn config_read(&self, register: u16, data: &mut [u8]);

    /// Writes configuration space. The bus looks at [`decoded`](Self::decoded) again afterwards.
    fn config_write(&self, register: u16, data: &[u8]);

    /// Memory ranges that the function answers at now.
    fn decoded(&self) -> Vec<BarRange>;

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// A BAR can be reached at `base` from now on, or (`None`) no longer: register or drop doorbells.
    fn routed(&self, bar: u8, base: Option<u64>);

    /// Back to the state after power-on. Must not wait for I/O.
    fn reset(&self);

    /// The port, if the function is one.
    fn bridge(&self) -> Option<&RootPort> {
        None
    }

    /// The function's versioned state.
    fn save(&self) -> Result<serde_json::Value, serde_json::Error>;
    fn restore(&self, saved: serde_json::Value) -> Result<(), PciError>;
}

/// A function that more than one owner holds.
pub type SharedFunction = Arc<dyn PciFunction>;

/// Told what guests do with slots that they were asked to empty. Called on vCPU threads, under the lock of configuration space:
/// must not wait, and must not come back to the bus.
pub trait SlotEvents: Send + Sync {
    /// The device was reset and is out of the slot. Whoever drops it last gives its doorbells and vectors back.
    fn ejected(&self, slot: u8, device: SharedFunction);

    /// The guest does not give the device up.
    fn kept(&self, slot: u8);
}

/// For a hierarchy whose devices nobody asks for.
pub struct NoSlotEvents;

impl SlotEvents for NoSlotEvents {
    fn ejected(&self, _slot: u8, _device: SharedFunction) {}
    fn kept(&self, _slot: u8) {}
}
