//! Migrations, as a host sees them that a guest leaves or comes to (DESIGN §5; `docs/protocol/migration.md`).
//!
//! - **Receive** needs an applied `MigrationStarted` that names this host in this boot. What it starts runs nothing.
//! - **Run** needs the applied commit of that very migration, and a grant that names the new epoch (R4).
//! - **Carry** needs the guest of the epoch that the migration names.
//! - **Go on** needs applied state that has reached the migration and shows neither it nor another permit: it was aborted. A state
//!   from before the migration, as a restarted hostd begins with, shows the same, so the id is compared with the head.

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::Seq;
use statemachine::ids::VmId;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use statemachine::state::Migration;
use statemachine::state::MigrationPhase;
use statemachine::state::Vm;

use super::Action;
use super::News;
use super::View;
use super::files;
use super::guest::Guest;
use super::guest::Order;
use super::guest::Outgoing;
use super::guest::Phase;
use super::sleeping;

/// Guests that are on their way here, and for which nothing was begun.
pub(super) fn receive(view: &View<'_>, actions: &mut Vec<Action>) {
    let caught_up = view.grant.is_some_and(|grant| view.fold.head.seq >= grant.applied);
    for (vm, moving) in view.fold.state.all_moving().filter(|(_, moving)| comes_here(view, moving)) {
        if caught_up && !view.guests.contains_key(&vm) {
            actions.push(Action::Receive { vm, migration: moving.id });
        }
    }
}

fn comes_here(view: &View<'_>, migration: &Migration) -> bool {
    migration.to == view.host && migration.to_boot == view.boot
}

/// A process that takes in a guest. True when there is nothing more to say of it.
pub(super) fn take_in(view: &View<'_>, vm: VmId, guest: &Guest, id: MigrationId, actions: &mut Vec<Action>) -> bool {
    let known = view.fold.state.migrations.get(&vm);
    let Some(migration) = known.filter(|known| known.id == id && comes_here(view, known)) else {
        return sleeping::take_in(view, vm, guest, id, actions);
    };
    let report = |news| Action::Report { vm, epoch: guest.epoch, news };
    match (&guest.phase, migration.phase) {
        (Phase::Gone(ended), MigrationPhase::Moving) => {
            actions.push(report(News::MigrationFailed(id, ended.detail.clone())));
            true
        }
        // The permit stays: what is left is forgotten, and the guest starts from its disks.
        (Phase::Gone(_), MigrationPhase::Committed { .. }) => false,
        (Phase::Incoming { loaded: true }, MigrationPhase::Moving) => {
            if mutant::is_on(Mutant::RunBeforeCommit) {
                let order = Order::Run { epoch: guest.epoch, deadline: view.now.plus_ms(12_000) };
                actions.push(Action::Order { vm, epoch: guest.epoch, order, desired_at: Seq::from(id) });
            }
            actions.push(report(News::MigrationLoaded(id)));
            true
        }
        (Phase::Incoming { loaded: true }, MigrationPhase::Committed { epoch }) => {
            if let Some(grant) = view.allows(epoch).filter(|_| guest.may_be_nudged(view.now)) {
                let order = Order::Run { epoch, deadline: grant.deadline };
                actions.push(Action::Order { vm, epoch: guest.epoch, order, desired_at: Seq::from(epoch) });
            }
            files::hand_over(view, vm, epoch, guest, actions);
            true
        }
        // It is committed only after this host said that it holds everything; a process that does not know is another.
        (Phase::Incoming { loaded: false }, MigrationPhase::Committed { .. }) => false,
        (Phase::Incoming { loaded: false } | Phase::Launching | Phase::Alive { .. }, _) => true,
    }
}

/// A guest of this host under its permit: whether it is to leave, or to go on after it was not let go.
pub(super) fn leave(view: &View<'_>, vm: VmId, known: &Vm, guest: &Guest, actions: &mut Vec<Action>) {
    if sleeping::fall_asleep(view, vm, guest, actions) {
        return;
    }
    let (epoch, desired_at) = (guest.epoch, known.desired_at);
    let report = |news| Action::Report { vm, epoch, news };
    let moving = view.fold.state.moving(vm).filter(|moving| moving.from == view.host && moving.epoch == epoch);
    if mutant::is_on(Mutant::GoOnWithoutAbort) {
        actions.extend(go_on(view, epoch, guest).map(|order| Action::Order { vm, epoch, order, desired_at }));
    }
    let Some(moving) = moving else {
        actions.extend(go_on(view, epoch, guest).map(|order| Action::Order { vm, epoch, order, desired_at }));
        return;
    };
    match guest.outgoing.as_ref().filter(|outgoing| outgoing.migration == moving.id) {
        None => actions.push(Action::Carry { vm, epoch, migration: moving.id, to: moving.to }),
        Some(Outgoing { failure: Some(words), .. }) => {
            actions.push(report(News::MigrationFailed(moving.id, words.clone())));
        }
        Some(Outgoing { progress: Some(progress), .. }) if moving.progress != Some(*progress) => {
            actions.push(report(News::MigrationProgress(moving.id, *progress)));
        }
        Some(_) => {}
    }
}

fn go_on(view: &View<'_>, epoch: Epoch, guest: &Guest) -> Option<Order> {
    let stands = guest.stands_for.filter(|migration| view.fold.head.seq >= Seq::from(*migration))?;
    view.allows(epoch).filter(|_| guest.may_be_nudged(view.now)).map(|_| Order::GoOn { migration: stands })
}
