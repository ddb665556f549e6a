//! What this host has to do so that its guests equal the permits that it may act on (DESIGN §5). Pure and level-triggered:
//! the same view gives the same actions, and an action that was lost is planned again.
//!
//! The rules, each with the reason that it is here and nowhere else:
//!
//! - **Start** needs a permit of this host and this boot in applied state, a grant that allows its epoch
//!   ([`ConfirmedGrant::allows`]: R4, hazard C5), no guest of that VM in any form, and an epoch that was never marked.
//! - **Confirm** (extend or resume) needs the same grant, and goes to `lease` guests alone.
//! - **End** what is superseded: a guest whose epoch is not the permit, once applied state has reached that epoch.
//! - **An exit is reported** only of a guest that the shell found gone: lock free and control group empty. The shell marks the
//!   epoch first, so no epoch is ever started after its exit was reported.
//! - **Migrations** have rules of their own ([`moving`]), and so have **sleep** ([`sleeping`]) and **devices** that come and leave
//!   ([`devices`]).
//! - **A marked epoch without a guest** is looked into, never guessed about; and, like a permit that is not wanted, only once
//!   applied state has caught up with a grant: hostd begins with the state of its last snapshot.

mod devices;
mod files;
mod guest;
mod moving;
mod sleeping;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::Seq;
use statemachine::ids::VmId;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use statemachine::state::Desired;
use statemachine::state::DeviceWord;
use statemachine::state::DiskFault;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::MigrationProgress;
use statemachine::state::Permit;
use statemachine::state::ReleaseClass;
use statemachine::state::StopMode;
use statemachine::state::Vm;

pub use devices::Device;
pub use guest::Ended;
pub use guest::Feeding;
pub use guest::Guest;
pub use guest::Order;
pub use guest::Outgoing;
pub use guest::Phase;
pub use guest::Retry;
pub use guest::Stopping;

use crate::lease::clock::Boottime;
use crate::lease::record::ConfirmedGrant;

/// How long a guest gets at each stage of its end.
#[derive(Debug, Clone, Copy)]
pub struct StopTimers {
    /// The power button is pressed once more after this.
    pub second_press_ms: u64,
    /// A shutdown becomes a power-off after this.
    pub power_off_ms: u64,
    /// A power-off that had no effect becomes a kill of the process after this.
    pub kill_ms: u64,
}

impl Default for StopTimers {
    fn default() -> Self {
        StopTimers { second_press_ms: 10_000, power_off_ms: 60_000, kill_ms: 15_000 }
    }
}

/// What is known of a guest here and not in the log yet. The order is that in which it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    Exited(Ended),
    MigrationFailed(MigrationId, String),
    MigrationLoaded(MigrationId),
    SuspensionFailed(MigrationId, String),
    /// The bytes of its file.
    Suspended(MigrationId, u64),
    Status(GuestStatus),
    DiskFault(Option<DiskFault>),
    Device(String, DeviceWord),
    MigrationProgress(MigrationId, MigrationProgress),
    Facts(Arc<GuestFacts>),
}

/// What news are about; of each kind, one report is under way at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NewsKind {
    Exited,
    MigrationFailed,
    MigrationLoaded,
    SuspensionFailed,
    Suspended,
    Status,
    DiskFault,
    Device,
    MigrationProgress,
    Facts,
}

