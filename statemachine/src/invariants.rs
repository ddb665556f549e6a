//! Invariants of DESIGN §5 that are visible in the state, by their ids. One copy, shared by property
//! tests, the simulation and production assertions.

use std::collections::BTreeSet;
use std::fmt;

use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::VmId;
use crate::scheduler;
use crate::state::Disk;
use crate::state::HostUsage;
use crate::state::MigrationPhase;
use crate::state::Remembered;
use crate::state::State;
use crate::state::SuspensionPhase;
use crate::state::Vm;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// R2, R3, S1, S2, E2.
    pub invariant: &'static str,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

fn violation(invariant: &'static str, what: String) -> Violation {
    Violation { invariant, what }
}

/// Everything that must hold of one state.
pub fn check(state: &State) -> Vec<Violation> {
    let mut found = Vec::new();
    check_capacity(state, &mut found);
    check_volumes(state, &mut found);
    let index = |(key, remembered): (_, &Remembered)| state.remembered_order.get(&remembered.seq) == Some(key);
    if state.remembered.len() != state.remembered_order.len() || !state.remembered.iter().all(index) {
        found.push(violation("E2", "the order of remembered answers differs from the answers".to_owned()));
    }
    if state.digest() != state.recompute_digest() {
        found.push(violation("E2", "the digest kept step by step differs from the recomputed one".to_owned()));
    }
    for (name, vm) in state.vm_names.iter() {
        if state.vms.get(vm).is_none_or(|vm| vm.name != *name) {
            found.push(violation("E2", format!("the name index points {name} at a VM of another name")));
        }
    }
    let guests = state.guests.iter().map(|(vm, _)| vm).chain(state.pauses.iter().map(|(vm, _)| vm));
    for vm in guests.chain(state.disk_faults.iter().map(|(vm, _)| vm)) {
        if state.vms.get(vm).is_none_or(|vm| vm.permit.is_none()) {
            found.push(violation("E2", format!("something is known of the guest of vm {vm}, which may not run")));
        }
    }
    check_migrations(state, &mut found);
    check_suspensions(state, &mut found);
    check_devices(state, &mut found);
    found
}

/// What the log gave to a guest that runs, or wants back, is among what the guest may have open: or S2 would not see it. Each device has
/// one name and, once anything came or left, one slot.
fn check_devices(state: &State, found: &mut Vec<Violation>) {
    for (id, plugs) in state.plugs.iter() {
        let granted = state.vms.get(id).and_then(|vm| vm.granted_spec.as_ref());
        let listed = |device: &String| granted.is_some_and(|spec| spec.has_device(device));
        if !plugs.coming.iter().chain(&plugs.leaving).all(listed) || !plugs.coming.is_disjoint(&plugs.leaving) {
            found.push(violation("S2", format!("vm {id} may have {plugs:?} open, and is granted {granted:?}")));
        }
    }
    for (id, spec) in state.vms.iter().filter_map(|(id, vm)| Some((id, vm.granted_spec.as_ref()?))) {
        let mut names = BTreeSet::new();
        let slots: Vec<u8> =
            spec.disks.iter().filter_map(|disk| disk.slot).chain(spec.nics.iter().filter_map(|nic| nic.slot)).collect();
        let twice = !spec.device_ids().all(|device| names.insert(device));
        if twice || slots.iter().collect::<BTreeSet<_>>().len() != slots.len() {
            found.push(violation("S2", format!("two devices of vm {id} have one name or one slot: {spec:?}")));
        }
    }
}

/// R2: what moves is a guest under the permit that it left with, to another host; what has arrived is under the one it was given.
fn check_migrations(state: &State, found: &mut Vec<Violation>) {
    for (vm, migration) in state.migrations.iter() {
        let (epoch, host) = match migration.phase {
            MigrationPhase::Moving => (migration.epoch, migration.from),
            MigrationPhase::Committed { epoch } => (epoch, migration.to),
        };
        let permit = state.vms.get(vm).and_then(|vm| vm.permit);
        let holds = permit.is_some_and(|permit| permit.epoch == epoch && permit.host == host);
        if !holds || migration.from == migration.to || migration.epoch >= Epoch(migration.id.0) {
            found.push(violation("R2", format!("vm {vm} has permit {permit:?} in {migration:?}")));
        }
    }
}

/// R2: who falls asleep or wakes up does it under one permit, on the host of the file; who sleeps has none.
fn check_suspensions(state: &State, found: &mut Vec<Violation>) {
    for (vm, suspension) in state.suspensions.iter() {
        let permit = state.vms.get(vm).and_then(|vm| vm.permit);
        let holds = match suspension.phase {
            SuspensionPhase::Asleep(_) => permit.is_none(),
            SuspensionPhase::Saving { epoch } | SuspensionPhase::Waking { epoch, .. } => {
                permit.is_some_and(|permit| permit.epoch == epoch && permit.host == suspension.host)
            }
        };
        if !holds || !state.vms.contains(vm) || state.migrations.contains(vm) {
            found.push(violation("R2", format!("vm {vm} has permit {permit:?} in {suspension:?}")));
        }
    }
}

