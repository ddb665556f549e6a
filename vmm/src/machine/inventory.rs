//! The disks and network cards of a guest and their slots, as values: what may come, what is there, what is on its way out.
//!
//! It outlives the machine: a reset builds the next one from it. [`device_manager`](super::device_manager) carries out what it decides.
//!
//! ```text
//! plug -> Opening -> Present -> Leaving -> (gone)
//!            |  unplug: abandoned, gone when the opening has ended
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vmm_control::{
    ConfigError, DeviceKind, DeviceState, DeviceStatus, DiskConfig, ErrorCode, Fault, NicConfig, VmmConfig,
};

use super::build::{disk_slots, nic_slots};
use crate::devices::block::files::FilesRefusal;
use crate::pci::topology::slot_address;

/// Storage that hangs holds a thread for each of these.
pub const MAX_OPENING: usize = 4;
/// A guest that hears the attention button waits five seconds, in which a second press would take the first one back; and it needs
/// a moment to start to blink.
pub const PRESS_SPACING: Duration = Duration::from_secs(6);

/// Why nothing was plugged, unplugged or changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("no free slot for {id}")]
    NoSlot { id: String },
    #[error("slot {slot} is that of {other}")]
    SlotTaken { slot: u8, other: String },
    #[error("another device has the id {id}")]
    IdTaken { id: String },
    #[error("{id} is being unplugged; plug it again when it is gone")]
    Leaving { id: String },
    #[error("no device has the id {id}")]
    NotFound { id: String },
    #[error("a disk and a network card have the id {id}")]
    Ambiguous { id: String },
    #[error("{id} is no network card")]
    NoNic { id: String },
    #[error("{MAX_OPENING} devices are being opened; does their storage answer?")]
    Busy,
    #[error("{id} is being plugged; save the guest when it is there")]
    Coming { id: String },
    #[error("{id} is being taken away; save the guest when it is gone")]
    TakenAway { id: String },
    #[error("the lease of this guest is over")]
    LeaseOver,
    #[error("no tap came with the request; send its descriptor with the line")]
    NoTap,
    #[error(transparent)]
    Files(#[from] FilesRefusal),
    #[error("cannot start a thread that opens {id}")]
    Thread {
        id: String,
        #[source]
        source: std::io::Error,
    },
}

impl Refusal {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Config(_) | Self::Ambiguous { .. } | Self::NoNic { .. } | Self::NoTap => ErrorCode::BadRequest,
            Self::Files(FilesRefusal::NotWanted { .. }) => ErrorCode::NotNow,
            Self::Files(_) => ErrorCode::BadRequest,
            Self::NoSlot { .. } | Self::SlotTaken { .. } | Self::IdTaken { .. } => ErrorCode::Taken,
            Self::Leaving { .. } | Self::Coming { .. } | Self::TakenAway { .. } | Self::Busy | Self::LeaseOver => {
                ErrorCode::NotNow
            }
            Self::NotFound { .. } => ErrorCode::NotFound,
            Self::Thread { .. } => ErrorCode::Failed,
        }
    }

    /// As the control socket says it.
    pub fn fault(&self) -> Fault {
        let message = match std::error::Error::source(self) {
            Some(cause) if !self.to_string().ends_with(&cause.to_string()) => format!("{self}: {cause}"),
            _ => self.to_string(),
        };
        Fault { code: self.code(), message }
    }
}

/// A device as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    Disk(DiskConfig),
    Nic(NicConfig),
}

impl DeviceConfig {
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Nic(nic) => &nic.id,
        }
    }

    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Disk(_) => DeviceKind::Disk,
            Self::Nic(_) => DeviceKind::Nic,
        }
    }

    fn slot(&self) -> Option<u8> {
        match self {
            Self::Disk(disk) => disk.slot,
            Self::Nic(nic) => nic.slot,
        }
    }

    fn free_slots(&self) -> Box<dyn Iterator<Item = u8>> {
        match self {
            Self::Disk(_) => Box::new(disk_slots()),
            Self::Nic(_) => Box::new(nic_slots()),
        }
    }
}

