//! Virtual machines: definition, desire, permits, and what their hosts saw.

use std::sync::Arc;

use super::Context;
use super::Decided;
use super::devices;
use super::form;
use super::host;
use super::migration;
use super::suspension;
use crate::command::ReportId;
use crate::command::VmChange;
use crate::event::Event;
use crate::event::ReleaseEvidence;
use crate::event::VmDefined;
use crate::event::VmDeleted;
use crate::event::VmDesiredChanged;
use crate::event::VmDesiredPause;
use crate::event::VmDesiredReset;
use crate::event::VmObservedDiskFault;
use crate::event::VmObservedExit;
use crate::event::VmObservedGuest;
use crate::event::VmObservedStatus;
use crate::event::VmPermitGranted;
use crate::event::VmPermitReleased;
use crate::event::VmPlaced;
use crate::event::VmRenamed;
use crate::event::VmRunStrategyChanged;
use crate::event::VmSpecChanged;
use crate::ids::ClusterId;
use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::Seq;
use crate::ids::SiteId;
use crate::ids::VmId;
use crate::mutant;
use crate::mutant::Mutant;
use crate::rejection::Noun;
use crate::rejection::Rejection;
use crate::scheduler;
use crate::state::AbortReason;
use crate::state::Created;
use crate::state::Desired;
use crate::state::Disk;
use crate::state::DiskFault;
use crate::state::ExitReason;
use crate::state::GuestFacts;
use crate::state::GuestStatus;
use crate::state::Nic;
use crate::state::RunStrategy;
use crate::state::StopMode;
use crate::state::Vm;
use crate::state::VmSpec;

/// Definitions in a site (DESIGN §14).
const VMS_MAX: usize = 20_000;

pub(super) fn find<'a>(context: &Context<'a>, vm: VmId) -> Result<&'a Vm, Rejection> {
    context.state.vms.get(&vm).ok_or_else(|| Rejection::NotFound { noun: Noun::Vm, name: vm.to_string() })
}

pub(super) fn wrong_state(vm: &Vm, why: impl Into<String>) -> Rejection {
    Rejection::VmState { name: vm.name.clone(), why: why.into() }
}

pub(super) fn define(
    context: &Context<'_>,
    name: &str,
    cluster: Option<ClusterId>,
    spec: &VmSpec,
    run_strategy: RunStrategy,
) -> Result<Decided, Rejection> {
    form::name("vm name", name)?;
    form::vm_spec(spec)?;
    if context.state.vm_by_name(name).is_some() {
        return Err(Rejection::NameTaken { noun: Noun::Vm, name: name.to_owned() });
    }
    if context.state.vms.len() >= VMS_MAX {
        return Err(form::invalid("vm", format!("a site holds at most {VMS_MAX} VMs")));
    }
    let default = || context.state.clusters.iter().next().map(|(id, _)| *id);
    let cluster = cluster.or_else(default).ok_or(Rejection::NotInitialised)?;
    if !context.state.clusters.contains(&cluster) {
        return Err(Rejection::NotFound { noun: Noun::Cluster, name: cluster.to_string() });
    }
    let site = context.state.site.as_ref().map_or_else(SiteId::default, |site| site.id);
    let vm = VmId::derive(site, context.seq);
    check_macs(context, vm, spec)?;
    let defined = VmDefined { vm, name: name.to_owned(), cluster, spec: Arc::new(spec.clone()), run_strategy };
    Ok(Decided::one(defined).creating(Created::Vm(vm)))
}

