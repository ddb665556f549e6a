//! The hierarchy as a guest sees it: through ports, ECAM and memory.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::config_space::{ConfigSpace, Identity, command, register};
use super::root_port::bridge_register;
use super::*;
use crate::bus::{MmioBus, PioBus};
use crate::interrupt::fake::FakeMsi;
use crate::virtio::locked;

/// A device with one 32 KiB prefetchable BAR, which is memory.
pub(super) struct FakeDevice {
    space: Mutex<ConfigSpace>,
    memory: Mutex<Vec<u8>>,
    pub(super) routed: Mutex<Option<u64>>,
    pub(super) resets: Mutex<u32>,
}

const BAR_BYTES: u64 = 0x8000;

impl FakeDevice {
    pub(super) fn new() -> Arc<Self> {
        Self::with(express::add_endpoint)
    }

    fn with(add_express: fn(&mut ConfigSpace) -> Result<u16, config_space::ConfigError>) -> Arc<Self> {
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem: None,
        });
        space.add_bar(Bar { index: 0, kind: BarKind::Prefetchable64, size: BAR_BYTES });
        add_express(&mut space).unwrap();
        Arc::new(Self {
            space: Mutex::new(space),
            memory: Mutex::new(vec![0; BAR_BYTES as usize]),
            routed: Mutex::new(None),
            resets: Mutex::new(0),
        })
    }
}

impl PciFunction for FakeDevice {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        locked(&self.space).read(register, data);
    }
    fn config_write(&self, register: u16, data: &[u8]) {
        locked(&self.space).write(register, data);
    }
    fn decoded(&self) -> Vec<BarRange> {
        locked(&self.space).decoded()
    }
    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        data.copy_from_slice(&locked(&self.memory)[at..at + data.len()]);
    }
    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let at = offset as usize;
        locked(&self.memory)[at..at + data.len()].copy_from_slice(data);
    }
    fn routed(&self, _bar: u8, base: Option<u64>) {
        *locked(&self.routed) = base;
    }
    fn reset(&self) {
        *locked(&self.resets) += 1;
        locked(&self.space).reset();
    }
    fn save(&self) -> Result<serde_json::Value, serde_json::Error> {
        serde_json::to_value(locked(&self.space).save())
    }
    fn restore(&self, saved: serde_json::Value) -> Result<(), PciError> {
        Ok(locked(&self.space).restore(&serde_json::from_value(saved)?)?)
    }
}

pub(super) fn map() -> PciMap {
    PciMap {
        ecam_base: 0xb000_0000,
        ecam_buses: 64,
        mmio32: 0xc000_0000..0xfc00_0000,
        mmio64: 0x40_0000_0000..0x50_0000_0000,
    }
}

struct Machine {
    bus: Arc<PciBus>,
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    disk: Arc<FakeDevice>,
    fixed: Arc<FakeDevice>,
}

/// A disk in slot 0, an empty slot 5, a fixed function at 00:1c.0.
fn machine() -> Machine {
    let disk = FakeDevice::new();
    let mut topology = Topology::new(map(), FakeMsi::new()).unwrap();
    let address = topology.add_root_port_device(0, disk.clone()).unwrap();
    assert_eq!(address.to_string(), "01:00.0");
    topology.add_root_port(5).unwrap();
    let fixed = FakeDevice::with(express::add_integrated_endpoint);
    assert_eq!(topology.add_fixed(topology::RNG_DEVICE, fixed.clone()).unwrap().to_string(), "00:1c.0");
    let bus = topology.build();
    bus.program().unwrap();
    let (pio, mmio) = (PioBus::new(), MmioBus::new());
    bus.insert_into(&pio, &mmio).unwrap();
    Machine { bus, pio, mmio, disk, fixed }
}