/// Tells one use of a slot from the next.
pub type Ticket = u64;

/// A place in the inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub slot: u8,
    pub ticket: Ticket,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opening { abandoned: bool },
    Present,
    Leaving { pressed: Option<Instant>, forced: bool },
}

#[derive(Debug)]
struct Entry {
    config: DeviceConfig,
    ticket: Ticket,
    state: State,
    /// Of a network card: the cable is plugged in.
    link_up: bool,
}

/// What a plug has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plug {
    Open(Place),
    /// The same was asked for before.
    Known,
}

/// What an unplug has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unplug {
    /// Press the attention button.
    Ask(u8),
    /// Take it away.
    Pull(u8),
    /// Wait: it was asked for a moment ago, or is still being opened and goes when that has ended.
    Wait,
}

/// Disks and network cards, by slot.
#[derive(Debug)]
pub struct Inventory {
    /// The guest without devices: what they are checked with.
    bare: VmmConfig,
    entries: BTreeMap<u8, Entry>,
    tickets: Ticket,
}

impl Inventory {
    /// The devices of a configuration: first those that name their slot, then the others in their order.
    pub fn new(config: &VmmConfig) -> Result<Self, Refusal> {
        config.check_guest()?;
        let disks = config.disks.iter().cloned().map(DeviceConfig::Disk);
        let nics = config.nics.iter().cloned().map(DeviceConfig::Nic);
        let (named, others): (Vec<_>, Vec<_>) = disks.chain(nics).partition(|device| device.slot().is_some());
        let bare = VmmConfig { disks: Vec::new(), nics: Vec::new(), ..config.clone() };
        let mut inventory = Self { bare, entries: BTreeMap::new(), tickets: 0 };
        for device in named.into_iter().chain(others) {
            let slot = inventory.find_slot(&device)?;
            inventory.enter(slot, device, State::Present);
        }
        Ok(inventory)
    }

    fn enter(&mut self, slot: u8, config: DeviceConfig, state: State) -> Place {
        self.tickets += 1;
        let ticket = self.tickets;
        self.entries.insert(slot, Entry { config, ticket, state, link_up: true });
        Place { slot, ticket }
    }

    fn find_slot(&self, device: &DeviceConfig) -> Result<u8, Refusal> {
        let Some(slot) = device.slot() else {
            let free = device.free_slots().find(|slot| !self.entries.contains_key(slot));
            return free.ok_or_else(|| Refusal::NoSlot { id: device.id().to_owned() });
        };
        match self.entries.get(&slot) {
            None => Ok(slot),
            Some(other) => Err(Refusal::SlotTaken { slot, other: other.config.id().to_owned() }),
        }
    }

    fn find(&self, id: &str) -> Result<u8, Refusal> {
        let mut found = self.entries.iter().filter(|(_, entry)| entry.config.id() == id).map(|(slot, _)| *slot);
        match (found.next(), found.next()) {
            (None, _) => Err(Refusal::NotFound { id: id.to_owned() }),
            (Some(slot), None) => Ok(slot),
            (Some(_), Some(_)) => Err(Refusal::Ambiguous { id: id.to_owned() }),
        }
    }

    fn at(&mut self, place: Place) -> Option<&mut Entry> {
        self.entries.get_mut(&place.slot).filter(|entry| entry.ticket == place.ticket)
    }

    /// A device is to come. Asked again for the same, it is known.
    pub fn plug(&mut self, device: DeviceConfig) -> Result<Plug, Refusal> {
        match self.find(device.id()) {
            Err(Refusal::NotFound { .. }) => {}
            Err(other) => return Err(other),
            Ok(slot) => {
                let id = || device.id().to_owned();
                let same_slot = device.slot().is_none_or(|asked| asked == slot);
                return match self.entries.get(&slot) {
                    Some(entry) if !same_slot || !same_device(&entry.config, &device) => {
                        Err(Refusal::IdTaken { id: id() })
                    }
                    Some(Entry { state: State::Leaving { .. } | State::Opening { abandoned: true }, .. }) => {
                        Err(Refusal::Leaving { id: id() })
                    }
                    _ => Ok(Plug::Known),
                };
            }
        }
        let slot = self.find_slot(&device)?;
        self.with(&device).check_guest()?;
        let opening = self.entries.values().filter(|entry| matches!(entry.state, State::Opening { .. }));
        if opening.count() >= MAX_OPENING {
            return Err(Refusal::Busy);
        }
        Ok(Plug::Open(self.enter(slot, device, State::Opening { abandoned: false })))
    }

