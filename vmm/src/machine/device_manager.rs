//! The devices of the running guest that come and go: opened, connected to a slot, asked for, drained, closed.
//!
//! Path of a plug: [`DeviceManager::plug_disk`] (control thread) takes a slot in the [`inventory`](super::inventory) and starts a thread,
//! which opens the disk, for however long its storage takes; connects it to the machine; and tells. Path of an unplug:
//! [`DeviceManager::unplug`] hands the request to the thread `plug`, which presses the slot's button. The guest's power-off comes back on
//! a vCPU's thread as an event for `plug`, and that starts a thread that drains the device, for however long that takes, closes it, and
//! tells. So neither the control thread nor a vCPU ever waits for storage, and a disk that hangs holds up no other device.
//!
//! It outlives the machine. A reset takes the old machine away ([`detach`](DeviceManager::detach)) and builds the next one with the
//! devices of now; one that is being opened meanwhile waits for it.

mod saved;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use pnet_base::MacAddr;
use vmm_control::{DeviceStatus, DiskConfig, NicConfig, Notice, VmmConfig};

use super::build::Beginning;
use super::inventory::{DeviceConfig, Inventory, Place, Plug, Refusal, Unplug};
use super::open_device::{Connections, Handle, Host, OpenDevice, PlugError, end_at_last};
use crate::devices::block::{BlockHandle, DiskFiles};
use crate::devices::net::{KernelTap, NetHandle, TapError};
use crate::lease::Phase;
use crate::lease::quiesce::Quiesce;
use crate::pci::topology::slot_address;
use crate::pci::{PciBus, PciError, SharedFunction, SlotEvents};
use crate::sandbox::Role;
use crate::virtio::{VirtioDevice, locked};

/// A device and the slot that it is to be put into.
pub type SlotDevice = (u8, Arc<dyn VirtioDevice>);

/// The machine of now.
#[derive(Clone)]
struct Live {
    bus: Arc<PciBus>,
    connections: Connections,
}

/// For the thread `plug`.
enum Event {
    Ask(u8),
    Pull(u8),
    Ejected { machine: u64, slot: u8, device: SharedFunction },
    Kept { machine: u64, slot: u8 },
}

#[derive(Default)]
struct State {
    live: Option<Live>,
    /// Counts machines: what a slot of an old one reports is of no interest.
    machine: u64,
    /// Of the machine's devices, those on their way out included.
    handles: BTreeMap<Place, Handle>,
    /// Of network cards that no machine was built with yet.
    taps: BTreeMap<Place, Arc<KernelTap>>,
    /// Likewise of disks.
    files: BTreeMap<Place, Arc<DiskFiles>>,
}

/// The open files of disks, by their ids.
pub type OpenFiles = BTreeMap<String, Vec<OwnedFd>>;

/// A device that is plugged, and what came with it.
enum Coming {
    Disk(DiskConfig, Arc<DiskFiles>),
    Nic(NicConfig, Option<OwnedFd>),
}

impl Coming {
    fn config(&self) -> DeviceConfig {
        match self {
            Self::Disk(disk, _) => DeviceConfig::Disk(disk.clone()),
            Self::Nic(nic, _) => DeviceConfig::Nic(nic.clone()),
        }
    }
}

pub struct DeviceManager {
    host: Host,
    inventory: Mutex<Inventory>,
    state: Mutex<State>,
    machine_came: Condvar,
    files_came: Condvar,
    /// Held by whoever connects a device to the machine, takes one out of it, or takes the machine away.
    connecting: Mutex<()>,
    /// Held while the lease is told which disks it guards, so that no older list replaces a newer one.
    guarding: Mutex<()>,
    events: Sender<Event>,
}

