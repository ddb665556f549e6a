//! Devices that come to a guest and leave it while it runs, and the memory that it is to make do with.
//!
//! Level-triggered like everything here: what the log wants is compared with what the guest's process has. A device that the log gave to the
//! guest is plugged, one that is to leave is asked for, both again and again at growing distances.
//!
//! That nothing of a device is open any more is said only when the process does not have it and nobody is about to give it: from that event
//! on its disk may belong to another guest (S2). So a plug that was not answered is under way however long that takes
//! ([`Guest::plugging`]), as are files that are being opened for it ([`Guest::handing`]), and what the process said before it was
//! answered counts for nothing ([`Guest::see_devices`]).

use statemachine::ids::Seq;
use statemachine::ids::VmId;
use statemachine::state::Desired;
use statemachine::state::DeviceWord;
use statemachine::state::Disk;
use statemachine::state::Nic;
use statemachine::state::Vm;
use vmm_control::DeviceState;

use super::Action;
use super::News;
use super::View;
use super::guest::Guest;
use super::guest::Order;
use super::guest::Phase;

/// One that can come and leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    Disk(Disk),
    Nic(Nic),
}

impl Device {
    pub fn id(&self) -> &str {
        match self {
            Device::Disk(disk) => &disk.id,
            Device::Nic(nic) => &nic.id,
        }
    }

    fn of(vm: &Vm, id: &str) -> Option<Device> {
        let spec = vm.granted_spec.as_ref()?;
        let disk = spec.disks.iter().find(|disk| disk.id == id).map(|disk| Device::Disk(disk.clone()));
        disk.or_else(|| spec.nics.iter().find(|nic| nic.id == id).map(|nic| Device::Nic(nic.clone())))
    }
}

/// A guest that lives under its permit.
pub(super) fn follow(view: &View<'_>, vm: VmId, known: &Vm, guest: &Guest, actions: &mut Vec<Action>) {
    let state = &view.fold.state;
    // A guest on its way has what it set out with; one that ends needs nothing.
    let stays = known.desired == Desired::Running && state.moving(vm).is_none();
    if !matches!(guest.phase, Phase::Alive { .. }) || !stays {
        return;
    }
    let epoch = guest.epoch;
    if let Some(mib) = state.memory_targets.get(&vm).copied().filter(|mib| guest.memory_told != Some(*mib)) {
        actions.push(Action::Order { vm, epoch, order: Order::Memory { mib }, desired_at: known.desired_at });
    }
    let (Some(plugs), Some(has)) = (state.plugs.get(&vm), &guest.devices) else { return };
    let due = |id: &str| guest.device_tries.get(id).is_none_or(|tries| tries.is_due(Seq::ZERO, view.now));
    let mut say = |id: &str, word: DeviceWord| {
        if plugs.said.get(id) != Some(&word) {
            actions.push(Action::Report { vm, epoch, news: News::Device(id.to_owned(), word) });
        }
    };
    let words = |id: &str| guest.device_words.get(id).cloned();
    for id in &plugs.coming {
        match (has.get(id), words(id)) {
            (Some(DeviceState::Present), _) => say(id, DeviceWord::Plugged),
            (None, Some(words)) => say(id, DeviceWord::NotPlugged(words)),
            _ => {}
        }
    }
    for id in &plugs.leaving {
        match (has.get(id), words(id)) {
            (None, _) if !guest.plugging.contains(id) && !guest.handing.contains(id) => say(id, DeviceWord::Unplugged),
            (Some(_), Some(words)) => say(id, DeviceWord::Kept(words)),
            _ => {}
        }
    }
    let may_come = |id: &&String| !has.contains_key(*id) && !guest.plugging.contains(*id) && due(id);
    for id in plugs.coming.iter().filter(may_come) {
        actions.extend(Device::of(known, id).map(|device| Action::Plug { vm, epoch, device }));
    }
    for id in plugs.leaving.iter().filter(|id| has.contains_key(*id) && due(id)) {
        actions.push(Action::Unplug { vm, epoch, device: id.clone() });
    }
}