pub(super) fn change(context: &Context<'_>, vm: VmId, change: &VmChange) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    let mut events: Vec<Event> = Vec::new();
    if let Some(name) = change.name.as_ref().filter(|name| **name != known.name) {
        form::name("vm name", name)?;
        if context.state.vm_by_name(name).is_some() {
            return Err(Rejection::NameTaken { noun: Noun::Vm, name: name.clone() });
        }
        events.push(VmRenamed { vm, name: name.clone() }.into());
    }
    if let Some(id) = change.spec.unplug.iter().find(|id| !known.spec.has_device(id)) {
        return Err(form::invalid("unplug", format!("{} has no disk or network card {id}", known.name)));
    }
    let mut spec = change.spec.over(&known.spec);
    if spec != *known.spec {
        form::vm_spec(&spec)?;
        check_macs(context, vm, &spec)?;
        let desired = devices::follow(context, vm, known, &mut spec)?;
        events.push(VmSpecChanged { vm, spec: Arc::new(spec) }.into());
        events.extend(desired);
    }
    if let Some(run_strategy) = change.run_strategy.filter(|strategy| *strategy != known.run_strategy) {
        events.push(VmRunStrategyChanged { vm, run_strategy }.into());
        let desired = match run_strategy {
            RunStrategy::Always => Some(Desired::Running),
            RunStrategy::Halted => Some(Desired::Stopped(StopMode::Shutdown)),
            RunStrategy::Manual => None,
        };
        if let Some(desired) = desired.filter(|desired| is_news(known, *desired)) {
            if matches!(desired, Desired::Stopped(_)) {
                events.extend(migration::abort(context.state, vm, AbortReason::Cancelled));
                events.extend(suspension::abort(context.state, vm, AbortReason::Cancelled));
            }
            events.push(VmDesiredChanged { vm, desired }.into());
        }
    }
    Ok(Decided::many(events))
}

/// Two cards of one address on a network take each other's frames, so a site has every address once.
fn check_macs(context: &Context<'_>, vm: VmId, spec: &VmSpec) -> Result<(), Rejection> {
    for (index, nic) in spec.nics.iter().enumerate() {
        let mac = nic.mac_of(vm);
        let same = |other: &&Nic, of: VmId| other.mac_of(of) == mac;
        if spec.nics[..index].iter().any(|other| same(&other, vm)) {
            return Err(form::invalid("nic mac", format!("{mac} is listed twice")));
        }
        for (id, other) in context.state.vms.iter().filter(|(id, _)| **id != vm) {
            // What it runs or sleeps with keeps its address until it stops.
            let held = context.state.held_spec(id, other).into_iter().flat_map(|spec| &spec.nics);
            if other.spec.nics.iter().chain(held).any(|nic| same(&nic, *id)) {
                return Err(Rejection::MacInUse { mac: mac.to_string(), holder: other.name.clone() });
            }
        }
    }
    Ok(())
}

/// Asking for what is wanted already changes nothing, and a pulled plug is not put back by the button.
fn is_news(vm: &Vm, desired: Desired) -> bool {
    let settled = match (vm.desired, desired) {
        (Desired::Running, Desired::Running) => true,
        (Desired::Stopped(_), Desired::Stopped(StopMode::Shutdown)) => true,
        (before, now) => before == now,
    };
    !settled
}

pub(super) fn delete(context: &Context<'_>, vm: VmId) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if known.permit.is_some() {
        let why = format!("it runs, or may run; stop it first: `quorate vm stop {}`", known.name);
        return Err(wrong_state(known, why));
    }
    Ok(Decided::one(VmDeleted { vm }))
}

/// Starting a VM that never runs makes it one that always does, as `virtctl start` does for KubeVirt.
pub(super) fn start(context: &Context<'_>, vm: VmId, pinned: Option<HostId>) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if let Some(host) = pinned {
        host::find(context, host)?;
    }
    let mut events: Vec<Event> = Vec::new();
    if known.run_strategy == RunStrategy::Halted {
        events.push(VmRunStrategyChanged { vm, run_strategy: RunStrategy::Always }.into());
    }
    match (known.permit, known.desired) {
        (Some(_), Desired::Running) => return Ok(Decided::nothing()),
        (Some(_), Desired::Stopped(_)) => {
            return Err(wrong_state(known, "it is powering down; start it when it is down"));
        }
        (None, Desired::Stopped(_)) => events.push(VmDesiredChanged { vm, desired: Desired::Running }.into()),
        (None, Desired::Running) => {}
    }
    events.extend(permit(context, vm, known, pinned)?);
    Ok(Decided::many(events))
}

