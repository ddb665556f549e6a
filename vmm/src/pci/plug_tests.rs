//! Hot plug as a guest's driver sees it: one that does what Linux's `pciehp` does, and hostile ones.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::config_space::{command, register};
use super::root_port::bridge_register;
use super::slot::bits::*;
use super::tests::{FakeDevice, map};
use super::topology::{FIRST_SLOT_DEVICE, MAX_SLOTS, slot_address};
use super::*;
use crate::interrupt::fake::{FakeMsi, FakeVectors};
use crate::virtio::locked;

/// What the bus told of its slots.
#[derive(Default)]
struct Told {
    ejected: Mutex<Vec<(u8, SharedFunction)>>,
    kept: Mutex<Vec<u8>>,
}

impl SlotEvents for Told {
    fn ejected(&self, slot: u8, device: SharedFunction) {
        locked(&self.ejected).push((slot, device));
    }
    fn kept(&self, slot: u8) {
        locked(&self.kept).push(slot);
    }
}

struct Machine {
    bus: Arc<PciBus>,
    msi: Arc<FakeMsi>,
    told: Arc<Told>,
}

/// Devices in some slots, ports at all of them.
fn machine(devices: &[(u8, Arc<FakeDevice>)]) -> Machine {
    let (msi, told) = (FakeMsi::new(), Arc::new(Told::default()));
    let mut topology = Topology::new(map(), msi.clone()).unwrap();
    topology.tell(told.clone());
    // In the order of the slots, so that the nth allocation of vectors is that of slot n.
    for slot in 0..MAX_SLOTS {
        match devices.iter().find(|(at, _)| *at == slot) {
            Some((_, device)) => drop(topology.add_root_port_device(slot, device.clone()).unwrap()),
            None => topology.add_root_port(slot).unwrap(),
        }
    }
    let bus = topology.build();
    bus.program().unwrap();
    Machine { bus, msi, told }
}

/// Linux's driver of one port, without its five seconds.
struct Pciehp<'a> {
    bus: &'a PciBus,
    vectors: Arc<FakeVectors>,
    slot: u8,
    port: PciAddress,
    express: u16,
    msi: u16,
    heard: u64,
}

const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED | LINK_CHANGED;
const ENABLES: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED | ENABLE_HOT_PLUG | ENABLE_LINK;

impl<'a> Pciehp<'a> {
    fn probe(machine: &'a Machine, slot: u8) -> Self {
        let bus = &*machine.bus;
        let port = PciAddress::on_root_bus(FIRST_SLOT_DEVICE + slot);
        let find = |id: u8| {
            let mut at = read(bus, port, register::CAPABILITIES, 1) as u16;
            while read(bus, port, at, 1) != u32::from(id) {
                at = read(bus, port, at + 1, 1) as u16;
                assert_ne!(at, 0, "capability {id:#x}");
            }
            at
        };
        let vectors = machine.msi.function(usize::from(slot)).unwrap();
        let driver = Self { bus, vectors, slot, port, express: find(0x10), msi: find(0x05), heard: 0 };
        driver.move_vector(0xfee0_1000, 0x41);
        driver.write(driver.msi + 2, 1);
        driver.command(ENABLES, ENABLES);
        driver.status(EVENTS);
        driver
    }

    fn write(&self, register: u16, value: u16) {
        self.bus.config_write(self.port, register, &value.to_le_bytes());
    }

    fn move_vector(&self, address: u64, data: u16) {
        self.bus.config_write(self.port, self.msi + 4, &address.to_le_bytes());
        self.write(self.msi + 12, data);
    }

    fn mask(&self, masked: bool) {
        self.bus.config_write(self.port, self.msi + 16, &u32::from(masked).to_le_bytes());
    }

    fn control(&self) -> u16 {
        read(self.bus, self.port, self.express + 0x18, 2) as u16
    }

    fn command(&self, value: u16, mask: u16) {
        self.write(self.express + 0x18, self.control() & !mask | value & mask);
    }

    /// Reads the events and clears those of `clear`.
    fn status(&self, clear: u16) -> u16 {
        let status = read(self.bus, self.port, self.express + 0x1a, 2) as u16;
        self.write(self.express + 0x1a, status & clear);
        status
    }

    fn link_is_up(&self) -> bool {
        read(self.bus, self.port, self.express + 0x12, 2) & 1 << 13 != 0
    }

    /// Messages since the last call.
    fn interrupts(&mut self) -> u64 {
        let delivered = self.vectors.vector(0).unwrap().delivered;
        delivered - std::mem::replace(&mut self.heard, delivered)
    }

    fn power_on(&self) {
        self.command(0, POWERED_OFF);
        self.command(INDICATOR_ON, INDICATOR);
    }

