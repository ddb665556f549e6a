//! The devices of a guest that is being saved, or that comes from elsewhere.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use super::super::inventory::{DeviceConfig, Refusal, Unplug};
use super::{DeviceManager, Handle};
use crate::lease::quiesce::{Quiesce, QuiesceError};
use crate::pci::{PciBus, PciError};
use crate::saved::header::{DeviceShape, DiskShape, NicShape};
use crate::virtio::locked;

/// Whether a guest that waits is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl DeviceManager {
    /// Whether a save can begin: no device is being opened for the guest, and none is being taken away from it. A device that the guest was
    /// asked for is no hindrance: it is saved with that, and the guest gives it up where it goes.
    pub fn check_settled(&self) -> Result<(), Refusal> {
        locked(&self.inventory).check_settled()
    }

    /// Presses the buttons of devices that the guest was to be asked for, if that has not come to pass yet: an unplug that was answered before
    /// a save goes with the guest. Under [`hold`](Self::hold), and while the guest stands.
    pub fn ask_for_leaving(&self, bus: &PciBus) -> Result<(), PciError> {
        let asked = bus.asked_for();
        let leaving = locked(&self.inventory).leaving();
        leaving.into_iter().try_for_each(|what| match what {
            Unplug::Ask(slot) if !asked.contains(&slot) => bus.ask_removal(slot),
            _ => Ok(()),
        })
    }

    /// What the guest has in its slots, as the header of a saved guest names it; a device that it has given up and that is still being
    /// closed is none of them. Under [`hold`](Self::hold), and while the guest stands.
    pub fn shapes(&self, bus: &PciBus) -> BTreeMap<u8, DeviceShape> {
        let present = locked(&self.inventory).present();
        let handles = locked(&self.state).handles.clone();
        let in_slot = present.into_iter().filter(|(place, _)| bus.is_occupied(place.slot));
        let shape = |(place, device)| {
            let shape = match (device, handles.get(&place)?) {
                (DeviceConfig::Disk(config), Handle::Disk { disk, .. }) => DeviceShape::Disk(DiskShape {
                    bytes: disk.facts().bytes,
                    serial: config.serial,
                    read_only: config.read_only,
                }),
                (DeviceConfig::Nic(config), Handle::Nic { .. }) => {
                    DeviceShape::Nic(NicShape { mac: config.mac, mtu: config.mtu })
                }
                _ => return None,
            };
            Some((place.slot, shape))
        };
        in_slot.filter_map(shape).collect()
    }

    /// Waits until the disks of a guest from elsewhere can be opened. False when it is given up.
    pub fn wait_for_files(&self, is_given_up: impl Fn() -> bool) -> bool {
        loop {
            let waiting: Vec<_> = self.disks().into_iter().filter(|disk| !disk.has_file()).collect();
            if waiting.is_empty() || is_given_up() {
                return waiting.is_empty();
            }
            waiting.iter().filter(|disk| !disk.files().is_wanted()).for_each(|disk| disk.want_file());
            let state = locked(&self.state);
            if waiting.iter().all(|disk| !disk.has_file()) {
                let _ = self.files_came.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Opens the disks of a guest from elsewhere, whose files nobody else writes any more.
    pub fn open_disks(&self) -> Result<(), QuiesceError> {
        self.disks().iter().try_for_each(|disk| disk.reopen())?;
        // A lease that has ended meanwhile has them closed again.
        self.guard();
        Ok(())
    }
}