impl DeviceManager {
    /// For the devices of a configuration, the taps of its network cards in their order, and the files of those disks that are not opened by
    /// their paths.
    pub fn new(
        config: &VmmConfig,
        taps: Vec<KernelTap>,
        mut files: OpenFiles,
        host: Host,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error>> {
        let inventory = Inventory::new(config)?;
        let mut by_id: BTreeMap<&str, KernelTap> = config.nics.iter().map(|nic| nic.id.as_str()).zip(taps).collect();
        let mut state = State::default();
        for (place, device) in inventory.present() {
            match &device {
                DeviceConfig::Disk(disk) => {
                    let handed = files.remove(&disk.id).unwrap_or_default();
                    state.files.insert(place, host.disk_files(disk, handed)?);
                }
                DeviceConfig::Nic(nic) => {
                    if let Some(tap) = by_id.remove(nic.id.as_str()) {
                        state.taps.insert(place, Arc::new(tap));
                    }
                }
            }
        }
        let (events, received) = channel();
        let manager = Arc::new(Self {
            host,
            inventory: Mutex::new(inventory),
            state: Mutex::new(state),
            machine_came: Condvar::new(),
            files_came: Condvar::new(),
            connecting: Mutex::new(()),
            guarding: Mutex::new(()),
            events,
        });
        let weak = Arc::downgrade(&manager);
        Role::Plug.spawn("", move || serve(&weak, &received))?;
        Ok(manager)
    }

    // -- what hostd asks; answered from the inventory, carried out by others

    /// Takes a slot for a disk and opens it. The answer comes before the disk does.
    pub fn plug_disk(self: &Arc<Self>, disk: DiskConfig, files: Vec<OwnedFd>) -> Result<DeviceStatus, Refusal> {
        let files = self.host.disk_files(&disk, files)?;
        self.plug(Coming::Disk(disk, files))
    }

    /// Likewise for a network card. A tap for a card that is known is closed.
    pub fn plug_nic(self: &Arc<Self>, nic: NicConfig, tap: Option<OwnedFd>) -> Result<DeviceStatus, Refusal> {
        self.plug(Coming::Nic(nic, tap))
    }

    fn plug(self: &Arc<Self>, coming: Coming) -> Result<DeviceStatus, Refusal> {
        if self.host.lease.phase() != Phase::Valid {
            return Err(Refusal::LeaseOver);
        }
        let device = coming.config();
        let id = device.id().to_owned();
        // One step: a disk that fails at once would be gone from the answer.
        let (planned, status) = {
            let mut inventory = locked(&self.inventory);
            (inventory.plug(device)?, inventory.device(&id)?)
        };
        if let Plug::Open(place) = planned {
            if matches!(coming, Coming::Nic(_, None)) {
                locked(&self.inventory).gone(place);
                return Err(Refusal::NoTap);
            }
            let manager = Arc::clone(self);
            let life = move || manager.open_and_connect(place, coming);
            if let Err(source) = Role::PlugOpen.spawn("", life) {
                locked(&self.inventory).gone(place);
                return Err(Refusal::Thread { id, source });
            }
        }
        Ok(status)
    }

    /// Asks the guest for a device, or takes it away.
    pub fn unplug(&self, id: &str, force: bool) -> Result<DeviceStatus, Refusal> {
        let (what, status) = {
            let mut inventory = locked(&self.inventory);
            (inventory.unplug(id, force, Instant::now())?, inventory.device(id)?)
        };
        self.order(what);
        Ok(status)
    }

    /// Plugs the cable of a network card in, or pulls it.
    pub fn set_link(&self, nic: &str, up: bool) -> Result<(), Refusal> {
        let slot = locked(&self.inventory).set_link(nic, up)?;
        let card = self.handles().into_iter().find(|(place, _)| place.slot == slot);
        if let Some((_, Handle::Nic { nic, .. })) = card
            && let Err(error) = nic.set_link(up)
        {
            // The card is on its way out. The next one has the cable as it was asked for.
            tracing::debug!(nic = nic.name(), %error, "the link of a network card that has ended");
        }
        Ok(())
    }

    /// Takes the files of a disk that wants them.
    pub fn hand_files(&self, disk: &str, files: Vec<OwnedFd>) -> Result<(), Refusal> {
        let handle = self.disks().into_iter().find(|handle| handle.name() == disk);
        handle.ok_or_else(|| Refusal::NotFound { id: disk.to_owned() })?.files().hand(files)?;
        self.host.lease.files_came();
        let _nobody_looks = locked(&self.state);
        self.files_came.notify_all();
        Ok(())
    }

    /// The disks that want their files.
    pub fn files_wanted(&self) -> Vec<String> {
        let wanting = self.disks().into_iter().filter(|disk| disk.files().is_wanted());
        wanting.map(|disk| disk.name().to_owned()).collect()
    }

    pub fn status(&self) -> Vec<DeviceStatus> {
        locked(&self.inventory).status()
    }

    fn order(&self, what: Unplug) {
        let event = match what {
            Unplug::Ask(slot) => Event::Ask(slot),
            Unplug::Pull(slot) => Event::Pull(slot),
            Unplug::Wait => return,
        };
        // The receiver lives as long as we do.
        let _ = self.events.send(event);
    }

    // -- what the machine asks

    fn handles(&self) -> Vec<(Place, Handle)> {
        locked(&self.state).handles.iter().map(|(place, handle)| (*place, handle.clone())).collect()
    }

    pub fn disks(&self) -> Vec<Arc<BlockHandle>> {
        let disk = |(_, handle)| match handle {
            Handle::Disk { disk, .. } => Some(disk),
            Handle::Nic { .. } => None,
        };
        self.handles().into_iter().filter_map(disk).collect()
    }

    /// The taps of the network cards that the guest has, with the cards' addresses.
    pub fn cables(&self) -> Vec<(MacAddr, Arc<KernelTap>)> {
        let cable = |(_, handle)| match handle {
            Handle::Nic { mac, tap, .. } => Some((mac, tap)),
            Handle::Disk { .. } => None,
        };
        self.handles().into_iter().filter_map(cable).collect()
    }

    pub fn nics(&self) -> Vec<Arc<NetHandle>> {
        let nic = |(_, handle)| match handle {
            Handle::Nic { nic, .. } => Some(nic),
            Handle::Disk { .. } => None,
        };
        self.handles().into_iter().filter_map(nic).collect()
    }

    /// Opens the devices that a new machine is built with; [`open_disks`](Self::open_disks) opens the disks of one for a guest from
    /// elsewhere.
    pub fn open_all(&self, beginning: Beginning) -> Result<Vec<SlotDevice>, PlugError> {
        let present = locked(&self.inventory).present();
        let mut devices = Vec::with_capacity(present.len());
        for (place, device) in present {
            let opened = match &device {
                DeviceConfig::Disk(disk) => {
                    let files = locked(&self.state).files.remove(&place);
                    let files = files.unwrap_or_else(DiskFiles::by_path);
                    self.host.open_disk(disk, files, beginning)?
                }
                DeviceConfig::Nic(nic) => {
                    let tap = locked(&self.state).taps.remove(&place);
                    let tap = tap.ok_or_else(|| TapError::NotHandedOver { nic: nic.id.clone() })?;
                    self.host.open_nic(nic, tap)?
                }
            };
            self.enter(place, opened.handle);
            devices.push((place.slot, opened.device));
        }
        Ok(devices)
    }

    /// Where the slots of the machine that is being built report to.
    pub fn slot_events(&self) -> Arc<dyn SlotEvents> {
        let machine = locked(&self.state).machine + 1;
        Arc::new(Inbox { machine, events: self.events.clone() })
    }

    /// A machine is built. Devices can come and go from now on.
    pub fn attach(&self, bus: Arc<PciBus>, connections: Connections) {
        {
            let mut state = locked(&self.state);
            state.machine += 1;
            state.live = Some(Live { bus, connections });
            self.machine_came.notify_all();
        }
        self.guard();
        self.follow_guest();
    }

    /// Takes over what the machine's own state says of its devices, as it does when it was restored.
    pub fn follow_guest(&self) {
        let Some(Live { bus, .. }) = locked(&self.state).live.clone() else {
            return;
        };
        let pulled: Vec<_> = self.nics().into_iter().filter(|nic| !nic.is_link_up()).collect();
        let mut inventory = locked(&self.inventory);
        for nic in pulled {
            // A card that is on its way out has no cable to speak of.
            let _ = inventory.set_link(nic.name(), false);
        }
        // A guest that was asked for a device before its state was saved is still at it.
        let asked: Vec<u8> = bus.asked_for().into_iter().filter(|slot| inventory.leaves(*slot).is_some()).collect();
        // An unplug that came while the machine was built found nobody to ask.
        let to_do =
            inventory.leaving().into_iter().filter(|what| !asked.iter().any(|slot| *what == Unplug::Ask(*slot)));
        to_do.for_each(|what| self.order(what));
    }

    /// While it is held, no device is connected to the machine and none is pulled out of it.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        locked(&self.connecting)
    }