    fn power_off(&self) {
        self.command(POWERED_OFF, POWERED_OFF);
        self.command(INDICATOR_OFF, INDICATOR);
    }

    fn device_id(&self) -> u32 {
        read(self.bus, slot_address(self.slot).unwrap(), 0, 4)
    }
}

fn read(bus: &PciBus, address: PciAddress, register: u16, len: usize) -> u32 {
    let mut data = [0; 4];
    bus.config_read(address, register, &mut data[..len]);
    u32::from_le_bytes(data)
}

#[test]
fn a_device_is_plugged_found_and_used() {
    let machine = machine(&[]);
    let mut driver = Pciehp::probe(&machine, 4);
    assert_eq!(driver.device_id(), u32::MAX);
    driver.interrupts();
    let disk = FakeDevice::new();
    machine.bus.insert(4, disk.clone()).unwrap();
    assert_eq!(driver.interrupts(), 1);
    let status = driver.status(EVENTS);
    assert_eq!(status & (EVENTS | PRESENT), BUTTON_PRESSED | PRESENCE_CHANGED | PRESENT);
    assert!(!driver.link_is_up() && driver.device_id() == u32::MAX, "without power nobody answers");

    driver.power_on();
    assert!(driver.link_is_up());
    let events = driver.status(EVENTS) & EVENTS;
    assert_eq!(events, COMMAND_COMPLETED | LINK_CHANGED);
    assert_eq!(driver.device_id(), 0x1042_1af4);
    let address = slot_address(4).unwrap();
    let window = u64::from(read(&machine.bus, driver.port, bridge_register::PREFETCH_BASE, 2) & 0xfff0) << 16
        | u64::from(read(&machine.bus, driver.port, bridge_register::PREFETCH_BASE_HIGH, 4)) << 32;
    machine.bus.config_write(address, register::BAR0, &window.to_le_bytes());
    machine.bus.config_write(address, register::COMMAND, &command::MEMORY.to_le_bytes());
    assert_eq!(*locked(&disk.routed), Some(window), "the window was open before the device came");
    assert!(matches!(machine.bus.insert(4, FakeDevice::new()), Err(PciError::SlotTaken { slot: 4 })));
}

#[test]
fn a_device_goes_when_the_guest_powers_its_slot_off() {
    let disk = FakeDevice::new();
    let machine = machine(&[(2, disk.clone())]);
    let mut driver = Pciehp::probe(&machine, 2);
    driver.interrupts();
    machine.bus.ask_removal(2).unwrap();
    assert_eq!(machine.bus.asked_for(), [2]);
    assert_eq!((driver.interrupts(), driver.status(EVENTS) & EVENTS), (1, BUTTON_PRESSED));
    driver.command(INDICATOR_BLINK, INDICATOR);
    driver.status(EVENTS);
    assert!(locked(&machine.told.ejected).is_empty(), "the guest uses it until it says otherwise");
    assert!(locked(&disk.routed).is_some());

    driver.power_off();
    let (slot, device) = locked(&machine.told.ejected).pop().unwrap();
    assert!(slot == 2 && Arc::ptr_eq(&device, &(disk.clone() as SharedFunction)));
    assert_eq!((*locked(&disk.resets), *locked(&disk.routed)), (1, None));
    let status = driver.status(EVENTS);
    assert_eq!(status & (EVENTS | PRESENT), COMMAND_COMPLETED | LINK_CHANGED | PRESENCE_CHANGED);
    assert!(machine.bus.asked_for().is_empty());

    // And the slot takes another one.
    machine.bus.insert(2, FakeDevice::new()).unwrap();
    driver.power_on();
    assert_eq!(driver.device_id(), 0x1042_1af4);
}

#[test]
fn a_device_that_the_guest_keeps_stays() {
    let machine = machine(&[(2, FakeDevice::new())]);
    let driver = Pciehp::probe(&machine, 2);
    machine.bus.ask_removal(2).unwrap();
    driver.status(EVENTS);
    driver.command(INDICATOR_BLINK, INDICATOR);
    driver.command(INDICATOR_ON, INDICATOR);
    assert_eq!(*locked(&machine.told.kept), [2]);
    assert!(machine.bus.asked_for().is_empty());
    driver.power_off();
    assert!(locked(&machine.told.ejected).is_empty(), "power off alone pulls nothing");
    // A slot without power gives its device at once.
    machine.bus.ask_removal(2).unwrap();
    assert_eq!(locked(&machine.told.ejected).len(), 1);
}

