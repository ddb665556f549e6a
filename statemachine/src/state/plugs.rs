//! Devices that come to a guest, and leave it, while it runs.
//!
//! The spec that a permit was granted with ([`Vm::granted_spec`](crate::state::Vm)) lists every device that the guest may have open: one
//! that is plugged enters it with the event that says so, before any host acts (S2); one that leaves stays in it until its host says that
//! nothing of it is open any more.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use serde::Deserialize;
use serde::Serialize;

use crate::state::Disk;
use crate::state::FirstBoot;
use crate::state::Nic;
use crate::state::VmSpec;

/// Of a guest that holds a permit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugs {
    /// Devices that were given to the guest while it runs, and that it has not got yet.
    pub coming: BTreeSet<String>,
    /// Devices that the guest is to give up.
    pub leaving: BTreeSet<String>,
    /// What its host said last of a device that was to come or to leave.
    pub said: BTreeMap<String, DeviceWord>,
}

/// What a host says of a device that is to come or to leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceWord {
    /// The guest can use it.
    Plugged,
    /// It could not be given to the guest; the host tries again.
    NotPlugged(String),
    /// The guest does not give it up; it is asked again.
    Kept(String),
    /// Nothing of it is open any more.
    Unplugged,
}

impl DeviceWord {
    pub const MAX_WORDS: usize = 256;
}

/// Disks and network cards.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
}

impl Devices {
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty() && self.nics.is_empty()
    }

    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.id.as_str()).chain(self.nics.iter().map(|nic| nic.id.as_str()))
    }
}

impl VmSpec {
    /// The ids of its disks and network cards: no two are the same.
    pub fn device_ids(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.id.as_str()).chain(self.nics.iter().map(|nic| nic.id.as_str()))
    }

    pub fn has_device(&self, id: &str) -> bool {
        self.device_ids().any(|own| own == id)
    }

    /// The same with these devices more.
    pub fn with(mut self, more: &Devices) -> VmSpec {
        self.disks.extend(more.disks.iter().cloned());
        self.nics.extend(more.nics.iter().cloned());
        self
    }

    /// The same without this device.
    pub fn without(mut self, id: &str) -> VmSpec {
        self.disks.retain(|disk| disk.id != id);
        self.nics.retain(|nic| nic.id != id);
        self
    }

    /// The same with every device's slot said, as the vmm gives them out: those that are named first; then disks from the front and network
    /// cards from the end. `None` when there are not as many.
    pub fn with_slots(mut self) -> Option<VmSpec> {
        let seed = self.first_boot.as_ref().map(|_| FirstBoot::SLOT);
        let named = self.disks.iter().filter_map(|disk| disk.slot).chain(self.nics.iter().filter_map(|nic| nic.slot));
        let mut taken: BTreeSet<u8> = named.chain(seed).collect();
        for disk in self.disks.iter_mut().filter(|disk| disk.slot.is_none()) {
            disk.slot = Some((1..=VmSpec::SLOTS).find(|slot| taken.insert(*slot))?);
        }
        for nic in self.nics.iter_mut().filter(|nic| nic.slot.is_none()) {
            nic.slot = Some((1..=VmSpec::SLOTS).rev().find(|slot| taken.insert(*slot))?);
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, slot: Option<u8>) -> Disk {
        Disk { slot, ..Disk::raw(id, &format!("/srv/{id}")) }
    }

    fn nic(id: &str, slot: Option<u8>) -> Nic {
        Nic { id: id.to_owned(), bridge: "br0".to_owned(), mac: None, slot }
    }

    fn slots(spec: &VmSpec) -> Vec<Option<u8>> {
        spec.disks.iter().map(|disk| disk.slot).chain(spec.nics.iter().map(|nic| nic.slot)).collect()
    }

    #[test]
    fn disks_take_the_first_free_slots_and_cards_the_last() {
        let spec = VmSpec {
            disks: vec![disk("a", None), disk("b", Some(1)), disk("c", None)],
            nics: vec![nic("lan", None), nic("wan", Some(22)), nic("san", None)],
            ..VmSpec::default()
        };
        let placed = spec.clone().with_slots().unwrap();
        assert_eq!(slots(&placed), [2, 1, 3, 23, 22, 21].map(Some));
        assert_eq!(placed.clone().with_slots(), Some(placed.clone()));
        let removed = placed.without("a").with(&Devices { disks: vec![disk("d", None)], nics: Vec::new() });
        assert_eq!(slots(&removed.with_slots().unwrap()), [1, 3, 2, 23, 22, 21].map(Some));
    }

    #[test]
    fn the_seed_keeps_its_slot_free_and_there_are_not_more_than_there_are() {
        let many = |count: u32| (0..count).map(|n| disk(&format!("d{n}"), None)).collect();
        let first_boot = FirstBoot {
            host_name: "web".to_owned(),
            user: None,
            interfaces: Vec::new(),
            dns: Vec::new(),
            user_data: None,
        };
        let spec = |count| VmSpec { disks: many(count), first_boot: Some(first_boot.clone()), ..VmSpec::default() };
        let placed = spec(22).with_slots().unwrap();
        assert!(placed.disks.iter().all(|disk| disk.slot != Some(FirstBoot::SLOT)));
        assert_eq!(spec(23).with_slots(), None);
        assert!(VmSpec { first_boot: None, ..spec(23) }.with_slots().is_some());
    }
}