pub(super) fn place(context: &Context<'_>, vm: VmId) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if known.permit.is_some() || known.desired != Desired::Running {
        return Ok(Decided::nothing());
    }
    permit(context, vm, known, None).map(Decided::many)
}

/// Chooses a host and grants the permit, in one batch: the choice holds on exactly the state it was made on.
fn permit(context: &Context<'_>, vm: VmId, known: &Vm, pinned: Option<HostId>) -> Result<Vec<Event>, Rejection> {
    let (mut known, mut pinned) = (known.clone(), pinned);
    if let Some((suspension, saved)) = context.state.suspensions.get(&vm).and_then(|it| Some((it, it.asleep()?))) {
        let home = host::find(context, suspension.host)?;
        if pinned.is_some_and(|host| host != suspension.host) {
            return Err(wrong_state(&known, format!("it is suspended on {}, and wakes up there alone", home.name)));
        }
        pinned = Some(suspension.host);
        known.granted_spec = Some(saved.spec.clone());
    }
    let spec = known.granted_spec.as_ref().unwrap_or(&known.spec);
    check_disks(context, vm, &known.name, &spec.disks)?;
    let decided_on = Seq(context.seq.0 - 1);
    let explanation = scheduler::place(context.state, &known, pinned, decided_on).map_err(|explanation| {
        Rejection::NoHostFits { name: known.name.clone(), explanation: Box::new(explanation) }
    })?;
    let Some((host, boot)) = explanation.chosen.and_then(|id| Some((id, context.state.hosts.get(&id)?.facts.boot)))
    else {
        return Err(Rejection::NoHostFits { name: known.name.clone(), explanation: Box::new(explanation) });
    };
    let release = known.spec.release_class();
    Ok(vec![
        VmPlaced { vm, explanation: Arc::new(explanation) }.into(),
        VmPermitGranted { vm, host, boot, release }.into(),
    ])
}

