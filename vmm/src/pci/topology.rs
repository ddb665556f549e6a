//! Which function is where, and where its memory can be reached.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bar::BarRange;
use super::host_bridge::FixedFunction;
use super::root_port::RootPort;
use super::slot::Removal;
use super::{NoSlotEvents, PciAddress, PciError, PciFunction, SharedFunction, SlotEvents};
use crate::interrupt::MsiSink;
use crate::virtio::locked;

/// Root ports that fit between the reserved devices and the fixed functions.
pub const MAX_SLOTS: u8 = 24;
/// Device number of slot 0's root port: 1 is kept for graphics, 2 for USB.
pub const FIRST_SLOT_DEVICE: u8 = 3;
/// Device numbers of functions on bus 0 that are part of the root complex: never plugged, never moved.
pub const FIRST_FIXED_DEVICE: u8 = FIRST_SLOT_DEVICE + MAX_SLOTS;
pub const WATCHDOG_DEVICE: u8 = 0x1b;
pub const RNG_DEVICE: u8 = 0x1c;
pub const BALLOON_DEVICE: u8 = 0x1d;
/// The last of the fixed devices; 0x1e itself is kept free.
pub const LAST_FIXED_DEVICE: u8 = 0x1e;
const LPC_DEVICE: u8 = 0x1f;
const _: () = assert!(FIRST_FIXED_DEVICE == WATCHDOG_DEVICE);
/// Each slot and each fixed device has an equal share of both memory windows, by its device number.
pub(super) const SHARES: u8 = LAST_FIXED_DEVICE + 1 - FIRST_SLOT_DEVICE;
/// One share of the 32-bit window.
pub(super) const SHARE_OF_WINDOW_32: u64 = 2 << 20;

/// Where PCI is in the guest's address space. Part of the machine type and the maximum memory, never of the host.
#[derive(Debug, Clone)]
pub struct PciMap {
    /// Base of ECAM, aligned to its size (1 MiB a bus).
    pub ecam_base: u64,
    /// 64, 128 or 256.
    pub ecam_buses: u16,
    /// For 32-bit BARs, below 4 GiB, 2 MiB a slot or fixed device.
    pub mmio32: Range<u64>,
    /// For 64-bit prefetchable BARs, shared evenly between the slots and the fixed devices.
    pub mmio64: Range<u64>,
}

impl PciMap {
    pub fn ecam_bytes(&self) -> u64 {
        u64::from(self.ecam_buses) << 20
    }

    fn check(&self) -> Result<(), PciError> {
        let shares = u64::from(SHARES);
        let why = if !matches!(self.ecam_buses, 64 | 128 | 256) {
            "ECAM covers 64, 128 or 256 buses"
        } else if !self.ecam_base.is_multiple_of(self.ecam_bytes())
            || self.ecam_base.checked_add(self.ecam_bytes()).is_none()
        {
            "ECAM must be aligned to its size"
        } else if self.mmio32.end > 1 << 32 || !self.mmio32.start.is_multiple_of(1 << 20) {
            "the 32-bit window must lie below 4 GiB on a megabyte"
        } else if !self.mmio64.start.is_multiple_of(1 << 20) {
            "the 64-bit window must start on a megabyte"
        } else if self.mmio32.end.saturating_sub(self.mmio32.start) < SHARE_OF_WINDOW_32 * shares {
            "the 32-bit window needs 2 MiB a slot or fixed device"
        } else if self.mmio64.end.saturating_sub(self.mmio64.start) < shares << 20 {
            "the 64-bit window needs 1 MiB a slot or fixed device"
        } else {
            return Ok(());
        };
        Err(PciError::BadMap {
            why,
            ecam_base: self.ecam_base,
            mmio32: self.mmio32.clone(),
            mmio64: self.mmio64.clone(),
        })
    }

    fn holds(&self, range: &BarRange) -> bool {
        [&self.mmio32, &self.mmio64].iter().any(|window| range.base >= window.start && range.last() < window.end)
    }
}

/// The hierarchy while it is put together.
pub struct Topology {
    map: PciMap,
    msi: Arc<dyn MsiSink>,
    /// By device number on bus 0.
    root: BTreeMap<u8, Arc<dyn PciFunction>>,
    events: Arc<dyn SlotEvents>,
}

impl Topology {
    /// Host bridge and LPC bridge, with every slot and every fixed device free.
    pub fn new(map: PciMap, msi: Arc<dyn MsiSink>) -> Result<Self, PciError> {
        map.check()?;
        let host = FixedFunction::host_bridge(map.ecam_base, map.ecam_buses);
        let mut root: BTreeMap<u8, Arc<dyn PciFunction>> = BTreeMap::new();
        root.insert(0, Arc::new(host));
        root.insert(LPC_DEVICE, Arc::new(FixedFunction::lpc_bridge()));
        Ok(Self { map, msi, root, events: Arc::new(NoSlotEvents) })
    }

