//! What firmware would have done before a direct boot: number the buses, open the ports' windows, place the BARs.
//!
//! It works through configuration space alone, as firmware does, so it holds for every function; and its result
//! depends on the device number on bus 0 and the map alone, so a guest finds the same addresses at every start. Linux keeps what it
//! finds when it is consistent: no `pci=` option is needed.

use super::config_space::{command, register};
use super::root_port::bridge_register::{
    MEMORY_BASE, MEMORY_LIMIT, PREFETCH_BASE, PREFETCH_BASE_HIGH, PREFETCH_LIMIT, PREFETCH_LIMIT_HIGH, PRIMARY_BUS,
};
use super::topology::{
    FIRST_FIXED_DEVICE, FIRST_SLOT_DEVICE, LAST_FIXED_DEVICE, SHARE_OF_WINDOW_32, SHARES, secondary_bus,
};
use super::{PciAddress, PciBus, PciError};

const MIB: u64 = 1 << 20;
const BAR_COUNT: u8 = 6;

/// Memory that is given out from the bottom, in naturally aligned pieces.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    fn take(&mut self, size: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(size)?;
        let end = at.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(at)
    }

    fn last(&self) -> u64 {
        self.end - 1
    }
}

struct FoundBar {
    index: u8,
    is_64_bit: bool,
    prefetchable: bool,
    size: u64,
}

impl PciBus {
    /// Programs every port and the device behind it, and the fixed functions. For the start of a guest and after its reset.
    pub fn program(&self) -> Result<(), PciError> {
        let ports: Vec<PciAddress> = self
            .root_functions()
            .filter(|(_, function)| function.bridge().is_some())
            .map(|(address, _)| address)
            .collect();
        for port in ports {
            self.program_port(port)?;
        }
        let fixed: Vec<PciAddress> = self
            .root_functions()
            .map(|(address, _)| address)
            .filter(|address| (FIRST_FIXED_DEVICE..=LAST_FIXED_DEVICE).contains(&address.device()))
            .collect();
        for function in fixed {
            let (mut low, mut high) = self.share_of(function.device());
            self.program_function(function, &mut low, &mut high)?;
        }
        Ok(())
    }

    fn program_port(&self, port: PciAddress) -> Result<(), PciError> {
        let slot = port.device() - FIRST_SLOT_DEVICE;
        let bus = secondary_bus(slot)?;
        let (mut low, mut high) = self.share_of(port.device());
        // Primary 0, secondary and subordinate the same: one device, no bridge behind it.
        self.config_write(port, PRIMARY_BUS, &[0, bus, bus]);
        self.write_u16(port, MEMORY_BASE, (low.next >> 16) as u16);
        self.write_u16(port, MEMORY_LIMIT, (low.last() >> 16) as u16);
        self.write_u16(port, PREFETCH_BASE, (high.next >> 16) as u16);
        self.write_u16(port, PREFETCH_LIMIT, (high.last() >> 16) as u16);
        self.write_u32(port, PREFETCH_BASE_HIGH, (high.next >> 32) as u32);
        self.write_u32(port, PREFETCH_LIMIT_HIGH, (high.last() >> 32) as u32);
        self.write_u16(port, register::COMMAND, command::MEMORY | command::BUS_MASTER);

        let Some(child) = PciAddress::new(bus, 0, 0) else {
            return Ok(());
        };
        if self.read_u32(child, register::VENDOR_ID) == u32::MAX {
            return Ok(());
        }
        self.program_function(child, &mut low, &mut high)
    }

    /// Places the BARs of one function and switches them on.
    fn program_function(&self, function: PciAddress, low: &mut Window, high: &mut Window) -> Result<(), PciError> {
        let mut bars = self.size_bars(function);
        // Largest first leaves no holes.
        bars.sort_by_key(|bar| std::cmp::Reverse(bar.size));
        for bar in bars {
            let window = if bar.is_64_bit && bar.prefetchable { &mut *high } else { &mut *low };
            let base = window.take(bar.size).ok_or(PciError::NoWindow {
                address: function,
                bar: bar.index,
                size: bar.size,
            })?;
            let at = register::BAR0 + 4 * u16::from(bar.index);
            self.write_u32(function, at, base as u32);
            if bar.is_64_bit {
                self.write_u32(function, at + 4, (base >> 32) as u32);
            }
        }
        // Bus mastering is the driver's to enable.
        self.write_u16(function, register::COMMAND, command::MEMORY);
        Ok(())
    }

    /// The two windows of a slot or a fixed device: its shares of the machine's.
    fn share_of(&self, device: u8) -> (Window, Window) {
        let map = self.map();
        let number = u64::from(device - FIRST_SLOT_DEVICE);
        let low = map.mmio32.start + number * SHARE_OF_WINDOW_32;
        let share = (map.mmio64.end - map.mmio64.start) / u64::from(SHARES) / MIB * MIB;
        let high = map.mmio64.start + number * share;
        (Window { next: low, end: low + SHARE_OF_WINDOW_32 }, Window { next: high, end: high + share })
    }

    fn size_bars(&self, address: PciAddress) -> Vec<FoundBar> {
        let mut found = Vec::new();
        let mut index = 0;
        while index < BAR_COUNT {
            let at = register::BAR0 + 4 * u16::from(index);
            self.write_u32(address, at, u32::MAX);
            let low = self.read_u32(address, at);
            let is_64_bit = low & 0b110 == 0b100;
            let mut mask = u64::from(low & !0xf) | u64::from(u32::MAX) << 32;
            if is_64_bit {
                self.write_u32(address, at + 4, u32::MAX);
                mask = u64::from(low & !0xf) | u64::from(self.read_u32(address, at + 4)) << 32;
            }
            if low & !0xf != 0 || (is_64_bit && mask >> 32 != 0) {
                found.push(FoundBar {
                    index,
                    is_64_bit,
                    prefetchable: low & 0b1000 != 0,
                    size: (!mask).wrapping_add(1),
                });
            }
            index += if is_64_bit { 2 } else { 1 };
        }
        found
    }

    fn read_u32(&self, address: PciAddress, register: u16) -> u32 {
        let mut data = [0; 4];
        self.config_read(address, register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write_u16(&self, address: PciAddress, register: u16, value: u16) {
        self.config_write(address, register, &value.to_le_bytes());
    }

    fn write_u32(&self, address: PciAddress, register: u16, value: u32) {
        self.config_write(address, register, &value.to_le_bytes());
    }
}
