//! Guests that fall asleep on this host, sleep here, or wake up (`docs/protocol/suspend.md`).
//!
//! - **Suspend** needs the guest of the epoch that the suspension names. From then on it is not let go before the log says so.
//! - **Wake** needs what a start needs: the applied permit of this host and boot, a grant that names it, an epoch that was never marked. What
//!   it starts takes the guest in from its file, and runs nothing.
//! - **Run** needs the same permit, and a grant that names it still.
//! - **A file is discarded** when applied state, caught up with a grant, does not know it any more.

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::Seq;
use statemachine::ids::VmId;
use statemachine::state::ExitReason;
use statemachine::state::Permit;
use statemachine::state::Suspension;
use statemachine::state::SuspensionPhase;

use super::Action;
use super::News;
use super::View;
use super::end_at_once;
use super::files;
use super::guest::Ended;
use super::guest::Feeding;
use super::guest::Guest;
use super::guest::Order;
use super::guest::Phase;

/// A guest of this host under its permit: true while it falls asleep, and is not to be let go.
pub(super) fn fall_asleep(view: &View<'_>, vm: VmId, guest: &Guest, actions: &mut Vec<Action>) -> bool {
    let epoch = guest.epoch;
    let saving = SuspensionPhase::Saving { epoch };
    let Some(suspension) = view.fold.state.suspensions.get(&vm).filter(|it| it.phase == saving) else { return false };
    let id = suspension.id;
    let report = |news| Action::Report { vm, epoch, news };
    match guest.outgoing.as_ref().filter(|outgoing| outgoing.migration == id) {
        None if matches!(guest.phase, Phase::Alive { .. }) => {
            actions.push(Action::Suspend { vm, epoch, suspension: id });
        }
        None => {}
        Some(outgoing) => match (&outgoing.failure, outgoing.saved_bytes) {
            (Some(words), _) => actions.push(report(News::SuspensionFailed(id, words.clone()))),
            (None, Some(bytes)) => actions.push(report(News::Suspended(id, bytes))),
            (None, None) => {}
        },
    }
    true
}

/// The suspension from which the guest of a permit goes on.
pub(super) fn waking(view: &View<'_>, vm: VmId, permit: Permit) -> Option<MigrationId> {
    let suspension = view.fold.state.suspensions.get(&vm)?;
    (waking_epoch(suspension)? == permit.epoch).then_some(suspension.id)
}

fn waking_epoch(suspension: &Suspension) -> Option<Epoch> {
    match suspension.phase {
        SuspensionPhase::Waking { epoch, .. } => Some(epoch),
        SuspensionPhase::Saving { .. } | SuspensionPhase::Asleep(_) => None,
    }
}

/// A process that takes in a guest from its file. True when there is nothing more to say of it.
pub(super) fn take_in(view: &View<'_>, vm: VmId, guest: &Guest, id: MigrationId, actions: &mut Vec<Action>) -> bool {
    let suspension = view.fold.state.suspensions.get(&vm).filter(|it| it.id == id && it.host == view.host);
    let Some(epoch) = suspension.and_then(waking_epoch) else { return false };
    let permit = view.fold.state.vms.get(&vm).and_then(|known| known.permit);
    if !permit.is_some_and(|permit| permit.epoch == epoch && permit.host == view.host && permit.boot == view.boot) {
        return false;
    }
    let order = |order| Action::Order { vm, epoch: guest.epoch, order, desired_at: Seq::from(epoch) };
    match (&guest.phase, &guest.feeding) {
        (Phase::Gone(ended), feeding) => {
            let end = |reason, words: &str| Ended { reason, detail: words.to_owned() };
            let ended = match (view.marked.contains(&(vm, epoch)), feeding) {
                // It ran, whatever is told of a process that took a guest in: from here on the file is a past.
                (true, _) if ended.reason == ExitReason::StartFailed => end(ExitReason::Lost, &ended.detail),
                (true, _) => ended.clone(),
                (false, Some(Feeding::Failed(words))) => end(ExitReason::StartFailed, words),
                (false, _) => end(ExitReason::StartFailed, &ended.detail),
            };
            actions.push(Action::Report { vm, epoch, news: News::Exited(ended) });
        }
        (Phase::Incoming { loaded: true }, _) => {
            if let Some(grant) = view.allows(epoch).filter(|_| guest.may_be_nudged(view.now)) {
                actions.push(order(Order::Run { epoch, deadline: grant.deadline }));
            }
            files::hand_over(view, vm, epoch, guest, actions);
        }
        (Phase::Incoming { loaded: false }, None) => actions.push(Action::Feed { vm, suspension: id }),
        (_, Some(Feeding::Failed(_))) => actions.extend(end_at_once(view, guest.stopping).map(order)),
        (Phase::Incoming { loaded: false } | Phase::Launching | Phase::Alive { .. }, _) => {}
    }
    true
}

/// Files of guests that do not sleep here any more.
pub(super) fn discard(view: &View<'_>, actions: &mut Vec<Action>) {
    let caught_up = view.grant.is_some_and(|grant| view.fold.head.seq >= grant.applied);
    let known = |vm: &VmId, id: MigrationId| {
        let suspension = view.fold.state.suspensions.get(vm);
        suspension.is_some_and(|it| it.id == id && it.host == view.host) || view.fold.head.seq < Seq::from(id)
    };
    let unknown = view.asleep.iter().filter(|(vm, id)| caught_up && !known(vm, *id));
    actions.extend(unknown.map(|(vm, suspension)| Action::Discard { vm: *vm, suspension: *suspension }));
}