impl Machine {
    fn ports_read(&self, address: u32, register: u32) -> u32 {
        self.pio.write(0xcf8, &(0x8000_0000 | address << 8 | register & 0xfc).to_le_bytes());
        let mut data = [0; 4];
        self.pio.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam_read(&self, bus: u64, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(0xb000_0000 + (bus << 20 | device << 15 | register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Where a function has its PCI Express capability.
    fn express(&self, bus: u64, device: u64) -> u64 {
        let mut at = self.ecam_read(bus, device, 0x34) & 0xff;
        while self.ecam_read(bus, device, u64::from(at)) & 0xff != 0x10 {
            at = self.ecam_read(bus, device, u64::from(at)) >> 8 & 0xff;
            assert_ne!(at, 0, "a PCI Express capability");
        }
        u64::from(at)
    }

    fn ecam_write_u16(&self, bus: u64, device: u64, register: u16, value: u16) {
        let at = 0xb000_0000 + (bus << 20 | device << 15 | u64::from(register));
        self.mmio.write(at, &value.to_le_bytes());
    }
}

#[test]
fn firmware_finds_a_q35() {
    let machine = machine();
    assert_eq!(machine.ports_read(0, 0), 0x29c0_8086);
    assert_eq!(machine.ports_read(0, 0x60), 0xb000_0005, "ECAM of 64 buses, enabled");
    let lpc = 0x1f << 3;
    assert_eq!(machine.ports_read(lpc, 0), 0x2918_8086);
    assert_eq!(machine.ports_read(lpc, 0x40), 0x601);
    assert_eq!(machine.ports_read(lpc, 8) >> 16, 0x0601);
    for reserved in [1, 2] {
        assert_eq!(machine.ports_read(reserved << 3, 0), u32::MAX);
    }
}

#[test]
fn ports_and_ecam_show_the_same_registers() {
    let machine = machine();
    for (bus, device) in [(0u32, 0u32), (0, 3), (0, 8), (0, 0x1f), (1, 0), (1, 1), (6, 0), (9, 0)] {
        for register in (0..256).step_by(4) {
            assert_eq!(
                machine.ports_read(bus << 8 | device << 3, register),
                machine.ecam_read(u64::from(bus), u64::from(device), u64::from(register)),
                "bus {bus} device {device} register {register:#x}"
            );
        }
    }
    assert_eq!(machine.ecam_read(0, 0, 0x100), 0, "no extended capabilities");
}

#[test]
fn the_address_port_keeps_only_whole_words() {
    let machine = machine();
    machine.pio.write(0xcf8, &0x8000_0000u32.to_le_bytes());
    machine.pio.write(0xcfb, &[1]);
    machine.pio.write(0xcf8, &[1, 2]);
    let mut latched = [0; 4];
    machine.pio.read(0xcf8, &mut latched);
    assert_eq!(u32::from_le_bytes(latched), 0x8000_0000);
    let mut byte = [0];
    machine.pio.read(0xcfe, &mut byte);
    assert_eq!(byte, [0xc0], "the high bytes of the data port are the device id");
}

#[test]
fn a_disk_is_reachable_through_its_port_as_programmed() {
    let machine = machine();
    let bar = machine.ecam_read(1, 0, 0x10) & !0xf;
    let bar = u64::from(bar) | u64::from(machine.ecam_read(1, 0, 0x14)) << 32;
    assert_eq!(*locked(&machine.disk.routed), Some(bar));
    assert!(map().mmio64.contains(&bar));

    machine.mmio.write(bar + 0x10, &[1, 2, 3, 4]);
    let mut data = [0; 4];
    machine.mmio.read(bar + 0x10, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    machine.mmio.read(bar + BAR_BYTES, &mut data);
    assert_eq!(data, [0xff; 4]);

    // The port's memory decoding off, then on.
    machine.ecam_write_u16(0, 3, register::COMMAND, 0);
    machine.mmio.read(bar + 0x10, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(*locked(&machine.disk.routed), None);
    machine.ecam_write_u16(0, 3, register::COMMAND, command::MEMORY);
    machine.mmio.read(bar + 0x10, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
}

#[test]
fn a_bar_moved_out_of_the_window_of_its_port_is_gone() {
    let machine = machine();
    machine.mmio.write(0xb000_0000 + (1 << 20) + 0x10, &0x4f_0000_0000u64.to_le_bytes());
    assert_eq!(*locked(&machine.disk.routed), None);
    // And no doorbell may be placed outside of the machine's windows, whatever the port says.
    for register in [bridge_register::MEMORY_BASE, bridge_register::PREFETCH_BASE] {
        machine.ecam_write_u16(0, 3, register, 0);
    }
    machine.mmio.write(0xb000_0000 + (3 << 15) + u64::from(bridge_register::PREFETCH_BASE_HIGH), &[0; 4]);
    machine.mmio.write(0xb000_0000 + (1 << 20) + 0x10, &0xfee0_0000u64.to_le_bytes());
    assert_eq!(*locked(&machine.disk.routed), None);
}

#[test]
fn a_bus_renumbered_by_the_guest_is_found_at_its_new_number() {
    let machine = machine();
    let at = 0xb000_0000 + (3 << 15) + u64::from(bridge_register::SECONDARY_BUS);
    machine.mmio.write(at, &[9, 9]);
    assert_eq!(machine.ecam_read(9, 0, 0), 0x1042_1af4);
    assert_eq!(machine.ecam_read(1, 0, 0), u32::MAX);
}

#[test]
fn an_empty_slot_is_off_and_a_full_one_is_on() {
    let machine = machine();
    for (device, slot_number, present) in [(3, 1, true), (8, 6, false)] {
        let at = machine.express(0, device);
        let capabilities = machine.ecam_read(0, device, at + 0x14);
        assert_eq!(capabilities >> 19, slot_number);
        assert_ne!(capabilities & 1 << 6, 0, "hot plug capable");
        let control_status = machine.ecam_read(0, device, at + 0x18);
        assert_eq!(control_status & 1 << 10 == 0, present, "power");
        assert_eq!(control_status >> 16 & 1 << 6 != 0, present, "presence");
        let link = machine.ecam_read(0, device, at + 0x10) >> 16;
        assert_eq!(link & 1 << 13 != 0, present, "link");
    }
}

#[test]
fn a_slot_that_loses_power_resets_its_device_and_hides_it() {
    let machine = machine();
    let at = machine.express(0, 3) as u16;
    machine.ecam_write_u16(0, 3, at + 0x18, 1 << 10);
    assert_eq!(*locked(&machine.disk.resets), 1);
    assert_eq!(*locked(&machine.disk.routed), None);
    assert_eq!(machine.ecam_read(1, 0, 0), u32::MAX);
    machine.ecam_write_u16(0, 3, at + 0x18, 0);
    assert_eq!(machine.ecam_read(1, 0, 0), 0x1042_1af4);
    assert_eq!(machine.ecam_read(1, 0, 0x10), 0xc, "as after power-on");
}

#[test]
fn a_fixed_function_is_reachable_without_a_port_and_has_no_link() {
    let machine = machine();
    let low = machine.ecam_read(0, 0x1c, 0x10) & !0xf;
    let bar = u64::from(low) | u64::from(machine.ecam_read(0, 0x1c, 0x14)) << 32;
    // Its share of the window, which is that of no slot: an address that guests know.
    let share = (0x10_0000_0000 / 28) >> 20 << 20;
    assert_eq!(bar, map().mmio64.start + 25 * share);
    assert_eq!(*locked(&machine.fixed.routed), Some(bar));
    machine.mmio.write(bar, &[5, 6, 7, 8]);
    assert_eq!(locked(&machine.fixed.memory)[..4], [5, 6, 7, 8]);

    let kind = |bus, device| machine.ecam_read(bus, device, machine.express(bus, device)) >> 20 & 0xf;
    assert_eq!((kind(0, 0x1c), kind(0, 3), kind(1, 0)), (9, 4, 0));
    let link = |bus, device| {
        let at = machine.express(bus, device);
        [0x0c, 0x10, 0x2c, 0x30].map(|register| machine.ecam_read(bus, device, at + register))
    };
    assert_eq!(link(0, 0x1c), [0; 4]);
    machine.ecam_write_u16(0, 0x1c, machine.express(0, 0x1c) as u16 + 0x10, 0xffff);
    assert_eq!(link(0, 0x1c), [0; 4]);
    assert_ne!(link(1, 0), [0; 4]);
}

#[test]
fn fixed_functions_have_their_own_device_numbers() {
    let mut topology = Topology::new(map(), FakeMsi::new()).unwrap();
    for device in topology::FIRST_FIXED_DEVICE..=topology::LAST_FIXED_DEVICE {
        topology.add_fixed(device, FakeDevice::new()).unwrap();
        let again = topology.add_fixed(device, FakeDevice::new());
        assert!(matches!(again, Err(PciError::FixedDeviceTaken { .. })));
    }
    for device in [0, 3, 0x1a, 0x1f, 0xff] {
        assert!(matches!(topology.add_fixed(device, FakeDevice::new()), Err(PciError::NotAFixedDevice { .. })));
    }
    for slot in 0..topology::MAX_SLOTS {
        topology.add_root_port(slot).unwrap();
    }
    topology.build().program().unwrap();
}

#[test]
fn a_secondary_bus_reset_resets_the_device() {
    let machine = machine();
    machine.ecam_write_u16(0, 3, bridge_register::BRIDGE_CONTROL, 1 << 6);
    assert_eq!(*locked(&machine.disk.resets), 1);
    assert_eq!(*locked(&machine.disk.routed), None);
}

#[test]
fn a_machine_reset_ends_with_the_same_addresses() {
    let machine = machine();
    let before = *locked(&machine.disk.routed);
    machine.ecam_write_u16(0, 3, bridge_register::PREFETCH_BASE, 0xfff0);
    machine.bus.reset().unwrap();
    assert_eq!(*locked(&machine.disk.routed), before);
}

#[test]
fn saved_settings_of_the_guest_come_back_with_their_routes() {
    let old = machine();
    let moved = map().mmio64.start + (16 << 20);
    old.mmio.write(0xb000_0000 + (1 << 20) + 0x10, &moved.to_le_bytes());
    assert_eq!(*locked(&old.disk.routed), Some(moved));
    let saved = old.bus.save().unwrap();
    let new = machine();
    new.bus.restore(saved.clone()).unwrap();
    assert_eq!(*locked(&new.disk.routed), Some(moved));

    let empty = Topology::new(map(), FakeMsi::new()).unwrap().build();
    assert!(matches!(empty.restore(saved), Err(PciError::SlotDiffers)));
}

#[test]
fn slots_are_unique_and_bounded() {
    let mut topology = Topology::new(map(), FakeMsi::new()).unwrap();
    topology.add_root_port(3).unwrap();
    assert!(matches!(topology.add_root_port_device(3, FakeDevice::new()), Err(PciError::SlotTaken { slot: 3 })));
    assert!(matches!(topology.add_root_port(24), Err(PciError::NoSuchSlot { slot: 24 })));
    let mut small = map();
    small.mmio32 = 0xc000_0000..0xc010_0000;
    assert!(matches!(Topology::new(small, FakeMsi::new()), Err(PciError::BadMap { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any sequence of configuration writes, to any function, leaves a hierarchy whose memory can be read everywhere,
    /// whose device is routed only inside the machine's windows, and whose identity is unchanged.
    #[test]
    fn hostile_configuration_never_leaves_the_windows(
        writes in prop::collection::vec(
            (prop_oneof![Just((0u8, 0u8)), Just((0, 3)), Just((0, 8)), Just((0, 0x1c)), Just((0, 0x1f)), Just((1, 0)), any::<(u8, u8)>()],
             0u16..256, prop::collection::vec(any::<u8>(), 1..9)),
            0..150),
        probes in prop::collection::vec(any::<u64>(), 0..20),
    ) {
        let machine = machine();
        for ((bus, device), register, data) in writes {
            if let Some(address) = PciAddress::new(bus, device % 32, 0) {
                machine.bus.config_write(address, register, &data);
            }
        }
        for base in [&machine.disk, &machine.fixed].into_iter().filter_map(|device| *locked(&device.routed)) {
            let last = base + (BAR_BYTES - 1);
            let inside = |w: &std::ops::Range<u64>| w.contains(&base) && w.contains(&last);
            prop_assert!(inside(&map().mmio32) || inside(&map().mmio64), "{base:#x}");
        }
        for address in probes {
            machine.bus.mmio_read(address, &mut [0; 8]);
            machine.bus.mmio_write(address, &[0; 8]);
        }
        prop_assert_eq!(machine.ecam_read(0, 0, 0), 0x29c0_8086);
        prop_assert_eq!(machine.ecam_read(0, 3, 0), 0x000c_1b36);
    }
}
