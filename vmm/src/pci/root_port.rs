//! A PCI Express root port with one slot: the place of every hot-pluggable device (DESIGN §7).
//!
//! Its slot has the standard controls of native hot plug (attention button, power controller, power indicator,
//! presence, link state), so that adding a device to a running guest changes no address. A slot that the guest
//! powers off resets its device and hides it.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::PciFunction;
use super::bar::BarRange;
use super::config_space::{ConfigError, ConfigSpace, Identity, SavedConfigSpace, command, register};
use super::express::{self, offset as express_offset};
use crate::interrupt::MsiVectors;
use crate::virtio::locked;

/// Ids of QEMU's generic root port: guests need no driver that they do not have.
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x000c, revision: 0, class: [0x06, 0x04, 0x00], subsystem: None };

pub mod bridge_register {
    //! Registers of the type 1 header.
    pub const PRIMARY_BUS: u16 = 0x18;
    pub const SECONDARY_BUS: u16 = 0x19;
    pub const SUBORDINATE_BUS: u16 = 0x1a;
    pub const MEMORY_BASE: u16 = 0x20;
    pub const MEMORY_LIMIT: u16 = 0x22;
    pub const PREFETCH_BASE: u16 = 0x24;
    pub const PREFETCH_LIMIT: u16 = 0x26;
    pub const PREFETCH_BASE_HIGH: u16 = 0x28;
    pub const PREFETCH_LIMIT_HIGH: u16 = 0x2c;
    pub const BRIDGE_CONTROL: u16 = 0x3e;
}
use bridge_register::*;

const PREFETCH_64_BIT: u16 = 0x1;
/// Parity, SERR, secondary bus reset.
const BRIDGE_CONTROL_WRITABLE: u16 = 0x0043;
const SECONDARY_BUS_RESET: u16 = 1 << 6;

mod slot {
    //! Bits of the slot registers (PCI Express Base 7.5.3.9 to 7.5.3.11).
    pub const ATTENTION_BUTTON: u32 = 1 << 0;
    pub const POWER_CONTROLLER: u32 = 1 << 1;
    pub const POWER_INDICATOR: u32 = 1 << 4;
    pub const SURPRISE: u32 = 1 << 5;
    pub const HOT_PLUG: u32 = 1 << 6;
    pub const NO_COMMAND_COMPLETED: u32 = 1 << 18;
    pub const NUMBER_SHIFT: u32 = 19;

    pub const CONTROL_WRITABLE: u16 = 0x17ff;
    pub const ENABLE_PRESENCE: u16 = 1 << 3;
    pub const ENABLE_HOT_PLUG: u16 = 1 << 5;
    pub const INDICATOR_ON: u16 = 0b01 << 8;
    pub const INDICATOR_OFF: u16 = 0b11 << 8;
    pub const POWERED_OFF: u16 = 1 << 10;
    pub const ENABLE_LINK: u16 = 1 << 12;

    pub const STATUS_CLEARABLE: u16 = 0x011f;
    pub const PRESENCE_CHANGED: u16 = 1 << 3;
    pub const PRESENT: u16 = 1 << 6;
    pub const LINK_CHANGED: u16 = 1 << 8;
}
const LINK_ACTIVE: u16 = 1 << 13;

mod msi {
    //! MSI with a 64-bit address and a mask, one vector. Offsets count from the capability.
    pub const CAPABILITY_ID: u8 = 0x05;
    pub const CONTROL: u16 = 0x02;
    pub const ENABLE: u16 = 1 << 0;
    pub const IS_64_BIT: u16 = 1 << 7;
    pub const MASKABLE: u16 = 1 << 8;
    pub const ADDRESS: u16 = 0x04;
    pub const ADDRESS_HIGH: u16 = 0x08;
    pub const DATA: u16 = 0x0c;
    pub const MASK: u16 = 0x10;
    pub const PENDING: u16 = 0x14;
    pub const BODY_BYTES: usize = 0x16;
}

/// A root port and what is in its slot.
pub struct RootPort {
    inner: Mutex<Inner>,
    child: Option<Arc<dyn PciFunction>>,
}

struct Inner {
    space: ConfigSpace,
    express: u16,
    msi: u16,
    vectors: Arc<dyn MsiVectors>,
}

/// [`RootPort`] as it is saved, without its child.
#[derive(Debug, Serialize, Deserialize)]
struct SavedRootPort {
    version: u32,
    config: SavedConfigSpace,
    child: Option<serde_json::Value>,
}

impl SavedRootPort {
    const VERSION: u32 = 1;
}

/// The windows through which a port hands memory accesses on, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub base: u64,
    pub last: u64,
}