impl News {
    pub fn kind(&self) -> NewsKind {
        match self {
            News::Exited(_) => NewsKind::Exited,
            News::MigrationFailed(..) => NewsKind::MigrationFailed,
            News::MigrationLoaded(_) => NewsKind::MigrationLoaded,
            News::SuspensionFailed(..) => NewsKind::SuspensionFailed,
            News::Suspended(..) => NewsKind::Suspended,
            News::MigrationProgress(..) => NewsKind::MigrationProgress,
            News::Status(_) => NewsKind::Status,
            News::DiskFault(_) => NewsKind::DiskFault,
            News::Device(..) => NewsKind::Device,
            News::Facts(_) => NewsKind::Facts,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Start {
        vm: VmId,
        permit: Permit,
        deadline: Boottime,
    },
    /// Its epoch was used and no guest is known: find out what became of it.
    LookInto {
        vm: VmId,
        permit: Permit,
    },
    /// It is not wanted any more and was never started: use the epoch up and say so.
    Renounce {
        vm: VmId,
        permit: Permit,
    },
    Order {
        vm: VmId,
        epoch: Epoch,
        order: Order,
        desired_at: Seq,
    },
    Report {
        vm: VmId,
        epoch: Epoch,
        news: News,
    },
    /// A guest is on its way here: start a process that takes it in.
    Receive {
        vm: VmId,
        migration: MigrationId,
    },
    /// It is to leave: bring it to its new host.
    Carry {
        vm: VmId,
        epoch: Epoch,
        migration: MigrationId,
        to: HostId,
    },
    /// It is to fall asleep: write it down.
    Suspend {
        vm: VmId,
        epoch: Epoch,
        suspension: MigrationId,
    },
    /// A guest that sleeps here has a permit again: start a process that takes it in.
    Wake {
        vm: VmId,
        suspension: MigrationId,
    },
    /// That process waits for what is in the file.
    Feed {
        vm: VmId,
        suspension: MigrationId,
    },
    /// Nobody wakes up from this file any more.
    Discard {
        vm: VmId,
        suspension: MigrationId,
    },
    /// The guest is to get a device while it runs.
    Plug {
        vm: VmId,
        epoch: Epoch,
        device: Device,
    },
    /// Its process is to get the files of a disk.
    HandFiles {
        vm: VmId,
        epoch: Epoch,
        disk: String,
    },
    /// The guest is asked to give a device up.
    Unplug {
        vm: VmId,
        epoch: Epoch,
        device: String,
    },
    /// The log knows that this epoch is over and no process is left: clear its run directory.
    Forget {
        vm: VmId,
        epoch: Epoch,
    },
}

/// All that a plan depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub host: HostId,
    pub boot: BootId,
    pub fold: &'a Fold,
    pub grant: Option<&'a ConfirmedGrant>,
    pub guests: &'a BTreeMap<VmId, Guest>,
    /// Epochs that were, or may have been, started on this host.
    pub marked: &'a BTreeSet<(VmId, Epoch)>,
    /// Files of guests that sleep, on this host.
    pub asleep: &'a BTreeSet<(VmId, MigrationId)>,
    pub now: Boottime,
    pub stop: StopTimers,
}

impl View<'_> {
    fn allows(&self, epoch: Epoch) -> Option<&ConfirmedGrant> {
        self.grant.filter(|grant| grant.allows(epoch, self.fold.head.seq, self.now))
    }

    /// Applied state has reached the permit of this epoch, so that its absence means that it is over.
    fn has_reached(&self, epoch: Epoch) -> bool {
        self.fold.head.seq >= Seq::from(epoch)
    }
}

/// The actions that are due.
pub fn plan(view: &View<'_>) -> Vec<Action> {
    let mut actions = Vec::new();
    for (vm, guest) in view.guests {
        plan_guest(view, *vm, guest, &mut actions);
    }
    moving::receive(view, &mut actions);
    sleeping::discard(view, &mut actions);
    for (vm, known, permit) in view.fold.state.permits_on(view.host) {
        if permit.boot == view.boot && !view.guests.contains_key(&vm) {
            actions.extend(plan_permit(view, vm, known, permit));
        }
    }
    actions
}

/// A permit without a guest.
fn plan_permit(view: &View<'_>, vm: VmId, known: &Vm, permit: Permit) -> Option<Action> {
    let caught_up = view.grant.is_some_and(|grant| view.fold.head.seq >= grant.applied);
    if !caught_up && !mutant::is_on(Mutant::StartWithoutGrant) {
        return None;
    }
    if view.marked.contains(&(vm, permit.epoch)) && !mutant::is_on(Mutant::EpochStartedTwice) {
        return Some(Action::LookInto { vm, permit });
    }
    match known.desired {
        Desired::Stopped(_) => Some(Action::Renounce { vm, permit }),
        Desired::Running => {
            let grant = match mutant::is_on(Mutant::StartWithoutGrant) {
                true => view.grant?,
                false => view.allows(permit.epoch)?,
            };
            let deadline = grant.deadline;
            Some(match sleeping::waking(view, vm, permit) {
                Some(suspension) => Action::Wake { vm, suspension },
                None => Action::Start { vm, permit, deadline },
            })
        }
    }
}

fn plan_guest(view: &View<'_>, vm: VmId, guest: &Guest, actions: &mut Vec<Action>) {
    let epoch = guest.epoch;
    if guest.incoming.is_some_and(|migration| moving::take_in(view, vm, guest, migration, actions)) {
        return;
    }
    let known = view.fold.state.vms.get(&vm);
    let permitted =
        known.filter(|known| known.permit.is_some_and(|permit| permit.epoch == epoch && permit.host == view.host));
    match (&guest.phase, permitted) {
        (Phase::Gone(ended), Some(_)) => actions.push(Action::Report { vm, epoch, news: News::Exited(ended.clone()) }),
        (Phase::Gone(_), None) if view.has_reached(epoch) => actions.push(Action::Forget { vm, epoch }),
        (_, None) if view.has_reached(epoch) => {
            // Superseded. Nobody waits for its file systems: its disks may belong to another by now.
            let order = |order| Action::Order { vm, epoch, order, desired_at: view.fold.head.seq };
            actions.extend(end_at_once(view, guest.stopping).map(order));
        }
        // This host starts from an old state; what it has not read yet cannot be judged.
        (_, None) => {}
        (Phase::Launching | Phase::Incoming { .. } | Phase::Alive { .. }, Some(known)) => {
            tend(view, vm, known, guest, actions);
        }
    }
}