    /// The machine is about to end: nothing is connected to it any more. Its devices are still here, for those who stop them.
    pub fn detach(&self) {
        let _nobody_connects = self.hold();
        locked(&self.state).live = None;
    }

    /// The machine has ended, and its devices with it. What was on its way out is out, for the guest that used it is gone.
    /// `drained` says whether nothing of them is in the kernel; if not, the process ends, and nothing more is to be said.
    pub fn forget(&self, drained: bool) {
        let mut handles = std::mem::take(&mut locked(&self.state).handles);
        if drained {
            for (place, id) in locked(&self.inventory).drop_leaving() {
                if let Some(handle) = handles.remove(&place) {
                    end_at_last(&handle, || true);
                }
                self.tell_unplugged(id);
            }
        }
        let mut state = locked(&self.state);
        for (place, handle) in handles {
            match handle {
                Handle::Nic { tap, .. } => drop(state.taps.insert(place, tap)),
                Handle::Disk { disk, .. } => drop(state.files.insert(place, Arc::clone(disk.files()))),
            }
        }
        drop(state);
        self.guard();
    }

    /// From now on others reach the device: those who stop it, count it, or pull its cable.
    fn enter(&self, place: Place, handle: Handle) {
        locked(&self.state).handles.insert(place, handle.clone());
        // After that, so that a request that comes meanwhile finds the card or is found here.
        if let Handle::Nic { nic, .. } = handle
            && !locked(&self.inventory).link_is_up(place.slot)
            && let Err(error) = nic.set_link(false)
        {
            tracing::warn!(nic = nic.name(), %error, "the link of a network card is not as it was asked for");
        }
    }

