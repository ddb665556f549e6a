//! The files of disks that a guest's process may not open by itself: it let go of them when its lease ended, or never had them because the
//! guest comes from elsewhere. When it may have them it says which it wants.
//!
//! It gets them under the permit that applied state has for it here, and while a grant that names it lets it run.

use statemachine::ids::Epoch;
use statemachine::ids::Seq;
use statemachine::ids::VmId;

use super::Action;
use super::View;
use super::guest::Guest;

/// `epoch` is that of the permit: the process of a guest from elsewhere goes by its migration until it runs.
pub(super) fn hand_over(view: &View<'_>, vm: VmId, epoch: Epoch, guest: &Guest, actions: &mut Vec<Action>) {
    if view.allows(epoch).is_none() {
        return;
    }
    let due = |disk: &str| guest.file_tries.get(disk).is_none_or(|tries| tries.is_due(Seq::ZERO, view.now));
    for disk in guest.files_wanted.iter().filter(|disk| !guest.handing.contains(*disk) && due(disk)) {
        actions.push(Action::HandFiles { vm, epoch, disk: disk.clone() });
    }
}