/// R3: what permits take on a host is what the host's record says, and is within its policy.
///
/// A host may shrink (memory taken out, a lower ratio) below what runs there: then nothing new fits, which
/// [`check_step`] verifies; this checks the books.
fn check_capacity(state: &State, found: &mut Vec<Violation>) {
    for (id, host) in state.hosts.iter() {
        let mut usage = HostUsage::default();
        let moving = state.all_moving().filter(|(_, moving)| moving.to == *id);
        let coming = moving.filter_map(|(vm, _)| state.vms.get(&vm));
        for vm in state.permits_on(*id).map(|(_, vm, _)| vm).chain(coming) {
            let spec = vm.granted_spec.as_ref().unwrap_or(&vm.spec);
            usage.vcpus += spec.vcpus;
            usage.memory_mib += spec.memory_mib;
            usage.vms += 1;
        }
        if usage != host.usage {
            let what = format!("host {} books {:?}, its permits take {usage:?}", host.name, host.usage);
            found.push(violation("R3", what));
        }
    }
}

/// S2: a volume has one writer, unless it is shareable.
fn check_volumes(state: &State, found: &mut Vec<Violation>) {
    let held: Vec<_> = state.vms.iter().filter_map(|(id, vm)| Some((id, state.held_spec(id, vm)?))).collect();
    for (index, (vm, spec)) in held.iter().enumerate() {
        for (other, other_spec) in &held[..index] {
            let others = || other_spec.disks.iter().flat_map(Disk::volumes);
            if spec.disks.iter().flat_map(Disk::volumes).any(|volume| others().any(|held| held.clashes(&volume))) {
                found.push(violation("S2", format!("vms {vm} and {other} may both write one volume")));
            }
        }
    }
}

/// Everything that must hold between a state and the next.
pub fn check_step(before: &State, after: &State) -> Vec<Violation> {
    let mut found = Vec::new();
    for (id, vm) in after.vms.iter() {
        let known = before.vms.get(id);
        let old = known.and_then(|vm| vm.permit);
        check_news_of_a_guest(*id, known, vm, &mut found);
        let Some(new) = vm.permit.filter(|new| old.is_none_or(|old| old.epoch != new.epoch)) else { continue };
        let left = before.moving(*id).filter(|moving| Some(moving.epoch) == old.map(|old| old.epoch));
        let handed_over = left.is_some_and(|moving| moving.to == new.host && moving.to_boot == new.boot);
        check_new_permit(*id, old.map(|old| old.epoch), new.epoch, handed_over, &mut found);
        if !handed_over {
            check_fit(after, *id, new.host, &mut found);
        }
    }
    for (vm, moving) in after.all_moving().filter(|(vm, moving)| before.moving(*vm).map(|it| it.id) != Some(moving.id))
    {
        check_fit(after, vm, moving.to, &mut found);
    }
    for (id, data_center) in after.data_centers.iter() {
        let old = before.data_centers.get(id).and_then(|dc| dc.spm);
        if let (Some(old), Some(new)) = (old, data_center.spm)
            && old != new
        {
            found.push(violation("S1", format!("data center {id} changed its storage manager without a release")));
        }
    }
    found
}

/// R2: what is heard of a guest is about the epoch that holds the permit; late words of older epochs change nothing (hazard
/// H16).
fn check_news_of_a_guest(vm: VmId, before: Option<&Vm>, after: &Vm, found: &mut Vec<Violation>) {
    let permit = before.and_then(|vm| vm.permit).map(|permit| permit.epoch);
    let exit = after.last_exit.as_ref().filter(|exit| before.and_then(|vm| vm.last_exit.as_ref()) != Some(exit));
    let seen = after.observed.filter(|seen| before.and_then(|vm| vm.observed) != Some(*seen));
    for epoch in exit.map(|exit| exit.epoch).into_iter().chain(seen.map(|seen| seen.epoch)) {
        if permit != Some(epoch) {
            let holder = permit.map_or("none".to_owned(), |epoch| epoch.to_string());
            found.push(violation(
                "R2",
                format!("news of epoch {epoch} of vm {vm} was believed, its permit is {holder}"),
            ));
        }
    }
}

/// R2: a next permit exists only after the last was released or handed over by a migration, and epochs rise.
fn check_new_permit(vm: VmId, old: Option<Epoch>, new: Epoch, handed_over: bool, found: &mut Vec<Violation>) {
    if let Some(old) = old {
        if !handed_over {
            found.push(violation("R2", format!("vm {vm} got epoch {new} while epoch {old} was not released")));
        }
        if old > new {
            found.push(violation("R2", format!("vm {vm} fell from epoch {old} to {new}")));
        }
    }
}

/// R3: when it was given a place, the guest fitted.
fn check_fit(after: &State, vm: VmId, host: HostId, found: &mut Vec<Violation>) {
    let Some(known) = after.vms.get(&vm) else { return };
    let placed = after.hosts.get(&host).zip(after.clusters.get(&known.cluster));
    let within = placed.is_some_and(|(host, cluster)| scheduler::within_limits(host, &cluster.scheduling));
    if !within {
        found.push(violation("R3", format!("vm {vm} was placed on host {host} beyond its capacity")));
    }
}