    /// The configuration as it would be with one device more.
    fn with(&self, device: &DeviceConfig) -> VmmConfig {
        let mut config = self.bare.clone();
        for device in self.entries.values().map(|entry| &entry.config).chain([device]) {
            match device {
                DeviceConfig::Disk(disk) => config.disks.push(disk.clone()),
                DeviceConfig::Nic(nic) => config.nics.push(nic.clone()),
            }
        }
        config
    }

    /// A device was opened, and can be connected. False when nobody wants it any more.
    pub fn opened(&mut self, place: Place) -> bool {
        let wanted = self.is_wanted(place);
        if let Some(entry) = self.at(place).filter(|_| wanted) {
            entry.state = State::Present;
        }
        wanted
    }

    /// Whether nobody has asked for the device to go since it was asked to come.
    pub fn is_wanted(&self, place: Place) -> bool {
        let entry = self.entries.get(&place.slot).filter(|entry| entry.ticket == place.ticket);
        entry.is_some_and(|entry| matches!(entry.state, State::Opening { abandoned: false } | State::Present))
    }

    /// A device is to go.
    pub fn unplug(&mut self, id: &str, force: bool, now: Instant) -> Result<Unplug, Refusal> {
        let slot = self.find(id)?;
        let Some(entry) = self.entries.get_mut(&slot) else {
            return Err(Refusal::NotFound { id: id.to_owned() });
        };
        let (pressed, forced) = match entry.state {
            State::Opening { .. } => {
                entry.state = State::Opening { abandoned: true };
                return Ok(Unplug::Wait);
            }
            State::Present => (None, force),
            State::Leaving { pressed, forced } => (pressed, forced || force),
        };
        let just_pressed = pressed.is_some_and(|pressed| now.saturating_duration_since(pressed) < PRESS_SPACING);
        let (what, pressed) = match (force, just_pressed) {
            (true, _) => (Unplug::Pull(slot), pressed),
            (false, true) => (Unplug::Wait, pressed),
            (false, false) => (Unplug::Ask(slot), Some(now)),
        };
        entry.state = State::Leaving { pressed, forced };
        Ok(what)
    }

    /// The guest was asked for this one before it came to us (a saved state), or takes it out by itself.
    pub fn leaves(&mut self, slot: u8) -> Option<Place> {
        let entry = self.entries.get_mut(&slot)?;
        if entry.state == State::Present {
            entry.state = State::Leaving { pressed: None, forced: false };
        }
        matches!(entry.state, State::Leaving { .. }).then_some(Place { slot, ticket: entry.ticket })
    }

    /// What is still to be done about devices on their way out, when a machine begins that has them.
    pub fn leaving(&self) -> Vec<Unplug> {
        let leaving = |(slot, entry): (&u8, &Entry)| match entry.state {
            State::Leaving { forced: true, .. } => Some(Unplug::Pull(*slot)),
            State::Leaving { forced: false, .. } => Some(Unplug::Ask(*slot)),
            State::Opening { .. } | State::Present => None,
        };
        self.entries.iter().filter_map(leaving).collect()
    }

    /// The guest does not give it up.
    pub fn kept(&mut self, slot: u8) -> Option<String> {
        let entry = self.entries.get_mut(&slot)?;
        if !matches!(entry.state, State::Leaving { .. }) {
            return None;
        }
        entry.state = State::Present;
        Some(entry.config.id().to_owned())
    }