#[test]
fn a_device_that_is_pulled_is_gone_at_once() {
    let disk = FakeDevice::new();
    let machine = machine(&[(2, disk.clone())]);
    let mut driver = Pciehp::probe(&machine, 2);
    driver.interrupts();
    machine.bus.take_out(2).unwrap();
    assert_eq!((*locked(&disk.resets), *locked(&disk.routed), driver.device_id()), (1, None, u32::MAX));
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.status(EVENTS) & (EVENTS | PRESENT), PRESENCE_CHANGED | LINK_CHANGED);
    assert!(locked(&machine.told.ejected).is_empty(), "whoever pulls knows");
    assert!(matches!(machine.bus.take_out(2), Err(PciError::SlotEmpty { slot: 2 })));
    assert!(matches!(machine.bus.take_out(MAX_SLOTS), Err(PciError::NoSuchSlot { .. })));
}

#[test]
fn a_message_is_sent_when_the_first_event_comes_and_not_for_each() {
    let machine = machine(&[(2, FakeDevice::new())]);
    let mut driver = Pciehp::probe(&machine, 2);
    driver.interrupts();
    machine.bus.ask_removal(2).unwrap();
    machine.bus.take_out(2).unwrap();
    assert_eq!(driver.interrupts(), 1, "the driver has not looked yet");
    driver.status(BUTTON_PRESSED);
    assert_eq!(driver.interrupts(), 0, "others are pending");
    driver.status(EVENTS);
    machine.bus.insert(2, FakeDevice::new()).unwrap();
    assert_eq!(driver.interrupts(), 1);
    // A driver that enables events when some are pending is told.
    driver.command(0, ENABLE_HOT_PLUG);
    driver.command(ENABLE_HOT_PLUG, ENABLE_HOT_PLUG);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_vector_is_moved_and_masked_by_the_guest() {
    let machine = machine(&[]);
    let mut driver = Pciehp::probe(&machine, 0);
    driver.move_vector(0x1_fee0_2000, 0x77);
    let vector = driver.vectors.vector(0).unwrap();
    assert_eq!((vector.address, vector.data, vector.unmasked), (0x1_fee0_2000, 0x77, true));
    driver.interrupts();
    driver.mask(true);
    machine.bus.insert(0, FakeDevice::new()).unwrap();
    assert_eq!(driver.interrupts(), 0);
    assert_eq!(read(&machine.bus, driver.port, driver.msi + 20, 4), 1, "pending");
    driver.mask(false);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(read(&machine.bus, driver.port, driver.msi + 20, 4), 0);
}

#[test]
fn an_unplug_under_way_goes_on_after_a_restore() {
    let old = machine(&[(2, FakeDevice::new())]);
    let old_driver = Pciehp::probe(&old, 2);
    old.bus.ask_removal(2).unwrap();
    old_driver.status(EVENTS);
    old_driver.command(INDICATOR_BLINK, INDICATOR);

    let new = machine(&[(2, FakeDevice::new())]);
    new.bus.restore(old.bus.save().unwrap()).unwrap();
    assert_eq!(new.bus.asked_for(), [2]);
    let vectors = new.msi.function(2).unwrap();
    let mut driver = Pciehp { bus: &new.bus, vectors, heard: 0, ..old_driver };
    assert_eq!(driver.interrupts(), 1, "the completion of the last command was pending: told again");
    driver.power_off();
    assert_eq!(locked(&new.told.ejected).len(), 1);
}

#[test]
fn a_plugged_device_is_saved_with_its_slot() {
    let old = machine(&[]);
    let driver = Pciehp::probe(&old, 7);
    old.bus.insert(7, FakeDevice::new()).unwrap();
    driver.power_on();
    let bar = map().mmio64.start + (8 << 30);
    old.bus.config_write(driver.port, bridge_register::PREFETCH_BASE_HIGH, &((bar >> 32) as u32).to_le_bytes());
    let saved = old.bus.save().unwrap();
    assert!(matches!(machine(&[]).bus.restore(saved.clone()), Err(PciError::SlotDiffers)));
    assert!(matches!(machine(&[(8, FakeDevice::new())]).bus.restore(saved.clone()), Err(PciError::SlotDiffers)));
    let new = machine(&[(7, FakeDevice::new())]);
    new.bus.restore(saved).unwrap();
    let driver = Pciehp { bus: &new.bus, ..driver };
    assert!(driver.link_is_up() && driver.device_id() == 0x1042_1af4);
    assert_eq!(driver.control() & INDICATOR, INDICATOR_ON);
}

#[test]
fn a_state_that_lies_about_presence_is_not_believed() {
    let old = machine(&[(2, FakeDevice::new())]);
    let driver = Pciehp::probe(&old, 2);
    let mut saved = old.bus.save().unwrap();
    let status = usize::from(driver.express + 0x1a);
    saved.get_mut(&driver.port.to_string()).unwrap()["config"]["bytes"][status] = 0xb0.into();
    let new = machine(&[(2, FakeDevice::new())]);
    new.bus.restore(saved).unwrap();
    let driver = Pciehp { bus: &new.bus, ..driver };
    assert_eq!(driver.status(0) & 0xff, PRESENT | COMMAND_COMPLETED);
}

#[test]
fn every_slot_has_bus_and_windows_before_it_has_a_device() {
    let mut topology = Topology::new(map(), FakeMsi::new()).unwrap();
    topology.add_root_port_device(3, FakeDevice::new()).unwrap();
    topology.add_empty_root_ports().unwrap();
    let bus = topology.build();
    bus.program().unwrap();
    let ports: Vec<_> = bus.root_functions().filter_map(|(_, function)| function.bridge()).collect();
    assert_eq!(ports.len(), usize::from(MAX_SLOTS));
    let buses: BTreeSet<u8> = ports.iter().map(|port| port.secondary_bus()).collect();
    assert_eq!(buses, (1..=MAX_SLOTS).collect());
    let mut windows: Vec<_> = ports.iter().flat_map(|port| port.windows()).collect();
    assert_eq!(windows.len(), 2 * ports.len());
    windows.sort_by_key(|window| window.base);
    assert!(windows.windows(2).all(|pair| pair[0].last < pair[1].base));
}

#[test]
fn a_reset_of_the_bus_keeps_what_was_plugged() {
    let machine = machine(&[(1, FakeDevice::new())]);
    let disk = FakeDevice::new();
    machine.bus.insert(9, disk.clone()).unwrap();
    machine.bus.ask_removal(1).unwrap();
    machine.bus.reset().unwrap();
    assert!(locked(&disk.routed).is_some(), "found and programmed as any other");
    assert!(machine.bus.asked_for().is_empty(), "the guest that was asked is gone");
    let driver = Pciehp::probe(&machine, 9);
    assert_eq!((driver.link_is_up(), driver.control() & POWERED_OFF), (true, 0));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u8, u16, Vec<u8>),
    Insert(u8),
    Ask(u8),
    TakeOut(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = 0u8..4;
    let bytes = prop::collection::vec(any::<u8>(), 1..9);
    // The capabilities of a port are below 0x98; most writes go to its slot registers.
    let register = prop_oneof![Just(0x58u16), 0x54u16..0x60, 0x70u16..0x98, 0u16..256];
    let step = prop_oneof![
        6 => (slot.clone(), register, bytes).prop_map(|(slot, at, data)| Step::Write(slot, at, data)),
        1 => slot.clone().prop_map(Step::Insert),
        2 => slot.clone().prop_map(Step::Ask),
        1 => slot.prop_map(Step::TakeOut),
    ];
    prop::collection::vec(step, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does with its ports while devices come and go: no device is lost or leaves twice, one that is out answers
    /// nowhere, and the state can be saved and taken over by a machine with the same devices.
    #[test]
    fn hostile_guests_lose_no_device(steps in steps()) {
        let machine = machine(&[]);
        let mut inside: [Option<Arc<FakeDevice>>; 4] = [const { None }; 4];
        for step in steps {
            match step {
                Step::Write(slot, at, data) => {
                    machine.bus.config_write(PciAddress::on_root_bus(FIRST_SLOT_DEVICE + slot), at, &data);
                }
                Step::Insert(slot) => {
                    let device = FakeDevice::new();
                    let taken = machine.bus.insert(slot, device.clone()).is_err();
                    let place = &mut inside[usize::from(slot)];
                    prop_assert_eq!(taken, place.is_some());
                    place.get_or_insert(device);
                }
                Step::Ask(slot) => machine.bus.ask_removal(slot).unwrap(),
                Step::TakeOut(slot) => {
                    let was = inside[usize::from(slot)].take();
                    prop_assert_eq!(machine.bus.take_out(slot).is_ok(), was.is_some());
                    if let Some(was) = was {
                        prop_assert_eq!(*locked(&was.routed), None);
                    }
                }
            }
            for (slot, device) in locked(&machine.told.ejected).drain(..) {
                let was = inside[usize::from(slot)].take();
                prop_assert!(was.is_some_and(|was| Arc::ptr_eq(&(was.clone() as SharedFunction), &device)
                    && locked(&was.routed).is_none()));
            }
        }
        let same: Vec<_> = (0..).zip(&inside).filter(|(_, d)| d.is_some()).map(|(s, _)| (s, FakeDevice::new())).collect();
        let again = super::plug_tests::machine(&same);
        again.bus.restore(machine.bus.save().unwrap()).unwrap();
        prop_assert_eq!(again.bus.asked_for(), machine.bus.asked_for());
    }
}