impl Window {
    pub fn holds(&self, range: &BarRange) -> bool {
        range.base >= self.base && range.last() <= self.last
    }
}

impl RootPort {
    /// `slot_number` is what the guest shows to its operator; 1..=31.
    pub fn new(
        slot_number: u8,
        child: Option<Arc<dyn PciFunction>>,
        vectors: Arc<dyn MsiVectors>,
    ) -> Result<Self, ConfigError> {
        let mut space = ConfigSpace::bridge(IDENTITY);
        space.allow_u16(PRIMARY_BUS, 0xffff);
        space.allow_u16(SUBORDINATE_BUS, 0x00ff);
        space.allow_u16(MEMORY_BASE, 0xfff0);
        space.allow_u16(MEMORY_LIMIT, 0xfff0);
        for window in [PREFETCH_BASE, PREFETCH_LIMIT] {
            space.init_u16(window, PREFETCH_64_BIT);
            space.allow_u16(window, 0xfff0);
        }
        space.allow_u32(PREFETCH_BASE_HIGH, u32::MAX);
        space.allow_u32(PREFETCH_LIMIT_HIGH, u32::MAX);
        space.allow_u16(BRIDGE_CONTROL, BRIDGE_CONTROL_WRITABLE);

        let express = express::add_root_port(&mut space, slot_number)?;
        let capabilities = slot::ATTENTION_BUTTON
            | slot::POWER_CONTROLLER
            | slot::POWER_INDICATOR
            | slot::SURPRISE
            | slot::HOT_PLUG
            | slot::NO_COMMAND_COMPLETED
            | u32::from(slot_number) << slot::NUMBER_SHIFT;
        space.init_u32(express + express_offset::SLOT_CAPABILITIES, capabilities);
        space.allow_u16(express + express_offset::SLOT_CONTROL, slot::CONTROL_WRITABLE);
        space.clear_on_one_u16(express + express_offset::SLOT_STATUS, slot::STATUS_CLEARABLE);
        if child.is_some() {
            space.init_u16(express + express_offset::SLOT_CONTROL, slot::INDICATOR_ON);
            space.init_u16(express + express_offset::SLOT_STATUS, slot::PRESENT);
            space.init_u16(express + express_offset::LINK_STATUS, express::LINK_SPEED_AND_WIDTH | LINK_ACTIVE);
        } else {
            space.init_u16(express + express_offset::SLOT_CONTROL, slot::INDICATOR_OFF | slot::POWERED_OFF);
        }

        let msi = space.add_capability(msi::CAPABILITY_ID, &[0; msi::BODY_BYTES])?;
        space.init_u16(msi + msi::CONTROL, msi::IS_64_BIT | msi::MASKABLE);
        space.allow_u16(msi + msi::CONTROL, msi::ENABLE);
        space.allow_u32(msi + msi::ADDRESS, !3);
        space.allow_u32(msi + msi::ADDRESS_HIGH, u32::MAX);
        space.allow_u16(msi + msi::DATA, u16::MAX);
        space.allow_u32(msi + msi::MASK, 1);
        Ok(Self { inner: Mutex::new(Inner { space, express, msi, vectors }), child })
    }

    /// The bus behind this port, as the guest numbered it. 0 while it has not.
    pub fn secondary_bus(&self) -> u8 {
        locked(&self.inner).space.u8(SECONDARY_BUS)
    }

    /// The device in the slot, while the slot has power.
    pub fn child(&self) -> Option<&Arc<dyn PciFunction>> {
        let powered = !locked(&self.inner).powered_off();
        self.child.as_ref().filter(|_| powered)
    }

    /// Open windows: none while the port's memory decoding is off.
    pub fn windows(&self) -> Vec<Window> {
        let inner = locked(&self.inner);
        let space = &inner.space;
        if space.u16(register::COMMAND) & command::MEMORY == 0 {
            return Vec::new();
        }
        let low = |at: u16| u64::from(space.u16(at) & 0xfff0) << 16;
        let high = |at: u16| u64::from(space.u32(at)) << 32;
        let memory = Window { base: low(MEMORY_BASE), last: low(MEMORY_LIMIT) | 0xf_ffff };
        let prefetch = Window {
            base: high(PREFETCH_BASE_HIGH) | low(PREFETCH_BASE),
            last: high(PREFETCH_LIMIT_HIGH) | low(PREFETCH_LIMIT) | 0xf_ffff,
        };
        // A base above its limit is how a guest closes a window.
        [memory, prefetch].into_iter().filter(|w| w.base <= w.last).collect()
    }
}

impl Inner {
    fn powered_off(&self) -> bool {
        let control = self.space.u16(self.express + express_offset::SLOT_CONTROL);
        control & slot::POWERED_OFF != 0
    }