    /// Nothing of the device is left. Its id, unless another one has the place by now.
    pub fn gone(&mut self, place: Place) -> Option<String> {
        self.at(place)?;
        self.entries.remove(&place.slot).map(|entry| entry.config.id().to_owned())
    }

    /// A machine begins: those that were on their way out stay out, for the guest that used them is gone. Returns them.
    pub fn drop_leaving(&mut self) -> Vec<(Place, String)> {
        let leaving = self.entries.iter().filter(|(_, entry)| matches!(entry.state, State::Leaving { .. }));
        let places: Vec<_> = leaving.map(|(slot, entry)| Place { slot: *slot, ticket: entry.ticket }).collect();
        places.into_iter().filter_map(|place| Some((place, self.gone(place)?))).collect()
    }

    /// Whether no device is on its way into the guest, or out of it whatever the guest says.
    pub fn check_settled(&self) -> Result<(), Refusal> {
        for entry in self.entries.values() {
            let id = || entry.config.id().to_owned();
            match entry.state {
                State::Opening { abandoned: false } => return Err(Refusal::Coming { id: id() }),
                State::Leaving { forced: true, .. } => return Err(Refusal::TakenAway { id: id() }),
                // One that is not wanted any more never reaches the guest.
                State::Opening { abandoned: true } | State::Present | State::Leaving { forced: false, .. } => {}
            }
        }
        Ok(())
    }

    /// What a machine is built with.
    pub fn present(&self) -> Vec<(Place, DeviceConfig)> {
        let present = self.entries.iter().filter(|(_, entry)| !matches!(entry.state, State::Opening { .. }));
        present.map(|(slot, entry)| (Place { slot: *slot, ticket: entry.ticket }, entry.config.clone())).collect()
    }

    /// The cable of a network card. Returns its slot.
    pub fn set_link(&mut self, nic: &str, up: bool) -> Result<u8, Refusal> {
        let is_this = |entry: &Entry| entry.config.kind() == DeviceKind::Nic && entry.config.id() == nic;
        let Some((slot, entry)) = self.entries.iter_mut().find(|(_, entry)| is_this(entry)) else {
            let id = nic.to_owned();
            let is_disk = self.entries.values().any(|entry| entry.config.id() == nic);
            return Err(if is_disk { Refusal::NoNic { id } } else { Refusal::NotFound { id } });
        };
        entry.link_up = up;
        Ok(*slot)
    }

    pub fn link_is_up(&self, slot: u8) -> bool {
        self.entries.get(&slot).is_none_or(|entry| entry.link_up)
    }

    pub fn device(&self, id: &str) -> Result<DeviceStatus, Refusal> {
        let slot = self.find(id)?;
        let found = self.status().into_iter().find(|device| device.slot == slot);
        found.ok_or_else(|| Refusal::NotFound { id: id.to_owned() })
    }

    pub fn status(&self) -> Vec<DeviceStatus> {
        let status = |(slot, entry): (&u8, &Entry)| {
            Some(DeviceStatus {
                id: entry.config.id().to_owned(),
                kind: entry.config.kind(),
                slot: *slot,
                address: slot_address(*slot)?.to_string(),
                state: match entry.state {
                    State::Opening { abandoned: false } => DeviceState::Plugging,
                    State::Present => DeviceState::Present,
                    State::Leaving { .. } | State::Opening { abandoned: true } => DeviceState::Unplugging,
                },
                link_up: (entry.config.kind() == DeviceKind::Nic).then_some(entry.link_up),
            })
        };
        self.entries.iter().filter_map(status).collect()
    }
}

/// Whether a second request means the device of the first: a slot that was named in one of them only makes no difference.
fn same_device(one: &DeviceConfig, other: &DeviceConfig) -> bool {
    let without_slot = |device: &DeviceConfig| match device.clone() {
        DeviceConfig::Disk(disk) => DeviceConfig::Disk(DiskConfig { slot: None, ..disk }),
        DeviceConfig::Nic(nic) => DeviceConfig::Nic(NicConfig { slot: None, ..nic }),
    };
    without_slot(one) == without_slot(other)
}