    /// Has `events` told what the guest does with the slots that are added from now on.
    pub fn tell(&mut self, events: Arc<dyn SlotEvents>) {
        self.events = events;
    }

    /// A root port with `device` in it. Returns the device's address after [`PciBus::program`].
    pub fn add_root_port_device(&mut self, slot: u8, device: Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        self.add_port(slot, Some(device))
    }

    /// A root port with an empty slot, for hot plug.
    pub fn add_root_port(&mut self, slot: u8) -> Result<(), PciError> {
        self.add_port(slot, None).map(|_| ())
    }

    /// A function on bus 0, at one of the device numbers that are kept for such.
    pub fn add_fixed(&mut self, device: u8, function: Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        if !(FIRST_FIXED_DEVICE..=LAST_FIXED_DEVICE).contains(&device) {
            return Err(PciError::NotAFixedDevice { device });
        }
        if self.root.contains_key(&device) {
            return Err(PciError::FixedDeviceTaken { device });
        }
        self.root.insert(device, function);
        Ok(PciAddress::on_root_bus(device))
    }

    /// A root port for each slot that has none: any of them can take a device later, and no address depends on how many do.
    pub fn add_empty_root_ports(&mut self) -> Result<(), PciError> {
        for slot in 0..MAX_SLOTS {
            if !self.root.contains_key(&(FIRST_SLOT_DEVICE + slot)) {
                self.add_root_port(slot)?;
            }
        }
        Ok(())
    }

    fn add_port(&mut self, slot: u8, child: Option<Arc<dyn PciFunction>>) -> Result<PciAddress, PciError> {
        let bus = secondary_bus(slot)?;
        let device = FIRST_SLOT_DEVICE + slot;
        if self.root.contains_key(&device) {
            return Err(PciError::SlotTaken { slot });
        }
        let port = RootPort::new(slot, child, self.msi.allocate(1)?, Arc::clone(&self.events))?;
        self.root.insert(device, Arc::new(port));
        debug_assert_eq!(slot_address(slot).map(PciAddress::bus), Some(bus));
        slot_address(slot).ok_or(PciError::NoSuchSlot { slot })
    }

    pub fn build(self) -> Arc<PciBus> {
        Arc::new(PciBus { map: self.map, root: self.root, config: Mutex::new(()), routes: RwLock::new(Vec::new()) })
    }
}

/// The bus number that a slot's port is given.
pub(super) fn secondary_bus(slot: u8) -> Result<u8, PciError> {
    if slot < MAX_SLOTS { Ok(slot + 1) } else { Err(PciError::NoSuchSlot { slot }) }
}

/// The address of the device in a slot, as [`PciBus::program`] numbers the buses. A guest may number them otherwise for itself.
pub fn slot_address(slot: u8) -> Option<PciAddress> {
    PciAddress::new(secondary_bus(slot).ok()?, 0, 0)
}

/// The hierarchy of a running guest.
pub struct PciBus {
    map: PciMap,
    root: BTreeMap<u8, Arc<dyn PciFunction>>,
    /// One configuration access at a time, as on hardware; routes are recomputed under it.
    config: Mutex<()>,
    routes: RwLock<Vec<Route>>,
}

#[derive(Clone)]
struct Route {
    range: BarRange,
    function: Arc<dyn PciFunction>,
}

impl Route {
    fn same(&self, other: &Route) -> bool {
        self.range == other.range && Arc::ptr_eq(&self.function, &other.function)
    }
}

impl PciBus {
    pub fn map(&self) -> &PciMap {
        &self.map
    }

    /// Functions on bus 0, by device number.
    pub fn root_functions(&self) -> impl Iterator<Item = (PciAddress, &Arc<dyn PciFunction>)> {
        self.root.iter().map(|(device, function)| (PciAddress::on_root_bus(*device), function))
    }

    fn port(&self, slot: u8) -> Result<&RootPort, PciError> {
        let device = FIRST_SLOT_DEVICE.saturating_add(slot);
        let port = self.root.get(&device).and_then(|function| function.bridge());
        port.filter(|port| port.slot() == slot).ok_or(PciError::NoSuchSlot { slot })
    }

    /// Puts a device into an empty slot while the guest runs, and tells the guest.
    pub fn insert(&self, slot: u8, device: SharedFunction) -> Result<(), PciError> {
        let _one_at_a_time = locked(&self.config);
        self.port(slot)?.insert(device).map_err(|_| PciError::SlotTaken { slot })?;
        self.reroute();
        Ok(())
    }