/// Refuses what would give a volume a second writer (S2).
pub(super) fn check_disks(context: &Context<'_>, vm: VmId, name: &str, disks: &[Disk]) -> Result<(), Rejection> {
    for (other_id, other) in context.state.vms.iter() {
        let Some(held) = context.state.held_spec(other_id, other).filter(|_| *other_id != vm) else { continue };
        for volume in disks.iter().flat_map(Disk::volumes) {
            if held.disks.iter().flat_map(Disk::volumes).any(|held| held.clashes(&volume)) {
                return Err(Rejection::DiskInUse {
                    name: name.to_owned(),
                    path: volume.path.to_owned(),
                    holder: other.name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// Stopping a VM that always runs makes it one that never does, as `virtctl stop` does for KubeVirt.
pub(super) fn stop(context: &Context<'_>, vm: VmId, mode: StopMode) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    let mut events: Vec<Event> = Vec::new();
    events.extend(suspension::stop(context, vm, known, mode)?);
    if known.run_strategy == RunStrategy::Always {
        events.push(VmRunStrategyChanged { vm, run_strategy: RunStrategy::Halted }.into());
    }
    let desired = Desired::Stopped(mode);
    let down_already = known.permit.is_none() && matches!(known.desired, Desired::Stopped(_));
    if is_news(known, desired) && !down_already {
        events.extend(migration::abort(context.state, vm, AbortReason::Cancelled));
        events.push(VmDesiredChanged { vm, desired }.into());
    }
    Ok(Decided::many(events))
}

pub(super) fn reset(context: &Context<'_>, vm: VmId) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if known.permit.is_none() || known.desired != Desired::Running {
        return Err(wrong_state(known, format!("only a running VM can be reset; `quorate vm start {}`", known.name)));
    }
    if context.state.moving(vm).is_some() {
        let why = format!("it is on its way to another host; wait, or `quorate vm cancel-migration {}`", known.name);
        return Err(wrong_state(known, why));
    }
    suspension::check_awake(context, vm, known)?;
    Ok(Decided::one(VmDesiredReset { vm }))
}

/// Going on is news to a guest that its user paused, and to one that an error of a disk holds: that is tried again at once.
pub(super) fn pause(context: &Context<'_>, vm: VmId, paused: bool) -> Result<Decided, Rejection> {
    let known = find(context, vm)?;
    if known.permit.is_none() || known.desired != Desired::Running {
        let why = format!("only a running VM can be paused or resumed; `quorate vm start {}`", known.name);
        return Err(wrong_state(known, why));
    }
    suspension::check_awake(context, vm, known)?;
    let wanted = context.state.pauses.get(&vm).is_some_and(|pause| pause.wanted);
    let held = known.observed.is_some_and(|observed| observed.status == GuestStatus::PausedIo);
    match wanted == paused && (paused || !held) {
        true => Ok(Decided::nothing()),
        false => Ok(Decided::one(VmDesiredPause { vm, paused })),
    }
}

pub(super) fn find_reported<'a>(
    context: &Context<'a>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
) -> Result<&'a Vm, Rejection> {
    host::check_report(context, report)?;
    let known = find(context, vm)?;
    match known.permit {
        Some(permit) if permit.epoch == epoch && permit.host == report.host => Ok(known),
        Some(_) if mutant::is_on(Mutant::LateReportBelieved) => Ok(known),
        _ => Err(Rejection::StaleEpoch { name: known.name.clone(), epoch }),
    }
}

pub(super) fn report_status(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
    status: GuestStatus,
) -> Result<Decided, Rejection> {
    let known = find_reported(context, report, vm, epoch)?;
    if known.observed.is_some_and(|observed| observed.epoch == epoch && observed.status == status) {
        return Ok(Decided::nothing());
    }
    Ok(Decided::one(VmObservedStatus { vm, epoch, host: report.host, counter: report.counter, status }))
}

/// A guest's own word: bounded, recorded, and the ground of no decision.
pub(super) fn report_guest(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
    facts: &Arc<GuestFacts>,
) -> Result<Decided, Rejection> {
    find_reported(context, report, vm, epoch)?;
    facts.check()?;
    if context.state.guests.get(&vm) == Some(facts) {
        return Ok(Decided::nothing());
    }
    let (host, counter) = (report.host, report.counter);
    Ok(Decided::one(VmObservedGuest { vm, epoch, host, counter, facts: facts.clone() }))
}

pub(super) fn report_disk_fault(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
    fault: Option<&DiskFault>,
) -> Result<Decided, Rejection> {
    find_reported(context, report, vm, epoch)?;
    if let Some(fault) = fault {
        form::text("disk id", &fault.disk, form::DISK_ID_MAX)?;
        form::text("disk fault", &fault.what, DiskFault::MAX_WORDS)?;
    }
    if context.state.disk_faults.get(&vm) == fault {
        return Ok(Decided::nothing());
    }
    let (host, counter) = (report.host, report.counter);
    Ok(Decided::one(VmObservedDiskFault { vm, epoch, host, counter, fault: fault.cloned() }))
}

pub(super) fn report_exited(
    context: &Context<'_>,
    report: &ReportId,
    vm: VmId,
    epoch: Epoch,
    reason: ExitReason,
    detail: &str,
) -> Result<Decided, Rejection> {
    let known = find_reported(context, report, vm, epoch)?;
    if reason == ExitReason::HostRebooted {
        return Err(form::invalid("exit reason", "a reboot is told by a new boot id, not by a guest's exit"));
    }
    form::text("detail", detail, form::DETAIL_MAX)?;
    let exit =
        VmObservedExit { vm, epoch, host: report.host, counter: report.counter, reason, detail: detail.to_owned() };
    let mut events: Vec<Event> = Vec::new();
    events.extend(migration::abort(context.state, vm, AbortReason::GuestEnded));
    events.extend(suspension::abort(context.state, vm, AbortReason::GuestEnded));
    events.push(exit.into());
    events.push(VmPermitReleased { vm, epoch, evidence: ReleaseEvidence::Host }.into());
    if known.desired == Desired::Running && !known.restarts_after(reason) {
        events.push(VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::Shutdown) }.into());
    }
    Ok(Decided::many(events))
}