    /// Tells the lease which disks other hosts can open too.
    fn guard(&self) {
        let _in_order = locked(&self.guarding);
        let shared = self.handles().into_iter().filter_map(|(_, handle)| match handle {
            Handle::Disk { disk, shared: true } => Some(disk as Arc<dyn Quiesce>),
            Handle::Disk { .. } | Handle::Nic { .. } => None,
        });
        self.host.lease.guard_disks(shared.collect());
    }

    // -- a device comes

    fn open(&self, coming: Coming) -> Result<OpenDevice, PlugError> {
        match coming {
            Coming::Disk(disk, files) => self.host.open_disk(&disk, files, Beginning::Boot),
            Coming::Nic(nic, Some(tap)) => {
                let tap = KernelTap::adopt(&nic.id, tap)?;
                self.host.open_nic(&nic, Arc::new(tap))
            }
            Coming::Nic(nic, None) => Err(TapError::NotHandedOver { nic: nic.id }.into()),
        }
    }

    /// The life of a thread that plugs one device.
    fn open_and_connect(&self, place: Place, coming: Coming) {
        let id = coming.config().id().to_owned();
        let connected = self.open(coming).and_then(|opened| self.connect(place, opened));
        let wanted = locked(&self.inventory).is_wanted(place);
        match connected {
            Ok(true) => {
                let address = slot_address(place.slot).map(|address| address.to_string()).unwrap_or_default();
                tracing::info!(device = id, slot = place.slot, "a device is plugged");
                (self.host.notify)(Notice::Plugged { id, slot: place.slot, address });
            }
            Err(error) if wanted => {
                let message = crate::process::chain(&error);
                tracing::warn!(device = id, message, "a device is not plugged");
                locked(&self.inventory).gone(place);
                (self.host.notify)(Notice::PlugFailed { id, message });
            }
            Ok(false) | Err(_) => {
                locked(&self.inventory).gone(place);
                self.tell_unplugged(id);
            }
        }
    }

    /// Puts a device into its slot. False, and it is closed again, when nobody wants it any more.
    fn connect(&self, place: Place, opened: OpenDevice) -> Result<bool, PlugError> {
        let OpenDevice { device, handle } = opened;
        let connected = {
            let _nobody_else = self.hold();
            let live = self.wait_for_machine();
            if locked(&self.inventory).opened(place) {
                // Guarded before the guest can write to it.
                self.enter(place, handle.clone());
                self.guard();
                let function = live.connections.connect(device).map_err(PlugError::from);
                function.and_then(|function| Ok(live.bus.insert(place.slot, function)?)).map(|()| true)
            } else {
                Ok(false)
            }
        };
        if !matches!(connected, Ok(true)) {
            locked(&self.state).handles.remove(&place);
            self.guard();
            end_at_last(&handle, || true);
            return connected;
        }
        Ok(true)
    }