/// A guest that lives under its permit.
fn tend(view: &View<'_>, vm: VmId, known: &Vm, guest: &Guest, actions: &mut Vec<Action>) {
    let epoch = guest.epoch;
    let order = |order| Action::Order { vm, epoch, order, desired_at: known.desired_at };
    if guest.release == ReleaseClass::Lease {
        let newer = |grant: &&ConfirmedGrant| guest.confirmed.is_none_or(|confirmed| confirmed < grant.deadline);
        let confirm = view.allows(epoch).filter(newer).map(|grant| Order::Confirm { deadline: grant.deadline });
        actions.extend(confirm.map(order));
    }
    match known.desired {
        Desired::Running => {
            let asked = known.reset_at.filter(|at| *at > Seq::from(epoch));
            let due = asked.filter(|at| guest.reset.is_none_or(|done| done < *at));
            actions.extend(due.map(|id| order(Order::Reset { id })));
        }
        Desired::Stopped(StopMode::PowerOff) => actions.extend(end_at_once(view, guest.stopping).map(order)),
        Desired::Stopped(StopMode::Shutdown) => actions.extend(shut_down(view, known, guest).map(order)),
    }
    actions.extend(stand_or_go(view, vm, known, guest).map(order));
    devices::follow(view, vm, known, guest, actions);
    files::hand_over(view, vm, epoch, guest, actions);
    moving::leave(view, vm, known, guest, actions);
    let status = match guest.phase {
        Phase::Alive { status, .. } => status,
        Phase::Launching | Phase::Incoming { .. } | Phase::Gone(_) => GuestStatus::PoweringUp,
    };
    let seen = known.observed.filter(|observed| observed.epoch == epoch).map(|observed| observed.status);
    let started_over = guest.phase == Phase::Launching && seen.is_some();
    let mut report = |news| actions.push(Action::Report { vm, epoch, news });
    if seen != Some(status) && !started_over {
        report(News::Status(status));
    }
    let state = &view.fold.state;
    let level = state.site.as_ref().map_or(0, |site| site.feature_level);
    if level < GuestFacts::FEATURE_LEVEL {
        return;
    }
    if state.disk_faults.get(&vm) != guest.fault.as_ref() && !started_over {
        report(News::DiskFault(guest.fault.clone()));
    }
    if let Some(facts) = guest.facts.as_ref().filter(|facts| state.guests.get(&vm) != Some(facts)) {
        report(News::Facts(facts.clone()));
    }
}

/// What its user last said of standing still. A guest that is to shut down has to run for it.
fn stand_or_go(view: &View<'_>, vm: VmId, known: &Vm, guest: &Guest) -> Option<Order> {
    let Phase::Alive { status, .. } = guest.phase else { return None };
    let said = view.fold.state.pauses.get(&vm);
    let wish = said.map_or(Seq::ZERO, |pause| pause.at);
    let stand = said.is_some_and(|pause| pause.wanted) && known.desired == Desired::Running;
    let nudge = guest.may_be_nudged(view.now);
    match status {
        GuestStatus::Up if stand && nudge => Some(Order::Pause),
        GuestStatus::PausedUser if !stand && nudge => Some(Order::Resume { wish }),
        GuestStatus::PausedIo if !stand && guest.retry.is_due(wish, view.now) => Some(Order::Resume { wish }),
        _ => None,
    }
}

fn shut_down(view: &View<'_>, known: &Vm, guest: &Guest) -> Option<Order> {
    let current = guest.stopping.filter(|stopping| stopping.desired_at == known.desired_at);
    let Some(first) = current.and_then(|stopping| stopping.first_press) else {
        return guest.stopping.and_then(|older| older.power_off).map_or(Some(Order::PowerButton), |_| {
            // It is being powered off already, by an earlier and sharper wish.
            end_at_once(view, guest.stopping)
        });
    };
    let waited_ms = view.now.ms_since(first);
    if waited_ms >= view.stop.power_off_ms {
        return end_at_once(view, current);
    }
    let presses = current.map_or(0, |stopping| stopping.presses);
    (presses < 2 && waited_ms >= view.stop.second_press_ms).then_some(Order::PowerButton)
}

fn end_at_once(view: &View<'_>, stopping: Option<Stopping>) -> Option<Order> {
    let Some(off) = stopping.and_then(|stopping| stopping.power_off) else { return Some(Order::PowerOff) };
    let last = stopping.and_then(|stopping| stopping.killed).unwrap_or(off);
    (view.now.ms_since(last) >= view.stop.kill_ms).then_some(Order::Kill)
}

#[cfg(test)]
mod tests;
