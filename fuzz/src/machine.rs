//! The PCI hierarchy of a small machine, with devices that watch: in slots 0 and 1, and at a fixed place; slots 2 and 23 are empty.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use vm_memory::GuestAddress;
use vmm::bus::MmioBus;
use vmm::bus::PioBus;
use vmm::interrupt::fake::FakeIoEvents;
use vmm::interrupt::fake::FakeMsi;
use vmm::memory::GuestMemory;
use vmm::pci::PciBus;
use vmm::pci::PciError;
use vmm::pci::PciMap;
use vmm::pci::SharedFunction;
use vmm::pci::SlotEvents;
use vmm::pci::Topology;
use vmm::pci::topology::RNG_DEVICE;
use vmm::virtio::VirtioPci;

use crate::recorder::Recorder;

pub const SLOTS: [u8; 4] = [0, 1, 2, 23];
pub const ECAM: u64 = 0xb000_0000;
const MEMORY_BYTES: usize = 1 << 18;

/// Devices that a guest gave up.
#[derive(Default)]
struct Ejected(Mutex<Vec<u8>>);

impl SlotEvents for Ejected {
    fn ejected(&self, slot: u8, device: SharedFunction) {
        assert!(device.decoded().is_empty(), "a device that leaves is reset");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
    }
    fn kept(&self, _slot: u8) {}
}

pub struct Machine {
    pub bus: Arc<PciBus>,
    pub pio: Arc<PioBus>,
    pub mmio: Arc<MmioBus>,
    /// By slot; the last one is at the fixed place.
    pub devices: BTreeMap<u8, Arc<Recorder>>,
    pub functions: BTreeMap<u8, Arc<VirtioPci>>,
    map: PciMap,
    msi: Arc<FakeMsi>,
    io_events: Arc<FakeIoEvents>,
    memory: GuestMemory,
    ejected: Arc<Ejected>,
}

pub const FIXED: u8 = 255;

impl Machine {
    /// With devices in these slots.
    pub fn new(occupied: &[u8]) -> Self {
        let map = PciMap {
            ecam_base: ECAM,
            ecam_buses: 64,
            mmio32: 0xc000_0000..0xfc00_0000,
            mmio64: 0x40_0000_0000..0x50_0000_0000,
        };
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("a small memory");
        let (msi, io_events, ejected) = (FakeMsi::new(), FakeIoEvents::new(), Arc::<Ejected>::default());
        let mut topology = Topology::new(map.clone(), msi.clone()).expect("the map is one");
        let events: Arc<Ejected> = Arc::clone(&ejected);
        topology.tell(events);
        let (mut devices, mut functions) = (BTreeMap::new(), BTreeMap::new());
        for slot in SLOTS {
            if !occupied.contains(&slot) {
                topology.add_root_port(slot).expect("the slot is free");
                continue;
            }
            let device = Arc::new(Recorder::default());
            let function = VirtioPci::new(device.clone(), memory.clone(), &*msi, io_events.clone());
            let function = function.expect("a small device");
            topology.add_root_port_device(slot, function.clone()).expect("the slot is free");
            devices.insert(slot, device);
            functions.insert(slot, function);
        }
        let device = Arc::new(Recorder::default());
        let function = VirtioPci::integrated(device.clone(), memory.clone(), &*msi, io_events.clone());
        let function = function.expect("a small device");
        topology.add_fixed(RNG_DEVICE, function.clone()).expect("the place is free");
        devices.insert(FIXED, device);
        functions.insert(FIXED, function);
        let bus = topology.build();
        bus.program().expect("the windows are large enough");
        let (pio, mmio) = (PioBus::new(), MmioBus::new());
        bus.insert_into(&pio, &mmio).expect("the buses are empty");
        Self { bus, pio, mmio, devices, functions, map, msi, io_events, memory, ejected }
    }

    pub fn insert(&mut self, slot: u8) {
        let device = Arc::new(Recorder::default());
        let function = VirtioPci::new(device.clone(), self.memory.clone(), &*self.msi, self.io_events.clone());
        let function = function.expect("a small device");
        let is_taken = self.bus.is_occupied(slot);
        assert_eq!(self.bus.insert(slot, function.clone()).is_err(), is_taken);
        if !is_taken {
            self.devices.insert(slot, device);
            self.functions.insert(slot, function);
        }
    }

    pub fn take_out(&mut self, slot: u8) {
        if self.bus.take_out(slot).is_ok() {
            self.forget(slot);
        }
    }

    fn forget(&mut self, slot: u8) {
        let device = self.devices.remove(&slot).expect("it was in its slot");
        self.functions.remove(&slot);
        assert!(!device.is_active(), "a device that leaves is reset");
    }

    /// Takes note of what left, and looks at what has to hold whatever a guest does.
    pub fn check(&mut self) {
        let ejected = std::mem::take(&mut *self.ejected.0.lock().unwrap_or_else(PoisonError::into_inner));
        for slot in ejected {
            self.forget(slot);
        }
        for slot in SLOTS {
            assert_eq!(self.bus.is_occupied(slot), self.functions.contains_key(&slot), "slot {slot}");
        }
        for (address, function) in self.bus.root_functions() {
            let mut vendor = [0; 2];
            function.config_read(0, &mut vendor);
            assert!(matches!(u16::from_le_bytes(vendor), 0x8086 | 0x1b36 | 0x1af4), "{address}");
        }
        let mut addresses: Vec<u64> = self.io_events.doorbells().iter().map(|(address, ..)| *address).collect();
        addresses.sort_unstable();
        let all = addresses.len();
        addresses.dedup();
        assert_eq!(addresses.len(), all, "one doorbell an address");
        let windows = [&self.map.mmio32, &self.map.mmio64];
        assert!(addresses.iter().all(|address| windows.iter().any(|window| window.contains(address))));
    }

    /// The slots that are taken.
    pub fn occupied(&self) -> Vec<u8> {
        SLOTS.into_iter().filter(|slot| self.functions.contains_key(slot)).collect()
    }

    pub fn save(&self) -> BTreeMap<String, serde_json::Value> {
        self.bus.save().expect("devices that watch can be saved")
    }

    /// Another machine of the same devices, with this state.
    pub fn moved(&self, saved: BTreeMap<String, serde_json::Value>) -> Result<Machine, PciError> {
        let machine = Machine::new(&self.occupied());
        machine.bus.restore(saved)?;
        Ok(machine)
    }
}