    /// Asks the guest to give the device of a slot up; [`SlotEvents`] hears of the answer, if there ever is one.
    pub fn ask_removal(&self, slot: u8) -> Result<(), PciError> {
        let _one_at_a_time = locked(&self.config);
        self.port(slot)?.ask_removal();
        self.reroute();
        Ok(())
    }

    /// Takes the device of a slot away, whatever the guest thinks of it. It was reset and has no routes any more.
    pub fn take_out(&self, slot: u8) -> Result<SharedFunction, PciError> {
        let _one_at_a_time = locked(&self.config);
        let device = self.port(slot)?.take_out().ok_or(PciError::SlotEmpty { slot })?;
        self.reroute();
        Ok(device)
    }

    /// Whether a slot has a device, with power or without.
    pub fn is_occupied(&self, slot: u8) -> bool {
        self.port(slot).is_ok_and(RootPort::is_occupied)
    }

    /// Slots whose device the guest was asked for.
    pub fn asked_for(&self) -> Vec<u8> {
        let ports = self.root.values().filter_map(|function| function.bridge());
        ports.filter(|port| port.removal() != Removal::NotAsked).map(RootPort::slot).collect()
    }

    pub fn config_read(&self, address: PciAddress, register: u16, data: &mut [u8]) {
        let _one_at_a_time = locked(&self.config);
        match self.function(address) {
            Some(function) => function.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    pub fn config_write(&self, address: PciAddress, register: u16, data: &[u8]) {
        let _one_at_a_time = locked(&self.config);
        if let Some(function) = self.function(address) {
            function.config_write(register, data);
            self.reroute();
        }
    }

    /// A load from the windows. Nobody there: all ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.route(address, data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.route(address, data.len()) {
            function.bar_write(bar, offset, data);
        }
    }

    /// Every function as after power-on, then programmed again.
    pub fn reset(&self) -> Result<(), PciError> {
        {
            let _one_at_a_time = locked(&self.config);
            for function in self.root.values() {
                function.reset();
            }
            self.reroute();
        }
        self.program()
    }

    /// The state of every function, by its address on bus 0.
    pub fn save(&self) -> Result<BTreeMap<String, serde_json::Value>, PciError> {
        let _one_at_a_time = locked(&self.config);
        self.root_functions().map(|(address, function)| Ok((address.to_string(), function.save()?))).collect()
    }

    pub fn restore(&self, mut saved: BTreeMap<String, serde_json::Value>) -> Result<(), PciError> {
        let _one_at_a_time = locked(&self.config);
        for (address, function) in self.root_functions() {
            let state = saved.remove(&address.to_string()).ok_or(PciError::SlotDiffers)?;
            function.restore(state)?;
        }
        if !saved.is_empty() {
            return Err(PciError::SlotDiffers);
        }
        self.reroute();
        Ok(())
    }

    fn function(&self, address: PciAddress) -> Option<SharedFunction> {
        if address.function() != 0 {
            return None;
        }
        if address.bus() == 0 {
            return self.root.get(&address.device()).cloned();
        }
        if address.device() != 0 {
            return None;
        }
        let port = self.root.values().filter_map(|f| f.bridge()).find(|port| port.secondary_bus() == address.bus())?;
        port.child()
    }

    /// Computes from the guest's settings which memory reaches which function, and tells those that changed.
    fn reroute(&self) {
        let mut new: Vec<Route> = Vec::new();
        let mut add = |range: BarRange, function: &Arc<dyn PciFunction>| {
            // Two functions at one address are the guest's error: the lower device number answers.
            let free = new.iter().all(|r: &Route| range.last() < r.range.base || range.base > r.range.last());
            if free && self.map.holds(&range) {
                new.push(Route { range, function: Arc::clone(function) });
            }
        };
        for function in self.root.values() {
            for range in function.decoded() {
                add(range, function);
            }
            let Some(port) = function.bridge() else {
                continue;
            };
            let windows = port.windows();
            let Some(child) = port.child() else {
                continue;
            };
            for range in child.decoded() {
                if windows.iter().any(|window| window.holds(&range)) {
                    add(range, &child);
                }
            }
        }
        new.sort_by_key(|route| route.range.base);
        let old = {
            let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *routes, new.clone())
        };
        for gone in old.iter().filter(|o| !new.iter().any(|n| n.same(o))) {
            gone.function.routed(gone.range.bar, None);
        }
        for come in new.iter().filter(|n| !old.iter().any(|o| o.same(n))) {
            come.function.routed(come.range.bar, Some(come.range.base));
        }
    }

    fn route(&self, address: u64, len: usize) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let after = routes.partition_point(|route| route.range.base <= address);
        let route = routes.get(after.checked_sub(1)?)?;
        let offset = address - route.range.base;
        let fits = offset < route.range.size && len as u64 <= route.range.size - offset;
        fits.then(|| (Arc::clone(&route.function), route.range.bar, offset))
    }
}