    /// The link follows power and presence.
    fn follow_power(&mut self, present: bool) {
        let at = self.express + express_offset::LINK_STATUS;
        let link = if present && !self.powered_off() {
            express::LINK_SPEED_AND_WIDTH | LINK_ACTIVE
        } else {
            express::LINK_SPEED_AND_WIDTH
        };
        if self.space.u16(at) != link {
            self.space.set_u16(at, link);
            let status = self.express + express_offset::SLOT_STATUS;
            self.space.set_u16(status, self.space.u16(status) | slot::LINK_CHANGED);
            self.notify();
        }
    }

    /// Interrupts for the slot events that the guest enabled.
    fn notify(&mut self) {
        let control = self.space.u16(self.express + express_offset::SLOT_CONTROL);
        let status = self.space.u16(self.express + express_offset::SLOT_STATUS);
        let wanted = [(slot::ENABLE_PRESENCE, slot::PRESENCE_CHANGED), (slot::ENABLE_LINK, slot::LINK_CHANGED)]
            .iter()
            .any(|(enable, event)| control & enable != 0 && status & event != 0);
        if !wanted || control & slot::ENABLE_HOT_PLUG == 0 {
            return;
        }
        if self.space.u16(self.msi + msi::CONTROL) & msi::ENABLE == 0 {
            return;
        }
        if self.space.u32(self.msi + msi::MASK) & 1 != 0 {
            self.space.set_u32(self.msi + msi::PENDING, 1);
        } else if let Err(error) = self.vectors.trigger(0) {
            tracing::warn!(%error, "a hot plug interrupt was not delivered");
        }
    }

    fn apply_msi(&mut self) {
        let space = &self.space;
        let enabled = space.u16(self.msi + msi::CONTROL) & msi::ENABLE != 0;
        let masked = space.u32(self.msi + msi::MASK) & 1 != 0;
        let address =
            u64::from(space.u32(self.msi + msi::ADDRESS)) | u64::from(space.u32(self.msi + msi::ADDRESS_HIGH)) << 32;
        let data = u32::from(space.u16(self.msi + msi::DATA));
        if let Err(error) = self.vectors.configure(0, address, data, !enabled || masked) {
            tracing::warn!(%error, "a root port's interrupt could not be routed");
        }
        if enabled && !masked && self.space.u32(self.msi + msi::PENDING) & 1 != 0 {
            self.space.set_u32(self.msi + msi::PENDING, 0);
            if let Err(error) = self.vectors.trigger(0) {
                tracing::warn!(%error, "a hot plug interrupt was not delivered");
            }
        }
    }

    fn msi_registers(&self) -> [u8; msi::BODY_BYTES] {
        let mut registers = [0; msi::BODY_BYTES];
        self.space.read(self.msi + 2, &mut registers);
        registers
    }
}

impl PciFunction for RootPort {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        locked(&self.inner).space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) {
        let present = self.child.is_some();
        let reset_child = {
            let mut inner = locked(&self.inner);
            let msi_before = inner.msi_registers();
            let off_before = inner.powered_off();
            inner.space.write(register, data);
            if inner.msi_registers() != msi_before {
                inner.apply_msi();
            }
            let off = inner.powered_off();
            if off != off_before {
                inner.follow_power(present);
            }
            let bus_reset = inner.space.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0;
            bus_reset || (off && !off_before)
        };
        // Outside of the lock: a device's reset may take its own.
        if let Some(child) = self.child.as_ref().filter(|_| reset_child) {
            child.reset();
        }
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
        let mut inner = locked(&self.inner);
        inner.space.reset();
        inner.apply_msi();
        drop(inner);
        if let Some(child) = &self.child {
            child.reset();
        }
    }

    fn bridge(&self) -> Option<&RootPort> {
        Some(self)
    }

    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        let child = self.child.as_ref().map(|c| c.save()).transpose()?;
        serde_json::to_value(SavedRootPort {
            version: SavedRootPort::VERSION,
            config: locked(&self.inner).space.save(),
            child,
        })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), super::PciError> {
        let saved: SavedRootPort = serde_json::from_value(saved)?;
        if saved.version != SavedRootPort::VERSION {
            return Err(super::PciError::Version {
                what: "a root port",
                found: saved.version,
                known: SavedRootPort::VERSION,
            });
        }
        let mut inner = locked(&self.inner);
        inner.space.restore(&saved.config)?;
        inner.apply_msi();
        drop(inner);
        match (&self.child, saved.child) {
            (Some(child), Some(state)) => child.restore(state),
            (None, None) => Ok(()),
            _ => Err(super::PciError::SlotDiffers),
        }
    }
}
