//! A PCI Express root port with one slot: the place of every hot-pluggable device (DESIGN §7).
//!
//! Its slot has the controls of native hot plug ([`slot`](super::slot)), so that adding a device to a running guest changes no
//! address. A slot that the guest powers off resets its device and hides it; one that the guest was asked to give up loses it.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::bar::BarRange;
use super::config_space::{ConfigError, ConfigSpace, Identity, SavedConfigSpace, command, register};
use super::express::{self, offset as express_offset};
use super::slot::{Effect, Registers, Removal, Slot, bits};
use super::{PciFunction, SharedFunction, SlotEvents};
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
    /// As the machine counts slots, from 0.
    slot: u8,
    events: Arc<dyn SlotEvents>,
    inner: Mutex<Inner>,
}

struct Inner {
    space: ConfigSpace,
    express: u16,
    msi: u16,
    vectors: Arc<dyn MsiVectors>,
    slot: Slot,
    child: Option<SharedFunction>,
    /// The hot-plug interrupt was due when last looked at: a message is sent when it becomes so.
    asserted: bool,
}

/// [`RootPort`] as it is saved.
#[derive(Debug, Serialize, Deserialize)]
struct SavedRootPort {
    version: u32,
    config: SavedConfigSpace,
    child: Option<serde_json::Value>,
    /// An unplug that the guest was asked for goes on after a restore.
    #[serde(default)]
    removal: Removal,
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
    /// `slot` is the machine's number, 0..=30. `events` is told when the guest gives a device up.
    pub fn new(
        slot: u8,
        child: Option<SharedFunction>,
        vectors: Arc<dyn MsiVectors>,
        events: Arc<dyn SlotEvents>,
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

        // The operator counts slots from 1, as slot number 0 means "none" to Linux.
        let number = slot + 1;
        let express = express::add_root_port(&mut space, number)?;
        let capabilities = bits::ATTENTION_BUTTON
            | bits::POWER_CONTROLLER
            | bits::ATTENTION_INDICATOR
            | bits::POWER_INDICATOR
            | bits::HOT_PLUG
            | u32::from(number) << bits::NUMBER_SHIFT;
        space.init_u32(express + express_offset::SLOT_CAPABILITIES, capabilities);
        space.allow_u16(express + express_offset::SLOT_CONTROL, bits::CONTROL_WRITABLE);
        space.clear_on_one_u16(express + express_offset::SLOT_STATUS, bits::STATUS_CLEARABLE);

        let msi = space.add_capability(msi::CAPABILITY_ID, &[0; msi::BODY_BYTES])?;
        space.init_u16(msi + msi::CONTROL, msi::IS_64_BIT | msi::MASKABLE);
        space.allow_u16(msi + msi::CONTROL, msi::ENABLE);
        space.allow_u32(msi + msi::ADDRESS, !3);
        space.allow_u32(msi + msi::ADDRESS_HIGH, u32::MAX);
        space.allow_u16(msi + msi::DATA, u16::MAX);
        space.allow_u32(msi + msi::MASK, 1);
        let (state, registers) = Slot::power_on(child.is_some());
        let mut inner = Inner { space, express, msi, vectors, slot: state, child, asserted: false };
        inner.show(registers);
        Ok(Self { slot, events, inner: Mutex::new(inner) })
    }

    /// The machine's number of the slot.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The bus behind this port, as the guest numbered it. 0 while it has not.
    pub fn secondary_bus(&self) -> u8 {
        locked(&self.inner).space.u8(SECONDARY_BUS)
    }

    /// The device in the slot, while the slot has power.
    pub fn child(&self) -> Option<SharedFunction> {
        let inner = locked(&self.inner);
        inner.child.clone().filter(|_| inner.registers().is_powered())
    }

    pub fn is_occupied(&self) -> bool {
        locked(&self.inner).child.is_some()
    }

    /// Whether the guest was asked for the device.
    pub fn removal(&self) -> Removal {
        locked(&self.inner).slot.removal()
    }

    /// Puts a device into the slot of a running guest. A device that finds the slot taken is given back.
    pub(super) fn insert(&self, device: SharedFunction) -> Result<(), SharedFunction> {
        let mut inner = locked(&self.inner);
        if inner.child.is_some() {
            return Err(device);
        }
        inner.child = Some(device);
        inner.change(Slot::insert);
        Ok(())
    }

    /// Asks the guest for the device. One that has no power comes out at once.
    pub(super) fn ask_removal(&self) {
        let mut inner = locked(&self.inner);
        let effect = inner.change(Slot::ask_removal);
        self.carry_out(effect, inner);
    }

