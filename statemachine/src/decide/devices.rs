//! Devices that come to a guest and leave it while it runs, and the memory that it is to make do with.
//!
//! A changed definition of a guest that runs is followed at once as far as disks and network cards come or go; a device that only changes
//! waits for the next start, as everything else does. Slots are said from then on: a guest keeps its PCI addresses when it moves.

use super::Context;
use super::Decided;
use super::form;
use super::suspension;
use super::vm;
use super::vm::find;
use super::vm::wrong_state;
use crate::command::ReportId;
use crate::event::Event;
use crate::event::VmDesiredDevices;
use crate::event::VmDesiredMemory;
use crate::event::VmObservedDevice;
use crate::ids::Epoch;
use crate::ids::VmId;
use crate::rejection::Rejection;
use crate::state::Desired;
use crate::state::DeviceWord;
use crate::state::Devices;
use crate::state::MemoryPages;
use crate::state::Plugs;
use crate::state::Vm;
use crate::state::VmSpec;

/// What the guest that runs is to be told of its new definition, whose devices get their slots here. `None`: it does not run, or has them.
pub(super) fn follow(
    context: &Context<'_>,
    vm: VmId,
    known: &Vm,
    wanted: &mut VmSpec,
) -> Result<Option<Event>, Rejection> {
    let (Some(permit), Some(granted)) = (known.permit, known.granted_spec.as_ref()) else { return Ok(None) };
    let nothing = Plugs::default();
    let leaving = &context.state.plugs.get(&vm).unwrap_or(&nothing).leaving;
    if let Some(id) = wanted.device_ids().find(|id| leaving.contains(*id)) {
        return Err(wrong_state(known, format!("its device {id} is on its way out; add it when it is gone")));
    }
    let unplug: Vec<String> = granted.device_ids().filter(|id| !wanted.has_device(id)).map(str::to_owned).collect();
    let is_new = |id: &str| !granted.has_device(id);
    if unplug.is_empty() && !wanted.device_ids().any(is_new) {
        return Ok(None);
    }
    if known.desired != Desired::Running {
        return Err(wrong_state(known, "it is powering down; change its devices when it is down"));
    }
    if context.state.moving(vm).is_some() {
        let why = format!("it is on its way to another host; wait, or `quorate vm cancel-migration {}`", known.name);
        return Err(wrong_state(known, why));
    }
    suspension::check_awake(context, vm, known)?;
    place(granted, wanted)?;
    let plug = Devices {
        disks: wanted.disks.iter().filter(|disk| is_new(&disk.id)).cloned().collect(),
        nics: wanted.nics.iter().filter(|nic| is_new(&nic.id)).cloned().collect(),
    };
    vm::check_disks(context, vm, &known.name, &plug.disks)?;
    let clashes = plug.disks.iter().flat_map(|disk| disk.volumes()).find(|volume| {
        let held = granted.disks.iter().filter(|disk| unplug.contains(&disk.id) || leaving.contains(&disk.id));
        held.flat_map(|disk| disk.volumes()).any(|held| held.clashes(volume))
    });
    if let Some(volume) = clashes {
        let why = format!("a disk that is on its way out has {} open; add it again when that one is gone", volume.path);
        return Err(wrong_state(known, why));
    }
    let unplug = unplug.into_iter().filter(|id| !leaving.contains(id)).collect::<Vec<_>>();
    if plug.is_empty() && unplug.is_empty() {
        return Ok(None);
    }
    Ok(Some(VmDesiredDevices { vm, epoch: permit.epoch, plug, unplug }.into()))
}

/// Devices that the guest has keep the slots where it sees them; new ones get what is free beside them, and beside those that leave.
fn place(granted: &VmSpec, wanted: &mut VmSpec) -> Result<(), Rejection> {
    let full = || form::invalid("disks", "the guest has no free slot left; unplug something first");
    let seen = granted.clone().with_slots().ok_or_else(full)?;
    for disk in &mut wanted.disks {
        if let Some(same) = seen.disks.iter().find(|seen| seen.id == disk.id) {
            disk.slot = same.slot;
        }
    }
    for nic in &mut wanted.nics {
        if let Some(same) = seen.nics.iter().find(|seen| seen.id == nic.id) {
            nic.slot = same.slot;
        }
    }
    let gone = |id: &str| !wanted.has_device(id);
    let leaving = Devices {
        disks: seen.disks.iter().filter(|disk| gone(&disk.id)).cloned().collect(),
        nics: seen.nics.iter().filter(|nic| gone(&nic.id)).cloned().collect(),
    };
    let mut all = wanted.clone().with(&leaving).with_slots().ok_or_else(full)?;
    form::slots(&all)?;
    all.disks.truncate(wanted.disks.len());
    all.nics.truncate(wanted.nics.len());
    (wanted.disks, wanted.nics) = (all.disks, all.nics);
    Ok(())
}

pub(super) fn report(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
    device: &str,
    word: &DeviceWord,
) -> Result<Decided, Rejection> {
    let known = vm::find_reported(context, report, vm, epoch)?;
    if let DeviceWord::NotPlugged(words) | DeviceWord::Kept(words) = word {
        form::text("words", words, DeviceWord::MAX_WORDS)?;
    }
    let plugs = context.state.plugs.get(&vm);
    let leaves = plugs.is_some_and(|plugs| plugs.leaving.contains(device));
    let has = known.granted_spec.as_ref().is_some_and(|spec| spec.has_device(device));
    let fits = match word {
        DeviceWord::Unplugged | DeviceWord::Kept(_) => leaves,
        DeviceWord::Plugged | DeviceWord::NotPlugged(_) => has && !leaves,
    };
    if !fits || plugs.and_then(|plugs| plugs.said.get(device)) == Some(word) {
        return Ok(Decided::nothing());
    }
    let (host, counter, device, word) = (report.host, report.counter, device.to_owned(), word.clone());
    Ok(Decided::one(VmObservedDevice { vm, epoch, host, counter, device, word }))
}

pub(super) fn memory(context: &Context<'_>, vm: VmId, mib: u64) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    let Some(granted) = known.granted_spec.as_ref().filter(|_| known.desired == Desired::Running) else {
        let why = format!("only a running VM can be given memory or asked for it; `quorate vm start {}`", known.name);
        return Err(wrong_state(known, why));
    };
    let most = granted.memory_mib;
    let least = VmSpec::MIN_MEMORY_TARGET_MIB.min(most);
    if granted.pages != MemoryPages::Any && mib != most {
        return Err(form::invalid(
            "memory",
            "it is in huge pages that its host has set aside, and those are not given back",
        ));
    }
    if !(least..=most).contains(&mib) {
        return Err(form::invalid("memory", format!("{mib} MiB asked for, {least} to {most} are possible")));
    }
    match context.state.memory_targets.get(&vm).copied().unwrap_or(most) == mib {
        true => Ok(Decided::nothing()),
        false => Ok(Decided::one(VmDesiredMemory { vm, mib })),
    }
}