    fn wait_for_machine(&self) -> Live {
        let mut state = locked(&self.state);
        loop {
            if let Some(live) = &state.live {
                return live.clone();
            }
            state = self.machine_came.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    // -- a device goes

    fn handle_event(self: &Arc<Self>, event: Event) {
        // What was asked for while a device was being connected finds it there.
        let _nobody_connects = self.hold();
        let live = locked(&self.state).live.clone();
        let is_now = |machine: u64| locked(&self.state).machine == machine;
        let done = match (event, live) {
            // Without a machine nobody is to be asked: the next one is built without the device, or it is asked for then.
            (Event::Ask(_) | Event::Pull(_), None) => Ok(()),
            (Event::Ask(slot), Some(live)) => live.bus.ask_removal(slot),
            (Event::Pull(slot), Some(live)) => match live.bus.take_out(slot) {
                Ok(device) => {
                    self.retire(slot, device);
                    Ok(())
                }
                // The guest was faster.
                Err(PciError::SlotEmpty { .. }) => Ok(()),
                Err(error) => Err(error),
            },
            (Event::Ejected { machine, slot, device }, _) if is_now(machine) => {
                self.retire(slot, device);
                Ok(())
            }
            (Event::Kept { machine, slot }, _) if is_now(machine) => {
                if let Some(id) = locked(&self.inventory).kept(slot) {
                    tracing::info!(device = id, slot, "the guest keeps a device that it was asked for");
                    (self.host.notify)(Notice::Kept { id });
                }
                Ok(())
            }
            (Event::Ejected { .. } | Event::Kept { .. }, _) => Ok(()),
        };
        if let Err(error) = done {
            tracing::error!(%error, "a slot does not do what it was asked for");
        }
    }

    /// A device is out of its slot.
    fn retire(self: &Arc<Self>, slot: u8, device: SharedFunction) {
        // Its doorbells and vectors.
        drop(device);
        let Some(place) = locked(&self.inventory).leaves(slot) else {
            return;
        };
        let manager = Arc::clone(self);
        let life = move || manager.end_device(place);
        if let Err(error) = Role::Unplug.spawn("", life) {
            tracing::error!(%error, slot, "no thread that ends a device: it ends with the machine");
        }
    }

    /// The life of a thread that ends one device.
    fn end_device(&self, place: Place) {
        let handle = locked(&self.state).handles.get(&place).cloned();
        // When the machine ends meanwhile, its end is the device's too.
        let is_here = || locked(&self.state).handles.contains_key(&place);
        if let Some(handle) = handle {
            end_at_last(&handle, is_here);
        }
        if locked(&self.state).handles.remove(&place).is_none() {
            return;
        }
        self.guard();
        let id = locked(&self.inventory).gone(place);
        if let Some(id) = id {
            tracing::info!(device = id, slot = place.slot, "a device is unplugged");
            self.tell_unplugged(id);
        }
    }

    fn tell_unplugged(&self, id: String) {
        (self.host.notify)(Notice::Unplugged { id });
    }
}

/// Runs until the manager and all machines that it had are gone.
fn serve(manager: &Weak<DeviceManager>, received: &Receiver<Event>) {
    while let Ok(event) = received.recv() {
        let Some(manager) = manager.upgrade() else {
            return;
        };
        manager.handle_event(event);
    }
}

/// The slots of one machine, as they report.
struct Inbox {
    machine: u64,
    events: Sender<Event>,
}

impl SlotEvents for Inbox {
    fn ejected(&self, slot: u8, device: SharedFunction) {
        // Nobody there: the process ends, and the device with it.
        let _ = self.events.send(Event::Ejected { machine: self.machine, slot, device });
    }

    fn kept(&self, slot: u8) {
        let _ = self.events.send(Event::Kept { machine: self.machine, slot });
    }
}