    /// Pulls the device out, without asking.
    pub(super) fn take_out(&self) -> Option<SharedFunction> {
        let mut inner = locked(&self.inner);
        let child = inner.child.take()?;
        inner.change(Slot::take_out);
        drop(inner);
        child.reset();
        Some(child)
    }

    /// Tells the device and whoever waits for it, outside of the lock: a device's reset may take its own.
    fn carry_out(&self, effect: Effect, mut inner: MutexGuard<'_, Inner>) {
        match effect {
            Effect::Nothing => {}
            Effect::PoweredOff => {
                let child = inner.child.clone();
                drop(inner);
                if let Some(child) = child {
                    child.reset();
                }
            }
            Effect::Ejected => {
                let child = inner.child.take();
                drop(inner);
                if let Some(child) = child {
                    child.reset();
                    self.events.ejected(self.slot, child);
                }
            }
            Effect::Kept => {
                drop(inner);
                self.events.kept(self.slot);
            }
        }
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
    fn registers(&self) -> Registers {
        Registers {
            control: self.space.u16(self.express + express_offset::SLOT_CONTROL),
            status: self.space.u16(self.express + express_offset::SLOT_STATUS),
        }
    }

    /// Shows the guest the registers, and the link that follows from them.
    fn show(&mut self, registers: Registers) {
        self.space.set_u16(self.express + express_offset::SLOT_CONTROL, registers.control);
        self.space.set_u16(self.express + express_offset::SLOT_STATUS, registers.status);
        let active = if self.slot.link_is_active(registers) { LINK_ACTIVE } else { 0 };
        self.space.set_u16(self.express + express_offset::LINK_STATUS, express::LINK_SPEED_AND_WIDTH | active);
    }

    /// One step of the slot, with its interrupt.
    fn change<T>(&mut self, step: impl FnOnce(&mut Slot, &mut Registers) -> T) -> T {
        let mut registers = self.registers();
        let result = step(&mut self.slot, &mut registers);
        self.show(registers);
        let due = registers.wants_interrupt();
        if due && !self.asserted {
            self.interrupt();
        }
        self.asserted = due;
        result
    }

    fn interrupt(&mut self) {
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

/// Whether a write of `len` bytes at `register` reaches the register of two bytes at `field`.
fn touches(register: u16, len: usize, field: u16) -> bool {
    register < field + 2 && usize::from(register) + len > usize::from(field)
}

impl PciFunction for RootPort {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        locked(&self.inner).space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) {
        let mut inner = locked(&self.inner);
        let msi_before = inner.msi_registers();
        let before = inner.registers();
        inner.space.write(register, data);
        if inner.msi_registers() != msi_before {
            inner.apply_msi();
        }
        let control = inner.express + express_offset::SLOT_CONTROL;
        let command = touches(register, data.len(), control);
        let status = touches(register, data.len(), control + 2);
        let mut effect = Effect::Nothing;
        if command || status {
            effect = inner.change(|slot, registers| slot.written(before, registers, command));
        }
        if effect == Effect::Nothing && inner.space.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0 {
            // What a reset of the bus does to a device is what a loss of power does.
            effect = Effect::PoweredOff;
        }
        self.carry_out(effect, inner);
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
        let (slot, registers) = Slot::power_on(inner.child.is_some());
        inner.slot = slot;
        inner.show(registers);
        inner.asserted = false;
        inner.apply_msi();
        self.carry_out(Effect::PoweredOff, inner);
    }

    fn bridge(&self) -> Option<&RootPort> {
        Some(self)
    }

    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        let (config, removal, child) = {
            let inner = locked(&self.inner);
            (inner.space.save(), inner.slot.removal(), inner.child.clone())
        };
        let child = child.map(|c| c.save()).transpose()?;
        serde_json::to_value(SavedRootPort { version: SavedRootPort::VERSION, config, child, removal })
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
        if inner.child.is_some() != saved.child.is_some() {
            return Err(super::PciError::SlotDiffers);
        }
        inner.space.restore(&saved.config)?;
        inner.apply_msi();
        let mut registers = inner.registers();
        inner.slot = Slot::restored(inner.child.is_some(), saved.removal, &mut registers);
        inner.show(registers);
        // A message that was on its way when the state was saved is lost: it is sent again (peers-vmm §4.2 rule 25).
        inner.asserted = false;
        inner.change(|_, _| ());
        let child = inner.child.clone();
        drop(inner);
        match (child, saved.child) {
            (Some(child), Some(state)) => child.restore(state),
            _ => Ok(()),
        }
    }
}
